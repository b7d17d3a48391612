"""What a job's configuration consists of: one root dataclass per job, plain values only.

`schema.py` checks values against these classes, `hpcmlx.config` fills them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hpcmlx.errors import ConfigError
from hpcmlx.schema import as_written, setting

# Keys of every job that name a file or directory.
_PATH_KEYS = ["model.path", "model.adapter", "run_dir", "launch.hostfile", "launch.hosts"]
_PATH_KEYS += ["sweep.dir"]
# Keys of `launch` that are for the mpirun which a job starts itself.
OF_MPIRUN = ("interface", "bind", "yield_when_idle", "export")


@dataclass(kw_only=True)
class ModelConfig:
    """Which model, and in which number format it computes."""

    path: str = setting("model directory, .gguf file, or a hub name that was fetched before")
    dtype: str = setting(
        "compute type; auto: float32 on a CPU, the checkpoint's own on a GPU",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    weights: str = setting(
        "quantized weights; auto: dequantize on a CPU, keep on a GPU",
        "auto",
        choices=("auto", "keep", "dequantize"),
    )
    adapter: str | None = setting(
        "directory of a LoRA adapter, mlx-lm's or PEFT's; null: none", None
    )
    verify: bool = setting(
        "compare the model's files with its checksums.json, where it has one", True
    )


@dataclass(kw_only=True)
class ParallelConfig:
    """The layout of the ranks; dp x pp x tp is the number of ranks."""

    dp: int = setting("replicas of the model, each with its part of the input", 1, low=1)
    pp: int = setting("pipeline stages: the layers are dealt out", 1, low=1)
    tp: int = setting("tensor-parallel ranks: every layer is cut", 1, low=1)
    tp_shares: list[float] | None = setting(
        "weight of each tensor-parallel rank, as in [2,1]; null: by the bandwidth that is said of "
        "the hosts, else equal",
        None,
        above=0,
    )
    pp_layers: list[int] | None = setting(
        "layers of each stage, as in [17,13]; null: balanced, with the hosts' bandwidth",
        None,
        low=1,
    )


@dataclass(kw_only=True)
class InferenceConfig:
    """How the rows are batched."""

    batch_size: int = setting("rows per microbatch, at most", 32, low=1)
    num_microbatches: int | None = setting(
        "microbatches in flight; null: the number of stages, one more where stages are seen idle",
        None,
        low=1,
    )
    prefill_chunk: int = setting("prompt tokens that go through a stage at once", 512, low=1)
    kv_memory: str | None = setting(
        "memory for KV caches on each rank, as in 4GiB; null: most of what is free", None
    )
    kv_bits: int | None = setting(
        "8: keep KV caches in 8 bits; null: as computed", None, choices=(8,)
    )
    prefix_cache: bool = setting("compute what prompts begin with in common only once", True)


@dataclass(kw_only=True)
class SamplingConfig:
    """How a token is chosen."""

    temperature: float = setting("0: the most likely token, always", 0.0, low=0)
    top_p: float = setting(
        "keep the most likely tokens up to this probability", 1.0, above=0, high=1
    )
    top_k: int = setting("keep this many tokens; 0: all", 0, low=0)
    min_p: float = setting(
        "keep tokens with at least this share of the top probability", 0.0, low=0, high=1
    )
    seed: int = setting("the draws of a row depend on this and on its id only", 0, low=0)
    max_tokens: int = setting("new tokens of a row, at most", 256, low=1)
    stop: list[str] = setting("strings that end a row", [])
    repetition_penalty: float = setting(
        "above 1: less of the tokens of the prompt and the answer", 1.0, above=0
    )
    frequency_penalty: float = setting(
        "taken off a token's logit for each time the answer has it", 0.0, low=-2, high=2
    )
    presence_penalty: float = setting(
        "taken off a token's logit where the answer has it", 0.0, low=-2, high=2
    )
    logprobs: int | None = setting(
        "report the log-probability of every token and of so many likeliest; null: none",
        None,
        low=0,
        high=20,
    )
    n: int = setting("answers to each prompt", 1, low=1)


@dataclass(kw_only=True)
class DataConfig:
    """What the input file is and where its columns are."""

    format: str = setting(
        "auto: by the file's name, and for JSONL by its rows",
        "auto",
        choices=("auto", "jsonl", "openai", "csv", "parquet", "hdf5"),
    )
    prompt_column: str = setting("CSV, Parquet, HDF5: column with the prompts", "prompt")
    messages_column: str = setting(
        "likewise: column with conversations, as JSON text or nested", "messages"
    )
    id_column: str = setting("likewise: column with the ids; need not be there", "id")


@dataclass(kw_only=True)
class ScoringConfig:
    """What is evaluated, and how."""

    kind: str = setting(
        "text: perplexity of a file; choices: multiple choice; harness: tasks of lm-eval",
        "text",
        choices=("text", "choices", "harness"),
    )
    window: int = setting("text: tokens the model sees at once", 512, low=2)
    stride: int = setting(
        "text: tokens from one window to the next; at most the window. Windows overlap by the "
        "rest, and each token counts once",
        256,
        low=1,
    )
    max_tokens: int | None = setting("text: score only this many tokens of the file", None, low=2)
    tasks: list[str] = setting("harness: names of tasks or groups, * allowed, as in [arc_easy]", [])
    task_path: str | None = setting(
        "harness: directory of task files; what they call (!function) is executed", None
    )
    num_fewshot: int | None = setting(
        "harness: examples before each question; null: as the task says", None, low=0
    )
    limit: int | None = setting("harness: only so many questions of a task", None, low=1)
    chat_template: bool = setting("harness: put questions as messages of a chat", False)


@dataclass(kw_only=True)
class SlurmConfig:
    """launch=slurm: what is asked of Slurm; null: what the site's default is."""

    partition: str | None = setting("one, or several with commas", None)
    account: str | None = setting("whom it is charged to", None)
    qos: str | None = setting("quality of service", None)
    nodes: int | None = setting("null: as many as the ranks need", None, low=1)
    ntasks_per_node: int | None = setting(
        "ranks of a node, at most; null: one, or what `nodes` makes of them", None, low=1
    )
    cpus_per_task: int | None = setting("CPUs of a rank", None, low=1)
    mem: str | None = setting("memory of a node, as in 64G", None)
    time: str | None = setting("limit, as in 02:00:00 or 2-12:00:00", None)
    signal_seconds: int = setting(
        "before the limit the job is told to save and to end; Slurm may be 30 s early", 120,
        low=10, high=65535,
    )  # fmt: skip
    max_requeues: int = setting(
        "times a job that can go on is put back into the queue, at most; never where nothing new "
        "was saved",
        20,
        low=0,
    )
    dependency: str | None = setting("jobs to wait for, as in afterok:123", None)
    extra: list[str] = setting("further options of sbatch, as in ['--gres=gpu:1']", [])
    follow: bool = setting("wait for the job and show its log; false: only submit it", True)


@dataclass(kw_only=True)
class LaunchConfig:
    """Whether the job starts its own mpirun."""

    kind: str = setting(
        "none: this process is a rank; mpirun: start one; slurm: submit a job that does",
        "none",
        choices=("none", "mpirun", "slurm"),
    )
    hostfile: str | None = setting(
        "Open MPI hostfile; null: this host, or Slurm's allocation", None
    )
    hosts: str | None = setting(
        "YAML file that says what the hosts are; null: HOSTFILE.yaml, if there is one", None
    )
    num_ranks: int | None = setting("null: dp x pp x tp, the only number that fits", None, low=1)
    interface: str | None = setting(
        "mpirun: what MPI uses between hosts, as in 10.0.1.0/24 or bridge0; null: what is said of "
        "the hosts, else mpirun's choice",
        None,
    )
    bind: str | None = setting(
        "mpirun: what each rank is bound to; null: mpirun's choice, none where ranks share cores",
        None,
        choices=("none", "core", "l3cache", "numa", "package"),
    )
    yield_when_idle: bool | None = setting(
        "mpirun: waiting ranks leave their core to others; null: where ranks are known to share "
        "cores. true for hosts that share a machine without knowing it",
        None,
    )
    export: list[str] = setting(
        "mpirun: further environment variables that every rank gets, as in [HF_TOKEN]", []
    )
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass(kw_only=True)
class CommConfig:
    """What messages travel over."""

    tensor: str = setting(
        "of tensor-parallel ranks; jaccl: RDMA over Thunderbolt 5; auto: where it can be had",
        "auto",
        choices=("auto", "mpi", "jaccl"),
    )


@dataclass(kw_only=True)
class SweepConfig:
    """-m: several points, each a job of its own."""

    dir: str | None = setting(
        "directory of the sweep; one that is there is gone on with; null: a new one under sweeps/",
        None,
    )
    max_parallel: int | None = setting(
        "points at once, at most; null: what fits the hosts; for a search 1", None, low=1
    )
    metric: str | None = setting(
        "number of summary.json that is shown and searched for, as in this_launch.tokens_per_sec; "
        "null: the job's own",
        None,
    )
    direction: str | None = setting(
        "hydra/sweeper=optuna: which metric is better; null: as the job's own metric is",
        None,
        choices=("minimize", "maximize"),
    )
    trials: int = setting("hydra/sweeper=optuna: points that are to be completed", 20, low=1)
    seed: int = setting("hydra/sweeper=optuna: of the search", 0, low=0)


@dataclass(kw_only=True)
class WatchdogConfig:
    """What ends a job that hangs."""

    timeout: float | None = setting(
        "seconds without progress of any rank, or word of one, that end the job; null: never",
        300.0,
        low=1,
    )


@dataclass(kw_only=True)
class JobConfig:
    """What every job has."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    run_dir: str | None = setting("directory of the results; null: a new one under runs/", None)
    #: Whether a job goes on with what an earlier launch has left in its run directory.
    RESUMABLE: ClassVar[bool] = False
    #: Key -> text, for the values that were written as interpolations. Not a key of the user's.
    unresolved: dict[str, str] = field(default_factory=dict)

    #: Further keys that name a file or directory.
    PATH_KEYS: ClassVar[tuple[str, ...]] = ()

    @property
    def metric(self) -> tuple[str, str]:
        """What a run is judged by: (number of its summary.json, "minimize" or "maximize")."""
        return "seconds", "minimize"

    @property
    def directory(self) -> str | None:
        """The run directory that was asked for, to begin in or to go on with."""
        return getattr(self, "resume", None) or self.run_dir

    def load_options(self) -> dict[str, Any]:
        """The keyword arguments of `load_model`."""
        return {
            "dtype": self.model.dtype,
            "weights": self.model.weights,
            "adapter": self.model.adapter,
            "tp_shares": self.parallel.tp_shares,
            "pp_layers": self.parallel.pp_layers,
        }

    def check(self) -> None:
        """Refuse values that are right one by one but do not fit each other.

        Raises:
            ConfigError: naming the key.
        """
        parallel, launch = self.parallel, self.launch
        for name, axis in (("tp_shares", "tp"), ("pp_layers", "pp")):
            parts = getattr(parallel, name)
            count = getattr(parallel, axis) * (self.num_chunks if axis == "pp" else 1)
            if parts is not None and len(parts) != count:
                raise ConfigError(
                    f"parallel.{name} has {len(parts)} entries but parallel.{axis}={count}: "
                    "give one entry per rank of that axis"
                )
        world = parallel.dp * parallel.pp * parallel.tp
        if launch.num_ranks not in (None, world):
            raise ConfigError(
                f"launch.num_ranks={launch.num_ranks} but the layout "
                f"dp{parallel.dp}_pp{parallel.pp}_tp{parallel.tp} is for {world}: leave it null"
            )
        if launch.kind == "slurm" and launch.hostfile is not None:
            raise ConfigError(
                "launch.hostfile is set, but with launch=slurm it is Slurm that has the hosts"
            )
        given = [name for name in OF_MPIRUN if getattr(launch, name) not in (None, [])]
        if launch.kind == "none" and given:
            raise ConfigError(
                f"launch.{given[0]} is for launch=mpirun and launch=slurm; an mpirun of your own "
                "takes options instead"
            )
        if getattr(self, "resume", None) is not None and self.run_dir is not None:
            raise ConfigError("resume and run_dir both name the run directory: give one of them")
        for name in (*_PATH_KEYS, *self.PATH_KEYS):
            group, _, last = name.rpartition(".")
            self.check_path(name, getattr(getattr(self, group) if group else self, last))

    def check_path(self, name: str, path: str | None) -> None:
        """Refuse a path that is empty or has a control character."""
        if path is not None and (not path.strip() or not path.isprintable()):
            text = as_written(name, path, self.unresolved)
            raise ConfigError(f"{name}={text}: empty, or has a control character")

    @property
    def num_chunks(self) -> int:
        """Pipeline stages that each rank holds."""
        return 1


@dataclass(kw_only=True)
class GenerateConfig(JobConfig):
    """jobs/generate.py: answers to the prompts of a file."""

    input: str = setting("the file with the prompts")
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    resume: str | None = setting(
        "run directory to go on with, with its settings where none are given", None
    )
    timeline: bool = setting("draw pipeline.png: what each stage did when", False)
    RESUMABLE: ClassVar[bool] = True
    PATH_KEYS: ClassVar[tuple[str, ...]] = ("input", "resume")

    @property
    def metric(self) -> tuple[str, str]:
        return "this_launch.tokens_per_sec", "maximize"

    def check(self) -> None:
        super().check()
        if "" in self.sampling.stop:
            raise ConfigError(
                "sampling.stop has an empty string, which would end every row at once"
            )


@dataclass(kw_only=True)
class EvaluateConfig(JobConfig):
    """jobs/evaluate.py: what a text costs, which choices a model makes, how it does in tasks."""

    input: str | None = setting(
        "text: a UTF-8 file; choices: questions (JSONL); harness: none", None
    )
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    evaluate: ScoringConfig = field(default_factory=ScoringConfig)
    PATH_KEYS: ClassVar[tuple[str, ...]] = ("input", "evaluate.task_path")

    @property
    def metric(self) -> tuple[str, str]:
        choices = self.evaluate.kind == "choices"
        return ("accuracy", "maximize") if choices else ("perplexity", "minimize")

    def check(self) -> None:
        super().check()
        own = self.evaluate
        if own.kind != "harness" and self.input is None:
            what = {"text": "text", "choices": "questions"}[own.kind]
            raise ConfigError(f"input is not set; give input=… (the file with the {what})")
        if own.kind == "harness" and not own.tasks:
            raise ConfigError("evaluate.tasks is empty; give evaluate.tasks=[…] (names of tasks)")
        if own.kind == "harness" and self.input is not None:
            raise ConfigError(
                "input is set, but evaluate.kind=harness takes none; see evaluate.tasks"
            )
        if own.kind == "text" and own.stride > own.window:
            raise ConfigError(
                f"evaluate.stride={own.stride} leaves tokens out between windows of "
                f"evaluate.window={own.window}: it must be at most the window"
            )
