"""SparsePO in TRL: its trainer for direct preference optimisation with our loss.

Needs the optional packages of ``unmask-language[trl]``; nothing else imports this module::

    from unmask.language.interop.trl import SparsePOTrainer

    trainer = SparsePOTrainer(model, args=DPOConfig(beta=0.1), train_dataset=pairs, processing_class=tokenizer)
    trainer.train()

TRL reads, encodes, cuts and batches the pairs in its own way, and logs our metrics.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from unmask.core.errors import UnmaskError
from unmask.language.data.preferences import PreferenceBatch
from unmask.language.methods.sparsepo import Settings, SparsePO


class SparsePOTrainer(DPOTrainer):
    """TRL's trainer with `unmask.language.methods.sparsepo.SparsePO` as its loss.

    Learned masks become ``model.token_masks``, so that optimizer and checkpoints see them; delete that before the model
    is published, which does not need them. Mask decay is then TRL's.

    Args:
        model: a causal language model of transformers.
        ref_model: what it is held against; None takes a copy.
        args: TRL's; its `beta` is used.
        settings: loss and masks.
        options: what else `DPOTrainer` takes.

    Raises:
        UnmaskError: several processes or adapters, whose gradients our loss would not reach.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        if options.get("peft_config") is not None or hasattr(model, "peft_config"):
            raise UnmaskError("SparsePOTrainer trains whole models, not adapters; leave out peft_config")
        args = args or DPOConfig("sparsepo")
        ref_model = copy.deepcopy(model) if ref_model is None else ref_model
        self.method = SparsePO(model, ref_model, replace(settings or Settings(), beta=args.beta))
        self.method.masks.come_alive(self.method.reference)
        model.add_module("token_masks", self.method.masks)
        super().__init__(model, ref_model=ref_model, args=args, **options)
        if self.accelerator.num_processes > 1:
            raise UnmaskError("SparsePOTrainer runs in one process; use `unmask train language/sparsepo --devices N`")

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        """Our loss of a batch of TRL's."""
        batch = batch_of(inputs)
        with self.accelerator.autocast():
            output = self.method(batch, None)
        mode = "train" if self.model.training else "eval"
        for name, metric in output.metrics.items():
            self._metrics[mode][name].append(float(metric.mean))
        if not return_outputs:
            return output.loss
        with torch.no_grad():
            scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return output.loss, scores


def batch_of(inputs: dict[str, Tensor]) -> PreferenceBatch:
    """TRL's batch, all chosen responses before all rejected ones, as one of ours.

    Raises:
        UnmaskError: the two rows of a pair do not have one prompt in front, or a response is empty.
    """
    paired = {
        name: torch.stack(inputs[name].chunk(2), 1) for name in ("input_ids", "attention_mask", "completion_mask")
    }
    prompts = paired["completion_mask"][:, 0].argmax(-1)
    ids = torch.arange(len(prompts), device=prompts.device)
    batch = PreferenceBatch(paired["input_ids"], prompts, paired["attention_mask"].sum(-1), ids)
    if not torch.equal(batch.response, paired["completion_mask"].bool()):
        raise UnmaskError(
            "the prompts of a pair differ in length, or a response is empty: set truncation_mode='keep_start' or "
            "max_length=None in DPOConfig, and pad on the right"
        )
    return batch
