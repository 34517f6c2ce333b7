"""Targets: what is predicted at hidden tokens."""

from unmask.core.targets.patches import denormalize_patches, normalize_patches, patchify, unpatchify
from unmask.core.targets.teachers import EMATeacher, FrozenTeacher, SharedTeacher, teachers

__all__ = [
    "EMATeacher",
    "FrozenTeacher",
    "SharedTeacher",
    "denormalize_patches",
    "normalize_patches",
    "patchify",
    "teachers",
    "unpatchify",
]
