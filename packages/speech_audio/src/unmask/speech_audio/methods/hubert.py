"""HuBERT: speech representations by masked prediction of hidden units (Hsu et al., TASLP 2021, arXiv 2106.07447).

Clustering gives every frame a label before training. Spans of waveform features are replaced by one learned vector, and
the model names the labels of the hidden frames: a softmax over cosine similarities with one embedding per class. The
first labels are clusters of MFCC, later ones clusters of the previous model's features (``unmask train`` makes both).

Where the released code (fairseq) differs from the paper or leaves a choice, this file does the following:

* The paper's alpha is ``masked_weight: alpha, unmasked_weight: 1 - alpha``. As released, the losses of several targets
  are summed, and both losses are divided by one count: the frames that either of them is taken over, each counted once.
* The penalty on the mean square of the waveform features (weight 10, not in the paper) is kept. Over several processes
  it is the mean over all frames; the released code weighs each process by its number of masked frames.
* Batches may be padded. Padded frames are never hidden, scored or penalised; released batches are cropped to their
  shortest clip and have none (``batching: crop``).
* Recordings longer than a clip may be are cut into several clips; the released data set takes one crop of each, at a
  random position (``long: crop``).
* Every clip keeps its own number of hidden frames; ``masking.equal_counts`` thins them as released.
* Losses are in nats (the released log shows bits), and there are as many embeddings as clusters: fairseq's dictionaries
  add four symbols that are never a target. The released (classes x frames x dim) tensor of similarities is a matrix
  product here, with the same values and gradients.
* BASE has 12 heads as released, not the 8 of the paper's table. `dropout_features` is left out: it has no effect.
* Released weight decay falls on everything. Here vectors and biases are exempt as in all our methods, `mask_embedding`
  among them; `label_embeddings` decay.
* Optimizer and schedule are the recipe's: ``paper`` holds the published values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unmask.core.errors import UnmaskError
from unmask.core.losses import mean_term
from unmask.core.mask import Packed
from unmask.core.masking import Masking, SpanMasking
from unmask.core.method import Clock, Features, Metric, Output, Plan, Term
from unmask.core.randomness import Key
from unmask.speech_audio.data.clips import AudioBatch
from unmask.speech_audio.data.clips import Settings as DataSettings
from unmask.speech_audio.data.frames import num_frames
from unmask.speech_audio.data.labels import Target
from unmask.speech_audio.data.spectrograms import frame_spectrograms
from unmask.speech_audio.encoders.wav2vec2 import EncoderSettings, SpeechEncoder, encode
from unmask.speech_audio.targets.iterations import Stages as Stages
from unmask.speech_audio.targets.iterations import outline as outline
from unmask.speech_audio.targets.iterations import planned as planned
from unmask.speech_audio.targets.iterations import prepare as prepare

CARD = {
    "title": "HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units",
    "paper": "Hsu et al., IEEE/ACM TASLP 2021, arXiv 2106.07447",
    "summary": "spans of 200 ms; cluster labels of MFCC, then of an earlier model's layer",
    "kind": "pretrain",
    "evidence": "full",
    "reference": "facebookresearch/fairseq",
    "reference_licence": "MIT",
}


@dataclass(frozen=True)
class HeadSettings:
    """How labels are predicted; the defaults are BASE's.

    Args:
        dim: width of the space of the cosine similarities: 256 (BASE), 768 (LARGE), 1024 (X-LARGE).
        untied: a projection for every target instead of one for all.
        temperature: cosine similarities are divided by this.
        target_weights: weight of each target's loss, at least 0; None = 1 for all.
    """

    dim: int = 256
    untied: bool = True
    temperature: float = 0.1
    target_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Settings:
    """What a recipe may set under ``model``.

    Args:
        encoder: the network to pre-train.
        head: how labels are predicted.
        masking: which frames are hidden.
        masked_weight: weight of the loss over hidden frames; the paper's alpha.
        unmasked_weight: weight of the loss over visible frames.
        feature_penalty: weight of the mean square of the waveform features.
    """

    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    masking: SpanMasking = field(default_factory=SpanMasking)
    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    feature_penalty: float = 10.0


def build(settings: Settings, data: DataSettings) -> HuBERT:
    """The model that a recipe describes.

    Raises:
        ValueError: the data have no labels.
    """
    if data.targets is None:
        raise ValueError(
            "HuBERT predicts labels, and data.label_sets names none. `unmask train` makes them (MFCC clusters first); "
            "to use your own, give their folders there"
        )
    return HuBERT(settings, data.targets)


@dataclass(frozen=True)
class HuBERTPlan(Plan):
    """The mask, and the frames that losses are taken on.

    Args:
        hidden: the hidden frames that have labels.
        visible: the visible ones, where a loss is taken there; else None.
        padded: whether any clip has padding.
    """

    hidden: Packed
    visible: Packed | None
    padded: bool


class HuBERT(nn.Module):
    """Masked prediction of frame labels around a speech encoder.

    Args:
        settings: the recipe's ``model``. A loss of weight 0 is not computed.
        targets: the label streams: names and numbers of classes.
        masking: another one than the settings'; any that takes padding.

    Raises:
        ValueError: weights that are negative or all zero, or not one for each target.
    """

    def __init__(self, settings: Settings, targets: Sequence[Target], masking: Masking | None = None) -> None:
        super().__init__()
        head = settings.head
        self.target_weights = head.target_weights or (1.0,) * len(targets)
        if len(self.target_weights) != len(targets) or not targets:
            raise ValueError(f"head.target_weights has {len(self.target_weights)} values for {len(targets)} targets")
        weights = settings.masked_weight, settings.unmasked_weight
        if min(*weights, *self.target_weights) < 0 or sum(weights) == 0:
            raise ValueError("masked_weight, unmasked_weight and target_weights must be >= 0, one of the first two > 0")
        self.encoder = encoder = SpeechEncoder(settings.encoder)
        self.classes = [target.classes for target in targets]
        self.names = [target.name for target in targets]
        self.masking, self.temperature = masking or settings.masking, head.temperature
        self.masked_weight, self.unmasked_weight = weights
        self.feature_penalty = settings.feature_penalty
        self.heads = len(targets) if head.untied else 1
        self.mask_embedding = nn.Parameter(torch.empty(encoder.dim).uniform_())
        self.final_proj = nn.Linear(encoder.dim, self.heads * head.dim)
        self.label_embeddings = nn.Parameter(torch.empty(sum(self.classes), head.dim).uniform_())

    @property
    def loss_on(self) -> dict[str, str]:
        """The tokens that each term is taken on (see `unmask.core.method`)."""
        terms = {
            "masked": ("hidden", self.masked_weight),
            "unmasked": ("visible", self.unmasked_weight),
            "feature_penalty": ("features", self.feature_penalty),
        }
        return {name: tokens for name, (tokens, weight) in terms.items() if weight}

    def norms_over_all(self) -> set[str]:
        """The GroupNorm of ``extractor: group_norm``, whose statistics are those of the whole clip, as released."""
        return {name for name, module in self.named_modules() if isinstance(module, nn.GroupNorm)}

    def draw(self, batch: AudioBatch, clock: Clock, key: Key) -> HuBERTPlan:
        """Choose the spans (section II-B), and list the frames that losses are taken on.

        Costs one host sync, for the number of those frames and whether there is padding; nothing after it costs any.

        Raises:
            UnmaskError: the batch has no labels.
        """
        if batch.labels is None:
            raise UnmaskError("HuBERT needs frame labels, and this batch has none; set data.label_sets")
        samples, frames = batch.audio.shape[1], num_frames(batch.audio.shape[1])
        valid = torch.arange(frames, device=batch.frames.device) < batch.frames[:, None]
        mask = self.masking(key.stream("mask"), (frames,), valid)  # type: ignore[call-arg]
        labelled = (batch.labels >= 0).all(2)
        hidden, visible = mask.hidden & labelled, mask.visible & labelled
        padded = ((batch.frames < frames) | (batch.lengths < samples)).any()
        n_hidden, n_visible, any_padding = torch.stack([hidden.sum(), visible.sum(), padded]).tolist()
        scored = _pack(visible, n_visible) if self.unmasked_weight else None
        return HuBERTPlan(mask, _pack(hidden, n_hidden), scored, bool(any_padding))

    def _contextualise(self, batch: AudioBatch, plan: HuBERTPlan) -> tuple[Tensor, Tensor]:
        """Waveform features, and the Transformer's output with hidden frames replaced."""
        features = self.encoder.waveform_features(batch.audio, batch.lengths if plan.padded else None)
        valid = plan.mask.valid if plan.padded else None
        return features, self.encoder.contextualise(features, valid, plan.mask.hidden, self.mask_embedding)

    def logits(self, x: Float[Tensor, "frames dim"]) -> Float[Tensor, "frames all_classes"]:
        """Cosine similarities with every class's embedding over the temperature (section II-E, eq. 3), in float32."""
        x = self.final_proj(x)  # [frames, heads * head_dim]
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(x.float().unflatten(1, (self.heads, -1)), dim=2)  # [frames, heads, head_dim]
            embeddings = F.normalize(self.label_embeddings.float(), dim=1)  # [all_classes, head_dim]
            parts = embeddings.split(self.classes) if self.heads > 1 else [embeddings]
            cosines = [projected[:, k] @ part.T for k, part in enumerate(parts)]
            return torch.cat(cosines, dim=1) / self.temperature

    def predict(self, batch: AudioBatch, plan: HuBERTPlan) -> Float[Tensor, "hidden all_classes"]:
        """Logits of the hidden frames, in the order of ``plan.hidden``, the targets' classes concatenated."""
        _, x = self._contextualise(batch, plan)  # [batch, frames, dim]
        return self.logits(plan.hidden.take(x))

    @torch.no_grad()
    def target(self, batch: AudioBatch, plan: HuBERTPlan) -> Int[Tensor, "hidden targets"]:
        """The hidden frames' labels, in the order of ``plan.hidden``."""
        assert batch.labels is not None
        return plan.hidden.take(batch.labels)  # [hidden, targets]

    def forward(self, batch: AudioBatch, plan: HuBERTPlan) -> Output:
        """Cross entropy over hidden (and visible) frames, and the feature penalty; accuracies as metrics."""
        assert batch.labels is not None
        features, x = self._contextualise(batch, plan)  # [batch, frames, channels] and [batch, frames, dim]
        counts = self.counts(batch, plan)
        terms: dict[str, Term] = {}
        metrics: dict[str, Metric] = {}
        for name, (frames, weight) in self._scored(plan).items():
            # [frames, all_classes] and [frames, targets]
            logits, labels = self.logits(frames.take(x)), frames.take(batch.labels)
            terms[name] = Term(self._cross_entropy(logits, labels), counts[name], weight)
            metrics |= self._accuracies(name, logits, labels)
        if self.feature_penalty:
            squares = features.float().square().mean(2)  # [batch, frames]
            real = plan.mask.valid if plan.padded else None
            terms["feature_penalty"] = mean_term(squares, real, self.feature_penalty)
        return Output(terms, metrics)

    def _scored(self, plan: HuBERTPlan) -> dict[str, tuple[Packed, float]]:
        """The frames whose labels are predicted, and the weight of their loss."""
        sets = {"masked": (plan.hidden, self.masked_weight), "unmasked": (plan.visible, self.unmasked_weight)}
        return {name: (frames, weight) for name, (frames, weight) in sets.items() if frames is not None and weight > 0}

    def counts(self, batch: AudioBatch, plan: HuBERTPlan) -> dict[str, Tensor | float]:
        """The divisor of each term: the number of all scored frames, and of all frames that are penalised."""
        scored = self._scored(plan)
        total = torch.stack([frames.offsets[-1] for frames, _ in scored.values()]).sum()
        counts: dict[str, Tensor | float] = dict.fromkeys(scored, total)
        if self.feature_penalty:
            frames = plan.mask.hidden.numel()
            counts["feature_penalty"] = plan.mask.valid.sum() if plan.padded and plan.mask.valid is not None else frames
        return counts

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over frames and targets, weighted by the targets' weights."""
        each = zip(self.target_weights, logits.split(self.classes, dim=1), labels.unbind(1), strict=True)
        return torch.stack([w * F.cross_entropy(part, label, reduction="sum") for w, part, label in each]).sum()

    def _best(self, logits: Tensor) -> Tensor:
        """The most probable class of each target."""
        return torch.stack([part.argmax(1) for part in logits.split(self.classes, dim=1)], dim=1)

    @torch.no_grad()
    def _accuracies(self, term: str, logits: Tensor, labels: Tensor) -> dict[str, Metric]:
        """The share of labels predicted right, over all targets and for each where there are several."""
        right = self._best(logits) == labels
        shares = {f"{term}_accuracy": Metric(right.sum(), right.numel())}
        if len(self.names) > 1:
            for k, name in enumerate(self.names):
                shares[f"{term}_accuracy/{k + 1} {name}"] = Metric(right[:, k].sum(), len(right))
        return shares

    def encode(self, batch: AudioBatch) -> Features:
        """Features of whole clips: nothing is masked, whatever the mode."""
        return encode(self.encoder, batch.audio, batch.lengths)

    @torch.no_grad()
    def picture(self, batch: AudioBatch, plan: HuBERTPlan) -> dict[str, Tensor]:
        """Spectrograms on the frame grid, standardised by their visible frames, and labels over time.

        Returns:
            ``input`` and ``masked``, [batch, 1, mels, frames], hidden and padded frames 0 in the latter; ``labels`` and
            ``predicted``, [batch, 1, targets, frames], integers, -1 where there is no label or no prediction.
        """
        assert batch.labels is not None
        visible = plan.mask.visible
        spectrograms = frame_spectrograms(batch.audio, visible)
        predicted = torch.full(batch.labels.shape, -1, device=batch.labels.device)
        predicted.flatten(0, 1)[plan.hidden.index] = self._best(self.predict(batch, plan))
        return {
            "input": spectrograms,
            "masked": torch.where(visible[:, None, None], spectrograms, 0.0),
            "labels": batch.labels.transpose(1, 2)[:, None],
            "predicted": predicted.transpose(1, 2)[:, None],
        }


def _pack(members: Bool[Tensor, "batch frames"], total: int) -> Packed:
    """The members' positions in the flattened batch; `total` is their number, known to the host."""
    flat = members.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, total)  # other frames go to one more slot, which is cut off
    positions = torch.arange(len(flat), device=flat.device)
    index = torch.empty(total + 1, dtype=torch.int64, device=flat.device).scatter_(0, slot, positions)[:total]
    return Packed(index, F.pad(members.sum(1).cumsum(0), (1, 0)).to(torch.int32))
