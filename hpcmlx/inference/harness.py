"""EleutherAI's lm-eval on any layout: `evaluate.kind=harness` of jobs/evaluate.py.

lm-eval runs on world rank 0 alone, which is the only one that needs it installed. Whenever it asks
its model (harness_model.py) something, rank 0 tells all ranks what, and they answer together.

Tasks are lm-eval's own, which come with its package, or those of the directory that the user names
in `evaluate.task_path`. Task files may have Python code executed (`!function`); none comes from
anywhere else, and nothing is fetched: Hugging Face's libraries are offline unless the user has set
HF_HUB_OFFLINE=0, so data sets have to be local files or in the cache already.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.extras import require
from hpcmlx.files import write_atomic
from hpcmlx.flight import recorder
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.evaluate import Verdict
from hpcmlx.inference.generate import build_engine
from hpcmlx.inference.rows import Request, RowResult
from hpcmlx.inference.scoring import Score, ScoreRow, score
from hpcmlx.mesh import Mesh
from hpcmlx.models.loader import LoadedModel
from hpcmlx.observe.progress import ProgressBar
from hpcmlx.redact import written
from hpcmlx.settings import EvaluateConfig

#: Where config.json does not say how much a model can see at once; lm-eval's own default.
DEFAULT_CONTEXT = 2048


class HarnessEvaluation:
    """`evaluate.kind=harness`: tasks of lm-eval.

    Args:
        context: tokens that the model can see at once, if it says.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, or no chat template.
    """

    def __init__(self, cfg: EvaluateConfig, mesh: Mesh, tokenizer: Any, context: int | None):
        self.cfg, self.mesh, self.tokenizer = cfg, mesh, tokenizer
        self.context = context or DEFAULT_CONTEXT
        if cfg.evaluate.chat_template and not tokenizer.has_chat_template:
            raise ConfigError("evaluate.chat_template=true, but the model has no chat template")
        if mesh.world.rank == 0:
            _prepare()
            self.manager, self.tasks = _find_tasks(cfg.evaluate.tasks, cfg.evaluate.task_path)
        mesh.world.barrier()  # a refusal comes before any rank loads the model

    def run(self, loaded: LoadedModel, run_dir: Path) -> Verdict | None:
        """Run the tasks and write lm-eval's results to `harness.json`; the verdict on world rank 0,
        which also prints lm-eval's table."""
        crew = Crew(self.cfg, self.mesh, loaded, self.tokenizer)
        if self.mesh.world.rank:
            crew.serve()
            return None
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.utils import handle_non_serializable, make_table

        from hpcmlx.inference.harness_model import HarnessModel

        own = self.cfg.evaluate
        path = written("model.path", self.cfg.model.path, self.cfg.unresolved)
        with recorder.outside():
            results = simple_evaluate(
                HarnessModel(crew, self.tokenizer, self.context, path),
                tasks=self.tasks,
                num_fewshot=own.num_fewshot,
                limit=own.limit,
                apply_chat_template=own.chat_template,
                task_manager=self.manager,
                log_samples=False,
            )
        crew.end()
        results["config"] |= {"layout": str(self.mesh.dims), "model_path": path}
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_atomic(run_dir / "harness.json", text + "\n")
        tables = [make_table(results)]
        if results.get("groups"):
            tables.append(make_table(results, "groups"))
        print(*tables, sep="\n", flush=True)
        totals = {"tasks": json.loads(text)["results"]}
        return Verdict(totals, f"{len(totals['tasks'])} tasks, results in harness.json")


class Crew:
    """All ranks as one model: rank 0 asks, the others `serve` until it says `end`.

    An exception on rank 0 leaves them waiting; `run_job` ends them then.
    """

    def __init__(self, cfg: EvaluateConfig, mesh: Mesh, loaded: LoadedModel, tokenizer: Any):
        self._cfg, self._mesh, self._loaded, self._tokenizer = cfg, mesh, loaded, tokenizer
        self._engine: Engine | None = None

    def score(self, rows: Sequence[ScoreRow]) -> list[Score]:
        """On rank 0: the scores of the rows, in their order."""
        with recorder.inside():
            self._mesh.world.bcast(("score", rows))
            return self._score(rows) or []

    def generate(self, requests: Sequence[Request]) -> list[RowResult]:
        """On rank 0: the answers to the requests, in their order; their `index` is their place."""
        with recorder.inside():
            self._mesh.world.bcast(("generate", requests))
            return self._generate(requests) or []

    def end(self) -> None:
        """On rank 0: let the others go."""
        self._mesh.world.bcast(("end", None))

    def serve(self) -> None:
        """On the other ranks: do what rank 0 asks for."""
        work = {"score": self._score, "generate": self._generate}
        while True:
            what, items = self._mesh.world.bcast(None)
            if what == "end":
                return
            work[what](items)

    def _score(self, rows: Sequence[ScoreRow]) -> list[Score] | None:
        with ProgressBar(len(rows), "texts", enabled=self._mesh.world.rank == 0) as bar:
            return score(
                self._loaded,
                self._mesh,
                rows,
                batch_size=self._cfg.inference.batch_size,
                on_rows=lambda done: bar.advance(len(done)),
            )

    def _generate(self, requests: Sequence[Request]) -> list[RowResult] | None:
        mesh = self._mesh
        if self._engine is None:
            self._engine = build_engine(self._cfg, mesh, self._loaded, self._tokenizer)
        if reason := next(filter(None, map(self._engine.why_too_large, requests)), None):
            raise ConfigError(f"a prompt of the task does not fit: {reason}")
        mine: list[RowResult] = []
        self._engine.run(requests, mine.append)
        if any(row.finish_reason == "error" for row in mine):
            raise IntegrityError(
                "the model gives NaN instead of a next token: its weights are damaged, or its "
                "numbers too big for the format; try model.dtype=float32"
            )
        # Every rank of a replica is told of its rows; one of them speaks.
        parts = mesh.world.gather(mine if mesh.pp == 0 and mesh.tp == 0 else [])
        return parts and sorted((row for part in parts for row in part), key=lambda r: r.index)


def _prepare() -> None:
    """Make lm-eval importable, and everything that it imports offline."""
    require("lm_eval", "eval", "evaluate.kind=harness", "evaluate a text or choices")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, os.environ.get("HF_HUB_OFFLINE", "1"))
    # Imported long ago, by transformers, it does not look at its variable again.
    hub.HF_HUB_OFFLINE = os.environ["HF_HUB_OFFLINE"].upper() in hub.ENV_VARS_TRUE_VALUES
    # Tasks import the package `evaluate`; Python would give them jobs/evaluate.py, which runs.
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None:
        folder = Path(script).resolve().parent
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]


def _find_tasks(patterns: Sequence[str], folder: str | None) -> tuple[Any, list[str]]:
    """lm-eval's TaskManager and the names of the tasks, groups and tags that the patterns fit.

    The directory that the user names is looked through first; lm-eval's own tasks, some 15,000
    files, only where it does not have everything.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"evaluate.task_path={folder} is not a directory")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    missing = [pattern for pattern in patterns if not manager.match_tasks([pattern])]
    if missing and folder is not None:
        manager = TaskManager(include_path=folder)
        missing = [pattern for pattern in patterns if not manager.match_tasks([pattern])]
    if missing:
        where = "" if folder is None else f" or {folder}"
        raise ConfigError(
            f"evaluate.tasks: {', '.join(missing)} is not in lm-eval{where}; `lm-eval ls tasks` "
            "lists lm-eval's own"
        )
    return manager, manager.match_tasks(list(patterns))
