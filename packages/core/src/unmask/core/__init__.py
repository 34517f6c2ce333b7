"""The small core that every domain of unmask shares: masks, targets, losses, blocks, training and evaluation.

Importing this package is cheap: it pulls in neither torch nor any domain. Import the part you need,
for example ``from unmask.core.mask import Mask``.
"""

__version__ = "0.1.0"
