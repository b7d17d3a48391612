"""What the training tests call truth: the twin against transformers on torch, and why the numbers
of mlx-lm's own trainer are other ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers

from hpcmlx.training.optim import OptimSettings
from tests.test_adapters import noise
from tests.tiny_configs import CONFIGS, FULL, ROPE_DEFAULT, SLIDING, build
from tests.training_twin import TwinTrainer, global_norm, logsumexp, relative_error
from tests.twin import load_twin

TOLERANCE = 1e-5  # relative, in float32
# Names that transformers has for what mlx-lm says in another way.
TORCH_NAMES: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "rope_parameters": {FULL: ROPE_DEFAULT, SLIDING: ROPE_DEFAULT},
    }
}


# mlx-lm rounds the root of gemma3's hidden_size, which scales embeddings, to bfloat16, also where
# all else is float32. That of 64 is exact.
OURS: dict[str, dict[str, Any]] = {"gemma3_text": {"hidden_size": 64}}


def random_batch(seed: int, lengths: list[int], prompts: list[int]) -> tuple[mx.array, mx.array]:
    """(tokens, targets), each [rows, longest]: random rows of these lengths, padded, whose first
    tokens are a prompt, which has no targets."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), max(lengths)), np.int32)
    targets = np.zeros(tokens.shape, bool)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        tokens[row, :length] = rng.integers(1, 128, length)
        targets[row, prompt:length] = True
    return mx.array(tokens), mx.array(targets)


BATCHES = [random_batch(seed, [12, 7, 9], [1, 3, 8]) for seed in range(3)]


def settings_of(name: str) -> dict[str, Any]:
    return CONFIGS[name] | OURS.get(name, {})


def torch_twin(name: str):
    """A random model of transformers, of the tiny configuration `name`, and torch."""
    torch = pytest.importorskip("torch", reason="NOT CHECKED: the truth itself (install torch)")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    settings = settings_of(name) | {"rope_parameters": ROPE_DEFAULT} | TORCH_NAMES.get(name, {})
    settings = {key: value for key, value in settings.items() if key != "model_type"}
    config = AutoConfig.for_model(name, **settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            shake = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(shake / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * shake)
    return torch, model.train()


def through_mlx(model, name: str, folder: Path) -> nn.Module:
    """What transformers saves, as mlx-lm reads it."""
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings_of(name)))
    return load_twin(folder)


def torch_loss(torch, model, tokens: mx.array, targets: mx.array):
    tokens, targets = torch.tensor(tokens.tolist()), torch.tensor(targets.tolist())
    logits = model(tokens[:, :-1]).logits
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -chosen[targets[:, 1:]].sum() / targets.sum()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "mixtral"])
def test_loss_and_gradients_as_torch(tmp_path, name):
    torch, model = torch_twin(name)
    twin = TwinTrainer(through_mlx(model, name, tmp_path / "weights"), OptimSettings("sgd"), 1)
    ours = twin.step(*BATCHES[0])
    loss = torch_loss(torch, model, *BATCHES[0])
    loss.backward()
    assert ours.loss == pytest.approx(loss.item(), rel=TOLERANCE)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert ours.grad_norm == pytest.approx(norm.item(), rel=TOLERANCE)
    # Gradients go the way of the weights, and come out under mlx-lm's names.
    for parameter in model.parameters():
        parameter.data = parameter.grad
    truth = dict(tree_flatten(through_mlx(model, name, tmp_path / "gradients").parameters()))
    assert ours.grads.keys() == truth.keys()
    errors = {path: relative_error(ours.grads[path], truth[path]) for path in truth}
    assert max(errors.values()) <= TOLERANCE, max(errors.items(), key=lambda item: item[1])


def test_steps_as_torch(tmp_path):
    torch, model = torch_twin("llama")
    settings = OptimSettings("adamw", 0.003, weight_decay=0.1)
    twin = TwinTrainer(through_mlx(model, "llama", tmp_path / "weights"), settings, 6, max_norm=1.0)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.003)
    for step in range(6):
        ours, batch = twin.step(*BATCHES[step % 3]), BATCHES[step % 3]
        optimizer.zero_grad()
        loss = torch_loss(torch, model, *batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert ours.loss == pytest.approx(loss.item(), rel=TOLERANCE), step
        assert ours.grad_norm == pytest.approx(norm.item(), rel=10 * TOLERANCE), step
        assert norm > 1  # it was clipped
    assert twin.steps[-1].loss < twin.steps[2].loss


def test_lora_gradients_are_those_of_the_product(tmp_path):
    """W + scale (A B)^T: what the factors' gradients must be follows from the weight's."""
    whole = TwinTrainer(build("llama"), OptimSettings(), 1)
    model = build("llama")
    model.freeze()
    linear_to_lora_layers(model, 4, {"rank": 3, "scale": 2.0, "dropout": 0.0})
    twin = TwinTrainer(model, OptimSettings(), 1)
    twin.params = {n: 0.1 * noise(v.shape, i) for i, (n, v) in enumerate(twin.params.items())}
    assert len(twin.params) == 2 * 7 * 4
    for path in list(whole.params):
        module = path.removesuffix(".weight")
        if f"{module}.lora_a" in twin.params:
            a, b = twin.params[f"{module}.lora_a"], twin.params[f"{module}.lora_b"]
            whole.params[path] = whole.params[path] + 2.0 * (a @ b).T
    loss, grads = twin.gradients(*BATCHES[0])
    truth, full = whole.gradients(*BATCHES[0])
    assert loss.item() == pytest.approx(truth.item(), rel=TOLERANCE)
    for path, grad in grads.items():
        module, _, role = path.rpartition(".")
        by_weight = 2.0 * full[f"{module}.weight"].T  # [in, out]
        if role == "lora_a":
            expected = by_weight @ twin.params[f"{module}.lora_b"].T
        else:
            expected = twin.params[f"{module}.lora_a"].T @ by_weight
        assert relative_error(grad, expected) < TOLERANCE, path


def test_logsumexp_of_a_large_vocabulary():
    logits = noise((2, 49_153), 0)
    truth = np.logaddexp.reduce(np.array(logits).astype(np.float64), axis=-1)
    np.testing.assert_allclose(np.array(logsumexp(logits)), truth, rtol=3e-7)
    grad = mx.grad(lambda x: logsumexp(x)[0])(logits)
    assert relative_error(grad[0], mx.softmax(logits[0].astype(mx.float32))) < TOLERANCE


# -- mlx-lm's trainer --

ROWS = [(4, 0), (6, 2), (30, 5), (25, 0)]  # (length, prompt) of each text


def mlx_batches() -> list[tuple[mx.array, mx.array]]:
    """Two batches of two texts, padded by mlx-lm: (tokens [2, 33], [2, 2] (prompt, length))."""
    rng = np.random.default_rng(0)
    rows = [(rng.integers(1, 128, length).tolist(), prompt) for length, prompt in ROWS]
    batches = sorted(iterate_batches(rows, 2, 2048), key=lambda batch: batch[1][0, 1].item())
    assert [tokens.shape for tokens, _ in batches] == [(2, 33)] * 2
    return batches


def masks(batch: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
    """([rows, seq], [rows, seq]) bool: a text's own targets, and the padding right behind it."""
    tokens, lengths = batch
    position = mx.arange(tokens.shape[1])[None]
    start, stop = mx.maximum(lengths[:, :1], 1), lengths[:, 1:]
    return (position >= start) & (position < stop), position == stop


def test_mlx_lm_asks_for_a_token_of_padding_in_every_row():
    twin = TwinTrainer(build("llama"), OptimSettings(), 1)
    for batch in mlx_batches():
        theirs, count = default_loss(twin.model, *batch)
        own, pad = masks(batch)
        assert count.item() == own.sum().item() + 2
        # Its number is the twin's, were the padding, token 0, a target.
        assert theirs.item() == pytest.approx(twin.evaluate(batch[0], own | pad), rel=1e-6)
        ours, behind = twin.evaluate(batch[0], own), twin.evaluate(batch[0], pad)
        excess = 2 * (behind - ours) / count.item()
        assert theirs.item() - ours == pytest.approx(excess, rel=1e-4)
        assert abs(excess) > 0.01


def test_mlx_lm_takes_the_mean_of_means():
    """Accumulated or over ranks: its gradient is the mean of the batches' mean gradients, so that a
    token of a short text counts for more than one of a long text."""
    twin = TwinTrainer(build("llama"), OptimSettings(), 1)
    batches = mlx_batches()
    losses, counts, grads = [], [], []
    for batch in batches:
        (loss, count), grad = nn.value_and_grad(twin.model, default_loss)(twin.model, *batch)
        losses.append(loss.item())
        counts.append(count.item())
        grads.append(dict(tree_flatten(grad)))
    tokens = mx.concatenate([tokens for tokens, _ in batches])
    targets = mx.concatenate([own | pad for own, pad in map(masks, batches)])
    loss, truth = twin.gradients(tokens, targets)
    # Weighted by their targets, its own numbers are the twin's.
    weighted = np.average(losses, weights=counts)
    assert loss.item() == pytest.approx(weighted, rel=1e-6)
    total = sum(counts)
    for path, grad in truth.items():
        by_token = sum(n / total * g[path] for n, g in zip(counts, grads, strict=True))
        assert relative_error(by_token, grad) < TOLERANCE, path
    # As mlx-lm takes them, they are not.
    first, second = losses
    share = counts[0] / total
    assert np.mean(losses) - weighted == pytest.approx((0.5 - share) * (first - second), rel=1e-6)
    off = {path: (grads[0][path] + grads[1][path]) / 2 - grad for path, grad in truth.items()}
    assert global_norm(off) > 0.3 * global_norm(truth)
