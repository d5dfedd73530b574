"""The table that `pae evaluate` prints. It leaves out metrics that are undefined for the data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pae_jax.report import statements

PER_TYPE_METRICS = (
    "image_auroc_sum",
    "image_auroc_max",
    "image_auroc_topk",
    "image_auroc_given",
    "pixel_auroc",
    "pixel_ap",
    "pixel_aupro",
)


def is_defined(value: Any) -> bool:
    """Returns False for None and NaN, which stand for an undefined metric."""
    return value is not None and not (isinstance(value, float | np.floating) and math.isnan(value))


def metric_names(record: Mapping[str, Any]) -> list[str]:
    """Returns the names of the metrics in a record of metrics.json."""
    return [name for name in record if name.startswith(("image_", "pixel_"))]


def per_type_columns(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the names of the metrics that are defined for one of the defect types.

    Args:
      rows: the section per_type of a record.
    """
    return [
        name for name in PER_TYPE_METRICS if any(is_defined(row.get(name)) for row in rows.values())
    ]


def format_table(record: Mapping[str, Any]) -> str:
    """Returns the metrics with their intervals, the decisions, and the metrics per defect type.

    Args:
      record: the content of metrics.json.
    """
    blocks = [_metrics(record), _decisions(record), _diagnostics(record), _per_type(record)]
    blocks.append(_protocols(record))
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _metrics(record: Mapping[str, Any]) -> list[str]:
    """Returns a line per metric: value, interval, and the value of the floor if there is one."""
    lines, floor = [], record.get("floor", {})
    for name in metric_names(record):
        if not is_defined(record[name]):
            continue
        ends = record["intervals"].get(name, ())
        defined = bool(ends) and all(map(is_defined, ends))
        interval = f"   [{ends[0]:.3f}, {ends[1]:.3f}]" if defined else ""
        line = f"{name:24s}{record[name]:.4f}{interval:17s}"
        if is_defined(floor.get(name)):
            line += f"   floor {floor[name]:.4f}"
        lines.append(line.rstrip())
    if floor:
        lines.append(
            f"{'floor':24s}PCA with {floor['components']} components of "
            f"{floor['training_images']} training images"
        )
    return lines


def _decisions(record: Mapping[str, Any]) -> list[str]:
    """Returns the threshold, its expected rate, and how many test images exceed it."""
    threshold, good = record["threshold"], record["images"]["good"]
    settings = record["provenance"]["config"]["eval"]
    score = threshold.get("image_score", settings["image_score"])
    lines = [f"{'threshold':24s}image score {score} > {threshold['score']:.6g}"]
    if "images" in threshold:
        expected = statements.expected(
            threshold["images"],
            threshold["false_positive_rate"],
            # Records from before this key have no calibration.
            calibrated=settings.get("calibration", "none") != "none",
        )
        lines.append(f"{'expected false alarms':24s}{expected}")
    else:
        lines.append(f"{'chosen by':24s}{threshold['source']}")
    for name, rate, total, truth in (
        ("false alarms", threshold["test_false_positive_rate"], good, "good"),
        (
            "detected",
            threshold["test_true_positive_rate"],
            sum(record["images"].values()) - good,
            "defective",
        ),
    ):
        if total:
            # The rate is a quotient of two counts; rounding recovers the numerator.
            lines.append(f"{name:24s}{round(rate * total)} of {total} {truth} images")
    return lines


def _diagnostics(record: Mapping[str, Any]) -> list[str]:
    values = record["diagnostics"].items()
    return [f"{name:24s}{value:.4f}" for name, value in values if is_defined(value)]


def _per_type(record: Mapping[str, Any]) -> list[str]:
    """Returns a line per defect type, with the columns that are defined for one of them."""
    rows = record["per_type"]
    columns = per_type_columns(rows)
    if not rows:
        return []
    table = [["defect type", "images", *columns]]
    for defect_type, row in rows.items():
        cells = [_value(row.get(name)) for name in columns]
        table.append([defect_type, str(row["images"]), *cells])
    return align(table)


def _protocols(record: Mapping[str, Any]) -> list[str]:
    """Returns a line per protocol under which the same maps have other values."""
    rows = record.get("protocols", [])
    if not rows:
        return []
    cells = [
        [_value(cell) if i else str(cell) for i, cell in enumerate(row.values())] for row in rows
    ]
    return align([list(rows[0]), *cells])


def _value(value: Any) -> str:
    return f"{value:.4f}" if is_defined(value) else "–"


def align(table: Sequence[Sequence[str]]) -> list[str]:
    """Returns the rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            [first.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        )
        for first, *cells in table
    ]
