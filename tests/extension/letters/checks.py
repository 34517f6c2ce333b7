"""`unmask.core.checks` for lines: hidden input is the ids of hidden letters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unmask.core import checks
from unmask.letters.data.lines import LineBatch


def corrupt(batch: LineBatch, plan: Any, value: float) -> LineBatch:
    """Another letter wherever `plan` hides one."""
    hidden = checks.hidden_tokens(plan, batch.letters.shape[1]) & batch.valid
    return replace(batch, letters=batch.letters.masked_fill(hidden, int(value)))


def check_method(method: Any, batch: LineBatch, **options: Any) -> None:
    """`unmask.core.checks.check_method`; options are passed on."""
    checks.check_method(method, batch, corrupt, **options)
