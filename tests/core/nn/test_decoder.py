"""The masked decoder against the same computation in spatial order, with and without memory, padding and rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unmask.core.mask import Indices, Mask
from unmask.core.masking import RandomMasking
from unmask.core.nn.decoder import MaskedDecoder
from unmask.core.nn.positions import sincos_positions
from unmask.core.nn.rotary import grid_positions, rotary_positions
from unmask.core.nn.transformer import Block, CrossBlock
from unmask.core.randomness import Key

GRID, DIM = (4, 4), 16
LATENT = torch.randn(3, 17, 12, generator=torch.Generator().manual_seed(0))  # a class token and all 16 others
MASK = RandomMasking(0.75)(Key.of(0, torch.arange(3)), GRID)
RAGGED = Mask.from_hidden(torch.arange(16) < torch.tensor([4, 9, 15])[:, None])


def make(memory: bool = False, prefix: int = 0, rotary: bool = False) -> MaskedDecoder:
    block = CrossBlock if memory else Block
    table = nn.functional.pad(sincos_positions(GRID, DIM), (0, 0, prefix, 0))[None]
    return MaskedDecoder(
        nn.Linear(12, DIM), nn.Parameter(torch.randn(1, 1, DIM)), nn.ModuleList(block(DIM, 2) for _ in range(2)),
        nn.LayerNorm(DIM), nn.Linear(DIM, 5), positions=None if rotary else table,
        rotary=rotary_positions(grid_positions(GRID), DIM // 2, base=100.0) if rotary else None,
    )  # fmt: skip


def seen(mask: Mask, prefix: int) -> Tensor:
    """The latents an encoder would give: prefix tokens, then the visible ones in the mask's order."""
    return torch.cat([LATENT[:, :prefix], mask.visible_indices.take(LATENT[:, 1:])], dim=1)


def in_spatial_order(decoder: MaskedDecoder, mask: Mask, prefix: int, memory: Tensor | None = None) -> Tensor:
    """MAE's published layout: tokens put back into raster order before the blocks; answers for all tokens."""
    tokens = torch.where(mask.hidden[..., None], decoder.mask_token, decoder.embed(LATENT[:, 1:]))
    x = torch.cat([decoder.embed(LATENT[:, :prefix]), tokens], dim=1)
    rotary = None if decoder.rotary is None else decoder.rotary.with_prefix(prefix)
    x = x if decoder.positions is None else x + decoder.positions
    inputs: list[Tensor] = []
    turned = {}
    if memory is not None:
        inputs = [decoder.embed(memory) + (0 if decoder.positions is None else decoder.positions)]
        turned = {} if rotary is None else {"memory_rotary": rotary}
    for block in decoder.blocks:
        x = block(x, *inputs, rotary=rotary, **turned)
    return decoder.head(decoder.norm(x))[:, prefix:]


@pytest.mark.parametrize("mask", [MASK, RAGGED], ids=["equal counts", "ragged"])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("memory", [False, True])
def test_equals_the_published_layout(memory: bool, prefix: int, rotary: bool, mask: Mask) -> None:
    decoder = make(memory, prefix, rotary)
    second = torch.randn(3, prefix + 16, 12) if memory else None
    expected = in_spatial_order(decoder, mask, prefix, second)
    hidden = mask.hidden_indices
    got = decoder(seen(mask, prefix), mask, second)
    valid = torch.ones_like(hidden.index, dtype=torch.bool) if hidden.valid is None else hidden.valid
    torch.testing.assert_close(got[valid], hidden.take(expected)[valid], rtol=1e-4, atol=1e-5)
    everywhere = decoder(seen(mask, prefix), mask, second, everywhere=True)
    torch.testing.assert_close(everywhere, expected, rtol=1e-4, atol=1e-5)


def test_padding_is_neither_attended_to_nor_answered() -> None:
    decoder, valid = make(), torch.arange(16) < torch.tensor([16, 10, 12])[:, None]
    hidden = (torch.arange(16) % 2 == 0).expand(3, -1)
    padded = Mask.from_hidden(hidden, valid)
    everywhere = decoder(seen(padded, 0), padded, everywhere=True)
    assert not everywhere[~valid].any()
    known = Mask.from_hidden(hidden & valid, valid, num_visible=None).take([1])
    assert known.hidden.shape[1] == 10
    hidden_before = padded.hidden_indices
    got = decoder(seen(padded, 0), padded)[1][hidden_before.valid[1]]  # type: ignore[index]
    rows = LATENT[1:2, 1:][:, known.visible_indices.index[0]]
    cut = MaskedDecoder(decoder.embed, decoder.mask_token, decoder.blocks, decoder.norm, decoder.head,
                        positions=decoder.positions[:, :10])  # type: ignore[index]  # fmt: skip
    torch.testing.assert_close(got, cut(rows, known)[0], rtol=1e-4, atol=1e-5)


def test_the_head_runs_on_what_is_asked_for_only() -> None:
    decoder, rows = make(), []
    handle = decoder.head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    decoder(seen(MASK, 0), MASK)
    decoder(seen(MASK, 0), MASK, everywhere=True)
    handle.remove()
    assert rows == [12, 16]


def test_two_decoders_share_their_tokens() -> None:
    """HPM's: one input, two stacks of blocks."""
    first, second = make(), make()
    tokens = first.tokens(seen(MASK, 0), MASK.visible_indices, MASK.hidden_indices)
    shared = MaskedDecoder(first.embed, first.mask_token, second.blocks, second.norm, second.head, first.positions)
    assert torch.equal(second.answer(tokens), shared(seen(MASK, 0), MASK))
    assert torch.equal(first.answer(tokens, grid_tokens=16), first(seen(MASK, 0), MASK, everywhere=True))


def test_predicts_a_set_that_is_not_the_rest() -> None:
    """A split's context and one target: tokens in neither do not exist for it."""
    decoder, context, target = make(), torch.tensor([[0, 1, 5]] * 3), torch.tensor([[8, 9]] * 3)
    tokens = decoder.tokens(Indices(context).take(LATENT[:, 1:]), Indices(context), Indices(target))
    other = decoder.tokens(Indices(context).take(LATENT[:, 1:]), Indices(context), Indices(target.flip(1)))
    answer = decoder.answer(tokens)
    assert tokens.x.shape == (3, 5, DIM) and answer.shape == (3, 2, 5)
    torch.testing.assert_close(decoder.answer(other).flip(1), answer)


def test_a_whole_grid_is_answered_everywhere_only() -> None:
    decoder, nothing = make(), Mask.from_hidden(torch.zeros(3, 16, dtype=torch.bool))
    expected = in_spatial_order(decoder, nothing, 0)
    torch.testing.assert_close(decoder(LATENT[:, 1:], nothing, everywhere=True), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no token is hidden.*pass everywhere=True"):
        decoder(LATENT[:, 1:], nothing)


def test_a_memory_goes_with_blocks_that_take_one() -> None:
    latent = seen(MASK, 0)
    with pytest.raises(ValueError, match="pass `memory`, or build the decoder of Block"):
        make(memory=True)(latent, MASK)
    with pytest.raises(ValueError, match="a memory was given, .* build the decoder of CrossBlock"):
        make()(latent, MASK, LATENT[:, 1:])
    with pytest.raises(ValueError, match="the memory has 15 tokens, and there are positions for 16; encode .* whole"):
        make(memory=True)(latent, MASK, LATENT[:, 2:])
    assert make(memory=True)(latent, MASK, LATENT[:, 1:]).shape == (3, 12, 5)
