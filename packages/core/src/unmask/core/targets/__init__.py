"""What is asked of the hidden tokens."""

from unmask.core.targets.patches import denormalize_patches, normalize_patches, patchify, unpatchify

__all__ = ["denormalize_patches", "normalize_patches", "patchify", "unpatchify"]
