"""`make house`: what breaks a rule is named."""

from pathlib import Path

import house
import pytest


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of core and two domains that keeps all rules."""
    write(tmp_path, "core", "mask.py", "def hide(x: int) -> int:\n    return x\n")
    for domain in ("vision", "language"):
        write(tmp_path, domain, "data/images.py", "from unmask.core.mask import hide\n")
        write(tmp_path, domain, "evaluation/score.py", f"from unmask.{domain}.data.images import hide\n")
    return tmp_path


def write(root: Path, package: str, name: str, text: str) -> None:
    path = root / "packages" / package / "src" / "unmask" / package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def broken(root: Path) -> list[str]:
    modules = list(house.read_modules(root))
    return [text for rule in house.RULES for text in rule(modules)]


def test_a_tidy_house_breaks_no_rule(tree: Path) -> None:
    assert broken(tree) == []


REPEATED = "".join(f"x{i} = {i}\n" for i in range(12))


@pytest.mark.parametrize(
    ("package", "name", "text", "said"),
    [
        ("vision", "data/a.py", "from unmask.vision.evaluation.score import hide\n", "higher floor"),
        ("vision", "data/a.py", "from unmask.language.data.images import hide\n", "of another package"),
        ("core", "a.py", "def late() -> None:\n    import unmask.vision\n", "of another package"),
        ("core", "a.py", 'NAME = "vision"\n', "core mentions"),
        ("core", "a.py", "x = 1\n" * 451, "451 lines"),
        ("core", "a.py", "def f(x):\n    return x\n", "f is not annotated (x)"),
    ],
)
def test_a_broken_rule_is_named(tree: Path, package: str, name: str, text: str, said: str) -> None:
    write(tree, package, name, text)
    assert any(said in problem for problem in broken(tree))


def test_repeated_code_is_named_once(tree: Path) -> None:
    write(tree, "vision", "data/a.py", REPEATED)
    write(tree, "language", "data/a.py", REPEATED)
    assert len(broken(tree)) == 1


def test_an_import_inside_a_function_may_run_upwards(tree: Path) -> None:
    write(tree, "vision", "data/a.py", "def f() -> None:\n    from unmask.vision.evaluation.score import hide\n")
    assert broken(tree) == []


def test_modules_that_import_each_other_are_named(tree: Path) -> None:
    write(tree, "core", "a/__init__.py", "from unmask.core.a.x import f\n")
    write(tree, "core", "a/x.py", "from unmask.core.b import g\n")
    assert broken(tree) == []
    write(tree, "core", "b.py", "from unmask.core.a import f\n")
    (problem,) = broken(tree)
    assert "unmask.core.a" in problem and "unmask.core.b" in problem
