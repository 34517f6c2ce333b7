"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations


class UnmaskError(ValueError):
    """Base of the errors shown to users as one line: what is wrong, what was expected, and what to do about it."""
