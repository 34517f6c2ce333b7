"""Fine-tuning of small encoders on few clouds: core's protocol, with other numbers."""

from __future__ import annotations

import math
from dataclasses import replace

from unmask.core.evaluation.finetune import FineTuning

PEAK_LR = 2e-3  # of the head in fine-tuning
FEWEST_STEPS = 300  # of fine-tuning, where the number of epochs is not given
_LARGEST, _SMALLEST = 128, 8  # clouds per step


def protocol_for(samples: int, at_once: int, epochs: int | None = None) -> FineTuning:
    """Core's `FineTuning`, made for small encoders and few clouds.

    Ours: the head's learning rate peaks at `PEAK_LR` whatever the batch (core's, which is ViT-B's, has 2.5e-4 at 128
    samples, and hardly moves encoders of a tenth of its width in so few steps), batches of an eighth of the training
    clouds, between 8 and 128 and no more than fit into memory, and at least `FEWEST_STEPS` steps. Drop path gates a
    whole batch at a time, as stochastic depth did at first (arXiv 1603.09382): the pillars of all clouds go through a
    layer as one row.

    Args:
        samples: training clouds.
        at_once: clouds that fit into memory: as many as pre-training had in a micro-batch.
        epochs: passes over them, if the number is given.
    """
    usual = FineTuning()
    batch = min(_LARGEST, max(_SMALLEST, samples // 8), max(1, samples), at_once)
    least = math.ceil(FEWEST_STEPS / max(1, samples // batch))
    return replace(
        usual,
        batch_size=batch,
        base_lr=PEAK_LR,
        reference_batch=batch,
        epochs=max(usual.epochs, least) if epochs is None else epochs,
    )
