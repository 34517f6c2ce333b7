"""Maskings: a masking is a frozen dataclass of settings; calling it with a key and a grid draws a `Mask`.

Multi-block maskings draw a `Split` instead: a context, and the sets of tokens to be predicted from it.
"""

from unmask.core.masking.block import BlockMasking
from unmask.core.masking.groups import choose_groups
from unmask.core.masking.multiblock import MultiBlockMasking, SpaceTimeBlockMasking
from unmask.core.masking.noise import NoiseMasking
from unmask.core.masking.random import BernoulliMasking, Masking, RandomMasking
from unmask.core.masking.span import SpanMasking
from unmask.core.masking.tube import TubeMasking

__all__ = [
    "BernoulliMasking",
    "BlockMasking",
    "Masking",
    "MultiBlockMasking",
    "NoiseMasking",
    "RandomMasking",
    "SpaceTimeBlockMasking",
    "SpanMasking",
    "TubeMasking",
    "choose_groups",
]
