"""K-means against scikit-learn and exact identities; sampling that is keyed and bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import FakeClips, tone
from safetensors.torch import save_file
from torch import Tensor

from unmask.core.data.kinds import CorruptSampleError
from unmask.core.randomness import stable_id
from unmask.speech_audio.targets.clustering import (
    ClusteringError,
    KMeans,
    KMeansSettings,
    ResidualKMeans,
    _nearest_on_device,
    fit_residual,
    moments,
    nearest,
    sample_frames,
)
from unmask.speech_audio.targets.codebook import Codebook, averaged
from unmask.speech_audio.targets.features import MFCC

QUICK = KMeansSettings(n_init=2, batch=256, max_iter=10, max_no_improvement=10)


def blobs(count: int = 900, dim: int = 6, classes: int = 5, scale: float = 4.0) -> Tensor:
    """Frames around `classes` centres, of very different spread per dimension."""
    generator = torch.Generator().manual_seed(1)
    centres = scale * torch.randn(classes, dim, generator=generator)
    x = centres[torch.arange(count) % classes] + torch.randn(count, dim, generator=generator)
    return x * torch.logspace(-1, 2, dim) + 7


# ---- assignment ----------------------------------------------------------------------------------------------------


def test_labels_are_those_of_scikit_learn() -> None:
    from sklearn.cluster import MiniBatchKMeans

    x = blobs()
    theirs = MiniBatchKMeans(20, n_init=1, batch_size=256, max_iter=3, random_state=0).fit(x.numpy())
    ours = KMeans(torch.from_numpy(theirs.cluster_centers_)).assign(x)
    assert ours.tolist() == theirs.predict(x.numpy()).tolist()


def test_labels_minimise_the_distance_in_any_pieces_and_ties_go_to_the_lowest() -> None:
    x, centroids = torch.randn(500, 8), torch.randn(31, 8)
    expected = torch.cdist(x.double(), centroids.double()).argmin(1)
    for rows in (1, 7, 499, 500, 1000):
        assert nearest(x, centroids, rows).equal(expected)
        assert _nearest_on_device(x, centroids, rows).equal(expected)
    whole = centroids.mul(8).round()  # exact in fp32, so that equal distances are equal
    assert nearest(x.mul(8).round(), torch.cat([whole, whole])).max() < 31
    assert nearest(torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 1], [-1, 0]])).tolist() == [0, 0]
    assert nearest(x[:0], centroids).shape == (0,)


def test_frames_of_another_feature_are_refused() -> None:
    with pytest.raises(ClusteringError, match="frames have 4 dimensions and the codebook 2"):
        KMeans(torch.zeros(3, 2)).assign(torch.zeros(5, 4))


def fit_kmeans(x: Tensor, classes: int, **options: Any) -> KMeans:
    """Plain k-means: one stage."""
    return fit_residual(x, classes, **options).stages[0]


# ---- fitting -------------------------------------------------------------------------------------------------------


def test_separate_clusters_are_found_and_a_fit_repeats() -> None:
    x = blobs(scale=40.0)
    fitted = fit_kmeans(x, 5, seed=3, settings=QUICK, standardise=True)
    labels = fitted.assign(x)
    for cluster in range(5):
        assert labels[cluster::5].unique().numel() == 1
    assert fit_kmeans(x, 5, seed=3, settings=QUICK, standardise=True).centroids.equal(fitted.centroids)
    assert not fit_kmeans(x, 5, seed=4, settings=QUICK, standardise=True).centroids.equal(fitted.centroids)


def test_standardised_dimensions_count_alike() -> None:
    x = blobs()
    fitted = fit_kmeans(x, 5, seed=0, settings=QUICK, standardise=True)
    stretched = fit_kmeans(x * torch.logspace(3, -3, 6) - 5, 5, seed=0, settings=QUICK, standardise=True)
    torch.testing.assert_close(fitted.centroids, stretched.centroids, atol=1e-3, rtol=1e-3)
    assert fitted.mean is not None and fitted.std is not None
    known = fitted.standardise(x)
    torch.testing.assert_close(known.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(6))
    assert fit_kmeans(x, 5, seed=0, settings=QUICK).mean is None


def test_a_constant_dimension_is_left_alone() -> None:
    mean, std = moments(torch.stack([torch.randn(100), torch.full((100,), 0.1)], dim=1))
    assert std[1] == 1 and mean[1] == pytest.approx(0.1)


def test_too_few_frames_and_numbers_that_are_not_finite_are_named() -> None:
    with pytest.raises(ClusteringError, match="4 frames are too few for 5 clusters; give more audio"):
        fit_kmeans(torch.randn(4, 2), 5, seed=0)
    with pytest.raises(ClusteringError, match="NaN or infinity; the model that gave them has diverged"):
        fit_kmeans(torch.full((9, 2), float("nan")), 5, seed=0)


def test_silence_leaves_clusters_empty_without_a_warning() -> None:
    x = torch.cat([torch.zeros(50, 2), torch.ones(50, 2)])
    labels = fit_kmeans(x, 5, seed=0, settings=QUICK).assign(x)
    assert labels[:50].unique().numel() == labels[50:].unique().numel() == 1 and labels[0] != labels[50]


# ---- residual stages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual() -> tuple[Tensor, ResidualKMeans]:
    x = blobs()
    return x, fit_residual(x, 8, 4, seed=0, settings=QUICK, standardise=True)


def test_the_first_stage_is_plain_kmeans(residual: tuple[Tensor, ResidualKMeans]) -> None:
    x, fitted = residual
    plain = fit_kmeans(x, 8, seed=0, settings=QUICK, standardise=True)
    assert plain.centroids.equal(fitted.stages[0].centroids)
    assert plain.assign(x).equal(fitted.assign(x)[:, 0])
    assert ResidualKMeans((plain,)).assign(x)[:, 0].equal(plain.assign(x))


def test_centroids_and_the_last_residual_add_up_to_the_frames(residual: tuple[Tensor, ResidualKMeans]) -> None:
    x, fitted = residual
    known, labels = fitted.stages[0].standardise(x), fitted.assign(x)
    rest = known
    for stage, column in zip(fitted.stages, labels.T, strict=True):
        assert column.equal(nearest(rest, stage.centroids))
        rest = rest - stage.centroids[column]
    torch.testing.assert_close(decoded(fitted, labels) + rest, known, rtol=0, atol=2e-6)  # sums in another order


def decoded(fitted: ResidualKMeans, labels: Tensor) -> Tensor:
    """The sum of the centroids of the first stages, as many as `labels` has."""
    stages = fitted.stages[: labels.shape[1]]
    return torch.stack([stage.centroids[column] for stage, column in zip(stages, labels.T, strict=True)]).sum(0)


def test_squares_do_not_rise_and_are_those_of_the_residuals(residual: tuple[Tensor, ResidualKMeans]) -> None:
    x, fitted = residual
    labels, squares = fitted.quantise(x)
    known = fitted.stages[0].standardise(x)
    assert (squares.diff() <= 0).all() and 0 < squares[-1] < squares[1] < squares[0]
    assert squares[0].item() == pytest.approx(known.square().sum().item(), rel=1e-5)
    for stages in range(1, 5):
        rest = known - decoded(fitted, labels[:, :stages])
        assert squares[stages].item() == pytest.approx(rest.square().sum().item(), rel=1e-4)


# ---- codebooks as files --------------------------------------------------------------------------------------------


def make_codebook(average: bool = False) -> Codebook:
    x = blobs()
    parts = {"layer 3": fit_residual(x, 4, 2, seed=0, settings=QUICK, standardise=True)}
    if average:
        return Codebook(parts, (torch.randn(12), torch.rand(12) + 0.5))
    return Codebook(parts | {"layer 6": fit_residual(x, 4, 2, seed=1, settings=QUICK)})


@pytest.mark.parametrize("average", [False, True])
def test_a_codebook_comes_back_from_its_file(tmp_path: Path, average: bool) -> None:
    book, x = make_codebook(average), torch.randn(50, 12)
    book.save(tmp_path / "codebook.safetensors")
    back = Codebook.load(tmp_path / "codebook.safetensors")
    assert back.digest == book.digest and list(back.parts) == list(book.parts)
    assert back.assign(x).equal(book.assign(x))
    assert book.assign(x).shape == (50, 2 if average else 4)


def test_parts_are_quantised_each_for_itself_and_averages_as_one() -> None:
    book, x = make_codebook(), torch.randn(50, 12)
    expected = [part.assign(x[:, 6 * i : 6 * i + 6]) for i, part in enumerate(book.parts.values())]
    assert book.assign(x).equal(torch.cat(expected, dim=1))
    mean, std = moments(x)
    both = averaged(x, mean, std, dim=6)
    torch.testing.assert_close(both, (((x - mean) / std)[:, :6] + ((x - mean) / std)[:, 6:]) / 2)
    with pytest.raises(ClusteringError, match="18 columns; the codebook is of layer 3, layer 6"):
        book.assign(torch.randn(5, 18))


def test_a_damaged_codebook_is_named(tmp_path: Path) -> None:
    path = tmp_path / "codebook.safetensors"
    with pytest.raises(ClusteringError, match="cannot be read"):
        Codebook.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ClusteringError, match="cannot be read"):
        Codebook.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ClusteringError, match="cannot be read"):
        Codebook.load(path)
    book = make_codebook()
    book.save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ClusteringError, match="its digest is not the one"):
        Codebook.load(path)


# ---- samples -------------------------------------------------------------------------------------------------------


def clips(count: int = 20) -> FakeClips:
    return FakeClips({f"{i}.wav": tone(90 + 10 * i, 0.3, noise=0.01, seed=i) for i in range(count)})


def test_a_sample_does_not_depend_on_the_order_of_the_clips() -> None:
    usual = clips()
    mixed = usual.reordered(np.random.default_rng(0).permutation(20).tolist())
    options = {"max_frames": 200, "share": 0.5, "seed": 4}
    first, second = sample_frames(usual, MFCC, **options), sample_frames(mixed, MFCC, **options)
    assert first.equal(second) and usual.read == mixed.read
    fits = [fit_kmeans(x, 5, seed=0, settings=QUICK).centroids for x in (first, second)]
    assert fits[0].equal(fits[1])
    sample_frames(other := clips(), MFCC, max_frames=200, share=0.5, seed=5)
    assert other.read != usual.read


def test_a_sample_is_a_share_of_the_clips_and_stops_when_it_is_full() -> None:
    all_clips = clips()
    assert len(sample_frames(all_clips, MFCC, max_frames=10_000)) == 20 * 28
    half = clips()
    assert len(sample_frames(half, MFCC, max_frames=10_000, share=0.5)) == 10 * 28 and len(half.read) == 10
    full = clips()
    assert len(sample_frames(full, MFCC, max_frames=100)) == 100 and len(full.read) == 4
    assert all_clips.read[:10] == half.read and half.read[:4] == full.read


def test_a_long_recording_counts_as_its_capped_length_and_is_seen_from_end_to_end() -> None:
    long = FakeClips({"long.wav": torch.cat([tone(100, 2.0), tone(300, 2.0)])})
    long.lengths = torch.tensor([16_000])
    taken, whole = sample_frames(long, MFCC, max_frames=10_000), MFCC(long.waves[0])
    assert len(taken) == 100 and taken[0].equal(whole[0]) and taken[-1].equal(whole[-1])


def test_damaged_clips_are_passed_over_or_fatal_as_the_settings_say() -> None:
    class Damaged(FakeClips):
        def waveform(self, index: int) -> Tensor:
            if self.ids[index] == stable_id("3.wav"):
                raise CorruptSampleError("3.wav: no audio")
            return super().waveform(index)

    damaged = Damaged({f"{i}.wav": tone(100, 0.3) for i in range(5)})
    assert len(sample_frames(damaged, MFCC, max_frames=1000)) == 4 * 28
    damaged.settings.corrupt = "fatal"
    with pytest.raises(CorruptSampleError, match="3.wav"):
        sample_frames(damaged, MFCC, max_frames=1000)


def test_no_clips_or_no_frames_are_named() -> None:
    with pytest.raises(ClusteringError, match="there are no clips"):
        sample_frames(FakeClips({}), MFCC, max_frames=10)
    with pytest.raises(ClusteringError, match="too short"):
        sample_frames(FakeClips({"a": torch.zeros(100)}), MFCC, max_frames=10)
