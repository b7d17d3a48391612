"""The words in which a plan says how a model is cut, and how a plan is matched with a model.

`models/plans.py` writes plans in these words; `tensor.apply_plan` carries them out. A plan and a
model that do not fit exactly are refused: a projection that a plan forgets would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlx import nn
from mlx.utils import tree_flatten

from hpcmlx.errors import ConfigError

Dim = Literal["query", "key_value", "query_key_value", "hidden", "gate_up"]


@dataclass(frozen=True)
class Replicate:
    """Whole on every rank."""


@dataclass(frozen=True)
class Block:
    """An MLP or a mixture of experts: one all_sum makes its output whole."""


@dataclass(frozen=True)
class Attention:
    """An attention: one all_sum makes its output whole; its heads are dealt out.

    The fields name the attributes that count heads in the mlx-lm module: query heads, KV heads,
    query heads per KV head. Without KV heads all query heads share one latent (MLA), or each has
    its own keys.
    """

    query: str
    key_value: str | None = None
    per_key_value: str | None = None


@dataclass(frozen=True)
class Colwise:
    """A projection, or one per expert, whose output is cut; a fused one in several parts."""

    dim: Dim


@dataclass(frozen=True)
class Rowwise:
    """A projection, or one per expert, whose input is cut: its output is a partial sum."""

    dim: Dim


@dataclass(frozen=True)
class PerHead:
    """Cut along the first axis, one position per query head: attention sinks, MLA projections."""


@dataclass(frozen=True)
class VocabEmbedding:
    """The token embedding, cut by rows."""


@dataclass(frozen=True)
class VocabHead:
    """The output head, cut by rows: a rank's logits are those of its vocabulary rows."""


Rule = Replicate | Block | Attention | Colwise | Rowwise | PerHead | VocabEmbedding | VocabHead


@dataclass(frozen=True)
class Plan:
    """How one kind of model is cut.

    Attributes:
        name: the model type, for messages.
        rules: path of a module, or of a parameter that lies directly in a block, to its rule. `*`
            stands for one path component; a path that ends in `?` need not be there.
    """

    name: str
    rules: Mapping[str, Rule]

    def match(self, model: nn.Module) -> dict[str, Rule]:
        """The rule of every module and parameter of `model` that the plan names.

        Raises:
            ConfigError: a pattern that must match does not, two patterns match one path, a
                parameter of the model is under no rule, or a block has no part that is cut.
        """
        parameters = list(dict(tree_flatten(model.parameters())))
        paths = [path for path, _ in model.named_modules()] + parameters
        rules: dict[str, Rule] = {}
        for pattern, rule in self.rules.items():
            wanted = re.compile(re.escape(pattern.rstrip("?")).replace(r"\*", "[^.]+"))
            found = [path for path in paths if wanted.fullmatch(path)]
            if not found and not pattern.endswith("?"):
                raise self._misfit(f"has no {pattern}")
            if twice := [path for path in found if path in rules]:
                raise self._misfit(f"has two rules for {twice[0]}")
            rules |= dict.fromkeys(found, rule)
        blocks = {path for path, rule in rules.items() if isinstance(rule, Block | Attention)}
        for path in parameters:
            if not {path, parent(path)} & (rules.keys() - blocks):
                raise self._misfit(f"has {path}, which the plan does not name")
        cut = {
            kind: [path for path, rule in rules.items() if isinstance(rule, kind)]
            for kind in (Colwise, Rowwise)
        }
        for block in blocks:
            for kind, inside in cut.items():
                if not any(path.startswith(f"{block}.") for path in inside):
                    raise self._misfit(f"has nothing {kind.__name__.lower()} in {block}")
        return rules

    def _misfit(self, what: str) -> ConfigError:
        return ConfigError(
            f"the tensor-parallel plan of {self.name} does not fit: the model {what}; "
            "set parallel.tp=1 and use parallel.pp"
        )


def parent(path: str) -> str:
    """The path of the module that holds `path`."""
    return path.rpartition(".")[0]
