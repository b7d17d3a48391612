"""The configuration of jobs/finetune.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hpcmlx.errors import ConfigError
from hpcmlx.schema import setting
from hpcmlx.settings import JobConfig


@dataclass(kw_only=True)
class MethodConfig:
    """What is trained."""

    kind: str = setting(
        "lora, dora (on quantized weights that are kept: QLoRA), or full",
        "lora",
        choices=("lora", "dora", "full"),
    )
    rank: int = setting("of LoRA's factors", 8, low=1)
    scale: float = setting("what their product is multiplied by; PEFT's alpha / rank", 20.0)
    num_layers: int | None = setting("train the last so many layers; null: all", None, low=1)
    modules: list[str] = setting(
        "patterns of module paths, whole or inside a layer, as in [self_attn.*,mlp.down_proj]",
        ["*"],
    )


@dataclass(kw_only=True)
class ExamplesConfig:
    """What it is trained on."""

    train: list[str] = setting("files or directories of JSONL: text, prompt/completion, messages")
    valid: list[str] = setting("likewise, for evaluation; []: none", [])
    targets: str = setting(
        "messages: which turns are learned; assistant: every answer, last: the last one, all",
        "assistant",
        choices=("assistant", "last", "all"),
    )
    max_length: int = setting("tokens of an example or a packed row, at most", 2048, low=2)
    too_long: str = setting(
        "what happens to longer examples", "truncate", choices=("truncate", "drop", "refuse")
    )
    packing: bool = setting(
        "fill rows with several examples, attention kept inside each; false: rows of like length",
        False,
    )
    cache: str = setting("directory of the tokenized examples", "runs/cache")


@dataclass(kw_only=True)
class OptimConfig:
    """How parameters move."""

    name: str = setting(
        "optimizer", "adamw", choices=("adamw", "adam", "sgd", "adafactor", "lion", "muon")
    )
    learning_rate: float = setting("the largest one", 1e-4, above=0)
    schedule: str = setting(
        "of the learning rate, after the warm-up",
        "cosine",
        choices=("constant", "linear", "cosine", "step", "exponential"),
    )
    warmup_steps: int = setting("steps in which it grows to the largest", 0, low=0)
    min_lr_ratio: float = setting("share of it that is left at the end", 0.0, low=0, high=1)
    decay_rate: float = setting("step, exponential: factor every decay_every steps", 0.1, above=0)
    decay_every: int = setting("step, exponential", 1000, low=1)
    weight_decay: float = setting("of parameters with two axes and more", 0.0, low=0)
    no_decay: list[str] = setting("patterns of further parameters without weight decay", [])
    betas: list[float] | None = setting("of adamw, adam, lion; null: the optimizer's own", None)
    eps: float | None = setting("of adamw, adam; null: the optimizer's own", None, above=0)
    momentum: float | None = setting("of sgd, muon; null: the optimizer's own", None, low=0)
    nesterov: bool | None = setting("of sgd, muon; null: the optimizer's own", None)
    adamw_learning_rate: float | None = setting(
        "muon: of the embeddings, heads and norms, which AdamW updates", None, above=0
    )
    clip_norm: float | None = setting("longest gradient; null: any", 1.0, above=0)
    state_dtype: str = setting(
        "of the optimizer's state; float32 also keeps a float32 copy of narrower parameters",
        "float32",
        choices=("float32", "param"),
    )
    zero1: bool = setting("spread the optimizer's state over the replicas", False)


@dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int | None = setting("optimizer steps; null: num_epochs", None, low=1)
    num_epochs: int = setting("times that every example is seen", 1, low=1)
    batch_size: int = setting("examples (or packed rows) of a step, over all replicas", 8, low=1)
    micro_batch_size: int = setting("of them that go through a stage at once", 1, low=1)
    seed: int = setting("of the order and of new factors", 0, low=0)
    schedule: str = setting(
        "of microbatches over stages", "1f1b", choices=("gpipe", "1f1b", "interleaved_1f1b")
    )
    num_chunks: int = setting("interleaved_1f1b: stages on each rank", 1, low=1)
    recompute: bool = setting("keep only the inputs of layers and run them again backwards", False)
    loss_chunk: int = setting("tokens whose logits are there at once", 1024, low=1)
    eval_every: int | None = setting("steps between evaluations; null: at the end", None, low=1)
    patience: int | None = setting(
        "stop after so many evaluations without a better loss; null: never", None, low=1
    )
    prompts: list[str] = setting("answered at every evaluation, greedily", [])
    prompt_tokens: int = setting("new tokens of those answers", 64, low=1)
    save_every: int | None = setting("steps between checkpoints; null: at the end", None, low=1)
    keep_last: int = setting("checkpoints to keep", 2, low=2)
    keep_best: int = setting("further ones, those of the lowest evaluation loss", 1, low=0)
    max_bad_steps: int = setting(
        "steps in a row whose gradient is not finite before the job stops; each is skipped",
        5,
        low=1,
    )
    check_every: int | None = setting(
        "steps between comparisons of the replicas' parameters, bit for bit; null: never",
        100,
        low=1,
    )
    sinks: list[str] = setting("tensorboard, wandb, mlflow: also report there", [])


@dataclass(kw_only=True)
class FinetuneConfig(JobConfig):
    """jobs/finetune.py: supervised fine-tuning."""

    data: ExamplesConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: str | None = setting(
        "run directory to go on with, with its settings where none are given", None
    )
    timeline: bool = setting("draw pipeline.png: what each stage did when", False)
    RESUMABLE: ClassVar[bool] = True
    PATH_KEYS: ClassVar[tuple[str, ...]] = ("resume", "data.cache")

    @property
    def metric(self) -> tuple[str, str]:
        return "best_loss", "minimize"

    @property
    def num_chunks(self) -> int:
        """Pipeline stages that each rank holds."""
        return self.train.num_chunks

    def check(self) -> None:
        """Refuse values that do not fit each other."""
        super().check()
        if not self.data.train:
            raise ConfigError("data.train is empty; give data.train=[…] (files or directories)")
        for name in ("train", "valid"):
            for path in getattr(self.data, name):
                self.check_path(f"data.{name}", path)
        if self.model.adapter is not None:
            raise ConfigError(
                "model.adapter is for inference: to train it further, merge it into the model "
                "(jobs/export.py --to mlx) and train that one"
            )
        train = self.train
        if (train.num_chunks > 1) != (train.schedule == "interleaved_1f1b"):
            raise ConfigError(
                f"train.num_chunks={train.num_chunks} with train.schedule={train.schedule}: "
                "interleaved_1f1b is for 2 chunks or more, the others for 1"
            )
        if train.num_chunks > 1 and self.parallel.pp == 1:
            raise ConfigError(
                "train.num_chunks is for a pipeline: set parallel.pp, or num_chunks=1"
            )
        if train.num_chunks > 1 and train.prompts:
            raise ConfigError(
                "train.prompts: answers need a rank's layers in one stage; set train.num_chunks=1"
            )
        if self.optim.zero1 and self.parallel.dp == 1:
            raise ConfigError("optim.zero1 spreads state over replicas, but parallel.dp=1")
        if (betas := self.optim.betas) is not None and len(betas) != 2:
            raise ConfigError(f"optim.betas={betas}: expected two numbers")
        if train.patience is not None and not self.data.valid:
            raise ConfigError("train.patience needs data.valid")
