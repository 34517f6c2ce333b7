"""The embedded point-cloud sets: decoded once from their carriers, split once, kept in the cache as arrays.

======  =====  ===  ====  =======  ==================================================================================
set     train  val  test  dropped  no two splits share
======  =====  ===  ====  =======  ==================================================================================
ldraw   3,272  462   927      313  a shape: prints and variants of one part stay together, and parts that look alike
lidar      89   16    37        0  an area: each of the three scans is cut along two straight lines
shapes    700  100   200        0  a cloud; synthetic, nothing is downloaded, classes are equally frequent
======  =====  ===  ====  =======  ==================================================================================

Splits are the same for every run and written beside the arrays before anything is trained. Classes, their sizes and
what simple features reach are in the tutorial on your own point clouds.

``ldraw`` are CAD models of toy bricks, 2,048 points spread evenly over the surface of each, in metres. Left out are
parts whose triangles equal another's: prints that differ in colour. A part's number without what follows it is its
mould, and parts of different moulds with the same extents and area (left and right, old and new) are put together, too:
2,265 shapes. For ``lidar`` see `unmask.pointcloud.data.embedded.airborne`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor

from unmask.core.data.carriers import Archive, cache_dir, fetch, say
from unmask.core.data.splits import assign
from unmask.core.data.stored import Ragged, stored
from unmask.core.progress import progress_bar
from unmask.core.randomness import stable_id
from unmask.pointcloud.data.embedded import airborne, ldraw, shapes
from unmask.pointcloud.data.embedded.carriers import CARRIERS
from unmask.pointcloud.data.kind import Source
from unmask.pointcloud.data.readers import Cloud

_FORMAT = 1  # raise when the decoding or the splits change, so that old cache entries are not used
_PART_POINTS = 2_048


@dataclass
class _Decoded:
    """What a decoder has read, cloud after cloud."""

    classes: tuple[str, ...] | None = None
    point_classes: tuple[str, ...] | None = None
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    arrays: dict[str, list[np.ndarray]] = field(default_factory=dict)  # "xyz", "point_labels", or a feature
    dropped: int = 0

    def add(self, name: str, **arrays: np.ndarray) -> None:
        self.names.append(name)
        for key, array in arrays.items():
            self.arrays.setdefault(key, []).append(array)


def _read(clouds: Ragged, index: int) -> Cloud:
    """A cloud from the cache."""
    arrays = clouds.rows(index)
    xyz, labels = arrays.pop("xyz").astype(np.float64), arrays.pop("point_labels", None)
    features = {name: np.array(array) for name, array in arrays.items()}
    return Cloud(xyz, features, None if labels is None else labels.astype(np.int64))


def load_embedded(name: str) -> Source:
    """An embedded set; where it is not made when it is read, it is fetched and decoded on first use, then cached.

    Args:
        name: one of `unmask.pointcloud.data.embedded.carriers.EMBEDDED`.

    Raises:
        CarrierError: it cannot be fetched, or its archive is not what was published.
    """
    if name == "shapes":
        return _shapes()
    folder = cache_dir() / "clouds" / f"{CARRIERS[name].key}-v{_FORMAT}"
    about = stored(folder, lambda new: _build(name, new))
    arrays = sorted(path.stem for path in (folder / "arrays").iterdir() if path.stem != "offsets")
    return Source(
        about["names"],
        partial(_read, Ragged(folder / "arrays", tuple(arrays))),
        torch.tensor(about["labels"]) if about["classes"] else None,
        about["classes"],
        codes=torch.tensor(about["codes"], dtype=torch.int8),
        point_classes=about["point_classes"],
    )


def _build(name: str, folder: Path) -> dict[str, Any]:
    archive = fetch(CARRIERS[name])
    say(f"{name}: decoding once")
    decoded = {"ldraw": _decode_ldraw, "lidar": _decode_lidar}[name](archive)
    (folder / "arrays").mkdir()
    Ragged.write(folder / "arrays", **decoded.arrays)
    about = {key: getattr(decoded, key) for key in ("classes", "point_classes", "labels", "codes", "dropped")}
    return {"names": [f"{name}:{cloud}" for cloud in decoded.names], **about}


def _decode_ldraw(archive: Path) -> _Decoded:
    library = ldraw.Library.open(archive)
    parts = library.parts()
    decoded = _Decoded(ldraw.CLASSES)
    seen: set[bytes] = set()
    signatures = []
    with progress_bar("decoding ldraw", len(parts)) as advance:
        for part in parts:
            triangles = library.triangles(part.path)
            advance(1)
            digest = hashlib.blake2b(triangles.tobytes(), digest_size=16).digest()
            if digest in seen:  # prints that differ in colour alone
                continue
            seen.add(digest)
            signatures.append(ldraw.signature(triangles))
            rng = np.random.default_rng(stable_id(part.name))
            points, _ = shapes.sample_surface(ldraw.upright(triangles), _PART_POINTS, rng)
            decoded.add(part.name, xyz=points.astype(np.float32))
            decoded.labels.append(ldraw.CLASSES.index(part.category))
    decoded.dropped = len(parts) - len(decoded.names)
    families = ldraw.families([ldraw.base_number(name) for name in decoded.names], signatures)
    decoded.codes = split_families(families, decoded.labels, val_share=0.1, test_share=0.2).tolist()
    return decoded


def split_families(families: list[str], labels: list[int], val_share: float, test_share: float) -> Int8[Tensor, "n"]:
    """Split codes: whole families, and class by class as far as families allow.

    A family of several classes counts as the one that most of its members have.
    """
    ids = {family: stable_id(family) for family in families}
    groups = torch.tensor([ids[family] for family in families])
    classes = torch.tensor(labels)
    strata = torch.empty_like(classes)
    for group in groups.unique():
        strata[groups == group] = classes[groups == group].mode().values
    codes = torch.zeros(len(families), dtype=torch.int8)
    for stratum in strata.unique():
        mine = strata == stratum
        codes[mine] = assign(groups[mine], None, None, val_share, test_share, groups[mine])
    return codes


def _decode_lidar(path: Path) -> _Decoded:
    decoded = _Decoded(point_classes=airborne.POINT_CLASSES)
    with Archive(path) as archive:
        for scan in airborne.SCANS:
            for tile in airborne.tiles(scan, archive.read(scan.path)):
                decoded.add(
                    tile.name,
                    xyz=tile.xyz.astype(np.float32),
                    intensity=tile.intensity.astype(np.float32),
                    point_labels=tile.labels.astype(np.int8),
                )
                decoded.codes.append(tile.code)
    return decoded


def _shapes() -> Source:
    labels = torch.arange(len(shapes.CLASSES)).repeat_interleave(shapes.PER_CLASS)
    names = [f"shapes:{shapes.CLASSES[label]}-{i % shapes.PER_CLASS}" for i, label in enumerate(labels.tolist())]
    codes = assign(torch.tensor([stable_id(name) for name in names]), labels, None, 0.1, 0.2)
    return Source(names, _shape, labels, list(shapes.CLASSES), codes=codes, point_classes=list(shapes.POINT_CLASSES))


def _shape(index: int) -> Cloud:
    points, labels = shapes.solid(index)
    return Cloud(points, {}, labels)
