"""Attention within sets of different sizes against one set at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unmask.core.nn.attention import GroupedAttention
from unmask.core.nn.packed import Groups, grouped_attention
from unmask.core.nn.transformer import Block, GroupedBlock


def sets(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Set numbers of tokens in a random order; set i has sizes[i] tokens."""
    number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 7 - 3
    return number[torch.randperm(len(number), generator=torch.Generator().manual_seed(seed))]


def test_groups_are_rectangles_of_whole_sets() -> None:
    set_of = sets(3, 1, 5, 3, 1, 12)
    groups = Groups.of(set_of)
    assert groups.sizes.tolist() == [[2, 1], [2, 3], [1, 5], [1, 12]]
    assert torch.equal(groups.order.sort().values, torch.arange(25))
    assert torch.equal(groups.order[groups.inverse], torch.arange(25))
    at = 0
    for number, size in groups.sizes.tolist():
        block = set_of[groups.order[at : at + number * size]].view(number, size)
        assert (block == block[:, :1]).all()
        assert (groups.order[at : at + number * size].view(number, size).diff(dim=1) > 0).all()  # order kept in a set
        at += number * size


def test_no_tokens() -> None:
    groups = Groups.of(torch.zeros(0, dtype=torch.int64))
    assert groups.sizes.shape == (0, 2)


def test_attention_equals_one_set_at_a_time() -> None:
    set_of = sets(4, 1, 9, 4, 2)
    groups = Groups.of(set_of)
    q, k, v = torch.randn(3, 1, 2, 20, 6, dtype=torch.float64, requires_grad=True)
    grouped = [x[:, :, groups.order] for x in (q, k, v)]
    got = grouped_attention(*grouped, groups.sizes)[:, :, groups.inverse]
    expected = torch.zeros_like(got)
    for number in set_of.unique():
        mine = (set_of == number).nonzero()[:, 0]
        logits = q[0][:, mine] @ k[0][:, mine].transpose(1, 2) / 6**0.5
        expected = expected.index_add(2, mine, (logits.softmax(-1) @ v[0][:, mine])[None])
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    ours = torch.autograd.grad((got * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs)


def one_set(x: torch.Tensor) -> torch.Tensor:
    """The sizes of one set that holds all tokens."""
    return torch.tensor([[1, x.shape[1]]])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_block_on_sets_equals_the_block_on_each(norm: str) -> None:
    set_of = sets(4, 2, 7)
    groups = Groups.of(set_of)
    grouped, plain = GroupedBlock(24, 3, norm=norm), Block(24, 3, norm=norm)  # type: ignore[arg-type]
    plain.load_state_dict(grouped.state_dict())  # strict: the names are the same
    x, position = torch.randn(2, 13, 24)
    got = grouped(x[groups.order][None], groups.sizes)[0][groups.inverse]
    placed = grouped(x[groups.order][None], groups.sizes, position[groups.order][None])[0][groups.inverse]
    for number in set_of.unique():
        one, where = x[set_of == number][None], position[set_of == number][None]
        torch.testing.assert_close(got[set_of == number], plain(one)[0])
        torch.testing.assert_close(placed[set_of == number], grouped(one, one_set(one), where)[0])


def test_position_enters_queries_and_keys_only() -> None:
    ours = GroupedAttention(24, 3)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {"proj.weight": "out_proj.weight", "proj.bias": "out_proj.bias"}
    ours.load_state_dict({a: theirs.state_dict()[b] for a, b in names.items()})
    x, position = torch.randn(2, 1, 7, 24)
    expected = theirs(x + position, x + position, x, need_weights=False)[0]
    torch.testing.assert_close(ours(x, one_set(x), position), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(x, one_set(x), position), ours(x + position, one_set(x)))


def test_dropout_of_attention_weights_is_on_in_training_only() -> None:
    groups = Groups.of(sets(6, 6))
    attention = GroupedAttention(8, 2, attention_dropout=0.5)
    x = torch.randn(1, 12, 8)
    assert not torch.equal(attention(x, groups.sizes), attention(x, groups.sizes))
    attention.eval()
    assert torch.equal(attention(x, groups.sizes), attention(x, groups.sizes))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")
def test_compiles_without_a_new_graph_for_every_batch() -> None:
    block = GroupedBlock(16, 2, norm="post")
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=count, dynamic=True)
    made = []
    for seed, sizes in enumerate([(4, 2, 1), (5, 3, 2), (6, 3, 2, 8, 5), (7, 1, 4, 4)]):
        groups = Groups.of(sets(*sizes, seed=seed))
        x = torch.randn(1, sum(sizes), 16)
        torch.testing.assert_close(compiled(x, groups.sizes), block(x, groups.sizes), rtol=1e-5, atol=1e-5)
        made.append(len(graphs))
    torch._dynamo.reset()
    assert made[-1] == made[1], f"graphs compiled after each batch: {made}"


def test_fused_kernel_is_what_runs() -> None:
    """Sets of one size are one call: as many calls as sizes."""
    calls = []
    real = F.scaled_dot_product_attention

    def spy(*args: torch.Tensor, **kwargs: float) -> torch.Tensor:
        calls.append(tuple(args[0].shape))
        return real(*args, **kwargs)

    groups = Groups.of(sets(3, 3, 3, 8))
    q = torch.randn(1, 2, 17, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        grouped_attention(q, q, q, groups.sizes)
    assert calls == [(3, 2, 3, 4), (1, 2, 8, 4)]
