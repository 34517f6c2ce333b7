"""Files of weights are read without running code, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.core.errors import UnmaskError
from unmask.core.interop.weights import check_fit, check_names, difference, read_state, save_state, some

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


class Opened:
    """Runs code when it is unpickled in the ordinary way."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code has run",)


@pytest.mark.parametrize("wrapped", [STATE, {"state_dict": STATE, "epoch": 3}, {"model": STATE}, {"module": STATE}])
def test_state_dicts_of_pytorch_files(tmp_path: Path, wrapped: dict[str, object]) -> None:
    torch.save(wrapped, tmp_path / "some.pth")
    found = read_state(tmp_path / "some.pth")
    assert found.keys() == STATE.keys() and all(found[name].equal(STATE[name]) for name in STATE)


def test_no_code_runs_and_the_remedy_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.pth"
    torch.save({"model": STATE, "config": Opened()}, file)
    with pytest.raises(UnmaskError, match=r"tensors alone .*save its state dict with safetensors.torch.save_file$"):
        read_state(file)
    assert "code has run" not in capsys.readouterr().out
    save_file(torch.load(file, weights_only=False)["model"], tmp_path / "some.safetensors")
    assert read_state(tmp_path / "some.safetensors")["a.weight"].equal(STATE["a.weight"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("some.npz", b"", r"read from .safetensors and .pth, .pt, .bin, .ckpt files"),
        ("some.safetensors", b"cut off", "not a complete safetensors file"),
        ("gone.safetensors", None, "not a complete safetensors file"),
        ("some.pth", b"", "cannot be read as tensors alone"),
        ("gone.pt", None, "cannot be read as tensors alone .*No such file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnmaskError, match=said):
        read_state(tmp_path / name)


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [1, 2], {"model": {"nested": STATE}}, torch.zeros(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "some.pt")
    with pytest.raises(UnmaskError, match="holds no state dict .* as state_dict, model, module"):
        read_state(tmp_path / "some.pt")


def test_saved_tensors_share_no_memory(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    save_state({"a": weight.T, "b": weight}, tmp_path / "some.safetensors")
    found = load_file(tmp_path / "some.safetensors")
    assert found["a"].equal(weight.T) and found["b"].equal(weight)


def test_differences_in_words() -> None:
    given = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0), **{f"c{i}": torch.zeros(1) for i in range(5)}}
    wanted = {"a": torch.zeros(3), "b": torch.tensor(2.0), "d": torch.zeros(1)}
    assert difference(wanted, wanted) == ""
    assert difference(given, wanted, " (why)") == (
        "1 of another shape: a (2 x 3, the model's is 3); 1 missing (why): d; "
        "5 that the model does not have: c0, c1, c2 and 2 more"
    )
    check_fit(wanted, wanted, "here")
    with pytest.raises(UnmaskError, match=r"^here: 1 missing: a\. Go away\.$"):
        check_fit({}, {"a": torch.zeros(1)}, "here", " Go away.")


def test_every_name_is_accounted_for() -> None:
    check_names(["a", "b"], ["b", "a"], "a model")
    with pytest.raises(UnmaskError, match=r"^these weights are not those of a model; unknown: x, y; missing: a$"):
        check_names(["y", "x", "b"], ["a", "b"], "a model")
    assert some(["a"]) == "a"
