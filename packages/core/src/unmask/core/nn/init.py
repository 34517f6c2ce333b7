"""Weight initialisation. A method applies one of these to its modules and says which in its file."""

from __future__ import annotations

from torch import nn


def xavier_init(module: nn.Module) -> None:
    """MAE's: linear weights xavier-uniform (a fused qkv as one matrix), biases 0, LayerNorm 1 and 0.

    Use as ``model.apply(xavier_init)``. Patch convolutions are left to the method.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def truncated_normal_init(module: nn.Module) -> None:
    """BEiT's and SimMIM's: linear and convolution weights truncated normal (std 0.02), biases 0, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
