"""One launch of fine-tuning: prepare, go on where an earlier launch has stopped, train, leave
results. `jobs/finetune.py` tells the story, `trainer.py` has the single acts.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from hpcmlx.errors import ConfigError, ExitCode, HpcmlxError, IntegrityError
from hpcmlx.files import write_atomic
from hpcmlx.inference.engine import Engine
from hpcmlx.inference.rows import Request, RowResult
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.mesh import Mesh
from hpcmlx.models.tokenizer import ChatRenderer
from hpcmlx.observe import curves, gantt
from hpcmlx.observe.metrics import Metrics, format_step, read_metrics
from hpcmlx.observe.summary import peak_memory, write_summary
from hpcmlx.observe.timeline import Timeline
from hpcmlx.record import COMPLETED
from hpcmlx.redact import written
from hpcmlx.settings_finetune import FinetuneConfig
from hpcmlx.training.build import Data, optim_settings
from hpcmlx.training.checkpoints.found import Found
from hpcmlx.training.checkpoints.store import CheckpointStore
from hpcmlx.training.optim import Optimizer
from hpcmlx.training.resume import (
    Progress,
    check_checkpoint_room,
    check_identity,
    drop_later_lines,
)
from hpcmlx.training.trainer import StepResult, Trainer
from hpcmlx.units import format_bytes

#: In the run directory.
CHECKPOINTS, SAMPLES = "checkpoints", "samples.jsonl"

_log = logging.getLogger(__name__)


class DivergedError(HpcmlxError):
    """Losses or gradients stopped being numbers."""

    exit_code = ExitCode.INTERNAL


@dataclass
class Run:
    """A launch under way. First `is_done`, then `go_on`, then `train`, all of them collective.

    Attributes:
        identity: of `resume.identity`.
        num_tokens_before: that earlier launches have trained on.
    """

    cfg: FinetuneConfig
    mesh: Mesh
    run_dir: Path
    data: Data
    tokenizer: Any
    identity: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    store: CheckpointStore = field(init=False)
    trainer: Trainer = field(init=False)
    num_tokens_before: int = 0
    _found: Found | None = None
    _valid_loss: float | None = None
    _pause: float = 0.0

    def __post_init__(self) -> None:
        keep = self.cfg.train.keep_last, self.cfg.train.keep_best
        self.store = CheckpointStore(self.run_dir / CHECKPOINTS, self.mesh.world, *keep)

    def is_done(self) -> bool:
        """Look for the newest checkpoint; whether an earlier launch has come to the end.

        Raises:
            ConfigError: it is of another run; says what differs.
            IntegrityError: it is damaged; says which file.
        """
        self._found = self.store.find()
        if self._found is None:
            return False
        check_identity(self._found.state, self.identity, self.run_dir)
        self.progress = Progress(**self._found.state["progress"])
        self.num_tokens_before = self.progress.num_tokens
        at_end = self.progress.step == self.data.batches.num_steps
        over = at_end or self.progress.sees_no_gain(self.cfg.train.patience)
        # Without the record the results may not be there.
        done: bool = over and self.mesh.world.bcast((self.run_dir / COMPLETED).exists())
        if done:
            self._found.close()
            _log.info("all %d steps are done already", self.progress.step)
        return done

    def check_room(self, trained: Mapping[str, mx.array]) -> None:
        """Refuse what cannot be saved. Raises OutputError.

        Args:
            trained: stand-ins for the parameters of the whole model, unevaluated.
        """
        total = self.data.batches.num_steps
        optimizer = Optimizer(optim_settings(self.cfg), total)
        directory, left = self.run_dir / CHECKPOINTS, total - self.progress.step
        check_checkpoint_room(directory, self.cfg.train, left, trained, optimizer)

    def go_on(self, trainer: Trainer) -> int:
        """Take up the checkpoint that was found, if there is one.

        Returns:
            The step of the first row of metrics: -1, the evaluation before any update, without one.
        """
        self.trainer = trainer
        if self._found is not None:
            with self._found as found:
                trainer.restore(found)
            _log.info("going on after step %d", self.progress.step)
        first = self.progress.step or -1
        if self.mesh.world.rank == 0:
            drop_later_lines(self.run_dir / SAMPLES, first)
        return first

    def train(self, metrics: Metrics) -> ExitCode:
        """Go through the steps that are left; ends early where it is asked to or sees no gain."""
        cfg, progress, total = self.cfg.train, self.progress, self.data.batches.num_steps
        if not progress.step:
            self._evaluate(metrics, -1)  # what there is before the first update
        while progress.step < total and not progress.sees_no_gain(cfg.patience):
            n, self._valid_loss = progress.step, None
            result = self.trainer.step(n, self.data.batches, self.data.train)
            progress.step, progress.num_tokens = n + 1, progress.num_tokens + result.num_tokens
            self._log_step(metrics, n, total, result)
            self._judge(result)
            last = progress.step == total
            if cfg.check_every and progress.step % cfg.check_every == 0:
                self._check_replicas()
            if last or (cfg.eval_every and progress.step % cfg.eval_every == 0):
                self._evaluate(metrics, n)
            enough = progress.sees_no_gain(cfg.patience)
            due = cfg.save_every and progress.step % cfg.save_every == 0
            if due or last or enough or result.asked_to_stop:
                self._save(metrics)
            self.store.poll(wait=last or enough or result.asked_to_stop)
            if result.asked_to_stop and not last:
                _log.info("asked to stop: step %d of %d is saved", progress.step, total)
                return ExitCode.PREEMPTED
            if enough and not last:
                _log.info(
                    "no better loss in %d evaluations: stopping after step %d",
                    cfg.patience,
                    progress.step,
                )
        return ExitCode.OK

    def _log_step(self, metrics: Metrics, n: int, total: int, result: StepResult) -> None:
        memory = peak_memory()
        peak = memory.get("peak_metal_bytes", memory["peak_rss_bytes"])
        values: dict[str, float] = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": self.trainer.learning_rate(n),
            "tokens_per_sec": result.num_tokens / result.seconds,
            "peak_memory_gib": peak / 2**30,
            "idle": result.idle,
            "skipped": float(result.skipped),
            "seconds": result.seconds,
            "save_seconds": self._pause,
        }
        self._pause = 0.0
        metrics.log(n, values)
        if self.mesh.world.rank == 0:
            _log.info("%s", format_step(n, total, values))

    def _judge(self, result: StepResult) -> None:
        progress, most = self.progress, self.cfg.train.max_bad_steps
        if not result.skipped:
            progress.bad_in_row = 0
            return
        progress.bad_in_row += 1
        progress.num_skipped += 1
        _log.warning(
            "step %d: loss %s, gradient %s: nothing was changed", progress.step - 1,
            result.loss, result.grad_norm,
        )  # fmt: skip
        if progress.bad_in_row >= most:
            self.store.poll(wait=True)  # on all ranks: what is being saved is from before
            raise DivergedError(
                f"loss or gradient was not finite in {progress.bad_in_row} steps in a row, the "
                f"last of them step {progress.step - 1}: lower optim.learning_rate, or use "
                "model.dtype=float32; the last checkpoint is from before"
            )

    # -- evaluation --

    def _evaluate(self, metrics: Metrics, n: int) -> None:
        data, progress = self.data, self.progress
        if data.valid is not None and data.valid_batches is not None:
            begin = time.perf_counter()
            loss = self.trainer.evaluate(data.valid_batches, data.valid)
            self._valid_loss = loss
            better = progress.best is None or loss < progress.best
            progress.best = loss if progress.best is None else min(loss, progress.best)
            progress.without_better = 0 if better else progress.without_better + 1
            seconds = time.perf_counter() - begin
            metrics.log(n, {"loss": loss, "seconds": seconds}, "eval")
            if self.mesh.world.rank == 0:
                _log.info("evaluation: loss %.4f, perplexity %.2f", loss, math.exp(loss))
        if self.cfg.train.prompts:
            self._answer(n)

    def _answer(self, n: int) -> None:
        """Answer `train.prompts` with the model as it is, through the inference engine."""
        render = ChatRenderer(self.tokenizer)
        prompts = self.cfg.train.prompts
        sampling = SamplingParams(max_tokens=self.cfg.train.prompt_tokens)
        requests = [
            Request(i, str(i), tuple(render([{"role": "user", "content": text}])), sampling)
            for i, text in enumerate(prompts)
        ]
        rows: list[RowResult] = []
        loaded = self.trainer.stages.chunks[0].loaded
        Engine(loaded, self.mesh, self.tokenizer).run(requests, rows.append)
        everyone = self.mesh.world.gather(rows)
        if everyone is None:
            return
        answers = {row.index: row.text for part in everyone for row in part}
        with (self.run_dir / SAMPLES).open("a", encoding="utf-8") as file:
            for i, text in enumerate(prompts):
                prompt = written(f"train.prompts[{i}]", text, self.cfg.unresolved)
                row = {"step": n, "prompt": prompt, "answer": answers[i]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                _log.info("%s -> %s", text, " ".join(answers[i].split()))

    # -- checkpoints --

    def _save(self, metrics: Metrics) -> None:
        begin = time.perf_counter()
        self._check_replicas()
        metrics.flush()
        state = {**self.identity, "progress": asdict(self.progress)}
        self.store.save(self.progress.step, self.trainer.pieces(), state, self._valid_loss)
        self._pause = time.perf_counter() - begin

    def _check_replicas(self) -> None:
        try:
            self.trainer.check_replicas()
        except IntegrityError:  # on all ranks: what is being saved was checked
            self.store.poll(wait=True)
            raise


def leave_results(run: Run, timeline: Timeline, seconds: float) -> None:
    """`summary.json` and, where matplotlib is installed, the pictures. Collective."""
    mesh, progress = run.mesh, run.progress
    totals = {
        "layout": str(mesh.dims),
        "steps": progress.step,
        "tokens_in_all": progress.num_tokens,
        "skipped_steps": progress.num_skipped,
        "best_loss": progress.best,
        "trained_parameters": run.trainer.stages.num_trained,
    }
    ranks = write_summary(
        mesh.world,
        run.run_dir,
        totals,
        {},
        seconds=seconds,
        num_tokens=progress.num_tokens - run.num_tokens_before,
        pace=run.trainer.pace,
    )
    place, layout = (mesh.dp, mesh.pp, mesh.tp), str(mesh.dims)
    if lanes := timeline.save(mesh.world, place, run.run_dir, layout):
        write_atomic(run.run_dir / gantt.PICTURE, gantt.draw(lanes, layout))
    if ranks is None:
        return
    peak = max(rank["peak_rss_bytes"] for rank in ranks)
    _log.info(
        "%d steps, %d tokens in %.1f s; peak memory %s",
        progress.step, progress.num_tokens, seconds, format_bytes(peak),
    )  # fmt: skip
    try:
        curves.require_matplotlib()
    except ConfigError as error:
        _log.warning("no %s: %s", curves.PICTURE, error)
        return
    write_atomic(run.run_dir / curves.PICTURE, curves.draw(read_metrics(run.run_dir), layout))
