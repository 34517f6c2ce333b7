"""The transformer block and positions against independent implementations."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.beit import RelativePositionBias as TimmBias
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from unmask.core.nn.attention import Attention
from unmask.core.nn.init import truncated_normal_init, xavier_init
from unmask.core.nn.positions import RelativePositionBias, sincos_positions
from unmask.core.nn.transformer import Block, DropPath


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_block_equals_timms(layer_scale: float | None) -> None:
    ours = Block(24, 3, mlp_ratio=2.0, layer_scale=layer_scale)
    norm = partial(nn.LayerNorm, eps=1e-6)
    theirs = TimmBlock(24, 3, mlp_ratio=2.0, qkv_bias=True, init_values=layer_scale, norm_layer=norm)
    theirs.load_state_dict(ours.state_dict())  # strict: the names are timm's
    x, y = (torch.randn(2, 7, 24).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    (ours(x).square().sum()).backward()
    (theirs(y).square().sum()).backward()
    torch.testing.assert_close(ours(x), theirs(y), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    for (name, p), (_, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_equals_torchs(norm: Any) -> None:
    ours = Block(24, 3, mlp_ratio=2.0, norm=norm, eps=1e-5)
    theirs = nn.TransformerEncoderLayer(
        24, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj.": "self_attn.out_proj.", "mlp.fc1.": "linear1."}
    names |= {"mlp.fc2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = theirs.state_dict()
    ours.load_state_dict({a + kind: state[b + kind] for a, b in names.items() for kind in ("weight", "bias")})
    x, padding = torch.randn(2, 7, 24), torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    a, b = ours(x, valid=~padding), theirs(x, src_key_padding_mask=padding)
    torch.testing.assert_close(a[~padding], b[~padding], rtol=1e-4, atol=1e-5)
    last = ours(x, valid=~padding, last=2)
    torch.testing.assert_close(last, a[:, -2:])
    (a[~padding].square().sum()).backward(), (b[~padding].square().sum()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        kind = name.rsplit(".", 1)[1]
        expected = gradients[names[name.removesuffix(kind)] + kind]
        torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_no_dropout_by_default() -> None:
    """In train mode: not even torch's generator moves."""
    block, x, state = Block(16, 2).train(), torch.randn(1, 5, 16), torch.get_rng_state()
    expected = x + block.attn(block.norm1(x))
    expected = expected + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(expected))))
    assert torch.equal(block(x), expected) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_acts_in_training_and_keeps_the_mean(name: str) -> None:
    block, x = Block(16, 2, **{name: 0.3}), torch.randn(1, 6, 16)  # type: ignore[arg-type]
    mean = block(x.expand(20_000, -1, -1)).mean(0)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    torch.testing.assert_close(mean, block(x)[0], rtol=0, atol=0.02)


@pytest.mark.usefixtures("unchecked")
def test_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="norm 'middle' is neither 'pre' nor 'post'"):
        Block(16, 2, norm="middle")  # type: ignore[arg-type]


def test_padding_is_not_attended_to() -> None:
    attention, x = Attention(16, 2), torch.randn(2, 6, 16)
    valid = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    out = attention(x, valid=valid)
    torch.testing.assert_close(out[:1, :4], attention(x[:1, :4]))
    torch.testing.assert_close(out[1:], attention(x[1:]))
    bias = torch.randn(2, 6, 6)
    torch.testing.assert_close(attention(x, bias, valid)[:1, :4], attention(x[:1, :4], bias[:, :4, :4]))


def test_bias_is_added_to_the_logits() -> None:
    """A bias of minus infinity off the diagonal leaves every token with its own value."""
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    only_self = torch.full((2, 5, 5), float("-inf")).masked_fill(torch.eye(5, dtype=torch.bool), 0.0)
    value = attention.qkv(x)[..., 32:]
    torch.testing.assert_close(attention(x, only_self), attention.proj(value))


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="dim 16 is not divisible by 3 heads"):
        Attention(16, 3)


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    drop, x = DropPath(0.25), torch.ones(8000, 2, 3)
    out = drop.train()(x)
    kept = (out.flatten(1) != 0).any(1)
    assert torch.equal(out, kept[:, None, None] * x / 0.75)
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    assert drop.eval()(x) is x


def sincos_by_hand(rows: int, columns: int, dim: int) -> list[list[float]]:
    table = []
    for y in range(rows):
        for x in range(columns):
            line: list[float] = []
            for place in (x, y):
                waves = [place / 10000 ** (k / (dim / 4)) for k in range(dim // 4)]
                line += [math.sin(w) for w in waves] + [math.cos(w) for w in waves]
            table.append(line)
    return table


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_sincos_by_hand(grid: tuple[int, int]) -> None:
    torch.testing.assert_close(sincos_positions(grid, 16), torch.tensor(sincos_by_hand(*grid, 16)))


def test_sincos_of_other_ranks() -> None:
    assert sincos_positions((5,), 8).shape == (5, 8) and sincos_positions((2, 3, 4), 24).shape == (24, 24)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions((2, 2), 10)


def test_relative_bias_equals_timms() -> None:
    ours, theirs = RelativePositionBias((3, 4), 2), TimmBias((3, 4), 2)
    torch.nn.init.normal_(ours.table)
    theirs.relative_position_bias_table.data.copy_(ours.table.data)
    assert torch.equal(ours(), theirs())


def test_relative_bias_without_class_token_depends_on_the_offset() -> None:
    bias = RelativePositionBias((3, 3), 1, class_token=False)
    torch.nn.init.normal_(bias.table)
    b = bias()[0]
    assert b[0, 4] == b[4, 8] and b[0, 1] == b[7, 8] and b[0, 1] != b[1, 0]


def test_initialisations() -> None:
    linear, norm, conv = nn.Linear(64, 192), nn.LayerNorm(8), nn.Conv2d(3, 64, 4)
    xavier_init(linear)
    bound, weight = (6 / 256) ** 0.5, linear.weight.detach()
    assert float(weight.abs().max()) <= bound and abs(float(weight.std()) - bound / 3**0.5) < 0.005
    assert not linear.bias.any()
    for module in (linear, norm, conv):
        truncated_normal_init(module)
    assert all(abs(float(m.weight.detach().std()) - 0.02) < 0.002 for m in (linear, conv))
    assert torch.equal(norm.weight, torch.ones(8)) and not norm.bias.any() and not conv.bias.any()
