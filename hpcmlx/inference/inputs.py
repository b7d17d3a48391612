"""Reads the input file of a batch job: JSONL, OpenAI's batch JSONL, CSV, Parquet or HDF5.

`jobs/generate.py` calls `read_batch` on rank 0 before the model is loaded. A row that cannot be
used becomes a `RowError` and the others go on; only a file that makes no sense as a whole is
refused.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcmlx.errors import ConfigError, InputError
from hpcmlx.files import digest_of
from hpcmlx.flight import recorder
from hpcmlx.inference import openai
from hpcmlx.inference.jsonl import MAX_LINE, json_lines, parse
from hpcmlx.inference.request import NUMBER_KINDS, ROW_KEYS, BadRow, InputRow, RequestBuilder
from hpcmlx.inference.rows import Request, RowError
from hpcmlx.inference.sampling import SamplingParams
from hpcmlx.settings import DataConfig

_CHUNK = 1024  # rows of a Parquet or HDF5 file in memory at once
_LISTED = 10  # ids or lines that a refusal names
_SUFFIXES = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet", ".h5": "hdf5", ".hdf5": "hdf5"}
_JSON_CELLS = {"messages", "tools", "chat_template_kwargs", "logit_bias"}

#: The line a row begins in (None: the file has no lines), and the row or what is wrong with it.
Record = tuple[int | None, dict[str, Any] | BadRow]


@dataclass
class Batch:
    """What an input file asks for.

    Attributes:
        sha256: of the file's bytes, in hex.
        is_openai: whether the file is in OpenAI's batch format.
        requests: one per sample of each good row, in input order.
        errors: the bad rows, in input order.
        rows: every row, good or bad, in input order: `rows[i].index == i`.
    """

    sha256: str
    is_openai: bool
    requests: list[Request] = field(default_factory=list)
    errors: list[RowError] = field(default_factory=list)
    rows: list[InputRow] = field(default_factory=list)


def read_batch(
    path: str | Path,
    tokenizer: Any,
    defaults: SamplingParams,
    data: DataConfig,
    *,
    n: int = 1,
    max_context: int | None = None,
) -> Batch:
    """Every row of a file, tokenized and checked.

    The format is `data.format`; "auto" goes by the file's suffix (.csv, .parquet, .pq, .h5, .hdf5,
    anything else is JSONL), and in JSONL by the first line that is an object: OpenAI's has
    `custom_id` or `body`. Blank lines are skipped. In JSONL a key that is not known is an error of
    its row. CSV (commas, a header line), Parquet and HDF5 (one-dimensional datasets) have the
    columns that `data` names and, where they are there, columns with the names of sampling
    parameters, `n`, `tools` and `chat_template_kwargs`; any other column is ignored, and an empty
    cell says nothing. What is not a number or a text is JSON in CSV and HDF5.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper; `messages` go through its chat template.
        defaults: sampling of rows that do not say.
        data: the format and the names of the columns.
        n: samples of rows that do not say.
        max_context: longest prompt plus output in tokens, if the model says.

    Raises:
        InputError: the file is missing, unreadable or has no rows; it lacks the columns; two rows
            have the same id; a row of an OpenAI file has no `custom_id`.
        ConfigError: `data` names a column twice, or pyarrow is needed and not installed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            sha256 = digest_of(file)
        kind = _format(path, data)
        reader = _Reader(path, kind, sha256, RequestBuilder(tokenizer, defaults, n, max_context))
        for line, row in _records(path, kind, data):
            reader.add(line, row)
            recorder.tick()
    except FileNotFoundError:
        raise InputError(f"input {path} does not exist; set input=FILE.jsonl") from None
    except OSError as error:
        raise InputError(f"input {path} cannot be read: {error}") from None
    return reader.finish()


class _Reader:
    """Sorts rows into good and bad ones, and watches over their ids."""

    def __init__(self, path: Path, kind: str, sha256: str, builder: RequestBuilder):
        self._path, self._kind, self._builder = path, kind, builder
        self._batch = Batch(sha256, is_openai=kind == "openai")
        self._places: dict[str, int] = {}  # id -> line or row number
        self._repeated: dict[str, list[int]] = {}
        self._nameless: list[int] = []
        self._word = "row" if kind in ("parquet", "hdf5") else "line"

    def add(self, line: int | None, row: dict[str, Any] | BadRow) -> None:
        batch, index = self._batch, len(self._batch.rows)
        number = index + 1 if line is None else line
        row_id, own_id, requests, problem = str(number), False, [], None
        kept = {"format": "chat" if batch.is_openai else "plain"}
        try:
            if isinstance(row, BadRow):
                raise row
            row_id, own_id = self._id(row, number)
            if batch.is_openai:
                kept = {"format": openai.row_format(row), "model": openai.row_model(row)}
            _refuse_surrogates(row, self._kind)
            if not (self._repeated or self._nameless):  # else the file is refused anyway
                requests = self._builder.build(self._plain(row), index, row_id)
        except BadRow as error:
            problem = error
        except RecursionError:
            problem = BadRow("nested too deep")
        if problem:
            where = f"{self._path}, row {number}" if line is None else f"{self._path}:{line}"
            message = f"{where}: {problem}"
            batch.errors.append(RowError(index, row_id, line, problem.code, message))
        if own_id or not problem:  # a bad row without an id takes no other row's away
            first = self._places.setdefault(row_id, number)
            if first != number:
                self._repeated.setdefault(row_id, [first]).append(number)
        batch.requests += requests
        batch.rows.append(
            InputRow(index, row_id, line, n=len(requests), errored=problem is not None, **kept)
        )

    def finish(self) -> Batch:
        """The batch. Raises InputError where the file as a whole is refused."""
        if not self._batch.rows:
            raise InputError(f"input {self._path} holds no rows")
        if self._nameless:
            raise InputError(
                f"input {self._path}: rows without a custom_id: {self._word}s "
                f"{_listing(self._nameless)}; give each one of its own"
            )
        if self._repeated:
            ids = [
                f"'{row_id:.60}' ({self._word}s {_listing(places)})"
                for row_id, places in self._repeated.items()
            ]
            raise InputError(
                f"input {self._path}: ids used more than once: {_listing(ids)}; give each row one "
                "of its own"
            )
        return self._batch

    def _id(self, row: dict[str, Any], number: int) -> tuple[str, bool]:
        """Takes the id out of a row; whether it is the row's own. BadRow where it is no id."""
        key = "custom_id" if self._batch.is_openai else "id"
        own = key in row
        value = row.pop(key, None if self._batch.is_openai else number)
        if self._batch.is_openai and (not isinstance(value, str) or not value):
            self._nameless.append(number)
            return str(number), False
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadRow(f"id={value!r:.60} must be a string or a whole number")
        _refuse_surrogates(str(value), self._kind)
        return str(value), own

    def _plain(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._kind == "openai":
            return openai.to_plain(row)
        if self._kind != "jsonl":
            return {key: _from_cell(key, value) for key, value in row.items()}
        if "custom_id" in row:
            raise BadRow(
                "a row in OpenAI's format in a file of plain rows; keep them in two files, or set "
                "data.format=openai"
            )
        return row


def _listing(items: Sequence[Any]) -> str:
    more = len(items) - _LISTED
    return ", ".join(map(str, items[:_LISTED])) + (f" and {more} more" if more > 0 else "")


def _refuse_surrogates(value: Any, kind: str) -> None:
    """JSON can escape half a character; in the other formats it stands for a byte of no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        # Where the id itself cannot be used, the row has none: as if it were no JSON.
        code = "invalid_json" if isinstance(value, str) else "invalid_row"
        if kind in ("jsonl", "openai"):
            raise BadRow("half of a surrogate pair (\\ud800-\\udfff) stands alone", code) from None
        byte = ord(error.object[error.start]) & 0xFF
        raise BadRow(f"not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8", code) from None


def _format(path: Path, data: DataConfig) -> str:
    if data.format != "auto":
        return data.format
    if kind := _SUFFIXES.get(path.suffix.lower()):
        return kind
    first = next((row for _, row in json_lines(path) if not isinstance(row, BadRow)), {})
    return "openai" if {"custom_id", "body"} & first.keys() else "jsonl"


def _records(path: Path, kind: str, data: DataConfig) -> Iterator[Record]:
    if kind in ("jsonl", "openai"):
        return json_lines(path)
    return {"csv": _csv, "parquet": _parquet, "hdf5": _hdf5}[kind](path, data)


def _csv(path: Path, data: DataConfig) -> Iterator[Record]:
    limit = csv.field_size_limit(MAX_LINE)  # in characters; one for the whole process
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if header is None:
                        raise InputError(f"{path}:{line}: not CSV ({error})") from None
                    yield line, BadRow(f"not CSV ({error})", "invalid_json")
                    continue
                if not cells:
                    continue
                if header is None:
                    header = cells
                    columns = _columns(header, data, path)
                elif len(cells) != len(header):
                    message = f"{len(cells)} cells under {len(header)} columns"
                    yield line, BadRow(f"{message}; are texts with commas quoted?")
                else:
                    yield line, _row(dict(zip(header, cells, strict=True)), columns)
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, data: DataConfig) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(
            f"input {path}: Parquet needs pyarrow; pip install 'hpcmlx[parquet]'"
        ) from None
    try:
        with ParquetFile(path) as file:
            columns = _columns(file.schema_arrow.names, data, path)
            for chunk in file.iter_batches(_CHUNK, columns=list(columns)):
                for i in range(chunk.num_rows):
                    try:
                        cells = {name: chunk.column(name)[i].as_py() for name in columns}
                    except UnicodeDecodeError as error:
                        yield None, BadRow(f"not UTF-8 ({error.reason})", "invalid_json")
                        continue
                    yield None, _row(cells, columns)
    except pyarrow.ArrowException as error:
        raise InputError(f"input {path} cannot be read as Parquet: {error}") from None


def _hdf5(path: Path, data: DataConfig) -> Iterator[Record]:
    try:
        with h5py.File(path, "r") as file:
            columns = _columns([name for name in file if name in file], data, path)
            sets = {name: _dataset(file, name, path) for name in columns}
            lengths = {len(dataset) for dataset in sets.values()}
            if len(lengths) > 1:
                raise InputError(f"input {path}: columns of different lengths {sorted(lengths)}")
            for start in range(0, max(lengths), _CHUNK):
                part = {name: dataset[start : start + _CHUNK] for name, dataset in sets.items()}
                for values in zip(*part.values(), strict=True):
                    yield None, _row(dict(zip(part, values, strict=True)), columns)
    except (KeyError, RuntimeError, ValueError) as error:  # h5py's, of a damaged file
        raise InputError(f"input {path} cannot be read as HDF5: {error}") from None


def _dataset(file: h5py.File, name: str, path: Path) -> Any:
    item = file[name]
    if not isinstance(item, h5py.Dataset) or item.ndim != 1:
        raise InputError(f"input {path}: '{name}' is not a one-dimensional dataset")
    # The hash of this file would not be one of such a column, which may change between two runs.
    if item.file.filename != file.filename or item.is_virtual or item.external:
        raise InputError(f"input {path}: '{name}' lies in another file; copy it into this one")
    if h5py.check_string_dtype(item.dtype):
        return item.asstr("utf-8", "surrogateescape")
    return item


def _columns(names: Sequence[str], data: DataConfig, path: Path) -> dict[str, str]:
    """The columns that are used, each with what it is in a plain row."""
    roles = {data.id_column: "id", data.prompt_column: "prompt", data.messages_column: "messages"}
    if len(roles) < 3:
        raise ConfigError(
            f"data.id_column, data.prompt_column and data.messages_column are {', '.join(roles)}: "
            "they must be three columns"
        )
    known = {key: key for key in ROW_KEYS - {"prompt", "messages"}} | roles
    used = [name for name in names if name in known]
    if len(set(used)) < len(used):
        raise InputError(f"input {path} has two columns of the same name: {', '.join(used)}")
    if not {data.prompt_column, data.messages_column} & set(used):
        raise InputError(
            f"input {path} has no column '{data.prompt_column}' or '{data.messages_column}', but "
            f"{_listing(names)}; set data.prompt_column or data.messages_column"
        )
    return {name: known[name] for name in used}


def _row(cells: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row as it is in JSONL, but for its numbers and its JSON texts: see `_from_cell`."""
    row = {key: _value(cells[column]) for column, key in columns.items()}
    row = {key: value for key, value in row.items() if value is not None and value != ""}
    if "prompt" in columns.values() and "messages" not in row:
        row.setdefault("prompt", "")  # so that it is refused for what it is
    return row


def _value(cell: Any) -> Any:
    """A cell in Python's own types, without the nulls that Parquet puts for absent fields."""
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "surrogateescape")
    if isinstance(cell, np.generic | np.ndarray):
        return cell.tolist()
    if isinstance(cell, dict):
        return {key: _value(value) for key, value in cell.items() if value is not None}
    return [_value(item) for item in cell] if isinstance(cell, list) else cell


def _from_cell(key: str, value: Any) -> Any:
    """A cell as the same key has it in JSONL."""
    if kind := NUMBER_KINDS.get(key):
        if isinstance(value, float) and kind is int and value.is_integer():
            return int(value)  # a column of whole numbers with gaps is often stored so
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            raise BadRow(f"{key}={value!r:.60} must be of type {kind.__name__}") from None
    if isinstance(value, str) and (key in _JSON_CELLS or (key == "stop" and value[0] == "[")):
        try:
            return parse(value)
        except BadRow as error:
            raise BadRow(f"column '{key}': {error}") from None
    return value
