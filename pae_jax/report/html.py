"""`report.html`: a self-contained page on one evaluation. Host code.

Without scripts the page shows everything, in order of falling score and with the decisions of the
run's threshold; the script adds sorting, filtering and another threshold. This module computes
what `report.html.jinja` lays out.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from markupsafe import Markup

from pae_jax.report import charts, frame, pictures
from pae_jax.report.frame import Picture, Score, Table, text
from pae_jax.report.readings import READINGS
from pae_jax.report.table import is_defined
from pae_jax.workdir.files import AnyPath

Measure = float | tuple[float, float, float] | None


class ImageEntry(NamedTuple):
    """The content of the report on one test image.

    Attributes:
      name: its path, as the user knows it.
      type: "good" or the defect type.
      label: the truth, True for defective.
      score: the image score that decides.
      scores: further image scores by name.
      image: uint8.
      reconstruction: uint8; None where the method makes none.
      map: the anomaly map.
      mask: the true mask; None where there is none.
    """

    name: str
    type: str
    label: bool
    score: float
    scores: Mapping[str, float]
    image: UInt8[np.ndarray, "h w 3"]
    reconstruction: UInt8[np.ndarray, "h w 3"] | None
    map: Float[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "h w"] | None


class Report(NamedTuple):
    """The content of the page.

    Attributes:
      title: its heading.
      metrics: value, or (value, low, high) with an interval; None and nan where undefined, which
        leave their row out.
      per_type: one mapping of column to value per defect type.
      diagnostics: properties of the projection, like `metrics`.
      provenance: configuration's hash, commit, versions, …; may be nested.
      curves: "roc": (false, true positive rate); "precision_recall": (recall, precision) with
        ascending recall; of the images. Either may be missing.
      threshold: an image is called defective if its score is above this value.
      image_score: the name of the score that decides.
      images: consumed once, one at a time.
      threshold_source: one sentence on where the threshold comes from.
      notes: sentences under the heading.
      floor: values of a simpler method, by the names of `metrics`; empty for none.
      floor_name: the heading of their column.
      pixel_threshold: a pixel is called anomalous if its value of the map is above this one; None
        if the maps are not made of pixels.
      protocols: one mapping of column to value per protocol under which the same maps have other
        values.
    """

    title: str
    metrics: Mapping[str, Measure]
    per_type: Sequence[Mapping[str, Any]]
    diagnostics: Mapping[str, Measure]
    provenance: Mapping[str, Any]
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
    threshold: float
    image_score: str
    images: Iterable[ImageEntry]
    threshold_source: str = ""
    notes: Sequence[str] = ()
    floor: Mapping[str, Measure] = {}
    floor_name: str = ""
    pixel_threshold: float | None = None
    protocols: Sequence[Mapping[str, Any]] = ()


class _Confusion(NamedTuple):
    """The number of images by truth and decision; positive means defective."""

    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int


class _Row(NamedTuple):
    """A row of the gallery.

    Attributes:
      name: the image's name.
      type: "good" or the defect type.
      truth: "good" or "defective".
      outcome: "right" or "wrong"; says whether the decision agrees with the truth.
      decision: "defective" or "good".
      verdict: "right", "missed" or "false alarm".
      scores: the score that decides, the others, then the number of regions if there is one.
      pictures: those of the image.
    """

    name: str
    type: str
    truth: str
    outcome: str
    decision: str
    verdict: str
    scores: Sequence[Score]
    pictures: Sequence[Picture]


class _Thumbnails(NamedTuple):
    """An entry whose arrays are thumbnails, and its regions above the pixel threshold.

    Attributes:
      entry: the entry.
      regions: their number; None without a pixel threshold.
      outline: their outlines, as a transparent picture; None if there are none.
    """

    entry: ImageEntry
    regions: int | None
    outline: UInt8[np.ndarray, "h w 4"] | None


def write_report(path: AnyPath, report: Report) -> None:
    """Writes the page at once or not at all.

    The memory needed is that of the thumbnails, at most 0.3 MB per image, and that of the page.
    """
    images = [_shrink(entry, report.pixel_threshold) for entry in report.images]
    images.sort(key=lambda image: frame.sortable(image.entry.score), reverse=True)
    frame.write(path, "report.html.jinja", _context(report, images))


def _is_wrong(entry: ImageEntry, threshold: float) -> bool:
    return (entry.score > threshold) != entry.label


def _shrink(entry: ImageEntry, pixel_threshold: float | None) -> _Thumbnails:
    """Returns the entry with thumbnails, so that hundreds of entries fit in memory."""
    mask, reconstruction = entry.mask, entry.reconstruction
    if mask is not None:
        mask = frame.thumbnail_mask(mask)
    if reconstruction is not None:
        reconstruction = pictures.shrink(reconstruction, frame.THUMBNAIL_SIDE)
    regions = outline = None
    if pixel_threshold is not None:
        anomalous = entry.map > pixel_threshold
        regions = pictures.count_regions(anomalous)
        outline = pictures.outline(frame.thumbnail_mask(anomalous)) if regions else None
    small = entry._replace(
        label=bool(entry.label),
        score=float(entry.score),
        image=pictures.shrink(entry.image, frame.THUMBNAIL_SIDE),
        reconstruction=reconstruction,
        map=pictures.shrink_map(entry.map, frame.THUMBNAIL_SIDE),
        mask=mask,
    )
    return _Thumbnails(small, regions, outline)


def _context(report: Report, images: Sequence[_Thumbnails]) -> dict[str, Any]:
    """Returns the template's variables; `images` stand on the page in this order."""
    threshold = float(report.threshold)
    entries = [image.entry for image in images]
    confusion = _confusion(entries, threshold)
    heat_limit = frame.heat_limit(entry.map for entry in entries)
    other_scores = _other_scores(report, entries)
    decision_rule = (
        f"{len(images)} images. Called defective where the score ({report.image_score}) is above "
        f"{threshold:.6g}. {report.threshold_source}"
    )
    return {
        "title": report.title,
        "notes": [decision_rule.strip(), *report.notes],
        "metrics": _measures(report.metrics, report.floor, report.floor_name),
        "threshold": frame.score_cell(threshold),
        "decisions": _decisions(confusion),
        "charts": list(_charts(report, entries, confusion)),
        "per_type": _records(report.per_type),
        "protocols": _records(report.protocols),
        "diagnostics": _diagnostics(report.diagnostics),
        "types": sorted(Counter(entry.type for entry in entries).items()),
        "scale": frame.heat_scale(heat_limit),
        "image_score": report.image_score,
        "other_scores": other_scores,
        "pixel_threshold": None if report.pixel_threshold is None else text(report.pixel_threshold),
        # A generator, so that the encoded pictures are held once, in the page.
        "images": (_row(image, threshold, other_scores, heat_limit) for image in images),
        "provenance": list(_flatten(report.provenance)),
    }


def _confusion(images: Sequence[ImageEntry], threshold: float) -> _Confusion:
    counts = Counter((entry.label, _is_wrong(entry, threshold)) for entry in images)
    return _Confusion(
        true_positives=counts[True, False],
        false_negatives=counts[True, True],
        false_positives=counts[False, True],
        true_negatives=counts[False, False],
    )


def _other_scores(report: Report, images: Sequence[ImageEntry]) -> list[str]:
    names = dict.fromkeys(name for entry in images for name in entry.scores)
    return [name for name in names if name != report.image_score]


def _charts(
    report: Report, images: Sequence[ImageEntry], confusion: _Confusion
) -> Iterator[Markup]:
    scores = np.array([entry.score for entry in images], np.float64)
    labels = np.array([entry.label for entry in images], bool)
    yield charts.histogram(scores, labels, float(report.threshold))
    detected, missed, alarms, passed = confusion
    defective, good = detected + missed, alarms + passed
    if "roc" in report.curves:
        point = (alarms / good, detected / defective) if good and defective else None
        yield charts.roc(*report.curves["roc"], point)
    if "precision_recall" in report.curves:
        point = (detected / defective, detected / (detected + alarms)) if detected else None
        yield charts.precision_recall(*report.curves["precision_recall"], point)


def _decisions(confusion: _Confusion) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the rows of the table of decisions: (truth, cells as (name, text))."""
    detected, missed, alarms, passed = confusion
    return [
        (truth, [("defective", str(above)), ("good", str(below)), ("rate", _rate(above, below))])
        for truth, above, below in (("defective", detected, missed), ("good", alarms, passed))
    ]


def _rate(above: int, below: int) -> str:
    return text(above / (above + below) if above + below else None)


def _measures(
    measures: Mapping[str, Measure], floor: Mapping[str, Measure], floor_name: str
) -> Table:
    """Returns the defined values; without the columns of intervals and floor if they are empty."""
    rows = []
    for name, measure in measures.items():
        value, *ends = measure if isinstance(measure, tuple) else (measure,)
        if is_defined(value):
            interval = "–".join(text(end) for end in ends if is_defined(end))
            beside = text(floor[name]) if is_defined(floor.get(name)) else ""
            rows.append([name, text(value), interval, beside])
    columns = ["", "value", "95 % of draws", floor_name]
    filled = [i for i in range(4) if i < 2 or any(row[i] for row in rows)]
    return Table([columns[i] for i in filled], [[row[i] for i in filled] for row in rows])


def _diagnostics(diagnostics: Mapping[str, Measure]) -> Table:
    """Returns the defined diagnostics and how each is to be read."""
    rows = [
        [name, text(value), READINGS.get(name, "")]
        for name, value in diagnostics.items()
        if is_defined(value)
    ]
    return Table(["", "value", "how to read it"], rows, texts=[2])


def _records(records: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for record in records for column in record))
    return Table(columns, [[text(record.get(column)) for column in columns] for record in records])


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the leaves of nested mappings as (dotted key, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, str) else json.dumps(value, default=str),
            )


def _row(
    image: _Thumbnails, threshold: float, other_scores: Sequence[str], heat_limit: float
) -> _Row:
    entry, regions, outline = image
    wrong = _is_wrong(entry, threshold)
    mistake = "missed" if entry.label else "false alarm"
    scores = [entry.score, *(float(entry.scores.get(name, math.nan)) for name in other_scores)]
    counts = [] if regions is None else [Score(str(regions), str(regions))]
    heat = pictures.overlay(entry.image, pictures.heat_map(entry.map, heat_limit))
    reconstruction = None if entry.reconstruction is None else frame.jpeg(entry.reconstruction)
    return _Row(
        name=entry.name,
        type=entry.type,
        truth="defective" if entry.label else "good",
        outcome="wrong" if wrong else "right",
        decision="defective" if entry.score > threshold else "good",
        verdict=mistake if wrong else "right",
        scores=[*map(frame.score_cell, scores), *counts],
        pictures=[
            Picture("input", frame.jpeg(entry.image)),
            Picture("reconstruction", reconstruction),
            Picture(
                "heat map",
                frame.jpeg(heat),
                None if outline is None else frame.png(outline),
                f"outlines of {regions} region{'s' if regions != 1 else ''}",
            ),
            Picture("true mask", None if entry.mask is None else frame.png(entry.mask)),
        ],
    )
