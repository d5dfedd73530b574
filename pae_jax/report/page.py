"""The page of one evaluation, from the record in metrics.json, the images and their maps."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.dataset import TestSplit
from data_pipelines.items import GOOD
from pae_jax.report import html, statements
from pae_jax.report.table import is_defined, metric_names


class Content(NamedTuple):
    """The parts of the page that differ between evaluations, beside the record.

    Attributes:
      title: the heading.
      scores: image scores (n,) by name.
      image_score: the name of the score that decides.
      threshold: an image is called defective if its score is above this value.
      threshold_source: one sentence on where the threshold comes from.
      maps: (h, w), of the size of the images of the test split.
      reconstructions: uint8 (h, w, 3), or None where there is none.
      false_positive_rate: the points of the ROC curve of the deciding score.
      true_positive_rate: of the same points.
      precision: of the same points.
      notes: sentences under the heading, before those of the record.
      pixel_threshold: a pixel is called anomalous if its value of the map is above this one; None
        if there is no such threshold.
    """

    title: str
    scores: Mapping[str, np.ndarray]
    image_score: str
    threshold: float
    threshold_source: str
    maps: Sequence[np.ndarray]
    reconstructions: Sequence[np.ndarray | None]
    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    precision: np.ndarray
    notes: Sequence[str]
    pixel_threshold: float | None = None


def make_report(
    record: Mapping[str, Any], test: TestSplit, content: Content, *, resamples: int
) -> html.Report:
    """Returns the content of report.html.

    Args:
      record: the content of metrics.json.
      test: the test split.
      content: what the record does not hold.
      resamples: the number of bootstrap draws.
    """
    scores = content.scores[content.image_score]
    channels = test.images.shape[-1]

    def entry(i: int) -> html.ImageEntry:
        return html.ImageEntry(
            name=test.names[i],
            type=test.types[i],
            label=bool(test.labels[i]),
            score=float(scores[i]),
            scores={name: float(values[i]) for name, values in content.scores.items()},
            image=np.repeat(test.images[i], 3 // channels, axis=-1),
            reconstruction=content.reconstructions[i],
            map=content.maps[i],
            mask=None if test.masks is None else test.masks[i],
        )

    return html.Report(
        title=content.title,
        metrics={
            name: (record[name], *record["intervals"][name])
            if name in record["intervals"]
            else record[name]
            for name in metric_names(record)
            if is_defined(record[name])
        },
        per_type=_defined_columns(record["per_type"]),
        diagnostics=record["diagnostics"],
        provenance=record["provenance"],
        curves={
            "roc": (content.false_positive_rate, content.true_positive_rate),
            "precision_recall": (content.true_positive_rate, content.precision),
        },
        threshold=content.threshold,
        image_score=content.image_score,
        images=map(entry, range(len(test.names))),
        threshold_source=content.threshold_source,
        notes=[*content.notes, *_notes(record, resamples)],
        floor={name: record["floor"][name] for name in metric_names(record.get("floor", {}))},
        floor_name="floor (PCA)",
        pixel_threshold=content.pixel_threshold,
        protocols=record.get("protocols", ()),
    )


def _defined_columns(per_type: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per defect type, with the columns that are defined for one of them."""
    columns = dict.fromkeys(
        name for row in per_type.values() for name, value in row.items() if is_defined(value)
    )
    return [
        {"type": defect_type, **{name: row[name] for name in columns}}
        for defect_type, row in per_type.items()
    ]


def _notes(record: Mapping[str, Any], resamples: int) -> list[str]:
    """Returns sentences on the floor, the intervals and the metrics that are left out."""
    notes = []
    if record.get("floor"):
        notes.append(statements.floor(record["floor"]))
    if count := record["evaluated_at"]["images_without_pixel_labels"]:
        notes.append(f"Pixel metrics leave out {count} defective images, whose masks are empty.")
    if record["intervals"]:
        good = record["images"][GOOD]
        defective = sum(record["images"].values()) - good
        notes.append(statements.intervals(resamples, good, defective))
    undefined = [name for name in metric_names(record) if not is_defined(record[name])]
    if undefined:
        notes.append(f"Undefined for these test images: {', '.join(undefined)}.")
    return notes
