"""The numbers of a training run, a row a step: `metrics.csv`, `metrics-eval.csv`, `metrics.h5`.

The CSV files are the live record: a line is appended per row, so that a process that is killed
loses none. `metrics.h5` holds the same columns and is replaced as a whole now and then, because an
HDF5 file whose writer was killed cannot be opened. The trainer logs; sinks get the same rows.
"""

from __future__ import annotations

import logging
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from hpcmlx.errors import IntegrityError, StorageError
from hpcmlx.files import flush, reported, write_atomic, write_hdf5
from hpcmlx.observe.sinks import Sink

#: The file of each kind of row, inside a run directory.
FILES = {"train": "metrics.csv", "eval": "metrics-eval.csv"}
#: All of them as HDF5: a group per kind, a dataset per column.
METRICS = "metrics.h5"

#: What of a row goes to the console: name in `values`, how it is written.
_SHOWN = {
    "loss": "loss {:.4f}",
    "grad_norm": "grad norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_sec": "{:,.0f} tok/s",
    "peak_memory_gib": "{:.2f} GiB",
    "idle": "idle {:.0%}",
}
_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # a column's: safe in CSV, HDF5 and all sinks

_log = logging.getLogger(__name__)


class Metrics:
    """Takes the rows of a run. A context manager: its end closes the sinks, too."""

    def __init__(
        self,
        run_dir: Path,
        sinks: Sequence[Sink] = (),
        *,
        first_step: int = 0,
        enabled: bool = True,
        rows_per_build: int = 100,
    ):
        """
        Args:
            sinks: get every row as well; one that fails is left out from then on.
            first_step: the first step of this launch: rows of it and of later steps that an
                earlier launch has left are dropped, because they will be done again.
            enabled: False on every rank but world rank 0: then nothing is read or written.
            rows_per_build: new rows after which `metrics.h5` is built again; more in a long run.

        Raises:
            IntegrityError: a file of an earlier launch is damaged, but for a torn last line.
            OutputError, StorageError: a file cannot be read, made or written.
        """
        self._run_dir, self._enabled = Path(run_dir), enabled
        self._built = self._run_dir / METRICS
        self._sinks, self._rows_per_build = list(sinks), rows_per_build
        self._unbuilt = 0
        self._tables = {}
        if enabled:
            for kind, name in FILES.items():
                self._tables[kind] = _Table(self._run_dir / name, first_step)
            # What an earlier launch built may lack rows, or have some that were dropped now.
            if any(table.steps for table in self._tables.values()) or self._built.exists():
                self._build()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Take one row; it survives this process when this returns (not yet the host: `flush`).

        Args:
            step: above that of the last row of its kind.
            values: name -> number; a name that is new becomes a column, a missing one is empty.
            kind: a key of `FILES`.

        Raises:
            StorageError: the disk is full or failing.
        """
        if not self._enabled:
            return
        self._tables[kind].append(step, values)
        for sink in tuple(self._sinks):
            try:
                sink.log(kind, step, values)
            except Exception as error:  # whatever that package raises
                self._sinks.remove(sink)
                self._warn(sink, error)
        self._unbuilt += 1
        num_rows = sum(len(table.steps) for table in self._tables.values())
        if self._unbuilt >= max(self._rows_per_build, num_rows // 10):
            self._build()

    def flush(self) -> None:
        """Get all rows to the disk and build `metrics.h5`. Call it before a checkpoint is
        complete: a run that resumes there then has every row before it, whatever happens.

        Raises:
            StorageError: the disk is full or failing.
        """
        for table in self._tables.values():
            table.flush()
        if self._unbuilt:
            self._build()

    def close(self) -> None:
        """`flush`, and close files and sinks.

        Raises:
            StorageError: the disk is full or failing.
        """
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            try:
                sink.close()
            except Exception as error:
                self._warn(sink, error)
        self.flush()
        for table in self._tables.values():
            table.close()

    def _build(self) -> None:
        def fill(file: h5py.File) -> None:
            for kind, table in self._tables.items():
                for name, column in table.arrays().items():
                    file.create_dataset(f"{kind}/{name}", data=column, chunks=True, fletcher32=True)

        write_hdf5(self._built, fill)
        self._unbuilt = 0

    def _warn(self, sink: Sink, error: Exception) -> None:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = self._run_dir / FILES["train"]
        _log.warning(
            "%s takes no more metrics (%s); %s has them all", type(sink).__name__, reason, where
        )


def read_metrics(run_dir: Path) -> dict[str, dict[str, np.ndarray]]:
    """What a run has logged by now; kinds without a row are left out.

    Returns:
        For every kind, column -> [rows]: "step" as int64, the others as float64, NaN where a row
        has no value.

    Raises:
        IntegrityError: a file is damaged, but for a torn last line.
        StorageError: it cannot be read.
    """
    found = {kind: _Table(Path(run_dir, name)).arrays() for kind, name in FILES.items()}
    return {kind: columns for kind, columns in found.items() if columns}


def format_step(step: int, total: int, values: Mapping[str, float]) -> str:
    """A step on one line of the console; steps count from 0, as in the files.

    Args:
        values: of these are shown, where there: loss, grad_norm, learning_rate, tokens_per_sec,
            peak_memory_gib, idle (of the pipeline's ranks, from 0 to 1).
    """
    parts = [text.format(values[name]) for name, text in _SHOWN.items() if name in values]
    return "  ".join([f"step {step:{len(str(total))}}/{total}", *parts])


class _Table:
    """One CSV file and its columns.

    Attributes:
        steps: of all rows.
    """

    def __init__(self, path: Path, first_step: int | None = None):
        """
        Args:
            first_step: rows from there on are cut off the file; None: it is only read.
        """
        self._path = path
        self._fd: int | None = None
        self.steps = array("q")
        self._columns: dict[str, array[float]] = {}
        lines = self._read(first_step)
        if first_step is not None and lines is not None:
            write_atomic(path, "".join(lines))

    def append(self, step: int, values: Mapping[str, float]) -> None:
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"{self._path.name} has step {self.steps[-1]} already, got {step}")
        if not values:
            raise ValueError(f"step {step} has no values for {self._path.name}")
        for name in values:
            if name == "step" or not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be a column of {self._path.name}")
        if values.keys() - self._columns.keys():
            self._widen([name for name in values if name not in self._columns])
        cells = [_text(values[name]) if name in values else "" for name in self._columns]
        line = ",".join([str(step), *cells]) + "\n"
        with reported(self._path):
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            data = line.encode()
            while data:
                data = data[os.write(self._fd, data) :]
        self._add(step, cells)

    def flush(self) -> None:
        if self._fd is not None:
            with reported(self._path):
                flush(self._fd)

    def close(self) -> None:
        if self._fd is not None:
            with reported(self._path):
                os.close(self._fd)
            self._fd = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Column -> [rows]; nothing where there is no row."""
        if not self.steps:
            return {}
        columns = {name: np.array(column) for name, column in self._columns.items()}
        return {"step": np.array(self.steps, np.int64), **columns}

    def _add(self, step: int, cells: Sequence[str]) -> None:
        self.steps.append(step)
        for column, cell in zip(self._columns.values(), cells, strict=True):
            column.append(float(cell or "nan"))

    def _widen(self, names: Sequence[str]) -> None:
        """Add columns, empty in all rows so far; the first time this makes the file."""
        self.close()
        old = self._path.read_text().splitlines() if self.steps else []
        for name in names:
            self._columns[name] = array("d", [float("nan")] * len(self.steps))
        header = ",".join(["step", *self._columns])
        lines = [header, *(line + "," * len(names) for line in old[1:])]
        write_atomic(self._path, "".join(f"{line}\n" for line in lines))

    def _read(self, first_step: int | None) -> list[str] | None:
        """Take in the rows of the file before `first_step`.

        Returns:
            The lines that the file should have, or None where it is as it should be.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"reading {self._path} failed: {error.strerror}") from error
        *lines, torn = data.split(b"\n")
        kept: list[str] = []
        for number, line in enumerate(lines, 1):
            try:
                names, text = list(self._columns), line.decode("ascii")
                first, *cells = text.split(",")
                if number == 1:
                    if first != "step" or not all(_NAME.fullmatch(name) for name in cells):
                        raise ValueError("not a header")
                    self._columns = {name: array("d") for name in cells}
                elif len(cells) != len(names) or (self.steps and int(first) <= self.steps[-1]):
                    raise ValueError("not the next row")
                elif first_step is not None and int(first) >= first_step:
                    break
                else:
                    self._add(int(first), cells)
            except ValueError as error:
                raise IntegrityError(
                    f"{self._path} is damaged at line {number}; restore it from a copy, or delete "
                    "it to lose the metrics of earlier launches"
                ) from error
            kept.append(f"{text}\n")
        return kept if torn or len(kept) < len(lines) else None


def _text(value: Any) -> str:
    """So that it reads back as the same number."""
    return str(int(value)) if isinstance(value, int) else repr(float(value))
