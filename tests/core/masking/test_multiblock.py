"""Multi-block and tube maskings, against what the authors' own samplers draw (see tests/golden/multiblock.json)."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from unmask.core.mask import Indices, Split
from unmask.core.masking import MultiBlockMasking, SpaceTimeBlockMasking, TubeMasking
from unmask.core.masking.multiblock import context_and_targets, cover
from unmask.core.nn.rotary import rotary_positions
from unmask.core.randomness import Key

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "multiblock.safetensors")
SHORT, LONG = SpaceTimeBlockMasking(), SpaceTimeBlockMasking(2, (0.7, 0.7))
PUBLISHED = MultiBlockMasking(per_batch=True)


def keys(n: int, seed: int = 0) -> Key:
    return Key.of(seed, torch.arange(n))


def of_step(step: int) -> Key:
    """A key that all samples of a step share."""
    return Key.of(0, torch.tensor([step])).stream("batch")


def uniforms(counter: int, n: int) -> list[Tensor]:
    """What the released samplers draw block sizes from at one value of their counter."""
    generator = torch.Generator().manual_seed(counter)
    return [torch.rand(1, generator=generator) for _ in range(n)]


def randint(high: int) -> int:
    return int(torch.randint(0, high, (1,)))


def cut(members: Tensor) -> Tensor:
    return Indices.from_members(members, int(members.sum(1).min())).index


# --- given the same random numbers, the released samplers' blocks ---


def test_ijepa_sizes_are_the_released_ones() -> None:
    u = torch.stack(
        [torch.cat([scale, torch.zeros(1), context]) for scale, context in (uniforms(c, 2) for c in range(200))]
    )
    expected = GOLDEN["ijepa/sizes_g16_counter0to199"].long()
    assert torch.equal(MultiBlockMasking().sizes(u, (16, 16)).flatten(1), expected)


@pytest.mark.parametrize("grid", [(8, 14, 14), (8, 16, 16), (4, 8, 8)])
def test_vjepa_sizes_are_the_released_ones(grid: tuple[int, int, int]) -> None:
    u = torch.stack([torch.cat(uniforms(counter, 3)) for counter in range(32)])
    for name, masking in (("short", SHORT), ("long", LONG)):
        expected = GOLDEN[f"vjepa/block_size_thw_{grid[0]}x{grid[1]}x{grid[2]}_{name}_counter0to31"].long()
        assert torch.equal(masking.sizes(u, grid), expected)


@pytest.mark.parametrize(("n", "min_keep"), [(14, 10), (8, 3)])
def test_ijepa_splits_are_the_released_ones(n: int, min_keep: int) -> None:
    masking, grid = MultiBlockMasking(min_keep=min_keep), (n, n)
    torch.manual_seed(1234)
    for batch in range(2):
        scale, context = uniforms(batch, 2)
        size = masking.sizes(torch.cat([scale, scale, context])[None], grid)[0][[0, 0, 0, 0, 1]]
        start = [[[randint(n - h), randint(n - w)] for h, w in size.tolist()] for _ in range(4)]
        seen, targets = context_and_targets(torch.tensor(start), size.expand(4, -1, -1), grid)
        name = f"ijepa/g{n}/exact_seed1234/batch{batch}"
        assert torch.equal(cut(seen), GOLDEN[f"{name}/masks_enc0"].long())
        for i in range(4):
            assert torch.equal(cut(targets[:, i]), GOLDEN[f"{name}/masks_pred{i}"].long())


@pytest.mark.parametrize(("name", "masking"), [("short", SHORT), ("long", LONG)])
def test_vjepa_splits_are_the_released_ones(name: str, masking: SpaceTimeBlockMasking) -> None:
    grid = (4, 8, 8)
    torch.manual_seed(7)
    for call in range(3):
        ((steps, h, w),) = masking.sizes(torch.cat(uniforms(call, 3))[None], grid).tolist()
        places = []  # the released code draws row, column, time
        for _ in range(3 * masking.blocks):
            row, column = randint(8 - h + 1), randint(8 - w + 1)
            places.append([randint(4 - steps + 1), row, column])
        start = torch.tensor(places).view(3, masking.blocks, 3)
        hidden = cover(start, torch.tensor([steps, h, w]).expand_as(start), grid).any(1)
        for kind, members in (("enc", ~hidden), ("pred", hidden)):
            assert torch.equal(cut(members), GOLDEN[f"vjepa/{name}_4x8x8_seed7_call{call}_{kind}"].long())


@pytest.mark.parametrize("width", [4, 10, 20])
def test_vjepa2_rotation_is_the_released_one(width: int) -> None:
    rotary = rotary_positions(GOLDEN["vjepa2/rope_pos"].long()[:, None], width, pairs="adjacent_tiled")
    torch.testing.assert_close(rotary.rotate(GOLDEN[f"vjepa2/rope_in_d{width}"]), GOLDEN[f"vjepa2/rope_out_d{width}"])


# --- the distribution of what we draw ---


@pytest.mark.parametrize(("n", "min_keep"), [(14, 10), (8, 3)])
def test_by_default_blocks_have_the_published_statistics(n: int, min_keep: int) -> None:
    """Before anything is cut. Sizes of 2,560 samples against those of 40 batches, so tolerances are wide."""
    split = MultiBlockMasking(min_keep=min_keep)(keys(2560), (n, n))
    seen = ~split.hidden(n * n)
    expected = 1 - GOLDEN[f"ijepa/g{n}/context_hidden_share_before_truncation"]
    assert (seen.float().mean(0) - expected).abs().max() < 0.05
    assert abs(float(seen.float().mean() - expected.mean())) < 0.01
    shares = torch.stack([t.members(n * n) for t in split.targets]).float().mean((0, 1))
    assert (shares - GOLDEN[f"ijepa/g{n}/target_share"]).abs().max() < 0.04
    assert not shares.view(n, n)[-1].any() and not shares.view(n, n)[:, -1].any()


def test_as_published_the_context_shrinks_with_the_batch() -> None:
    share = [PUBLISHED(keys(64, b), (14, 14), of_step(b)).context.count / 196 for b in range(40)]
    assert sum(share) / 40 == pytest.approx(
        float(GOLDEN["ijepa/g14/context_len_per_batch"].float().mean()) / 196, abs=0.03
    )
    alone = [PUBLISHED(keys(1, b), (14, 14), of_step(b)).context.count / 196 for b in range(150)]
    assert sum(alone) / 150 == pytest.approx(0.42, abs=0.02)


@pytest.mark.parametrize(("name", "masking"), [("short", SHORT), ("long", LONG)])
def test_vjepa_shares(name: str, masking: SpaceTimeBlockMasking) -> None:
    split = masking(keys(2000), (8, 14, 14))
    hidden = split.hidden(1568).float().view(-1, 8, 196)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))  # the same at all times
    assert (hidden.mean((0, 1)) - GOLDEN[f"vjepa/{name}_batch1_hidden_share_8x14x14"].flatten()).abs().max() < 0.06
    counts = GOLDEN[f"vjepa/{name}_batch1_context_count_2000"].float()
    assert float(split.context.lengths.float().mean() - counts.mean()) / 1568 == pytest.approx(0, abs=0.01)
    published = SpaceTimeBlockMasking(masking.blocks, masking.spatial_scale, per_batch=True)
    drawn = [published(keys(24, b), (8, 14, 14), of_step(b)) for b in range(60)]
    for got, table in ((lambda s: s.context, "context"), (lambda s: s.targets[0], "target")):
        expected = float(GOLDEN[f"vjepa/{name}_batch24_{table}_count_100"].float().mean()) / 1568
        assert sum(got(split).count for split in drawn) / 60 / 1568 == pytest.approx(expected, abs=0.03)


# --- exact properties ---

OPTIONS = [
    (MultiBlockMasking(), (14, 14)),
    (MultiBlockMasking(targets=2, tie_scale_aspect=False, inclusive_end=True), (12, 16)),
    (SHORT, (4, 8, 8)),
    (LONG, (4, 8, 8)),
    (SpaceTimeBlockMasking(3, (0.2, 0.4), (0.3, 0.8)), (6, 7, 9)),
]


@pytest.mark.parametrize(("masking", "grid"), OPTIONS, ids=str)
@pytest.mark.parametrize("per_batch", [False, True])
def test_context_and_targets_are_disjoint_and_in_raster_order(
    masking: object, grid: tuple[int, ...], per_batch: bool
) -> None:
    tokens = int(torch.tensor(grid).prod())
    masking = type(masking)(**{**vars(masking), "per_batch": per_batch})
    split = masking(keys(50), grid, of_step(3))
    assert not (~split.hidden(tokens) & split.asked(tokens)).any()
    assert int(split.context.lengths.min()) > getattr(masking, "min_keep", 0)
    for indices in (split.context, *split.targets):
        assert (indices.index.diff(dim=1) >= (1 if indices.valid is None else 0)).all()
        assert (indices.valid is None) == per_batch


@pytest.mark.parametrize(("masking", "grid"), OPTIONS, ids=str)
def test_by_default_a_split_depends_on_its_key_alone(masking: object, grid: tuple[int, ...]) -> None:
    whole = masking(keys(40), grid)  # type: ignore[operator]
    for i in (0, 7, 39):
        alone, row = masking(Key.of(0, torch.tensor([i])), grid), whole.take([i])  # type: ignore[operator]
        assert torch.equal(alone.context.index, row.context.index)
        assert all(torch.equal(a.index, b.index) for a, b in zip(alone.targets, row.targets, strict=True))
    assert len({tuple(row) for row in whole.hidden(int(torch.tensor(grid).prod())).tolist()}) > 15


def sizes_of(split: Split, grid: tuple[int, int]) -> set[tuple[int, int]]:
    """(height, width) of every target; asserts that each is a full rectangle."""
    found = set()
    for target in split.targets:
        for block in target.members(grid[0] * grid[1]).view(-1, *grid):
            h, w = int(block.any(1).sum()), int(block.any(0).sum())
            assert int(block.sum()) == h * w
            found.add((h, w))
    return found


def test_targets_are_rectangles_of_one_size_for_a_sample_or_a_batch() -> None:
    own = MultiBlockMasking()(keys(60), (14, 14))
    assert len(sizes_of(own, (14, 14))) > 3 and all(len(sizes_of(own.take([i]), (14, 14))) == 1 for i in range(60))
    assert len(sizes_of(PUBLISHED(keys(60), (14, 14), of_step(0)), (14, 14))) == 1
    everywhere = MultiBlockMasking(inclusive_end=True)(keys(400), (14, 14))
    assert everywhere.asked(196).view(-1, 14, 14).any(0).all()  # the last row and column too
    free = sizes_of(MultiBlockMasking(tie_scale_aspect=False)(keys(400), (14, 14)), (14, 14))
    tied = sizes_of(MultiBlockMasking()(keys(400), (14, 14)), (14, 14))
    assert len(free) > len(tied)


def test_a_step_decides_the_published_sizes() -> None:
    one, again, other = (PUBLISHED(keys(6, seed), (14, 14), of_step(step)) for seed, step in ((0, 1), (1, 1), (0, 2)))
    assert one.targets[0].count == again.targets[0].count and not torch.equal(one.context.index, again.context.index)
    assert len({PUBLISHED(keys(2), (14, 14), of_step(step)).targets[0].count for step in range(20)}) > 2
    assert sizes_of(one, (14, 14)) == sizes_of(again, (14, 14)) and not torch.equal(
        one.targets[0].index, other.targets[0].index
    )


def test_too_small_a_context_is_drawn_again() -> None:
    """Half of all draws at these settings leave 3 tokens or fewer; nobody keeps such a draw."""
    tight = MultiBlockMasking(targets=6, target_scale=(0.2, 0.3), min_keep=5)
    loose = MultiBlockMasking(targets=6, target_scale=(0.2, 0.3), min_keep=0)
    few, enough = loose(keys(300), (6, 6)).context.lengths, tight(keys(300), (6, 6)).context.lengths
    assert int(few.min()) <= 5 < int(enough.min())
    assert torch.equal(enough[few > 5], few[few > 5])  # the others keep theirs


def test_wrong_settings_and_grids_are_refused() -> None:
    for wrong, message in (
        ({"targets": 0}, "0 blocks: at least one"),
        ({"target_scale": (0.3, 0.2)}, "not a rising range within"),
        ({"context_scale": (0.5, 1.1)}, "not a rising range within"),
        ({"target_aspect": (0.0, 1.0)}, "aspect"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiBlockMasking(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2-d token grid; got 2 x 2 x 2"):
        MultiBlockMasking()(keys(1), (2, 2, 2))
    with pytest.raises(ValueError, match="3-d token grid; got 8 x 8"):
        SHORT(keys(1), (8, 8))
    with pytest.raises(ValueError, match="lower min_keep"):
        MultiBlockMasking()(keys(2), (4, 4))
    assert MultiBlockMasking(min_keep=2)(keys(2), (4, 4)).context.lengths.min() > 2  # what the message says to do
    with pytest.raises(ValueError, match="give a key that is the same .* `shared`, or set per_batch to false"):
        PUBLISHED(keys(2), (14, 14))


# --- tubes ---


@pytest.mark.parametrize(
    ("grid", "ratio", "per_slot"),  # counts of MCG-NJU/VideoMAE 14ef8d8, TubeMaskingGenerator
    [((8, 14, 14), 0.9, 176), ((8, 14, 14), 0.75, 147), ((8, 6, 6), 0.9, 32), ((8, 4, 4), 0.75, 12),
     ((8, 5, 5), 0.5, 12), ((8, 7, 7), 0.33, 16)],
)  # fmt: skip
def test_tubes_hide_the_same_at_all_times(grid: tuple[int, int, int], ratio: float, per_slot: int) -> None:
    mask = TubeMasking(ratio)(keys(30), grid)
    hidden = mask.hidden.view(30, grid[0], -1)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden)) and hidden.sum(2).unique().tolist() == [per_slot]
    assert mask.num_visible == grid[0] * (grid[1] * grid[2] - per_slot)
    assert torch.equal(mask.visible_indices.members(hidden[0].numel()), ~mask.hidden)
    assert len({tuple(row) for row in mask.hidden.tolist()}) > 25


def test_tubes_are_uniform_keyed_by_sample_and_need_time() -> None:
    share = TubeMasking(0.75)(keys(4000), (2, 4, 4)).hidden.float().mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    whole, alone = TubeMasking()(keys(9), (4, 6, 6)), TubeMasking()(Key.of(0, torch.tensor([5])), (4, 6, 6))
    assert torch.equal(whole.hidden[5], alone.hidden[0])
    assert TubeMasking(0.9, "floor_keep")(keys(1), (8, 14, 14)).hidden.sum() == 8 * 177  # V-JEPA's
    with pytest.raises(ValueError, match="at least two axes"):
        TubeMasking()(keys(1), (8,))


def test_cover_by_loop() -> None:
    start, size, grid = torch.tensor([[[0, 1, 2], [1, 0, 0]]]), torch.tensor([[[2, 2, 1], [1, 3, 4]]]), (2, 3, 4)
    for block, tokens in enumerate(cover(start, size, grid)[0]):
        for i, token in enumerate(itertools.product(*map(range, grid))):
            first, length = start[0, block].tolist(), size[0, block].tolist()
            assert bool(tokens[i]) == all(a <= t < a + n for a, t, n in zip(first, token, length, strict=True))
