"""Errors for users, and samples that had to be left out."""

from __future__ import annotations

from typing import NamedTuple


class UnmaskError(ValueError):
    """Base of the errors shown to users as one line: what is wrong, what was expected, and what to do about it."""


class Problem(NamedTuple):
    """A sample that is left out, or a note about one.

    Attributes:
        name: its path, shard key, row, or ``set:name``.
        reason: what is wrong with it.
    """

    name: str
    reason: str
