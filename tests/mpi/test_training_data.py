"""Each host tokenizes for itself; what fails on one rank fails on all."""

from __future__ import annotations

import socket

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import PreTrainedTokenizerFast

from hpcmlx.errors import InputError, OutputError
from hpcmlx.training.data.dataset import open_dataset
from hpcmlx.training.data.examples import ExampleSettings
from tests.fixtures import save_tokenizer, write_rows

pytestmark = pytest.mark.mpi
SETTINGS = ExampleSettings(40)
ROWS = [{"text": "one"}, {"prompt": "hi", "completion": "yo"}]


@pytest.fixture
def tokenizer(shared, world):
    path = shared / f"tokenizer-{world.rank}"
    save_tokenizer(path)
    return TokenizerWrapper(PreTrainedTokenizerFast.from_pretrained(path))


@pytest.fixture
def own_host(world, monkeypatch):
    """Every rank on a host of its own."""
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{world.rank}")


def test_one_rank_tokenizes_for_all(world, shared, tokenizer, on_root):
    path = on_root(lambda: write_rows(shared / "one.jsonl", ROWS))
    # Only the first rank of the host has a tokenizer at all.
    used = tokenizer if world.rank == 0 else None
    dataset = open_dataset([path], used, SETTINGS, shared / "one", world)
    seen = world.allgather((dataset.content_hash, dataset[1].tokens.tolist()))
    assert len(seen[0][1]) == 8 and all(other == seen[0] for other in seen)


def test_hosts_that_share_nothing(world, shared, tokenizer, own_host):
    folder = shared / f"host-{world.rank}"
    folder.mkdir()
    path = write_rows(folder / "train.jsonl", ROWS)
    dataset = open_dataset([path], tokenizer, SETTINGS, folder / "cache", world)
    assert len(list((folder / "cache").glob("*.h5"))) == 1
    assert len(set(world.allgather(dataset.content_hash))) == 1


def test_hosts_with_different_data_are_refused(world, shared, tokenizer, own_host):
    last = world.size - 1
    path = write_rows(shared / f"{world.rank}.jsonl", ROWS[: 1 if world.rank == last else 2])
    if world.size == 1:
        return
    with pytest.raises(InputError, match=f"rank {last} on host{last} and rank 0 on host0 have"):
        open_dataset([path], tokenizer, SETTINGS, shared / f"cache-{world.rank}", world)


@pytest.mark.parametrize("fault", ["bad row", "no cache"])
def test_what_fails_on_one_rank_fails_on_all(world, shared, tokenizer, own_host, fault):
    last = world.size - 1
    broken = world.rank == last
    rows = [*ROWS, "{"] if broken and fault == "bad row" else ROWS
    path = write_rows(shared / f"some-{world.rank}.jsonl", rows)
    cache = path if broken and fault == "no cache" else shared / f"some-{world.rank}"
    kind, text = {
        "bad row": (InputError, f"some-{last}.jsonl:3: not JSON"),
        "no cache": (OutputError, f"cannot create .*some-{last}.jsonl"),
    }[fault]
    where = rf" \(found by rank {last} on host{last}\)" if world.size > 1 else ""
    with pytest.raises(kind, match=f"{text}.*{where}"):
        open_dataset([path], tokenizer, SETTINGS, cache, world)
