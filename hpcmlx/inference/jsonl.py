"""Lines of JSON objects, each one read or, with its reason, refused.

`inputs.py` reads prompts with it and `choices.py` questions: a line that is no JSON object takes
only its own row away. JSON texts in the cells of other formats go through the same `parse`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hpcmlx.inference.request import BadRow

MAX_LINE = 64 << 20  # bytes; a longer line is a bad row


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Each line's number, from 1, and its object or what is wrong with it. Blank lines are left
    out, and a byte-order mark is no part of the first.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        number = 0
        # Not `splitlines`: it also splits at U+2028 and others that JSON strings may hold.
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                yield number, BadRow(f"longer than {MAX_LINE >> 20} MiB", "invalid_json")
            elif line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line); "
            "save the file as UTF-8",
            "invalid_json",
        )
    except BadRow as error:
        return error
    if not isinstance(row, dict):
        return BadRow(f"a row is a JSON object, not {type(row).__name__}", "invalid_json")
    return row


def parse(text: str) -> Any:
    """A JSON text, without the NaN and Infinity that Python would take. Raises BadRow."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        message = f"not usable JSON ({error})"
    raise BadRow(message, "invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
