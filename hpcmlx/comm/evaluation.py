"""Evaluations of MLX's graph, which run the collectives that were planned in it."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx

from hpcmlx.flight import recorder


def evaluate(*arrays: Any) -> None:
    """`mx.eval` as an operation of the flight recorder: it runs what was planned in the graph."""
    record, begin = recorder.evaluation(), time.perf_counter()
    mx.eval(*arrays)
    recorder.evaluating += time.perf_counter() - begin
    recorder.end(record)


def start_evaluation(*arrays: Any) -> None:
    """`mx.async_eval` likewise: it waits where too much is under way."""
    record, begin = recorder.evaluation(), time.perf_counter()
    mx.async_eval(*arrays)
    recorder.evaluating += time.perf_counter() - begin
    recorder.end(record)
