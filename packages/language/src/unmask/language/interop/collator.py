"""MEAP in transformers' own trainer: data collators that hide input tokens and ask for the clean ones.

Nothing else imports this module::

    collator = MEAPCollator(tokenizer)
    Trainer(model, arguments, train_dataset=blocks, data_collator=collator, callbacks=[CountEpochs(collator)]).train()

What a row hides follows its tokens, the seed and the epoch, and nothing else: not the batch size, the workers, the
ranks, or whether the run was resumed. Rows of equal tokens therefore hide equal places. The draws are those of the
methods `meap` and `meap_sft` for samples whose ids are `content_id`. ``share_positions`` follows the optimizer's step,
which a collator does not know, and is refused. The trainer uses its collator in evaluation too, so its evaluation loss
is that of texts with holes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import TrainerCallback

from unmask.core.errors import UnmaskError
from unmask.core.losses.vocabulary import IGNORE
from unmask.core.randomness import Key, stable_id
from unmask.language.data import chats
from unmask.language.methods import meap, meap_sft

_EPOCH_DIGITS = 1e-6  # the trainer's epochs are sums of fractions


def content_id(tokens: Any) -> int:
    """The sample id of a row of token ids, from these alone: the same in every process and on every machine."""
    return stable_id(np.asarray(tokens, dtype="<i8").tobytes().hex())


class _Collator:
    """What both collators share: the mask token, and the key of a row at an epoch."""

    def __init__(self, tokenizer: Any, ratio: float, seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise UnmaskError(
                "tokenizer: it has no mask token. Give it one, tokenizer.add_special_tokens({'mask_token': '<mask>'}), "
                "and the model a row for it, model.resize_token_embeddings(len(tokenizer))"
            )
        if not 0 <= ratio < 1:
            raise UnmaskError(f"settings.ratio: {ratio} is not in [0, 1)")
        self.mask_id: int = tokenizer.mask_token_id
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it change

    @property
    def epoch(self) -> int:
        """Which draw of every row is made: `CountEpochs` sets it."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def key(self, ids: Int[Tensor, "batch"]) -> Key:
        """What the draws of these rows start from; as in `unmask train`, where the ids are the data's."""
        return Key.of(self.seed, ids, self.epoch).stream("plan")


class MEAPCollator(_Collator):
    """Blocks of token ids as a batch for MEAP's pre-training.

    A block of n tokens is what the method calls a block of length n - 1: its last token is only ever predicted, and the
    one before it never hidden.

    Args:
        tokenizer: of transformers, with a mask token.
        settings: of the method; its `ratio` and `keep_special` are used.
        seed: of the draws.

    Raises:
        UnmaskError: no mask token, a ratio outside [0, 1), or ``share_positions``.
    """

    def __init__(self, tokenizer: Any, settings: meap.Settings | None = None, seed: int = 0) -> None:
        self.settings = settings or meap.Settings()
        super().__init__(tokenizer, self.settings.ratio, seed)
        if self.settings.share_positions:
            raise UnmaskError("settings.share_positions: a collator does not know the step; use `unmask train`")
        self._kept = torch.tensor(tokenizer.all_special_ids) if self.settings.keep_special else None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of blocks, dictionaries with ``input_ids``.

        The labels are the clean tokens; the model moves them by one place itself. The first is never asked for.

        Raises:
            UnmaskError: blocks of several lengths, of fewer than two tokens, or with padding.
        """
        clean = self._blocks(features)  # [batch, length + 1]
        length = clean.shape[1] - 1
        key = self.key(torch.tensor([content_id(row) for row in clean]))
        count = meap.hidden_count(length, self.settings.ratio)
        hidden = meap.draw_hidden(clean[:, :length], count, key, self._kept)  # [batch, length]
        tokens, labels = clean.clone(), clean.clone()
        tokens[:, :length] = clean[:, :length].masked_fill(hidden, self.mask_id)
        labels[:, 0] = IGNORE  # so that the trainer counts the tokens that are asked for
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}

    @staticmethod
    def _blocks(features: Sequence[Mapping[str, Any]]) -> Int[Tensor, "batch tokens"]:
        rows = [torch.as_tensor(feature["input_ids"], dtype=torch.int64) for feature in features]
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1 or lengths[0] < 2:
            raise UnmaskError(
                f"input_ids: blocks of {lengths} tokens; cut the texts into blocks of one length, 2 or more"
            )
        if any(0 in list(feature.get("attention_mask", ())) for feature in features):
            raise UnmaskError("attention_mask: blocks have no padding here; join texts and cut them into full blocks")
        return torch.stack(rows)


class MEAPFineTuningCollator(_Collator):
    """Prompts with their answers as a batch for MEAP's fine-tuning: every row, then the second rows of long answers.

    Args:
        tokenizer: of transformers, with a mask token.
        settings: of the method; its `ratio`, `longer_than` and `static` are used.
        seed: of the draws.

    Raises:
        UnmaskError: no mask token, or a ratio outside [0, 1).
    """

    def __init__(self, tokenizer: Any, settings: meap_sft.Settings | None = None, seed: int = 0) -> None:
        self.settings = settings or meap_sft.Settings()
        super().__init__(tokenizer, self.settings.ratio, seed)
        self.end_id: int | None = tokenizer.eos_token_id

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of rows, dictionaries with ``input_ids`` and ``labels``, without padding.

        Labels are -100 for the prompt's tokens and the tokens themselves for the answer's, as is usual. An answer's
        tokens are counted as they are in the row, after any cut, and without the end-of-text token.

        Raises:
            UnmaskError: labels that are not a prompt and an answer.
        """
        batch = chats.collate([self._sample(feature) for feature in features])
        hidden = meap_sft.draw_hidden(batch, self.settings, self.key(batch.ids))
        tokens = meap_sft.input_rows(batch, hidden, self.mask_id)  # [2 batch, length]
        labels = meap_sft.label_rows(batch, hidden)
        asked = labels.ne(IGNORE).any(1)  # a second row that hides nothing is left out
        valid = torch.cat([batch.valid, batch.valid]).long()
        return {"input_ids": tokens[asked], "labels": labels[asked], "attention_mask": valid[asked]}

    def _sample(self, feature: Mapping[str, Any]) -> chats.Sample:
        tokens, labels = (np.asarray(feature[name], dtype=np.int64) for name in ("input_ids", "labels"))
        asked = labels != IGNORE
        prompt = int(asked.argmax())
        if len(labels) != len(tokens) or not asked.any() or (labels[prompt:] != tokens[prompt:]).any() or not prompt:
            raise UnmaskError(
                "labels: expected -100 for every token of a prompt, then the tokens of its answer; give a chat one row "
                "for every answer, and leave the padding to the collator"
            )
        answer = len(tokens) - prompt - int(tokens[-1] == self.end_id)
        return chats.Sample(tokens, prompt, answer, content_id(tokens))


class CountEpochs(TrainerCallback):
    """Tells a collator the trainer's epoch, so that every epoch hides other tokens, in a resumed run too.

    Args:
        collator: of the same trainer.
    """

    def __init__(self, collator: MEAPCollator | MEAPFineTuningCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Called by the trainer before it asks for the epoch's first batch."""
        self.collator.epoch = int((state.epoch or 0) + _EPOCH_DIGITS)
