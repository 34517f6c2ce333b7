"""`unmask.core.checks` for image methods: hidden input is the pixels of hidden patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unmask.core import checks
from unmask.core.checks import hidden_tokens
from unmask.core.targets import patchify, unpatchify
from unmask.vision.data.images import ImageBatch
from unmask.vision.encoders.vit import patch_grid


def corrupt_patches(patch_size: int) -> Callable[[ImageBatch, Any, float], ImageBatch]:
    """The `corrupt` of images: overwrites every pixel of the patches that the plan hides.

    Args:
        patch_size: side, in pixels, of the patch that one token of the mask stands for.
    """

    def corrupt(batch: ImageBatch, plan: Any, value: float) -> ImageBatch:
        patches = patchify(batch.images, patch_size)
        hidden = hidden_tokens(plan, patches.shape[1])
        patches = patches.masked_fill(hidden[..., None], value)
        return replace(batch, images=unpatchify(patches, patch_size, patch_grid(batch.images.shape[-2:], patch_size)))

    return corrupt


def check_method(method: Any, batch: ImageBatch, **options: Any) -> None:
    """`unmask.core.checks.check_method` for a method with a ``patch_size``; options are passed on."""
    checks.check_method(method, batch, corrupt_patches(method.patch_size), **options)
