"""The task ``representation`` of point clouds, beside the same encoder at random weights and the raw coordinates.

Where clouds have a class: k-NN, a linear probe, the same with few labels, and fine-tuning, on the maximum and the mean
over a cloud's pillars (`cloud_vectors`), against statistics of the points (`coordinates`). Where points have a class: a
linear probe on the vector of the pillar that a point lies in, against what can be read off the points around it
(`point_coordinates`), by the protocol of `DenseProbe`. Data may have both. Data without labels give RankMe only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from unmask.core.evaluation.run import Job
from unmask.core.evaluation.samples import labelled, probe_samples, spread_of
from unmask.pointcloud.data.clouds import PointClouds
from unmask.pointcloud.evaluation.dense import DenseProbe, NoPointLabels, Reading, dense_probe
from unmask.pointcloud.evaluation.features import coordinates, of_points, raw_points
from unmask.pointcloud.evaluation.finetuning import protocol_for as protocol_for
from unmask.pointcloud.evaluation.tables import table as table

ROWS = {"trained": "trained encoder", "random": "untrained encoder", "coordinates": "coordinates"}


def measure(job: Job) -> dict[str, Any]:
    """Probes of whole clouds, of points, or of both; see the module's docstring."""
    method: Any = job.run.method
    raw = {"coordinates": partial(coordinates, grid=method.grid)}
    splits = {"train": job.open_train()}
    train = splits["train"]
    whole, by_point = labelled(train), train.point_classes is not None
    if whole or by_point:
        splits |= {"val": job.open("val"), "test": job.open("test")}
    result: dict[str, Any] = {"labelled": whole, "point_labelled": False, "skipped": {}, "protocol": {}}
    result["splits"] = {name: len(part) for name, part in splits.items()}
    if whole:
        result["splits"]["classes"] = len(train.classes or ())
        protocol = protocol_for(len(train), job.at_once, job.epochs)
        result |= probe_samples(job, splits, raw, protocol)
    else:
        result["rows"] = spread_of(job, train, raw)
    if by_point:
        try:
            _add_points(result, job, splits)
        except NoPointLabels as error:
            result["skipped"] = {"points": str(error)}
    if not whole:
        result["note"] = _note(job.data.source, result["point_labelled"])
    job.name_left_out(*splits.values())
    return result


def _note(source: str, by_point: bool) -> str:
    if by_point:
        return f"{source} has classes of points, not of whole clouds, so there are no probes of whole clouds."
    return (
        f"{source} has no labels, so there are no probes: only how many dimensions the features use. For probes, give "
        "labelled clouds with --data: one folder per class, or files with a class for every point."
    )


def _add_points(result: dict[str, Any], job: Job, splits: Mapping[str, PointClouds]) -> None:
    """The dense probe."""
    classes, protocol, method = splits["train"].point_classes, DenseProbe(), job.run.method
    assert classes is not None
    grid: Any = method.grid
    readouts = {name: of_points(method) for name, method in job.methods.items()}
    if job.references:
        readouts["coordinates"] = raw_points(grid)
    rows, about = dense_probe(
        readouts, splits, classes, Reading(grid, job.device, job.at_once, job.workers, job.seed), protocol
    )
    for name, row in rows.items():
        result["rows"][name]["dense"] = row
    result["point_labelled"] = True
    result["dense"] = about | {"pillar": list(grid.pillar[:2])}
    result["protocol"]["dense"] = asdict(protocol)
