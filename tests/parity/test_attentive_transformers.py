"""The attentive probe's pooling against transformers' ``VJEPA2AttentivePooler``: same weights, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import VJEPA2Config
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2AttentivePooler

from unmask.core.evaluation import AttentiveProbe
from unmask.core.evaluation.attentive import AttentiveClassifier

DIM, HEADS = 24, 3


def pair(blocks: int) -> tuple[AttentiveClassifier, nn.Module]:
    """The two at equal, random weights (biases and norms too, so that none of them is trivially right)."""
    torch.manual_seed(0)
    config = VJEPA2Config(hidden_size=DIM, num_attention_heads=HEADS, num_pooler_layers=blocks - 1, layer_norm_eps=1e-6)
    config._attn_implementation = "eager"
    theirs = VJEPA2AttentivePooler(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = AttentiveClassifier(DIM, 2, AttentiveProbe(blocks=blocks, heads=HEADS))
    missing, unexpected = ours.load_state_dict(renamed(theirs, blocks), strict=False)
    assert (missing, unexpected) == (["head.weight", "head.bias"], [])
    return ours, theirs


def renamed(theirs: nn.Module, blocks: int, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Their weights or gradients under our names."""
    of = {name: p.grad if gradients else p.detach() for name, p in theirs.named_parameters()}
    found = {"query": of.pop("query_tokens")}
    for end in ("weight", "bias"):
        for i in range(blocks - 1):
            layer = f"self_attention_layers.{i}.self_attn."
            found[f"blocks.{i}.attn.qkv.{end}"] = torch.cat([of.pop(f"{layer}{x}_proj.{end}") for x in "qkv"])
    names = {"cross_attention_layer.": "", "self_attention_layers": "blocks", "layer_norm": "norm"}
    names |= {"self_attn.out_proj": "attn.proj", "q_proj": "projq", "k_proj": "projk", "v_proj": "projv"}
    for name, value in of.items():
        for a, b in names.items():
            name = name.replace(a, b)
        found[name] = value
    return found


@pytest.mark.parametrize("blocks", [1, 4])
def test_pooled_tokens_and_all_gradients_are_equal(blocks: int) -> None:
    ours, theirs = pair(blocks)
    x = torch.randn(3, 10, DIM)
    a, b = ours.pool(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters())
    expected = renamed(theirs, blocks, gradients=True)
    for name, parameter in ours.named_parameters():
        if not name.startswith("head."):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
