"""Images of a method at work: their values, and what is hidden of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from unmask.core.mask import Mask
from unmask.core.report.parts import Pictures
from unmask.core.report.pictures import Shown
from unmask.vision.report import pictures
from unmask.vision.report.pictures import shade, to_rgb


def drawn(images: dict[str, Tensor], plan: Any, channels: int = 1) -> Pictures:
    """What `_draw` makes of a method's images of two samples."""
    data = SimpleNamespace(mean=(0.0,) * channels, std=(1.0,) * channels)
    recipe = SimpleNamespace(data=data, model=SimpleNamespace(), method="vision/some")
    run: Any = SimpleNamespace(recipe=recipe, step=3, method=SimpleNamespace(picture=lambda batch, plan: images))
    return pictures._draw(Shown(run, SimpleNamespace(), plan, ["a.png", "b.png"]))


def test_images_in_the_order_that_the_method_gives_them() -> None:
    images = {name: torch.zeros(2, 1, 4, 4) for name in ("input", "masked", "reconstruction", "attention")}
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    found = drawn(images, SimpleNamespace(mask=Mask.from_hidden(hidden)))
    titles = ["original", "what the encoder sees", "reconstruction", "attention"]
    assert [sample.name for sample in found.samples] == ["a.png", "b.png"]
    assert [title for title, _ in found.samples[0].panels] == titles
    assert found.note.startswith("2 validation images, evenly spaced, at step 3. Visible patches are copied")
    assert drawn({}, None).note == "vision/some draws no pictures."


def test_a_plan_without_a_mask_and_integer_images_are_drawn() -> None:
    images = {"input": torch.ones(2, 2, 4, 4, dtype=torch.int64), "masked": torch.zeros(2, 2, 4, 4)}
    found = drawn(images, SimpleNamespace(order=torch.arange(4)), channels=2)
    assert len(found.samples) == 2 and all(source.startswith("data:image/png") for _, source in found.samples[0].panels)
    assert "reconstruction" not in found.note and "the first is shown" in found.note


def test_pixels_come_back_from_normalised_units_for_any_channels() -> None:
    grey = to_rgb(torch.zeros(1, 1, 2, 2), (0.25,), (0.5,))
    assert grey.shape == (1, 3, 2, 2)
    assert torch.all(grey == 0.25)
    many = to_rgb(torch.full((1, 5, 2, 2), 9.0), (0.0,) * 5, (1.0,) * 5)
    assert many.shape == (1, 3, 2, 2)
    assert torch.all(many == 1.0)


def test_hidden_patches_are_shaded_where_they_are() -> None:
    hidden = torch.tensor([[False, True, False, False, False, True]])  # a grid of 2 x 3
    shaded = shade(torch.ones(1, 3, 4, 6), hidden)
    assert torch.all(shaded[0, :, :2, 2:4] < 1) and torch.all(shaded[0, :, 2:, 4:] < 1)
    assert int((shaded < 1).sum()) == 3 * 8
    odd = torch.ones(1, 3, 5, 7)
    assert shade(odd, hidden).equal(odd)


def test_pixels_of_any_range_are_shown_with_contrast() -> None:
    ramp = torch.linspace(-2.5, 2.5, 6).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    expected = torch.linspace(0, 1, 6).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    for mean, std in ((0.12, 0.008), (295.0, 7.6), (-0.3, 0.2)):
        torch.testing.assert_close(to_rgb(ramp, (mean,) * 3, (std,) * 3), expected)
