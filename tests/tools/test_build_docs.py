"""What `make docs` writes from the code: the table in README, the keys of recipes, the Python reference."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import api_reference
import build_docs
import recipe_reference

from unmask.core import registry

CARDS = list(registry.methods().values())


@dataclass(frozen=True)
class Inner:
    """An inner part.

    Args:
        size: of it, in cells.
    """

    size: Annotated[int, Field(ge=1, le=9)] = 3


@dataclass(frozen=True)
class Toy:
    """Toy settings.

    They have two paragraphs.

    Args:
        source: where from,
            on two lines.
        mode: ``a`` or ``b``; None for neither.
        shape: rows | columns.
        inner: the part.
        parts: several, by name.
        found: never written by hand.
    """

    source: str
    mode: Literal["a", "b"] | None = None
    shape: tuple[float, ...] = (0.5, 2.0)
    inner: Inner = field(default_factory=Inner)
    parts: dict[str, Inner] = field(default_factory=dict)
    found: tuple[Inner, ...] | None = None

    filled_in: ClassVar[frozenset[str]] = frozenset({"found"})


def all_sections() -> list[recipe_reference.Section]:
    domains = [section for name in registry.domains() for section in recipe_reference.domain_sections(name)]
    return recipe_reference.common_sections() + domains


def test_the_table_in_readme_is_up_to_date() -> None:
    text = build_docs.README.read_text(encoding="utf-8")
    assert build_docs.with_table(text, CARDS) == text, "run `make docs` and commit README.md"
    assert all(f"| `{card.id}` |" in text for card in CARDS)


def test_the_table_follows_the_cards() -> None:
    text = "a\n<!-- methods: x -->\n\nold\n\n<!-- /methods -->\nb\n"
    made = build_docs.with_table(text, CARDS[:1])
    assert made.startswith("a\n<!-- methods: x -->\n\n| method |") and made.endswith("|\n\n<!-- /methods -->\nb\n")
    assert "\nold\n" not in made


def test_method_pages_say_kind_task_and_evidence() -> None:
    page = build_docs.method_page(registry.card("speech_audio/prediction_targets"))
    assert page.startswith("---\nkind: pretrain\ntask: representation\nevidence: thin\n---\n")
    assert "[2409.10788](https://arxiv.org/abs/2409.10788)" in page and "## Recipe `tiny`" in page


def test_keys_of_settings_are_described() -> None:
    top, *inner = recipe_reference.sections("data", Toy, "toys: ")
    assert (top.title, top.text) == ("toys: `data`", "Toy settings.\n\nThey have two paragraphs.")
    keys = {key.name: (key.kind, key.default, key.meaning) for key in top.keys}
    assert keys["data.source"] == ("text", "required", "where from, on two lines.")
    assert keys["data.mode"] == ("`a` or `b` or `null`", "`null`", "`a` or `b`; `null` for neither.")
    assert keys["data.shape"] == ("list; each: number", "`[0.5, 2]`", "rows | columns.")
    assert keys["data.found"][0] == "filled in by the run"
    assert [section.title for section in inner] == ["toys: `data.inner`", "toys: `data.parts.NAME`"]
    assert inner[0].keys == [recipe_reference.Key("data.inner.size", "integer ≥ 1, ≤ 9", "`3`", "of it, in cells.")]
    assert "| rows \\| columns. |" in recipe_reference.shown(top)


@pytest.mark.parametrize("section", all_sections(), ids=lambda section: section.title)
def test_every_key_has_a_meaning(section: recipe_reference.Section) -> None:
    silent = [key.name for key in section.keys if not key.meaning]
    assert not silent, f"say what {', '.join(silent)} means under Args: of its class"


def test_the_choices_of_an_encoder_have_a_section_each() -> None:
    titles = [section.title for section in recipe_reference.domain_sections("vision")]
    assert "vision/simmim: `model.encoder` with `kind: swin`" in titles
    assert "vision/mae: `model.encoder` with `kind: timm`" in titles


def test_the_python_reference_has_every_module() -> None:
    packages = sorted((api_reference.ROOT / "packages").glob("*/src/unmask/*"))
    listed = {m for package in packages for _, modules in api_reference.parts_of(package) for m in modules}
    written = {m for package in packages for m in package.rglob("*.py") if m.name != "__init__.py"}
    assert {m.relative_to(api_reference.ROOT) for m in written - listed if "cli" not in str(m)} == set()
    assert len(packages) == 1 + len(registry.domains())
