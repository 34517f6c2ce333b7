"""Runtime shape checks (jaxtyping with beartype) where tensors are computed with, few threads, fixed seeds."""

from collections.abc import Iterator

from jaxtyping import config, install_import_hook

CHECKED = [f"unmask.core.{part}" for part in ("losses", "mask", "masking", "method", "nn", "randomness", "targets")]
CHECKED += [f"unmask.vision.{part}" for part in ("encoders", "methods")]
CHECKED += [f"unmask.speech_audio.{part}" for part in ("encoders", "methods", "checks", "data.spectrograms")]
CHECKED += [f"unmask.speech_audio.{part}" for part in ("interop.convert", "targets.clustering", "targets.features")]
CHECKED += [f"unmask.speech_audio.{part}" for part in ("targets.diagnostics", "data.frames")]
CHECKED += [f"unmask.pointcloud.{part}" for part in ("data.batches", "geometry", "encoders", "checks", "methods")]
CHECKED += [f"unmask.pointcloud.{part}" for part in ("evaluation.features", "interop.convert")]
CHECKED += [f"unmask.language.data.{part}" for part in ("document_model", "word_sets", "bag_store", "document_pairs")]
CHECKED += [f"unmask.language.{part}" for part in ("data.difficulty", "data.tagged_texts", "targets")]
CHECKED += [f"unmask.language.evaluation.{part}" for part in ("attention", "divergence", "retrieval", "scoring")]
CHECKED += [f"unmask.language.{part}" for part in ("encoders", "methods")]
install_import_hook(CHECKED, "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tensors here are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No runtime checks: for torch.compile, which cannot trace them, and for wrong types that the code reports."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
