"""Weights by other names: a table of ours and another library's, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from unmask.core.interop.weights import State, check_names

# Our name: theirs. Several where our tensor is theirs joined along the rows, as a fused qkv is.
Table = dict[str, tuple[str, ...]]


def read_table(state: Mapping[str, Tensor], table: Table, whose: str) -> State:
    """Our weights from theirs; an UnmaskError lists the names that are unknown or missing in `whose` weights."""
    check_names(state, [name for theirs in table.values() for name in theirs], whose)
    return {
        ours: state[theirs[0]] if len(theirs) == 1 else torch.cat([state[name] for name in theirs])
        for ours, theirs in table.items()
    }


def write_table(state: Mapping[str, Tensor], table: Table, whose: str) -> State:
    """The inverse of `read_table`. Parts of one tensor are copies: no two share memory."""
    check_names(state, table, whose)
    written: State = {}
    for ours, theirs in table.items():
        parts = [state[ours]] if len(theirs) == 1 else [part.clone() for part in state[ours].chunk(len(theirs))]
        written |= dict(zip(theirs, parts, strict=True))
    return written


def prefixed(ours: str, theirs: str, table: Table) -> Table:
    """The same table for a part of a model, such as ``blocks.*.`` here and ``layers.*.`` there."""
    return {f"{ours}{name}": tuple(f"{theirs}{other}" for other in others) for name, others in table.items()}


class Names:
    """The names of models of any depth: a table with stars, each for one part of a name (a number, ``weight``).

    Args:
        patterns: the first that fits a name converts it; the n-th star of our name is the n-th of theirs.
        library: whose the other names are, such as ``transformers' ViTMAE``; for messages.
    """

    def __init__(self, patterns: Table, library: str) -> None:
        self.patterns, self.library = patterns, library

    def to_ours(self, state: Mapping[str, Tensor]) -> State:
        """Our weights from theirs; an UnmaskError lists names that fit no pattern, and missing parts of a tensor."""
        return read_table(state, self._table(state, theirs=True), self.library)

    def to_theirs(self, state: Mapping[str, Tensor]) -> State:
        """Their weights from ours; an UnmaskError lists the names that fit no pattern."""
        return write_table(state, self._table(state, theirs=False), f"a model that {self.library} can hold")

    def _table(self, names: Iterable[str], theirs: bool) -> Table:
        """The table of the given names, ours or theirs."""
        table: Table = {}
        for name in names:
            for our, their in self.patterns.items():
                matches = (_match(pattern, name) for pattern in (their if theirs else (our,)))
                if match := next(filter(None, matches), None):
                    table[_filled(our, match)] = tuple(_filled(pattern, match) for pattern in their)
                    break
        return table


def _match(pattern: str, name: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"([^.]+)"), name)


def _filled(pattern: str, match: re.Match[str]) -> str:
    return pattern.replace("*", "{}").format(*match.groups())
