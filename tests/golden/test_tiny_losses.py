"""The first losses of the tiny recipes stay what was recorded: see tools/golden_losses.py."""

import json

import golden_losses
import pytest

RECORDED = json.loads(golden_losses.FILE.read_text(encoding="utf-8"))["losses"]
# The study of prediction targets ends in minutes of probes; its models are HuBERT's, which are held here.
METHODS = [name for name in RECORDED if name != "speech_audio/prediction_targets"]


def test_every_method_is_recorded() -> None:
    from unmask.core import registry

    assert set(RECORDED) == {name for name in registry.methods() if "tiny" in registry.recipes(name)}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_first_losses(method: str) -> None:
    losses = golden_losses.first_losses(method)
    assert golden_losses.same(losses, RECORDED[method], exact=False), losses


def test_other_losses_are_told_apart() -> None:
    losses = RECORDED["vision/mae"]
    assert golden_losses.same(losses, losses, exact=True)
    assert golden_losses.same([value * (1 + 1e-4) for value in losses], losses, exact=False)
    assert not golden_losses.same([value * (1 + 1e-4) for value in losses], losses, exact=True)
    assert not golden_losses.same([value * 1.01 for value in losses], losses, exact=False)
    assert not golden_losses.same(losses[:-1], losses, exact=False)
