"""The masked decoder: from the latents of visible tokens to a prediction for every hidden one.

Introduced by MAE (arXiv 2111.06377, section 3, "MAE decoder"): encoded tokens are projected to the decoder's width, a
learned mask token is inserted at every hidden position, position embeddings are added, and a few transformer blocks
follow. HPM (arXiv 2304.05919) runs two such decoders on one input; in CroCo (arXiv 2210.10716) the tokens also attend
to a second image.

Tokens stay in the order visible, hidden: attention does not depend on order, so nothing is put back into spatial order
on the way, and what follows the attention of the last block runs only on the tokens to predict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from unmask.core.mask import Indices, Mask
from unmask.core.nn.rotary import Rotary
from unmask.core.nn.transformer import CrossBlock


@dataclass(frozen=True)
class DecoderTokens:
    """The input of the decoder blocks: class and register tokens, then the visible tokens, then the hidden ones.

    Args:
        x: the tokens, positions added.
        visible: which tokens of the grid the visible ones are.
        hidden: which tokens of the grid are to be predicted.
        valid: False = padding, where the mask is ragged.
        rotary: the rotation of each token, where positions are rotary.
    """

    x: Float[Tensor, "batch tokens dim"]
    visible: Indices
    hidden: Indices
    valid: Bool[Tensor, "batch tokens"] | None
    rotary: Rotary | None


@dataclass(frozen=True, eq=False)  # compared by identity: torch.compile hashes it before its fields are set
class MaskedDecoder:
    """A decoder made of a method's own modules, so that their parameters keep the names they are published under.

    It holds no state: make one where it is used, and call it with latents and a mask.

    Args:
        embed: projects latents (and the memory's) to the decoder's width.
        mask_token: the embedding of every hidden token, before positions are added.
        blocks: run one after another; `CrossBlock` where there is a memory, else `Block`.
        norm: the norm after the blocks.
        head: maps each token to its prediction.
        positions: added to every token (and the memory's), the prefix tokens' rows first, as many as the latents have;
            None where nothing is added.
        rotary: the rotation of every token of the grid, for blocks with rotary positions; not for prefix tokens.
    """

    embed: nn.Module
    mask_token: Float[Tensor, "1 1 dim"]
    blocks: Iterable[nn.Module]
    norm: nn.Module
    head: nn.Module
    positions: Float[Tensor, "1 all_tokens dim"] | None = None
    rotary: Rotary | None = None

    def __call__(
        self,
        latent: Float[Tensor, "batch seen latent_dim"],
        mask: Mask,
        memory: Float[Tensor, "batch memory_tokens latent_dim"] | None = None,
        *,
        everywhere: bool = False,
    ) -> Float[Tensor, "batch predicted values"]:
        """Predict the hidden tokens, in the order of `mask.hidden_indices`.

        Args:
            latent: the encoder's output for `mask.visible_indices`, class and register tokens (if any) first.
            mask: which tokens are hidden.
            memory: the encoder's output for a second sample with all its tokens visible, prefix tokens first.
            everywhere: predict all tokens of the grid instead, in spatial order; zeros at padding.

        Raises:
            ValueError: nothing is hidden and `everywhere` is False; there is a memory and the blocks take none, or the
                other way round; the memory's tokens are not those of the positions.
        """
        tokens = self.tokens(latent, mask.visible_indices, mask.hidden_indices)  # x: [batch, seen + hidden, dim]
        return self.answer(tokens, memory, grid_tokens=mask.hidden.shape[1] if everywhere else None)

    def tokens(
        self, latent: Float[Tensor, "batch seen latent_dim"], visible: Indices, hidden: Indices
    ) -> DecoderTokens:
        """Project, insert mask tokens, add positions.

        Decoders that have these modules in common may share the result. For the predictor of a latent-prediction
        method, take a split's context and one of its targets.
        """
        latent = self.embed(latent)  # [batch, prefix + visible, dim]
        batch, prefix = len(latent), latent.shape[1] - visible.count
        if self.positions is None:
            masked = self.mask_token.expand(batch, hidden.count, -1)
        else:
            of_prefix, of_grid = self._positions(batch, prefix)
            latent = latent + torch.cat([of_prefix, visible.take(of_grid)], dim=1)
            masked = self.mask_token + hidden.take(of_grid)  # [batch, hidden, dim]
        rotary = self.rotary
        if rotary is not None:
            seen = rotary.take(visible).with_prefix(prefix)
            rotary = Rotary.concatenate([seen, rotary.take(hidden)])
        x, valid = torch.cat([latent, masked], dim=1), _valid(visible, hidden, prefix)
        return DecoderTokens(x, visible, hidden, valid, rotary)

    def answer(
        self,
        tokens: DecoderTokens,
        memory: Float[Tensor, "batch memory_tokens latent_dim"] | None = None,
        *,
        grid_tokens: int | None = None,
    ) -> Float[Tensor, "batch predicted values"]:
        """Run the blocks on these tokens; see `__call__`.

        With `grid_tokens`, the length of the token axis, predict all tokens, in spatial order.
        """
        x, everywhere = tokens.x, grid_tokens is not None
        last = tokens.hidden.count + everywhere * tokens.visible.count
        if last == 0:
            raise ValueError("no token is hidden, so there is nothing to predict; pass everywhere=True for all tokens")
        inputs, rotations = self._memory(memory)
        *blocks, final = self.blocks
        for block in blocks:
            x = block(x, *inputs, valid=tokens.valid, rotary=tokens.rotary, **rotations)  # [batch, tokens, dim]
        x = final(x, *inputs, valid=tokens.valid, rotary=tokens.rotary, last=last, **rotations)  # [batch, last, dim]
        x = self.head(self.norm(x))  # [batch, last, values]
        return x if grid_tokens is None else _in_spatial_order(x, tokens, grid_tokens)

    def _positions(self, batch: int, prefix: int) -> tuple[Tensor, Tensor]:
        """The prefix tokens' positions and the grid's, for each sample."""
        assert self.positions is not None
        of_prefix, of_grid = self.positions.expand(batch, -1, -1).split(
            [prefix, self.positions.shape[1] - prefix], dim=1
        )
        return of_prefix, of_grid

    def _memory(self, memory: Tensor | None) -> tuple[list[Tensor], dict[str, Rotary]]:
        """The arguments that every block takes for the memory, and those of its rotation."""
        crossing = all(isinstance(block, CrossBlock) for block in self.blocks)
        if crossing != (memory is not None):
            raise ValueError(
                "these blocks attend to a memory, and none was given; pass `memory`, or build the decoder of Block"
                if crossing
                else "a memory was given, and these blocks attend to none; build the decoder of CrossBlock"
            )
        if memory is None:
            return [], {}
        memory = self.embed(memory)
        if self.positions is not None:
            if memory.shape[1] != self.positions.shape[1]:
                raise ValueError(
                    f"the memory has {memory.shape[1]} tokens, and there are positions for {self.positions.shape[1]}; "
                    "encode the second sample whole, at the first one's size"
                )
            memory = memory + self.positions
        if self.rotary is None:
            return [memory], {}
        return [memory], {"memory_rotary": self.rotary.with_prefix(memory.shape[1] - self.rotary.cos.shape[2])}


def _valid(visible: Indices, hidden: Indices, prefix: int) -> Tensor | None:
    """Which decoder tokens are real, for ragged masks."""
    if visible.valid is None and hidden.valid is None:
        return None
    of_visible, of_hidden = (
        torch.ones_like(s.index, dtype=torch.bool) if s.valid is None else s.valid for s in (visible, hidden)
    )
    return torch.cat([F.pad(of_visible, (prefix, 0), value=True), of_hidden], dim=1)


def _in_spatial_order(x: Tensor, tokens: DecoderTokens, grid_tokens: int) -> Tensor:
    """Predictions for visible, then hidden tokens, put back into spatial order."""
    at_visible, at_hidden = x.split([tokens.visible.count, tokens.hidden.count], dim=1)
    grid = x.new_zeros(len(x), grid_tokens, x.shape[2])
    return tokens.hidden.put(tokens.visible.put(grid, at_visible), at_hidden)
