"""Networks from elsewhere that a method uses beside its own: a teacher, a tokenizer, a language model.

A method's module says which it needs, with one literal::

    NETWORKS = {"teacher": "the network whose features are the targets (timm or transformers)"}

``OPTIONAL_NETWORKS`` names those that a method can do without. A recipe names each under ``networks`` (``unmask train
METHOD --network teacher=DIR_OR_HUB_ID``); they are opened once and handed to ``build(settings, data, networks)`` as a
dict of `Network`. They arrive in eval mode and no parameter requires a gradient; `unmask.core.targets.FrozenTeacher`
keeps one so when the method around it is put in train mode.

What stays frozen is never written into checkpoints: a run that is resumed or loaded opens the network again and holds
it against the hash in its recipe. Parameters that the method makes trainable, and whatever it registers on the network
(masks, parametrizations, adapters), are saved like its own.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from unmask.core import registry
from unmask.core.errors import UnmaskError
from unmask.core.interop.directories import read_config

_HUB = "hf-hub:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]  # of a hub's repository; no pickle and no code is fetched
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class NetworkError(UnmaskError):
    """A network that cannot be opened, or is not the one that a run was started with."""


@dataclass(frozen=True)
class Network:
    """A network that has been opened.

    Args:
        source: what the user gave.
        folder: where its files lie: the place to open its tokenizer from, for example.
        kind: the library that it came from. Of a transformers model all of what was saved is opened, heads included;
            ``module.base_model`` is the part without them. Of a run it is the encoder, as ``load`` of its domain gives.
        module: in eval mode, in fp32 on the CPU, no parameter requires a gradient. Put it into the method as a
            submodule, and it moves to the device with it.
        hash: of its weights and their names.
        mean: per channel, what its inputs are normalised with, where its directory says so; else None.
        std: likewise.
        facts: all that its directory says of its inputs (size, resampling, sampling rate ...); empty where it says
            nothing.
    """

    source: str
    folder: Path
    kind: Literal["transformers", "timm", "unmask"]
    module: Any
    hash: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def open_network(source: str | Path) -> Network:
    """Open a network, frozen and in eval mode.

    Weights are read from safetensors only, and no code that lies beside them is run.

    Args:
        source: a run directory; a directory that `unmask export`, timm (``save_for_hf``) or transformers
            (``save_pretrained``) made; or the id of such a one on the Hugging Face hub. What looks like a path is never
            looked up there; ``hf-hub:ID`` always is.

    Raises:
        NetworkError: nothing that can be opened is there.
    """
    text = str(source)
    folder = network_folder(text)
    with torch.random.fork_rng(devices=[]):  # building a network draws initial weights
        kind, module, facts = _open(folder, text)
    module = module.requires_grad_(False).eval()
    found = weights_hash(module)
    _remember(module, found)
    mean, std = (facts.get(f"image_{name}", facts.get(name)) for name in ("mean", "std"))
    return Network(text, folder, kind, module, found, _numbers(mean), _numbers(std), facts)


def weights_hash(module: nn.Module) -> str:
    """A digest of a network's saved parameters and buffers: names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- what stays out of checkpoints ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Origin:
    """Of a parameter or module: the network that it was opened with, and the module's buffers then."""

    network: str
    buffers: frozenset[str] = frozenset()


# By identity, so that a copy (an EMA of the network) is the method's own.
_OPENED = WeakIdKeyDictionary()


def _remember(module: nn.Module, network: str) -> None:
    for part in module.modules():
        _OPENED[part] = _Origin(network, frozenset(name for name, _ in part.named_buffers(recurse=False)))
    for parameter in module.parameters():
        _OPENED[parameter] = _Origin(network)


def frozen_names(method: nn.Module) -> set[str]:
    """Names in a method's state dict that belong to opened networks and do not change.

    Those are parameters that do not require a gradient, and the buffers of networks none of whose parameters does.
    """
    named = list(method.named_parameters(remove_duplicate=False))
    trained = {_OPENED[p].network for _, p in named if p.requires_grad and p in _OPENED}
    names = {name for name, p in named if not p.requires_grad and p in _OPENED}
    for prefix, part in method.named_modules(remove_duplicate=False):
        origin = _OPENED.get(part)
        if origin is not None and origin.network not in trained:
            names |= {f"{prefix}.{name}".lstrip(".") for name in origin.buffers}
    return names


# ---- where it lies -------------------------------------------------------------------------------------------------


def network_folder(text: str) -> Path:
    """The directory that a path or hub id stands for; a hub id's is downloaded (no weights but safetensors, no code).

    Raises:
        NetworkError: there is none.
    """
    path = Path(text).expanduser()
    if text.startswith(_HUB):
        return _download(text.removeprefix(_HUB))
    if path.is_dir():
        return path
    if path.exists():
        raise NetworkError(f"{text}: is a file; give the directory that holds it, with its config.json")
    near = _near(path)
    if _looks_like_a_path(text) or near:
        hint = f"did you mean {near}?" if near else f"{path.parent} holds {_content(path.parent)}"
        raise NetworkError(f"{text}: no such directory; {hint} (An id on the hub is written {_HUB}ID)")
    return _download(text)


def _looks_like_a_path(text: str) -> bool:
    first = text.split("/")[0]
    return text.startswith((".", "/", "~")) or text.count("/") > 1 or ("/" in text and Path(first).is_dir())


def _near(path: Path) -> Path | None:
    """A directory that is there and named nearly so."""
    found = Path(path.anchor or ".")
    for part in path.parts[bool(path.anchor) :]:
        if not (found / part).is_dir():
            names = [entry.name for entry in found.iterdir() if entry.is_dir()] if found.is_dir() else []
            close = difflib.get_close_matches(part, names, n=1, cutoff=0.7)
            if not close:
                return None
            part = close[0]
        found /= part
    return found


def _content(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing"


def _download(identifier: str) -> Path:
    """A hub id's directory in the hub's cache."""
    if not _HUB_ID.fullmatch(identifier):
        raise NetworkError(f"{identifier}: neither a directory nor an id on the hub, which looks like owner/name")
    download = _imported("huggingface_hub", f"read {identifier} from the hub").snapshot_download
    try:
        return Path(download(identifier, allow_patterns=_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises a dozen kinds here; all mean "not to be had"
        raise NetworkError(
            f"{identifier}: no such directory, and no network of that id could be read from the hub ({_line(error)}). "
            "Give a directory, or an id that is there"
        ) from None


# ---- opening -------------------------------------------------------------------------------------------------------

_Opened = tuple[Literal["transformers", "timm", "unmask"], nn.Module, dict[str, Any]]


def _open(folder: Path, text: str) -> _Opened:
    if (folder / "recipe.yaml").is_file():
        from unmask.core.training.recipe import read_yaml

        return _open_ours(folder, str(read_yaml(folder / "recipe.yaml").get("method")))
    config = _json(folder / "config.json")
    if not config:
        raise NetworkError(
            f"{text}: neither a run (no recipe.yaml) nor a network's directory (no config.json); it holds "
            f"{_content(folder)}"
        )
    if isinstance(config.get("method"), str):
        return _open_ours(folder, config["method"])
    known: dict[str, Callable[[Path, Mapping[str, Any]], _Opened]] = {
        "model_type": _open_transformers,
        "architecture": _open_timm,
    }
    for key, opener in known.items():
        if key in config:
            _require_safetensors(folder, text)
            return opener(folder, config)
    raise NetworkError(
        f"{text}: its config.json is neither transformers' (no model_type), timm's (no architecture) nor ours (no "
        "method; an `unmask export` that is older than that key is to be made again)"
    )


def _require_safetensors(folder: Path, text: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
    held = f"{pickles[0]} can run code when it is opened" if pickles else f"it holds {_content(folder)}"
    raise NetworkError(
        f"{text}: only safetensors are read, and there are none ({held}). If you trust it, load it with the library it "
        "came from and save it again: save_pretrained(DIR) in transformers, save_for_hf(model, DIR, "
        "safe_serialization=True) in timm"
    )


def _open_ours(folder: Path, method: str) -> _Opened:
    """The encoder of a run, or of a directory that `unmask export` made."""
    module = registry.domain(registry.card(method).id).load(folder)
    preprocess = getattr(module, "preprocess", None)
    facts = {name: getattr(preprocess, name) for name in ("mean", "std", "size") if hasattr(preprocess, name)}
    return "unmask", module, facts


def _open_transformers(folder: Path, config: Mapping[str, Any]) -> _Opened:
    """The class that was saved, so that no weight is missing and drawn anew."""
    library = _imported("transformers", f"open {folder}")
    library.utils.logging.disable_progress_bar()  # of a second, and in everybody's log
    names = config.get("architectures") or [""]
    kind = getattr(library, str(names[0]), None)
    loader: Any = kind if isinstance(kind, type) and issubclass(kind, library.PreTrainedModel) else library.AutoModel
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        module, info = loader.from_pretrained(str(folder), output_loading_info=True, **options)
    except Exception as error:  # transformers and safetensors raise a dozen kinds here; all mean "not readable"
        raise NetworkError(f"{folder}: transformers cannot open it ({_line(error)})") from None
    missing = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if missing:
        raise NetworkError(
            f"{folder}: {len(missing)} weights of {type(module).__name__} are missing or misshapen ({missing[0]}); "
            "save it again, whole"
        )
    processor = _json(folder / "processor_config.json")
    nested = processor.get("image_processor") or processor.get("feature_extractor") or {}
    return "transformers", module, _json(folder / "preprocessor_config.json") or nested


def _open_timm(folder: Path, config: Mapping[str, Any]) -> _Opened:
    library = _imported("timm", f"open {folder}")
    try:
        module = library.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # as above
        raise NetworkError(f"{folder}: timm cannot open it ({_line(error)})") from None
    return "timm", module, dict(module.pretrained_cfg)


def _imported(library: str, purpose: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise NetworkError(f"{library} is needed to {purpose}: pip install {library}") from None


def _json(path: Path) -> dict[str, Any]:
    """A file's mapping; empty where there is no such file."""
    try:
        return read_config(path) if path.is_file() else {}
    except UnmaskError as error:
        raise NetworkError(str(error)) from None


def _numbers(values: Any) -> tuple[float, ...] | None:
    return tuple(float(v) for v in values) if isinstance(values, list | tuple) else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
