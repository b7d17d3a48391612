"""Gives this rank its part of a model: shapes first, then only its own byte ranges.

The order is what keeps memory at one shard: skeleton (no memory), tensor-parallel plan (cuts),
pipeline stage (which parameters), then one tensor at a time from the files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.flight import recorder
from hpcmlx.mesh import Mesh
from hpcmlx.models.adapter_files import open_adapter
from hpcmlx.models.adapters import attach
from hpcmlx.models.balance import Balance
from hpcmlx.models.checkpoint import Checkpoint
from hpcmlx.models.gguf import GGUFCheckpoint
from hpcmlx.models.plans import plan_for
from hpcmlx.models.skeleton import Quantization, Skeleton, WeightFormat, build_skeleton
from hpcmlx.parallel.dataflow import Dataflow, find_layers, trace
from hpcmlx.parallel.partition import Cut, Interval, offsets
from hpcmlx.parallel.pipeline import Stage, build_stage, check_layers
from hpcmlx.parallel.tensor import Shares, apply_plan, vocab_interval

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Attached(Protocol):
    """Parameters that something other than the checkpoint provides: an adapter, old or new."""

    @property
    def sources(self) -> Collection[str]:
        """Paths of the parameters that it provides."""

    @property
    def bytes_read(self) -> int:
        """Bytes of its files that were read."""

    def arrays(
        self, paths: Iterable[str], cuts: Mapping[str, Cut]
    ) -> Iterator[tuple[str, mx.array]]:
        """(path, evaluated array) of those of `paths` that it provides, cut for this rank."""

    def settle(self, paths: Iterable[str]) -> None:
        """Called once everything in `paths` is in memory. Collective over the tp group."""

    def describe(self, paths: Iterable[str]) -> str:
        """One phrase: what of it is among `paths`."""

    def close(self) -> None:
        """Close its files."""


Attach = Callable[[Skeleton], Attached]
Prepare = Callable[[nn.Module, Mapping[str, tuple[int, ...]]], Sequence[float]]


@dataclass
class LoadedModel:
    """This rank's part of a model, ready to run.

    Attributes:
        stage: the pipeline stage (the whole model where pp = 1).
        config: the checkpoint's config.json.
        vocab_interval: the vocabulary rows that the last stage's logits cover on this rank.
        vocab_size: rows of the whole vocabulary.
        num_layers: layers of the whole model.
        num_bytes: bytes of this rank's parameters in memory.
        bytes_read: weight bytes read from the files.
        layer_ranges: layers of each stage.
        adapter: what of an adapter is on this rank, in words; empty without one.
        flow: the traced dataflow; None for a whole model that nobody asked to trace.
        cuts: which part of a parameter this rank holds, of those that are cut.
        shapes: of every parameter of the whole model.
        parameters: paths of those that this rank's stage holds, in the model's order.
    """

    stage: Stage
    config: dict[str, Any]
    vocab_interval: Interval
    vocab_size: int
    num_layers: int
    num_bytes: int
    bytes_read: int
    layer_ranges: list[Interval]
    adapter: str = ""
    flow: Dataflow | None = None
    cuts: dict[str, Cut] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()

    def __str__(self) -> str:
        layers = "+".join(str(stop - start) for start, stop in self.layer_ranges)
        return (
            f"{self.config['model_type']}, {layers} layers; this rank: layers "
            f"{self.stage.start}-{self.stage.stop - 1}, {self.num_bytes / 2**20:.0f} MiB of weights"
            f" from {self.bytes_read / 2**20:.0f} MiB of the files"
            + (f"; {self.adapter}" if self.adapter else "")
        )


def load_model(
    checkpoint: Checkpoint | GGUFCheckpoint,
    mesh: Mesh,
    *,
    dtype: str = "auto",
    weights: str = "auto",
    tp_shares: Sequence[float] | None = None,
    pp_layers: Sequence[int] | None = None,
    adapter: str | Path | Attach | None = None,
    chunk: tuple[int, int] = (0, 1),
    prepare: Prepare | None = None,
) -> LoadedModel:
    """Load this rank's part of a model.

    Args:
        checkpoint: what `open_checkpoint` gave; closed at the end.
        dtype: "auto" is float32 on a CPU and the checkpoint's on a GPU.
        weights: "keep" quantized weights packed or "dequantize" them; "auto" dequantizes on a CPU,
            where packed products are many times slower than float32 ones.
        tp_shares: relative share of each tensor-parallel rank; None: by the bandwidth of
            `mesh.hosts`, equal where that is None.
        pp_layers: layers of each stage; None balances the time to read what a token needs.
        adapter: what `open_adapter` opens, or a function that attaches something to the skeleton;
            None for the plain model.
        chunk: (number, how many): with several stages on each rank, interleaved, which of this
            rank's to load. `check_coverage` is then the caller's.
        prepare: is given the model before it is cut into stages, and the whole shapes of its
            parameters; e.g. to wrap layers. It says how much work each layer is per byte, and the
            head last. The dataflow is traced, whatever the layout, where this is not None.

    Raises:
        ConfigError: the architecture, the layout or the adapter is refused; nothing has been read.
        IntegrityError: files are missing, truncated or do not belong together.
    """
    dtype, weights = resolve_formats(dtype, weights)
    skeleton = build_skeleton(
        checkpoint.config, checkpoint.tensors, DTYPES.get(dtype), _weight_format(weights)
    )
    model = skeleton.model
    lora: Attached | None = None
    if adapter is not None:
        lora = adapter(skeleton) if callable(adapter) else attach(skeleton, open_adapter(adapter))
    num_layers = len(find_layers(model))
    number, num_chunks = chunk
    num_stages = mesh.dims.pp * num_chunks
    flow = trace(model) if num_stages > 1 or prepare else None
    shapes = {path: array.shape for path, array in tree_flatten(model.parameters())}
    sizes = {path: array.nbytes for path, array in tree_flatten(model.parameters())}
    vocab = vocab_size(model)
    balance = Balance(mesh, sizes, tp_shares, pp_layers, speak=number == 0)
    cuts: dict[str, Cut] = {}
    interval = (0, vocab)
    if mesh.dims.tp > 1:
        plan = plan_for(skeleton.model_type)
        cuts = apply_plan(model, plan, mesh.tp_group, Shares(balance.tp_shares))
        interval = vocab_interval(model) or interval
    work = prepare(model, shapes) if prepare else None
    ranges = balance.stage_layers(num_layers, num_stages, flow, work)
    check_layers(num_layers, ranges)
    stage = build_stage(model, flow, *ranges[number * mesh.dims.pp + mesh.pp])
    reader = Reader(checkpoint, skeleton, cuts)
    wanted = [path for path in sizes if path in stage.parameters]
    if num_chunks == 1:
        check_coverage(mesh, wanted, sizes)
    num_bytes = 0
    provided = lora.sources if lora else {}
    arrays = reader.arrays([path for path in wanted if path not in provided])
    if lora:
        arrays = chain(arrays, lora.arrays(wanted, cuts))
    for parameter, array in arrays:
        model.update(tree_unflatten([(parameter, array)]))
        num_bytes += array.nbytes
    bytes_read = checkpoint.bytes_read
    checkpoint.close()
    if lora:
        lora.settle(wanted)
        bytes_read += lora.bytes_read
        lora.close()
    return LoadedModel(
        stage,
        skeleton.config,
        interval,
        vocab,
        num_layers,
        num_bytes,
        bytes_read,
        ranges,
        lora.describe(wanted) if lora else "",
        flow,
        cuts,
        shapes,
        tuple(wanted),
    )


def resolve_formats(dtype: str, weights: str) -> tuple[str, str]:
    """What "auto" is on this host; "checkpoint" for the checkpoint's own dtype."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if weights == "auto":
        weights = "dequantize" if on_cpu else "keep"
    if dtype == "auto":
        dtype = "float32" if on_cpu else "checkpoint"
    return dtype, weights


def _weight_format(weights: str) -> WeightFormat:
    return "dequantize" if weights == "dequantize" else "keep"


def vocab_size(model: nn.Module) -> int:
    """Rows of the model's logits, from an unevaluated forward pass.

    Raises:
        ConfigError: the model has kernels for Metal only and this host has none.
    """
    try:
        return model(mx.zeros((1, 1), mx.int32)).shape[-1]
    except RuntimeError as error:
        if "metal" not in str(error).lower():
            raise
        name = type(model).__module__.rpartition(".")[2]
        raise ConfigError(
            f"{name}: needs Metal kernels, which this host does not have; run it on Macs"
        ) from None


def check_coverage(mesh: Mesh, wanted: Collection[str], paths: Collection[str]) -> None:
    """Every one of the model's parameters `paths` is loaded by some stage: asserted at every start.

    Raises:
        IntegrityError: one is not.
    """
    loaded = set().union(*mesh.replica.allgather(set(wanted)))
    if left_out := sorted(set(paths) - loaded):
        raise IntegrityError(
            f"{len(left_out)} parameters belong to no stage, for example {left_out[0]}; "
            "use parallel.pp=1 and report the model"
        )


class Reader:
    """Turns checkpoint bytes into parameters, cut for this rank, one at a time."""

    def __init__(
        self, checkpoint: Checkpoint | GGUFCheckpoint, skeleton: Skeleton, cuts: Mapping[str, Cut]
    ):
        self.checkpoint, self.skeleton, self.cuts = checkpoint, skeleton, cuts

    def arrays(self, paths: Sequence[str]) -> Iterator[tuple[str, mx.array]]:
        """(parameter path, evaluated array) of every path; derived ones come last, grouped by
        the tensors they share."""
        derived: list[str] = []
        for path in paths:
            parts = self._parts(path)
            if all(self.skeleton.origins[part].stored for part in parts):
                yield path, self._finish(path, {p: self._stored(path, p) for p in parts})
            else:
                derived.append(path)
        for group in self._sharing(derived):
            yield from self._derived(group)

    def _parts(self, path: str) -> list[str]:
        """The sanitized tensors that make up a parameter: itself, or a packed triple."""
        module = path.removesuffix(".weight")
        if path.endswith(".weight") and module in self.skeleton.packed:
            names = (path, f"{module}.scales", f"{module}.biases")
            return [name for name in names if name in self.skeleton.origins]
        return [path]

    def _stored(self, path: str, part: str) -> mx.array:
        name = self.skeleton.origins[part].tensors[0]
        return self.checkpoint.read(name, self._part_cut(path, part))

    def _part_cut(self, path: str, part: str) -> Cut | None:
        """The cut of one stored part. Along a packed axis it is widened to whole groups; `_finish`
        takes the exact positions out after dequantizing."""
        cut, packing = self.cuts.get(path), self._packing(path)
        if cut is None or packing is None or not self._along_packed_axis(path, cut):
            return cut
        wide = Cut(cut.axis, tuple(_widen(i, packing.group_size) for i in cut.intervals))
        if part == path:
            return wide.scaled(packing.bits, 32)
        return wide.scaled(1, packing.group_size)

    def _packing(self, path: str) -> Quantization | None:
        return self.skeleton.packed.get(path.removesuffix(".weight"))

    def _along_packed_axis(self, path: str, cut: Cut) -> bool:
        name = self.skeleton.origins[path].tensors[0]
        return cut.axis == len(self.checkpoint.tensors[name].shape) - 1

    def _finish(self, path: str, parts: Mapping[str, mx.array]) -> mx.array:
        """Dequantize if need be, cast, make it this parameter's own memory."""
        array, packing = parts[path], self._packing(path)
        if packing is not None:
            module = path.removesuffix(".weight")
            # Scales in float16 would round the products; float32 is exact for 8-bit integers.
            scales = _wide(parts[f"{module}.scales"])
            biases = parts.get(f"{module}.biases")
            array = mx.dequantize(
                array,
                scales,
                None if biases is None else _wide(biases),
                group_size=packing.group_size,
                bits=packing.bits,
                mode=packing.mode,
            )
            cut = self.cuts.get(path)
            if cut is not None and self._along_packed_axis(path, cut):
                array = _take_exact(array, cut, packing.group_size)
        array = mx.contiguous(array.astype(self.skeleton.dtypes[path]))
        mx.eval(array)
        recorder.tick()
        return array

    def _sharing(self, paths: Sequence[str]) -> list[list[str]]:
        """Derived parameters grouped so that groups share no checkpoint tensor."""
        group_of: dict[str, list[str]] = {}
        tensors_of: dict[int, set[str]] = {}
        for path in paths:
            needed = {t for part in self._parts(path) for t in self.skeleton.origins[part].tensors}
            merged = [path]
            for group in {id(group_of[t]): group_of[t] for t in needed if t in group_of}.values():
                needed |= tensors_of.pop(id(group))
                merged = group + merged
            tensors_of[id(merged)] = needed
            for tensor in needed:
                group_of[tensor] = merged
        return list({id(group): group for group in group_of.values()}.values())

    def _derived(self, paths: Sequence[str]) -> Iterator[tuple[str, mx.array]]:
        """Parameters that `sanitize` computes (stacked experts, split projections): their whole
        source tensors are read, computed, cut and dropped before the next group."""
        parts = {path: self._parts(path) for path in paths}
        origins = self.skeleton.origins
        names = {t for ps in parts.values() for part in ps for t in origins[part].tensors}
        outputs = self.skeleton.sanitized({name: self.checkpoint.read(name) for name in names})
        for path in paths:
            cut_parts = {}
            for part in parts[path]:
                cut = self._part_cut(path, part)
                cut_parts[part] = outputs[part] if cut is None else take(outputs[part], cut)
            yield path, self._finish(path, cut_parts)


def take(array: mx.array, cut: Cut) -> mx.array:
    """The positions of `cut` out of a whole array, unevaluated."""
    index: list[Any] = [slice(None)] * array.ndim
    pieces = []
    for start, stop in cut.intervals:
        index[cut.axis] = slice(start, stop)
        pieces.append(array[tuple(index)])
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=cut.axis)


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _widen(interval: Interval, group: int) -> Interval:
    start, stop = interval
    return start // group * group, -(-stop // group) * group


def _take_exact(array: mx.array, cut: Cut, group: int) -> mx.array:
    """Undo `_widen`: out of concatenated whole groups, the positions that were asked for."""
    wide = [_widen(interval, group) for interval in cut.intervals]
    starts = [start for start, _ in offsets([stop - start for start, stop in wide])]
    exact = tuple(
        (at + start - w, at + stop - w)
        for at, (start, stop), (w, _) in zip(starts, cut.intervals, wide, strict=True)
    )
    return take(array, Cut(cut.axis, exact))
