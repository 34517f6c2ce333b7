"""What `evaluate` measured of clouds, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.core.evaluation.tables import percent, row_table, sample_columns


def table(result: Mapping[str, Any]) -> str:
    """What `evaluate` returned, as text for a terminal."""
    dense = [("points", percent("dense", "accuracy")), ("mean IoU", percent("dense", "mean_iou"))]
    return row_table(result, sample_columns(result, dense), remarks(result))


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What is said below the table."""
    lines = [result["note"]] if "note" in result else []
    lines += [f"{what}: not probed, {reason}" for what, reason in result["skipped"].items()]
    if "dense" not in result:
        return lines
    dense, pillar = result["dense"], " x ".join(f"{size:g}" for size in result["dense"]["pillar"])
    ceiling, count = dense["ceiling"], dense["points"]
    lines.append(
        f"points: {len(dense['classes'])} classes, fitted on {count['train']:,} points, scored on {count['test']:,}"
        + (f" ({dense['outside']:,} more are out of range)" if dense["outside"] else "")
        + f". Every point by its pillar's most frequent label ({pillar}): {100 * ceiling['accuracy']:.1f}, mean IoU "
        f"{100 * ceiling['mean_iou']:.1f}. The most frequent class everywhere: {100 * dense['majority']:.1f}."
    )
    return lines
