"""Attention by use and the blocks made of it, against torch's and transformers'."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.layers import SwiGLU as TimmSwiGLU
from torch import Tensor, nn
from transformers import LlamaConfig, VJEPA2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Layer

from unmask.core.mask import Indices
from unmask.core.nn.attention import Attention, CrossAttention, watch
from unmask.core.nn.rotary import Rotary, grid_positions, rotary_positions
from unmask.core.nn.transformer import Block, CrossBlock, SwiGLU


def torchs(dim: int, heads: int) -> nn.MultiheadAttention:
    """torch's attention with random weights and biases."""
    attention = nn.MultiheadAttention(dim, heads, batch_first=True)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def attention_pair(dim: int = 24, heads: int = 3) -> tuple[Attention, nn.MultiheadAttention]:
    ours, theirs = Attention(dim, heads), torchs(dim, heads)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {"proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}
    ours.load_state_dict({a: theirs.state_dict()[b] for a, b in names.items()})
    return ours, theirs


def cross_pair(dim: int = 24, heads: int = 3) -> tuple[CrossAttention, nn.MultiheadAttention]:
    ours, theirs = CrossAttention(dim, heads), torchs(dim, heads)
    copy_cross(ours, theirs)
    return ours, theirs


def copy_cross(ours: CrossAttention, theirs: nn.MultiheadAttention) -> None:
    weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    with torch.no_grad():
        for linear, weight, bias in zip((ours.projq, ours.projk, ours.projv), weights, biases, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    ours.proj.load_state_dict(theirs.out_proj.state_dict())


PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_torchs(causal: bool, padded: bool) -> None:
    ours, theirs = attention_pair()
    x = torch.randn(2, 7, 24)
    padding = PADDING if padded else None
    expected, weights = theirs(
        x, x, x, key_padding_mask=padding, attn_mask=FUTURE if causal else None, average_attn_weights=False
    )
    with watch(ours) as seen:
        got = ours(x, valid=None if padding is None else ~padding, causal=causal)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].weights, weights, rtol=1e-5, atol=1e-6)


def test_causal_with_a_bias_and_the_last_tokens_only() -> None:
    ours, theirs = attention_pair()
    x, bias = torch.randn(2, 7, 24), torch.randn(3, 7, 7)
    mask = bias.masked_fill(FUTURE, float("-inf")).repeat(2, 1, 1)
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x, bias, causal=True), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, bias, causal=True, last=3), expected[:, -3:], rtol=1e-5, atol=1e-5)
    rotary = rotary_positions(torch.arange(7)[:, None], 8)
    whole = ours(x, bias, rotary=rotary, causal=True)
    torch.testing.assert_close(ours(x, bias, rotary=rotary, causal=True, last=3), whole[:, -3:])


def test_without_biases_the_last_tokens_are_those_of_all() -> None:
    attention, x = Attention(24, 3, bias=False), torch.randn(2, 7, 24)
    assert sorted(attention.state_dict()) == ["proj.weight", "qkv.weight"]
    torch.testing.assert_close(attention(x, last=2), attention(x)[:, -2:])


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_equals_torchs(padded: bool) -> None:
    ours, theirs = cross_pair()
    x, memory = torch.randn(2, 4, 24), torch.randn(2, 7, 24)
    padding = PADDING if padded else None
    expected, weights = theirs(x, memory, memory, key_padding_mask=padding, average_attn_weights=False)
    with watch(ours) as seen:
        got = ours(x, memory, None if padding is None else ~padding)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0].weights, weights, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="dim 24 is not divisible by 5 heads"):
        CrossAttention(24, 5)


def test_cross_block_equals_torchs_decoder_layer() -> None:
    """torch's layer takes the memory as it comes: it gets what our `norm_y` makes of it."""
    ours = CrossBlock(24, 3, mlp_ratio=2.0, eps=1e-5)
    theirs = nn.TransformerDecoderLayer(24, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(ours.norm_y.weight), nn.init.normal_(ours.norm_y.bias)
    copy_cross(ours.cross_attn, theirs.multihead_attn)
    of_self = theirs.self_attn
    ours.attn.load_state_dict({
        "qkv.weight": of_self.in_proj_weight, "qkv.bias": of_self.in_proj_bias,
        "proj.weight": of_self.out_proj.weight, "proj.bias": of_self.out_proj.bias,
    })  # fmt: skip
    for mine, other in (("norm1", "norm1"), ("norm2", "norm2"), ("norm3", "norm3")):
        getattr(ours, mine).load_state_dict(getattr(theirs, other).state_dict())
    ours.mlp.fc1.load_state_dict(theirs.linear1.state_dict()), ours.mlp.fc2.load_state_dict(theirs.linear2.state_dict())
    x, memory = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    expected = theirs(x, ours.norm_y(memory), memory_key_padding_mask=PADDING)
    torch.testing.assert_close(ours(x, memory, memory_valid=~PADDING), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, memory, memory_valid=~PADDING, last=2), expected[:, -2:], rtol=1e-4, atol=1e-5)


def llama(dim: int = 24, heads: int = 3, hidden: int = 40) -> tuple[Block, LlamaDecoderLayer, LlamaConfig]:
    config = LlamaConfig(
        hidden_size=dim, num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=hidden,
        rms_norm_eps=1e-5, attn_implementation="sdpa",
    )  # fmt: skip
    ours = Block(dim, heads, hidden / dim, eps=1e-5, rms_norm=True, swiglu=True, bias=False)
    theirs = LlamaDecoderLayer(config, 0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    attention, mlp = theirs.self_attn, theirs.mlp
    ours.load_state_dict({
        "norm1.weight": theirs.input_layernorm.weight, "norm2.weight": theirs.post_attention_layernorm.weight,
        "attn.qkv.weight": torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
        "attn.proj.weight": attention.o_proj.weight, "mlp.fc1_g.weight": mlp.gate_proj.weight,
        "mlp.fc1_x.weight": mlp.up_proj.weight, "mlp.fc2.weight": mlp.down_proj.weight,
    })  # fmt: skip
    return ours, theirs, config


def test_block_equals_llamas() -> None:
    ours, theirs, config = llama()
    x, positions = torch.randn(2, 9, 24), torch.arange(9)[None]
    expected = theirs(x, position_embeddings=LlamaRotaryEmbedding(config)(x, positions), attention_mask=None)
    got = ours(x, rotary=rotary_positions(positions[0, :, None], 8), causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(ours.mlp.fc1_g.weight.grad, theirs.mlp.gate_proj.weight.grad, rtol=1e-3, atol=1e-3)


def test_a_causal_block_does_not_see_the_future() -> None:
    ours, _, _ = llama()
    x, rotary = torch.randn(1, 6, 24), rotary_positions(torch.arange(6)[:, None], 8)
    changed = torch.cat([x[:, :4], torch.randn(1, 2, 24)], dim=1)
    assert torch.equal(ours(x, rotary=rotary, causal=True)[:, :4], ours(changed, rotary=rotary, causal=True)[:, :4])


def test_rms_norm_is_llamas() -> None:
    theirs = LlamaRMSNorm(24, eps=1e-5)
    nn.init.normal_(theirs.weight)
    ours = Block(24, 3, rms_norm=True, eps=1e-5).norm1
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 24) * 1e-3  # small enough for eps to matter
    torch.testing.assert_close(ours(x), theirs(x))


def test_swiglu_equals_timms() -> None:
    ours, theirs = SwiGLU(12, 20), TimmSwiGLU(12, 20)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_block_equals_vjepa2s() -> None:
    config = VJEPA2Config(
        crop_size=32, patch_size=8, frames_per_clip=4, tubelet_size=2, hidden_size=48, num_attention_heads=3,
        mlp_ratio=2.0, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = VJEPA2Layer(config, hidden_size=48, num_attention_heads=3, mlp_ratio=2.0).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    state, of = theirs.state_dict(), ("query", "key", "value")
    ours = Block(48, 3, mlp_ratio=2.0)
    fused = {f"attn.qkv.{kind}": torch.cat([state.pop(f"attention.{part}.{kind}") for part in of])
             for kind in ("weight", "bias")}  # fmt: skip
    ours.load_state_dict({name.replace("attention.proj", "attn.proj"): t for name, t in state.items()} | fused)
    rotary = rotary_positions(grid_positions((2, 4, 4)), 16, pairs="adjacent_tiled")
    x = torch.randn(2, 32, 48)
    torch.testing.assert_close(ours(x, rotary=rotary), theirs(x)[0], rtol=1e-4, atol=1e-5)
    keep = torch.stack([torch.randperm(32)[:9], torch.randperm(32)[:9]])
    got = ours(x[:, :9], rotary=rotary.take(Indices(keep)))
    torch.testing.assert_close(got, theirs(x[:, :9], position_mask=keep)[0], rtol=1e-4, atol=1e-5)


# --- looking inside ---


def test_watching_changes_nothing_and_ends() -> None:
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    before = attention(x)
    with watch(attention) as seen:
        during = attention(x)
        attention(x, last=2)
    attention(x)
    assert torch.equal(before, during) and len(seen) == 2 and attention.seen is None
    assert "seen" not in attention.state_dict() and seen[1].q.shape == (2, 2, 2, 8)


def test_queries_keys_values_make_the_answer_and_carry_gradients() -> None:
    attention, x, bias = Attention(16, 2), torch.randn(2, 5, 16), torch.randn(2, 5, 5)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with watch(attention) as seen:
        out = attention(x, bias, valid)
    (one,) = seen
    torch.testing.assert_close(attention.proj((one.weights @ one.v).transpose(1, 2).flatten(2)), out)
    assert not one.weights[1, :, :, 3:].any() and bool((one.logits[1, :, :, 3:] == float("-inf")).all())
    torch.testing.assert_close(one.weights.sum(-1), torch.ones(2, 2, 5))
    (one.q @ one.k.transpose(-1, -2)).sum().backward()
    assert attention.qkv.weight.grad is not None and attention.qkv.weight.grad[:32].any()


def test_layers_are_watched_in_the_order_they_run() -> None:
    blocks, x = nn.Sequential(Block(16, 2), Block(16, 2)), torch.randn(1, 4, 16)
    with watch(blocks[1].attn, blocks[0].attn) as seen:
        blocks(x)
    with watch(blocks[0].attn) as alone:
        blocks(x)
    assert len(seen) == 2 and torch.equal(seen[0].q, alone[0].q)


# --- rotary positions ---


def rotate_pair_by_pair(x: Tensor, position: list[int], partner: list[tuple[int, int, int, float]]) -> Tensor:
    """Complex rotation of channels (a, b) by position[axis] * frequency."""
    out = x.clone()
    for a, b, axis, frequency in partner:
        turned = torch.complex(x[a], x[b]) * torch.exp(torch.tensor(1j * position[axis] * frequency))
        out[a], out[b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("pairs", ["halves", "adjacent"])
@pytest.mark.parametrize(("axes", "head_dim", "base"), [(1, 8, 1e4), (2, 16, 100.0), (3, 20, 1e4)])
def test_rotation_is_complex_multiplication(axes: int, head_dim: int, base: float, pairs: str) -> None:
    share = 2 * (head_dim // axes // 2)
    half = share // 2
    table = []
    for axis, k in itertools.product(range(axes), range(half)):
        first, second = (k, k + half) if pairs == "halves" else (2 * k, 2 * k + 1)
        table.append((axis * share + first, axis * share + second, axis, base ** (-k / half)))
    positions = torch.randint(0, 30, (5, axes))
    x = torch.randn(1, 1, 5, head_dim)
    got = rotary_positions(positions, head_dim, base=base, pairs=pairs).rotate(x)  # type: ignore[arg-type]
    expected = torch.stack([rotate_pair_by_pair(x[0, 0, i], positions[i].tolist(), table) for i in range(5)])
    torch.testing.assert_close(got[0, 0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[..., axes * share :], x[..., axes * share :])  # what is left over is not turned


def test_logits_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)

    def logit(a: list[int], b: list[int]) -> float:
        turned = (rotary_positions(torch.tensor([p]), 24).rotate(x) for p, x in ((a, q), (b, k)))
        return float((next(turned) * next(turned)).sum())

    assert logit([3, 1, 2], [5, 1, 0]) == pytest.approx(logit([4, 7, 5], [6, 7, 3]), abs=1e-5)
    assert logit([3, 1, 2], [5, 1, 0]) != pytest.approx(logit([4, 7, 5], [6, 8, 3]), abs=1e-3)


def test_angles_are_exact_in_half_precision() -> None:
    rotary = rotary_positions(torch.arange(3000, 3004)[:, None], 8)
    x = torch.randn(1, 2, 4, 8)
    got = rotary.rotate(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rotary.rotate(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def test_rotary_parts() -> None:
    whole = rotary_positions(grid_positions((3, 4)), 8)
    x = torch.randn(2, 2, 14, 8)
    shifted = whole.with_prefix(2).rotate(x)
    assert torch.equal(shifted[:, :, :2], x[:, :, :2]) and torch.equal(shifted[:, :, 2:], whole.rotate(x[:, :, 2:]))
    first, second = (whole.take(Indices(torch.stack([torch.randperm(12)[:n] for _ in range(2)]))) for n in (5, 2))
    both = Rotary.concatenate([first, second])
    assert torch.equal(both.last(2).rotate(x[:, :, :2]), second.rotate(x[:, :, :2]))
    assert torch.equal(grid_positions((2, 3)), torch.cartesian_prod(torch.arange(2), torch.arange(3)))
    with pytest.raises(ValueError, match="a head of 4 channels has no pair for each of 3 axes; use at least 6"):
        rotary_positions(grid_positions((2, 2, 2)), 4)
    assert rotary_positions(grid_positions((2, 2, 2)), 6).cos.shape == (1, 1, 8, 6)
