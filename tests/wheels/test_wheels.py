"""Each distribution, built and installed alone into an empty environment, works and brings nothing foreign along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMING = {"decord", "torchcodec"}
POINTS_ONLY = {"open3d", "spconv", "spconv-cu120", "laspy", "lazrs", "unmask-pointcloud"}
SPEECH_ONLY = {"torchaudio", "soundfile", "unmask-speech-audio"}
VISION_ONLY = {"timm", "torchvision", "datasets", "tifffile", "unmask-vision"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this workspace's environment; its output, or its error as the test's failure."""
    kept = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def uv() -> Path:
    """uv's program in the environment that runs the tests."""
    program = Path(sys.executable).with_name("uv")
    assert program.is_file(), "uv is not in this environment; run the tests with: make test-all"
    return program


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of every package, built from a copy so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheels")
    for package in ("core", "language", "pointcloud", "speech_audio", "vision"):
        source = shutil.copytree(ROOT / "packages" / package, folder / "source" / package)
        project = (source / "pyproject.toml").read_text(encoding="utf-8")
        # The link to the neighbouring source is a convenience of the workspace; a wheel does not have it.
        (source / "pyproject.toml").write_text(project.split("[tool.uv.sources]")[0], encoding="utf-8")
        run(uv(), "build", "--wheel", "--quiet", "--out-dir", folder, source, cwd=folder)
    return folder


def install(wheels: Path, package: str, into: Path) -> Path:
    """An empty environment with one of our packages, at the workspace's versions; returns its Python."""
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["constraint-dependencies"]
    constraints = wheels / "constraints.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    run(uv(), "venv", "--quiet", "--python", sys.executable, into, cwd=wheels)
    python = into / "bin" / "python"
    run(
        uv(), "pip", "install", "--quiet", "--python", python, "--constraint", constraints,
        "--find-links", wheels, package, cwd=wheels,
    )  # fmt: skip
    return python


def installed(python: Path, cwd: Path) -> set[str]:
    """Names of the distributions in an environment."""
    listed = json.loads(run(uv(), "pip", "list", "--format", "json", "--python", python, cwd=cwd))
    return {entry["name"].lower() for entry in listed}


def test_core_alone(wheels: Path, tmp_path: Path) -> None:
    python = install(wheels, "unmask-core", tmp_path / "env")
    names = installed(python, tmp_path)
    assert "unmask-core" in names
    assert not names & (COMING | POINTS_ONLY | SPEECH_ONLY | VISION_ONLY | {"transformers"})
    code = (
        "import torch, unmask.core.training.loop, unmask.core.report\n"
        "from unmask.core.masking import RandomMasking\n"
        "from unmask.core.randomness import Key\n"
        "print(int(RandomMasking(0.75)(Key.of(0, torch.arange(2)), (4, 4)).hidden.sum()))"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "24"
    assert json.loads(run(tmp_path / "env" / "bin" / "unmask", "list", "--json", cwd=tmp_path)) == []


def test_vision_alone_trains(wheels: Path, tmp_path: Path) -> None:
    python = install(wheels, "unmask-vision", tmp_path / "env")
    names = installed(python, tmp_path)
    assert {"unmask-core", "unmask-vision", "timm", "transformers"} <= names
    assert not names & (COMING | POINTS_ONLY | SPEECH_ONLY)

    program = tmp_path / "env" / "bin" / "unmask-vision"
    run(program, "train", "mae", "--data", "digits", "--steps", "10", "--out", tmp_path / "run", cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(line["step"] == 10 for line in lines)
    assert (tmp_path / "run" / "model.safetensors").is_file()

    code = "import unmask.vision; print(type(unmask.vision.load('run')).__name__)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "VisionTransformer"


def test_speech_alone_trains(wheels: Path, tmp_path: Path) -> None:
    """Both iterations of HuBERT on a folder of recordings."""
    python = install(wheels, "unmask-speech-audio", tmp_path / "env")
    names = installed(python, tmp_path)
    assert {"unmask-core", "unmask-speech-audio", "torchaudio", "transformers"} <= names
    assert not names & (COMING | POINTS_ONLY | VISION_ONLY)

    code = (
        "import numpy, soundfile\n"
        "rng = numpy.random.default_rng(0)\n"
        "for i in range(40):\n"
        "    soundfile.write(f'clips/{i:02d}.wav', 0.1 * rng.standard_normal(16000), 16000)"
    )
    (tmp_path / "clips").mkdir()
    run(python, "-c", code, cwd=tmp_path)
    program = tmp_path / "env" / "bin" / "unmask-speech-audio"
    command = [program, "train", "hubert", "--recipe", "tiny", "--data", "clips", "--steps", "10", "--out", "run"]
    run(*command, "--set", "training.batch_size=8", cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    code = "import unmask.speech_audio; print(unmask.speech_audio.load('run').dim)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "128"


def test_pointcloud_alone_trains(wheels: Path, tmp_path: Path) -> None:
    """GeoMAE on a folder of clouds, range and pillars chosen from them."""
    python = install(wheels, "unmask-pointcloud", tmp_path / "env")
    names = installed(python, tmp_path)
    assert {"unmask-core", "unmask-pointcloud", "laspy"} <= names
    assert not names & (COMING | SPEECH_ONLY | VISION_ONLY | {"transformers"})

    code = (
        "import numpy\n"
        "rng = numpy.random.default_rng(0)\n"
        "for i in range(40):\n"
        "    xy = rng.uniform(-10, 10, (800, 2))\n"
        "    z = numpy.sin(xy[:, :1] + i) + 0.05 * rng.standard_normal((800, 1))\n"
        "    numpy.save(f'clouds/{i:02d}.npy', numpy.concatenate([xy, z], 1))"
    )
    (tmp_path / "clouds").mkdir()
    run(python, "-c", code, cwd=tmp_path)
    program = tmp_path / "env" / "bin" / "unmask-pointcloud"
    command = [program, "train", "geomae", "--data", "clouds", "--steps", "10", "--out", "run"]
    run(*command, "--set", "training.batch_size=8", cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    code = "import unmask.pointcloud; print(unmask.pointcloud.load('run').dim)"
    assert int(run(python, "-c", code, cwd=tmp_path)) > 0


def test_language_alone_trains(wheels: Path, tmp_path: Path) -> None:
    """MEAP on a folder of text, a tokenizer included, and its export."""
    python = install(wheels, "unmask-language", tmp_path / "env")
    names = installed(python, tmp_path)
    assert {"unmask-core", "unmask-language", "transformers", "tokenizers"} <= names
    assert not names & (COMING | SPEECH_ONLY | VISION_ONLY | POINTS_ONLY)

    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(" ".join(f"word{(i * j) % 97} of it." for j in range(400)))
    program = tmp_path / "env" / "bin" / "unmask-language"
    command = [program, "train", "meap", "--data", "texts", "--steps", "10", "--out", "run"]
    run(*command, "--set", "data.vocabulary_size=400", cwd=tmp_path)
    run(program, "export", "run", "--out", "model", cwd=tmp_path)
    code = "from transformers import AutoModelForCausalLM as A; print(A.from_pretrained('model').config.vocab_size)"
    assert int(run(python, "-c", code, cwd=tmp_path)) <= 400
