"""`unmask.core.checks` for language methods: hidden input is the ids of hidden tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from unmask.core import checks


def corrupt(batch: Any, plan: Any, value: float) -> Any:
    """Another id wherever `plan` hides a token."""
    count = batch.tokens[0].numel()  # of a pair of rows, those of both
    hidden = checks.hidden_tokens(plan, count)
    if hidden.shape[1] < count:  # a token that is only ever predicted
        hidden = torch.nn.functional.pad(hidden, (0, count - hidden.shape[1]))
    return replace(batch, tokens=batch.tokens.masked_fill(hidden.view_as(batch.tokens), int(value)))


def check_method(method: Any, batch: Any, **options: Any) -> None:
    """`unmask.core.checks.check_method`; options are passed on."""
    checks.check_method(method, batch, corrupt, **options)
