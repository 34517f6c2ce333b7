"""A domain of short vectors, for what needs a whole domain: methods by file, recipes, the command line.

Tests put it in place with ``monkeypatch``: see `install`.
"""

from __future__ import annotations

import pytest

from unmask.core import registry
from unmask.core.domain import Domain

DOMAIN = Domain(
    name="toyland",
    samples="vectors",
    data={"vectors": "toyland.data"},
    tasks={},
    pretrained="toyland.pretrained",
)
load = DOMAIN.load


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the registry find this domain, and no other."""
    monkeypatch.setattr(registry, "domains", lambda: {"toyland": "toyland"})
    monkeypatch.setattr(registry, "methods", registry.methods.__wrapped__)
