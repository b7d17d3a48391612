"""MLX's lazy graph as data: which operation makes an array, and out of what.

`mx.export_to_dot` writes the graph for people to look at; here it is read back. The loader asks it
which tensors a parameter is computed from, the pipeline which outputs a layer depends on.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict

import mlx.core as mx

_MAX_NAMES = 1000  # MLX's bindings refuse more than 1024 keyword arguments
_EDGE = re.compile(r'^(?:"([^"]+)" -> (\d+)|(\d+) -> "([^"]+)")$', re.MULTILINE)


def operations(named: dict[str, mx.array]) -> tuple[dict[str, str], dict[str, set[str]]]:
    """MLX's graph of some unevaluated arrays.

    Returns:
        (name -> the operation that makes it, operation -> the operations that make its inputs).
        Operations have the same id in every export, unnamed arrays have not.
    """
    made_by: dict[str, str] = {}
    inputs: dict[str, set[str]] = defaultdict(set)
    names = list(named)
    for chunk in (names[i : i + _MAX_NAMES] for i in range(0, len(names), _MAX_NAMES)):
        text = io.StringIO()
        mx.export_to_dot(text, **{name: named[name] for name in chunk})
        edges = _EDGE.findall(text.getvalue())
        makers = {array: op for _, _, op, array in edges if op}
        made_by.update((name, makers[name]) for name in chunk)
        for array, op, _, _ in edges:
            if op and array in makers:
                inputs[op].add(makers[array])
    return made_by, inputs
