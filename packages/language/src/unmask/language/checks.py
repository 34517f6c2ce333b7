"""`unmask.core.checks` for language methods: hidden input is the ids of hidden tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from unmask.core import checks


def corrupt(batch: Any, plan: Any, value: float) -> Any:
    """Another id wherever `plan` hides a token."""
    hidden = checks.hidden_tokens(plan, batch.tokens.shape[1])
    if hidden.shape[1] < batch.tokens.shape[1]:  # a token that is only ever predicted
        hidden = torch.nn.functional.pad(hidden, (0, batch.tokens.shape[1] - hidden.shape[1]))
    return replace(batch, tokens=batch.tokens.masked_fill(hidden, int(value)))


def check_method(method: Any, batch: Any, **options: Any) -> None:
    """`unmask.core.checks.check_method`; options are passed on."""
    checks.check_method(method, batch, corrupt, **options)
