"""The masked decoder: from the latents of visible tokens to an answer for every hidden one.

Introduced by MAE (arXiv 2111.06377, section 3, "MAE decoder"): encoded tokens are projected to the decoder's width, one
learned vector stands at every hidden place, positions are added, and a few transformer blocks answer. HPM (arXiv
2304.05919) runs two such decoders on one input; CroCo (arXiv 2210.10716) lets the tokens attend to a second image.

Tokens stay in the order visible, hidden: attention does not depend on order, so nothing is put back into spatial order
on the way, and what follows the attention of the last block runs on the tokens that are asked for only.
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
    """What decoder blocks run on: class and register tokens, then the visible tokens, then the hidden ones.

    Args:
        x: the tokens, positions added.
        visible: which tokens of the grid the visible ones are.
        hidden: which tokens of the grid are asked for.
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
        mask_token: what stands at every hidden place, before positions are added.
        blocks: run one after another; `CrossBlock` where there is a memory, else `Block`.
        norm: the norm after the blocks.
        head: makes an answer of each token.
        positions: added to every token (and the memory's), the prefix tokens' rows first, as many as the latents have;
            None where nothing is added.
        rotary: the rotation of every token of the grid, for blocks with rotary positions; prefix tokens are not turned.
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
    ) -> Float[Tensor, "batch asked values"]:
        """Answer for the hidden tokens, in the order of `mask.hidden_indices`.

        Args:
            latent: the encoder's output for `mask.visible_indices`, class and register tokens (if any) first.
            mask: who is hidden.
            memory: the encoder's output for a second sample of which all tokens are seen, prefix tokens first.
            everywhere: answer for all tokens of the grid instead, in spatial order; zeros at padding.

        Raises:
            ValueError: nothing is hidden and not everything is asked for; there is a memory and the blocks take none,
                or the other way round; the memory's tokens are not those of the positions.
        """
        tokens = self.tokens(latent, mask.visible_indices, mask.hidden_indices)
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
            asked = self.mask_token.expand(batch, hidden.count, -1)
        else:
            of_prefix, of_grid = self._positions(batch, prefix)
            latent = latent + torch.cat([of_prefix, visible.take(of_grid)], dim=1)
            asked = self.mask_token + hidden.take(of_grid)  # [batch, hidden, dim]
        rotary = self.rotary
        if rotary is not None:
            seen = rotary.take(visible).with_prefix(prefix)
            rotary = Rotary.concatenate([seen, rotary.take(hidden)])
        x, valid = torch.cat([latent, asked], dim=1), _valid(visible, hidden, prefix)
        return DecoderTokens(x, visible, hidden, valid, rotary)

    def answer(
        self,
        tokens: DecoderTokens,
        memory: Float[Tensor, "batch memory_tokens latent_dim"] | None = None,
        *,
        grid_tokens: int | None = None,
    ) -> Float[Tensor, "batch asked values"]:
        """Run the blocks on these tokens; see `__call__`.

        With `grid_tokens`, answer for all tokens, put in their places among so many.
        """
        x, everywhere = tokens.x, grid_tokens is not None
        last = tokens.hidden.count + everywhere * tokens.visible.count
        if last == 0:
            raise ValueError("no token is hidden, so there is nothing to answer; pass everywhere=True for all tokens")
        inputs, turned = self._memory(memory)
        *blocks, final = self.blocks
        for block in blocks:
            x = block(x, *inputs, valid=tokens.valid, rotary=tokens.rotary, **turned)  # [batch, tokens, dim]
        x = final(x, *inputs, valid=tokens.valid, rotary=tokens.rotary, last=last, **turned)  # [batch, last, dim]
        x = self.head(self.norm(x))
        return x if grid_tokens is None else _in_place(x, tokens, grid_tokens)

    def _positions(self, batch: int, prefix: int) -> tuple[Tensor, Tensor]:
        """The prefix tokens' positions and the grid's, for each sample."""
        assert self.positions is not None
        of_prefix, of_grid = self.positions.expand(batch, -1, -1).split(
            [prefix, self.positions.shape[1] - prefix], dim=1
        )
        return of_prefix, of_grid

    def _memory(self, memory: Tensor | None) -> tuple[list[Tensor], dict[str, Rotary]]:
        """What every block gets of the memory."""
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
    seen, asked = (
        torch.ones_like(s.index, dtype=torch.bool) if s.valid is None else s.valid for s in (visible, hidden)
    )
    return torch.cat([F.pad(seen, (prefix, 0), value=True), asked], dim=1)


def _in_place(x: Tensor, tokens: DecoderTokens, grid_tokens: int) -> Tensor:
    """Answers for visible, then hidden tokens, put back into spatial order."""
    at_visible, at_hidden = x.split([tokens.visible.count, tokens.hidden.count], dim=1)
    grid = x.new_zeros(len(x), grid_tokens, x.shape[2])
    return tokens.hidden.put(tokens.visible.put(grid, at_visible), at_hidden)
