"""Who gets hidden. A masking is a frozen dataclass of settings; calling it with a key and a grid draws a `Mask`."""

from unmask.core.masking.block import BlockMasking
from unmask.core.masking.noise import NoiseMasking
from unmask.core.masking.random import BernoulliMasking, Masking, RandomMasking
from unmask.core.masking.span import SpanMasking

__all__ = ["BernoulliMasking", "BlockMasking", "Masking", "NoiseMasking", "RandomMasking", "SpanMasking"]
