"""A trained model as a directory of its own, with tokenizer and checksums: in MLX's format, packed
if asked, or in Hugging Face's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from mlx_lm import utils as mlx_lm_utils

from hpcmlx.errors import ConfigError
from hpcmlx.models.checkpoint import FETCH_PATTERNS, Checkpoint, GGUFCheckpoint, open_checkpoint
from hpcmlx.models.checksums import CHECKSUMS, verify, write_checksums
from hpcmlx.models.gguf_tokenizer import save_gguf_tokenizer
from hpcmlx.training.export.files import MAX_SHARD_BYTES, new_directory, write_json, write_weights
from hpcmlx.training.export.layouts import hub_groups, mlx_groups, packed_groups
from hpcmlx.training.export.merge import Merger, PackingLoss
from hpcmlx.training.export.source import Exported, Trained

# Of the base's small files: those that say what its weights were.
_LEFT = ("config.json", "*.index.json", "hf_quant_config.json", "conversion.json", CHECKSUMS)


def export_merged(
    trained: Trained,
    base: str | Path,
    out: str | Path,
    *,
    format: Literal["mlx", "hf"] = "mlx",
    dtype: str | None = None,
    quantize: Mapping[str, int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the trained model as the directory `out`.

    LoRA and DoRA are added in float32 and rounded once. In memory is one parameter at a time.

    Args:
        base: what `open_checkpoint` takes. What is packed there is unpacked.
        format: "mlx", or "hf" for the names and layouts of Hugging Face's checkpoint.
        dtype: a name of `hpcmlx.models.loader.DTYPES`; None keeps what the base computes in.
        quantize: {"bits": 4, "group_size": 64}: pack the weights, as mlx-lm does. What is packed
            so in the base, and was not trained, stays as it is, to the bit.
        max_shard_bytes: of a file of weights.

    Raises:
        OutputError: `out` is there already and not empty, or cannot be created.
        ConfigError: a tensor has no name in the format, or there is no such packing.
        IntegrityError: checkpoint and base do not belong together, or the base is damaged.
        StorageError: writing failed half-way; nothing is left.
    """
    if quantize is not None and format == "hf":
        raise ConfigError("MLX's packing has no place in Hugging Face's format; export to mlx")
    checkpoint, out = open_checkpoint(base), Path(out)
    loss = PackingLoss()
    try:
        merger = Merger(trained, checkpoint, dtype)
        config, notes = merger.config, []
        if format == "hf":
            groups = hub_groups(merger)
            config = _hub_config(checkpoint) or config
        elif quantize is None:
            groups = mlx_groups(merger)
        else:
            groups, config = packed_groups(merger, quantize, loss)
        if dtype is not None:
            config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        with new_directory(out) as folder:
            verify(checkpoint.path)  # or a damaged base would become a model with good checksums
            source = "pt" if format == "hf" else "mlx"
            num_bytes = write_weights(folder, groups, source, max_shard_bytes)
            mlx_lm_utils.save_config(config, folder / "config.json", keep_vision_config=True)
            _write_small_files(checkpoint, folder)
            write_checksums(folder)
    finally:
        checkpoint.close()
    if quantize is not None:
        notes.append(str(loss))
    elif merger.skeleton.packed:
        notes.append("what is packed in the base is unpacked here")
    num_tensors = sum(len(group.parts) for group in groups)
    return Exported(out, num_tensors, num_bytes, tuple(notes))


def _hub_config(checkpoint: Checkpoint | GGUFCheckpoint) -> dict[str, Any] | None:
    """The base's config.json without what others have added to it; None where there is no file."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return None
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("quantization")}


def _write_small_files(checkpoint: Checkpoint | GGUFCheckpoint, folder: Path) -> None:
    if isinstance(checkpoint, GGUFCheckpoint):
        save_gguf_tokenizer(checkpoint.metadata, folder)
        ids = {key: checkpoint.config.get(key) for key in ("bos_token_id", "eos_token_id")}
        write_json(
            folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None}
        )
        return
    patterns = [pattern for pattern in FETCH_PATTERNS if not pattern.endswith(".safetensors")]
    for file in sorted({file for pattern in patterns for file in checkpoint.path.glob(pattern)}):
        if not any(fnmatch(file.name, pattern) for pattern in _LEFT):
            shutil.copyfile(file, folder / file.name)
