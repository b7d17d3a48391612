"""A generate job's errors that only show while it runs, and the disk that it asks for."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from hpcmlx.inference.generate import _one_per_row
from hpcmlx.inference.rows import RowError
from tests.fixtures import copy_model, run, write_rows
from tests.fixtures import model as model


def test_a_row_whose_samples_all_fail_is_one_error(model, tmp_path):
    broken = copy_model(model, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], np.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "mlx"})
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "id": "second"}])
    line = [f"model.path={broken}", f"input={rows}", f"run_dir={tmp_path / 'run'}"]
    line += ["sampling.n=3", "sampling.temperature=1", "parallel.dp=2", "inference.batch_size=1"]
    outcome = run("generate", *line, ranks=2)
    assert outcome.code == 64, outcome.err
    errors = (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(error)["id"] for error in errors] == ["1", "second"]
    for error in errors:
        assert "not finite after 0 tokens of sample 0" in error


def test_of_each_row_the_lowest_samples_error_is_kept():
    def error(index, text):
        return RowError(index, str(index), None, "not_finite", text)

    one = [(2, error(5, "5.2")), (0, error(7, "7.0"))]
    other = [(1, error(7, "7.1")), (1, error(5, "5.1"))]
    assert [e.message for e in _one_per_row([one, [], other])] == ["5.1", "7.0"]
