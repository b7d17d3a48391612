"""Which beginnings prompts have in common, in which order that makes rows cheap, and their caches.

All prompts are known before the first is answered, so sharing is planned: the tree of common
prefixes is built once (pure functions on token lists), and what saves enough tokens is computed
once on every stage and copied for each row. The engine is the caller.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

MIN_SAVED = 64  # tokens; less is not worth a forward pass of its own


@dataclass(frozen=True)
class Prefix:
    """A beginning that several prompts share.

    Attributes:
        tokens: all of it, from the prompts' first token on.
        parent: the longest shorter one that is computed too; -1 for none.
        stop: rows of this prefix and of longer ones that begin with it stand before this position
            of the plan's order.
    """

    tokens: Sequence[int]
    parent: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """In which order rows are taken and what they share.

    Attributes:
        order: indices into the prompts: rows of one prefix stand together, and among them the
            longest first, so that rows of equal length are neighbours and the last ones are short.
        prefixes: those worth computing; a parent stands before its children.
        prefix_of: for each prompt the number of its longest prefix, -1 for none.
    """

    order: list[int]
    prefixes: list[Prefix]
    prefix_of: list[int]


def plan_prefixes(
    prompts: Sequence[Sequence[int]], share: bool = True, min_saved: int = MIN_SAVED
) -> Plan:
    """Plan for `prompts`: what is to be in the caches before a row's last token is fed.

    Args:
        share: False to share nothing.
        min_saved: a prefix is kept where it saves its rows this many tokens together.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    if not share or len(prompts) < 2:
        return Plan(by_length, [], [-1] * len(prompts))
    arrays = [np.asarray(p, np.int32) for p in prompts]
    # Big-endian bytes sort as the numbers do.
    alphabetic = sorted(range(len(arrays)), key=lambda i: arrays[i].astype(">u4").tobytes())
    common = [_common(arrays[a], arrays[b]) for a, b in pairwise(alphabetic)]
    kept = _worthwhile(_intervals(common), min_saved)

    owner = [-1] * len(prompts)  # by alphabetic position: the innermost kept interval
    for number, (start, stop, _, _) in enumerate(kept):
        owner[start:stop] = [number] * (stop - start)
    members: dict[int, list[int]] = {}
    for position, number in enumerate(owner):
        members.setdefault(number, []).append(alphabetic[position])
    children: dict[int, list[int]] = {}
    for number, (_, _, _, parent) in enumerate(kept):
        children.setdefault(parent, []).append(number)

    order: list[int] = []
    stops = [0] * len(kept)
    # Depth first; a number that comes up the second time has all its rows behind it.
    todo = [(-1, False)]
    while todo:
        number, done = todo.pop()
        if done:
            stops[number] = len(order)
            continue
        order += sorted(members.get(number, []), key=lambda i: (-len(prompts[i]), i))
        if number >= 0:
            todo.append((number, True))
        todo += [(child, False) for child in reversed(children.get(number, []))]
    prefixes = [
        Prefix(prompts[alphabetic[start]][:depth], parent, stops[number])
        for number, (start, _, depth, parent) in enumerate(kept)
    ]
    prefix_of = [-1] * len(prompts)
    for number, rows in members.items():
        for row in rows:
            prefix_of[row] = number
    return Plan(order, prefixes, prefix_of)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two prompts begin with in common."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _intervals(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, stop, depth) of every run of neighbours that share `depth` tokens, outer ones first
    (the internal nodes of the prefix tree, from the neighbours' common lengths)."""
    found, stack = [], [(0, 0)]  # (start, depth) of the runs that are open
    for position, depth in enumerate([*common, 0]):
        start = position
        while stack and stack[-1][1] > depth:
            start, inner = stack.pop()
            found.append((start, position + 1, inner))
        if not stack or stack[-1][1] < depth:
            stack.append((start, depth))
    return sorted(found, key=lambda run: (run[0], run[2]))


def _worthwhile(
    intervals: Sequence[tuple[int, int, int]], min_saved: int
) -> list[tuple[int, int, int, int]]:
    """(start, stop, depth, parent) of the prefixes that save enough beyond their kept parent."""
    kept: list[tuple[int, int, int, int]] = []
    open_: list[int] = []
    for start, stop, depth in intervals:
        while open_ and kept[open_[-1]][1] <= start:
            open_.pop()
        parent = open_[-1] if open_ else -1
        above = kept[parent][2] if open_ else 0
        if (stop - start - 1) * (depth - above) >= min_saved:
            open_.append(len(kept))
            kept.append((start, stop, depth, parent))
    return kept


class PrefixCache:
    """The caches of the prefixes that rows are being drawn from, on this rank's stage."""

    def __init__(self, plan: Plan, prefill: Callable[[Sequence[int], list[Any] | None], list[Any]]):
        """
        Args:
            prefill: gives new caches after these tokens, on top of a copy of the given caches.
        """
        self._plan, self._prefill = plan, prefill
        self._caches: OrderedDict[int, list[Any]] = OrderedDict()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prefix that is held."""
        return [len(self._plan.prefixes[number].tokens) for number in self._caches]

    @property
    def entries(self) -> list[Any]:
        """All cache entries that are held."""
        return [entry for caches in self._caches.values() for entry in caches]

    def get(self, number: int) -> list[Any]:
        """The caches of a prefix, computed if need be. Not to be changed: fork them."""
        if number not in self._caches:
            prefix = self._plan.prefixes[number]
            parent = None if prefix.parent < 0 else self.get(prefix.parent)
            known = 0 if prefix.parent < 0 else len(self._plan.prefixes[prefix.parent].tokens)
            self._caches[number] = self._prefill(prefix.tokens[known:], parent)
        self._caches.move_to_end(number)
        return self._caches[number]

    def release(self, position: int) -> None:
        """Forget the prefixes that no row from `position` of the plan's order on begins with."""
        for number in [n for n in self._caches if self._plan.prefixes[n].stop <= position]:
            del self._caches[number]

    def shrink(self) -> bool:
        """Forget the prefix that was used longest ago; whether there was one."""
        return bool(self._caches) and self._caches.popitem(last=False) is not None
