"""Fine-tuning in one process: what must change no number, and what is refused."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from hpcmlx.comm import Communicator
from hpcmlx.errors import ConfigError
from hpcmlx.mesh import Mesh
from hpcmlx.parallel.partition import Cut
from hpcmlx.training.documents import document_caches
from hpcmlx.training.loss import cross_entropy
from hpcmlx.training.methods import Method
from hpcmlx.training.optim import OptimSettings
from hpcmlx.training.placement import Place
from hpcmlx.training.stages import load_stages
from tests.tiny_configs import new
from tests.training_runs import (
    Examples,
    Setup,
    TrainLayout,
    batches,
    examples,
    open_run,
    sample,
    save_model,
    to_ours,
    twin_truth,
)
from tests.twin import load_twin

ALONE = TrainLayout()
DATA = examples(20)
TOLERANCE = 1e-5  # of gradients, in units of a tensor's largest number: other orders of sums


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The directory of a model, made once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(name):
        return made.get(name) or made.setdefault(name, save_model(folder / name, name))

    return get


def mesh():
    return Mesh(ALONE.dims, Communicator())


def one_step(path, setup, data=DATA, **options):
    """(result, gradients) of the first step."""
    plan = batches(data, 1, 1, **options)
    with open_run(path, mesh(), ALONE, setup) as run:
        (result,) = run.train(data, plan, 0, 1)
        return result, run.gather(run.sums.last)


# -- what costs memory or saves it, and nothing else --


@pytest.mark.parametrize("name, kind", [("gemma3_text", "full"), ("qwen3_moe", "lora")])
def test_recomputing_changes_no_loss(checkpoint, name, kind):
    method = Method(kind, 3, 2.0)
    with_it, grads = one_step(checkpoint(name), Setup(method))
    without, truth = one_step(checkpoint(name), Setup(method, recompute=False))
    assert with_it.loss == without.loss
    assert grads.error(truth.whole())[0] <= 1e-6


def test_recomputing_lets_activations_go(checkpoint):
    """Of long rows all layers' activations are the most there is in memory."""
    data, peaks = Examples([sample(0, 256)]), []
    for recompute in (False, True):
        with open_run(checkpoint("llama"), mesh(), ALONE, Setup(recompute=recompute)) as run:
            plan = batches(data, 1, 1, global_batch_size=1, max_length=256)
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            run.train(data, plan, 0, 1)
            peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.6 * peaks[0], peaks


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_loss_in_pieces_is_the_loss(checkpoint, chunk):
    pieces, grads = one_step(checkpoint("llama_tied"), Setup(loss_chunk=chunk))
    whole, truth = one_step(checkpoint("llama_tied"), Setup(loss_chunk=10**6))
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    assert grads.error(truth.whole())[0] <= TOLERANCE


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"pad_to": 16}]
)
def test_microbatches_and_padding_change_nothing(checkpoint, options):
    """Rows alone or together, of several lengths in a step or of one."""
    result, grads = one_step(checkpoint("gemma3_text"), Setup(), **options)
    usual, truth = one_step(checkpoint("gemma3_text"), Setup())
    assert result.loss == pytest.approx(usual.loss, rel=1e-6)
    assert grads.error(truth.whole())[0] <= TOLERANCE


def test_a_replica_that_has_no_rows_adds_nothing(checkpoint):
    """One row for two replicas: the second one's microbatch is padding."""
    data = Examples([sample(0, 9)])
    plan = batches(data, 2, 1, global_batch_size=1)
    rows = [part[0] for part in plan.step(0).microbatches]
    assert sorted(len(r.ids) for r in rows) == [0, 1]
    empty = next(i for i, r in enumerate(rows) if not r.ids)
    with open_run(checkpoint("llama"), mesh(), ALONE, Setup()) as run:
        run.mesh.dp = empty  # as that replica sees it
        (result,) = run.train(data, plan, 0, 1)
        assert result.loss == 0
        assert all(not g.any().item() for g in run.sums.last.values())


def test_gradients_are_clipped_by_their_norm(checkpoint):
    moved = []
    for clip in (None, 0.01):
        setup = Setup(optim=OptimSettings("sgd", 1.0), clip_norm=clip)
        with open_run(checkpoint("llama"), mesh(), ALONE, setup) as run:
            (result,) = run.train(DATA, batches(DATA, 1, 1), 0, 1)
            now = run.stages.parameters()
            squares = [np.square(np.array(now[n] - a)).sum() for n, a in run.first.items()]
            moved.append(np.sqrt(np.sum(squares)))
    assert result.grad_norm > 1
    assert moved == pytest.approx([result.grad_norm, 0.01], rel=1e-3)


# -- documents --


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_packed_row_is_its_documents_one_by_one(checkpoint, name):
    """gemma3's window of 4 is shorter than the documents."""
    data = Examples([sample(i, n, p) for i, (n, p) in enumerate([(9, 1), (7, 4), (5, 2), (8, 1)])])
    packed, grads = one_step(
        checkpoint(name), Setup(), data, packing=True, global_batch_size=2, micro_batch_size=2
    )
    assert batches(data, 1, 1, packing=True, global_batch_size=2).step(0).num_targets == 21
    plan = batches(data, 1, 1, global_batch_size=4)
    truth = twin_truth(checkpoint(name), Setup(), data, plan, 1, {})
    assert packed.loss == pytest.approx(truth.losses[0], rel=TOLERANCE)
    assert packed.grad_norm == pytest.approx(truth.norms[0], rel=TOLERANCE)
    assert grads.error(truth.grads)[0] <= TOLERANCE


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_a_recurrence_would_run_on_into_the_next_document(name):
    with pytest.raises(ConfigError, match=f"{name} keeps .* set train.packing=false"):
        document_caches(new(name), mx.ones((1, 4), mx.int32))


# -- methods --


def test_what_is_trained_is_what_mlx_lm_trains(checkpoint):
    """The last two layers, with the factors' shapes and the size of their first values."""
    stages = load_stages(str(checkpoint("qwen3_moe")), mesh(), Method("lora", 3, 2.0, 2))
    model = load_twin(checkpoint("qwen3_moe"))
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 3, "scale": 2.0, "dropout": 0.0})
    theirs = to_ours(dict(tree_flatten(model.trainable_parameters())))
    ours = stages.parameters()
    assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in theirs.items()}
    assert stages.num_trained == sum(a.size for a in theirs.values())
    for name, array in ours.items():
        bound = array.shape[-1] ** -0.5 if name.endswith("lora_down") else 0
        assert mx.abs(array).max().item() <= bound
        assert mx.abs(array).max().item() >= 0.8 * bound


def test_modules_by_pattern_and_seeds(checkpoint):
    path, pattern = str(checkpoint("llama")), ("self_attn.q_proj", "lm_head")
    first, same, other = (
        load_stages(path, mesh(), Method(modules=pattern, seed=seed)).parameters()
        for seed in (1, 1, 2)
    )
    modules = {name.rpartition(".")[0] for name in first}
    assert modules == {f"model.layers.{i}.self_attn.q_proj" for i in range(4)} | {"lm_head"}
    for name, array in first.items():
        assert mx.array_equal(array, same[name])
        assert mx.array_equal(array, other[name]) == name.endswith("lora_up")


@pytest.mark.parametrize(
    "name, method, said",
    [
        ("llama", Method(modules=("*.no_such",)), r"names no projection .* it has .*q_proj"),
        ("llama_4bit", Method("full"), "is quantized and cannot be trained .* method.kind=lora"),
        ("llama", Method("full", modules=("no_such",)), "leave nothing to train"),
        ("llama", Method("dora", modules=("model.embed_tokens",)), "DoRA on model.embed_tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(checkpoint, name, method, said):
    with pytest.raises(ConfigError, match=said):
        load_stages(str(checkpoint(name)), mesh(), method, weights="keep")


# -- parts --


def test_cross_entropy_of_a_large_vocabulary():
    rng = np.random.default_rng(0)
    logits = (5 * rng.standard_normal((3, 49_153))).astype(np.float32)
    tokens = np.array([0, 49_152, 777])
    wide = logits.astype(np.float64)
    truth = np.logaddexp.reduce(wide, axis=-1) - wide[np.arange(3), tokens]
    nll = cross_entropy(mx.array(logits), mx.array(tokens), 0, Communicator())
    np.testing.assert_allclose(np.array(nll), truth, rtol=1e-6)
    grad = mx.grad(lambda x: cross_entropy(x, mx.array(tokens), 0, Communicator()).sum())(
        mx.array(logits)
    )
    softmax = np.exp(wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True))
    softmax[np.arange(3), tokens] -= 1
    np.testing.assert_allclose(np.array(grad), softmax, atol=1e-6)


def test_each_position_has_one_owner():
    """Rows 2 and 3 are on both ranks, and the first one's."""
    whole = mx.arange(12.0).reshape(6, 2)
    cuts = Cut(0, ((0, 4),)), Cut(0, ((2, 6),))
    first = Place((6, 2), cuts[0], "overlapping", cuts[0], (0,), True, ((0, 4),))
    second = Place((6, 2), cuts[1], "overlapping", Cut(0, ((4, 6),)), (0,), True, ((2, 4),))
    copy = Place((6, 2), cuts[1], "overlapping", Cut(0, ()), (0,), True, ())
    for places in ((first, second), (first, second, copy)):
        parts = [place.spread_own(place.local(whole)) for place in places]
        assert mx.array_equal(sum(parts[1:], parts[0]), whole)
    assert copy.owns_nothing and not second.owns_nothing
    doubled = first.spread(first.local(whole)) + second.spread(second.local(whole))
    assert mx.array_equal(doubled, whole * mx.array([1, 1, 2, 2, 1, 1])[:, None])
