"""What a domain offers, and that every installed one has it."""

import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from unmask.core import registry
from unmask.core.domain import check_domain


@pytest.mark.parametrize("name", registry.domains())
def test_installed_domains_keep_their_contracts(name: str) -> None:
    check_domain(registry.domain(name))


def test_reading_what_a_domain_offers_imports_no_torch() -> None:
    code = "import sys; from unmask.core import registry; [registry.domain(n) for n in registry.domains()]"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)


def test_every_lack_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Settings:
        path: str
        free_to_change: ClassVar[frozenset[str]] = frozenset({"elsewhere"})

    monkeypatch.setitem(sys.modules, "half_a_domain", SimpleNamespace(Settings=Settings, resolve=None, inputs_of=None))
    broken = replace(
        registry.domain("vision"),
        data={"half": "half_a_domain"},
        tasks={"representation": "no_such_module"},
        export=None,
        report="half_a_domain",
    )
    with pytest.raises(AssertionError) as error:
        check_domain(broken)
    for part in (
        "no open_split",
        "no collate",
        "no COMMANDS",
        "no draw_pictures",
        "field `source`",
        "names elsewhere",
        "no_such_module",
        "formats",
        "come together",
    ):
        assert part in str(error.value)
