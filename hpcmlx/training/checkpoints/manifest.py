"""What a checkpoint says of itself: `manifest.json`, the last file written and the first one read.

JSON whose first line holds the SHA-256 of all that follows; with the SHA-256 of every shard in it,
no byte of a checkpoint can change unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hpcmlx.errors import IntegrityError
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.checkpoints.pieces import Tensor, check_whole
from hpcmlx.training.checkpoints.shards import DTYPES

MANIFEST = "manifest.json"
_FORMAT = 1
_SHARD = re.compile(r"shard-(\d{5,})\.h5")
#: What to do about a damaged checkpoint.
RESTORE = (
    "restore it from a copy; or delete it where another host has it; or go on from an older "
    "checkpoint with skip_damaged"
)


def shard_name(rank: int) -> str:
    return f"shard-{rank:05}.h5"


@dataclass(frozen=True)
class Shard:
    """What a rank has written.

    Attributes:
        sha256: of the file.
        bytes: in the file.
        host: where it was written.
    """

    sha256: str
    bytes: int
    host: str


@dataclass(frozen=True)
class Manifest:
    """All there is to know of a checkpoint but the numbers; the same on every host.

    Attributes:
        step: it was saved after.
        metric: at that step; lower is better.
        state: whatever the job wants back.
        versions: of what wrote it.
        shards: by rank.
        tensors: by name; their parts are by rank, too.
    """

    step: int
    metric: float | None
    state: Mapping[str, Any]
    versions: Mapping[str, str]
    shards: Mapping[int, Shard]
    tensors: Mapping[str, Tensor]

    def encode(self) -> bytes:
        """JSON whose first line has the SHA-256 of all that follows it."""
        content = {
            "format": _FORMAT,
            "step": self.step,
            "metric": self.metric,
            "state": self.state,
            "versions": self.versions,
            "shards": {
                shard_name(rank): vars(shard) for rank, shard in sorted(self.shards.items())
            },
            "tensors": {name: _to_json(tensor) for name, tensor in self.tensors.items()},
        }
        body = f'"checkpoint": {json.dumps(content, ensure_ascii=False)}}}\n'
        data = body.encode("utf-8", "surrogatepass")
        return _seal(data) + data


def decode(path: Path, data: bytes) -> Manifest:
    """The manifest that `Manifest.encode` made; `path` is for the message.

    Raises:
        IntegrityError: a byte of it has changed, or another version of hpcmlx wrote it.
    """
    first, _, rest = data.partition(b"\n")
    if first + b"\n" != _seal(rest):
        raise IntegrityError(f"{path} is damaged; {RESTORE}")
    content = json.loads(data.decode("utf-8", "surrogatepass"))["checkpoint"]
    if content.pop("format") != _FORMAT:
        raise IntegrityError(f"{path} is of another version of hpcmlx: {content['versions']}")
    try:
        shards = {_rank(name): Shard(**shard) for name, shard in content.pop("shards").items()}
        tensors = {name: _from_json(tensor) for name, tensor in content.pop("tensors").items()}
        for name, tensor in tensors.items():
            check_whole(name, tensor)
        return Manifest(**content, shards=shards, tensors=tensors)
    except (LookupError, TypeError, ValueError, IntegrityError) as error:
        raise IntegrityError(f"{path} cannot be understood: {error!r}; {RESTORE}") from error


def _seal(data: bytes) -> bytes:
    return f'{{"sha256": "{sha256(data).hexdigest()}",\n'.encode()


def _to_json(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "parts": [
            {"shard": shard_name(rank), "axis": cut.axis, "intervals": cut.intervals}
            for rank, cut in tensor.parts.items()
        ],
    }


def _from_json(values: dict[str, Any]) -> Tensor:
    parts = {
        _rank(part["shard"]): Cut(part["axis"], tuple(map(tuple, part["intervals"])))
        for part in values["parts"]
    }
    if values["dtype"] not in DTYPES:
        raise ValueError(f"no dtype {values['dtype']}")
    return Tensor(tuple(values["shape"]), values["dtype"], parts)


def _rank(name: str) -> int:
    match = _SHARD.fullmatch(name)
    if match is None:  # it becomes a path
        raise ValueError(f"{name!a} is no name of a shard")
    return int(match[1])
