"""`report.html`: a self-contained page on one evaluation. Host code.

The page needs no network and no other file: pictures are data URIs, charts inline SVG, and its
content security policy forbids the browser to fetch anything. Without scripts it shows
everything, in order of falling score; the script adds sorting and filtering.

This module computes what `report.html.jinja` lays out. `style.css` and `script.js` are written
into the page.
"""

import base64
import importlib.resources
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool, Float, UInt8
from markupsafe import Markup

from pae_jax.report import charts, pictures
from pae_jax.report.table import is_defined
from pae_jax.workdir.files import AnyPath, write_atomically

THUMBNAIL_SIDE = 160  # pixels of a thumbnail's longer side
JPEG_QUALITY = 75
# A quantile and not the maximum, because one extreme pixel would darken all other maps.
SCALE_QUANTILE = 0.999  # the fraction of the maps' pixels below the end of the heat scale

# Style and script are allowed "inline", because they are part of the page.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)

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
      map: the anomaly map in [0, 1].
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
      metrics: value, or (value, low, high) with an interval; None and nan where undefined.
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
    protocols: Sequence[Mapping[str, Any]] = ()


class _Table(NamedTuple):
    """A table of texts; the first cell of a row names it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class _Confusion(NamedTuple):
    """The number of images by truth and decision; positive means defective."""

    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int


class _Score(NamedTuple):
    """A cell of the gallery: what the script sorts by, and what is shown."""

    sort_value: str
    text: str


class _Row(NamedTuple):
    """A row of the gallery.

    Attributes:
      name: the image's name.
      type: "good" or the defect type.
      outcome: "right" or "wrong"; says whether the decision agrees with the truth.
      decision: "defective" or "good".
      verdict: "right", "missed" or "false alarm".
      scores: the score that decides, then the others.
      pictures: (name, data URI); the URI is None if there is no such picture.
    """

    name: str
    type: str
    outcome: str
    decision: str
    verdict: str
    scores: Sequence[_Score]
    pictures: Sequence[tuple[str, str | None]]


def write_report(path: AnyPath, report: Report) -> None:
    """Writes the page at once or not at all.

    The memory needed is that of the thumbnails, at most 0.3 MB per image, and that of the page.
    """
    images = [_shrink(entry) for entry in report.images]
    images.sort(key=lambda entry: _sortable(entry.score), reverse=True)
    # With `StrictUndefined` a misspelt variable raises an error instead of leaving a gap.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_read("report.html.jinja"))
    text = template.render(_context(report, images))
    # The name of a file, and so the page, need not be valid text.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _read(name: str) -> str:
    return importlib.resources.files("pae_jax.report").joinpath(name).read_text("utf-8")


def _sortable(score: float) -> float:
    # Comparisons with NaN are false, so one NaN would leave the list unsorted.
    return -math.inf if math.isnan(score) else score


def _is_wrong(entry: ImageEntry, threshold: float) -> bool:
    return (entry.score > threshold) != entry.label


def _shrink(entry: ImageEntry) -> ImageEntry:
    """Returns the entry with thumbnails, so that hundreds of entries fit in memory."""
    mask, reconstruction = entry.mask, entry.reconstruction
    if mask is not None:
        # One anomalous pixel marks its thumbnail's pixel, so that small defects stay visible.
        mask = pictures.shrink_map(mask.astype(np.float32), THUMBNAIL_SIDE) > 0
    if reconstruction is not None:
        reconstruction = pictures.shrink(reconstruction, THUMBNAIL_SIDE)
    return entry._replace(
        label=bool(entry.label),
        score=float(entry.score),
        image=pictures.shrink(entry.image, THUMBNAIL_SIDE),
        reconstruction=reconstruction,
        map=pictures.shrink_map(entry.map, THUMBNAIL_SIDE),
        mask=mask,
    )


def _context(report: Report, images: Sequence[ImageEntry]) -> dict[str, Any]:
    """Returns the template's variables; `images` stand on the page in this order."""
    threshold = float(report.threshold)
    confusion = _confusion(images, threshold)
    heat_limit = _heat_limit(images)
    other_scores = _other_scores(report, images)
    decision_rule = (
        f"{len(images)} images. Called defective where the score ({report.image_score}) is above "
        f"{threshold:.6g}. {report.threshold_source}"
    )
    return {
        "policy": POLICY,
        # These two files belong to the package, so they need no escaping.
        "style": Markup(_read("style.css")),
        "script": Markup(_read("script.js")),
        "title": report.title,
        "notes": [decision_rule.strip(), *report.notes],
        "metrics": _measures(report.metrics),
        "decisions": _decisions(confusion),
        "charts": list(_charts(report, images, confusion)),
        "per_type": _records(report.per_type),
        "protocols": _records(report.protocols),
        "diagnostics": _measures(report.diagnostics),
        "types": sorted(Counter(entry.type for entry in images).items()),
        "scale": {
            "picture": _png(pictures.heat_map(np.linspace(0, 1, 128)[None], 1.0)),
            "end": f"{heat_limit:.3g}",
            "below": f"{SCALE_QUANTILE:.1%}",
        },
        "image_score": report.image_score,
        "other_scores": other_scores,
        # A generator, so that the encoded pictures are held once, in the page.
        "images": (_row(entry, threshold, other_scores, heat_limit) for entry in images),
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


def _heat_limit(images: Sequence[ImageEntry]) -> float:
    """Returns the end of the heat scale, which all images share."""
    if not images:
        return 0.0
    values = np.concatenate([entry.map.ravel() for entry in images])
    return float(np.quantile(values, SCALE_QUANTILE))


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


def _decisions(confusion: _Confusion) -> _Table:
    detected, missed, alarms, passed = map(str, confusion)
    return _Table(
        ["truth", "called defective", "called good"],
        [["defective", detected, missed], ["good", alarms, passed]],
    )


def _measures(measures: Mapping[str, Measure]) -> _Table:
    """Returns values with their intervals; without the intervals' column if there are none."""
    rows = []
    for name, measure in measures.items():
        value, *ends = measure if isinstance(measure, tuple) else (measure,)
        interval = "–".join(_text(end) for end in ends if is_defined(end))
        rows.append([name, _text(value), interval])
    columns = ["", "value", "95 % of draws"]
    if any(interval for _, _, interval in rows):
        return _Table(columns, rows)
    return _Table(columns[:2], [row[:2] for row in rows])


def _records(records: Sequence[Mapping[str, Any]]) -> _Table:
    columns = list(dict.fromkeys(column for record in records for column in record))
    return _Table(
        columns, [[_text(record.get(column)) for column in columns] for record in records]
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):  # (value, low, high)
        point, *ends = map(_text, value)
        return f"{point} ({'–'.join(ends)})"
    if not is_defined(value):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"
    return str(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the leaves of nested mappings as (dotted key, text)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield f"{prefix}{key}", text


def _row(
    entry: ImageEntry, threshold: float, other_scores: Sequence[str], heat_limit: float
) -> _Row:
    wrong = _is_wrong(entry, threshold)
    mistake = "missed" if entry.label else "false alarm"
    scores = [entry.score, *(float(entry.scores.get(name, math.nan)) for name in other_scores)]
    heat = pictures.overlay(entry.image, pictures.heat_map(entry.map, heat_limit))
    return _Row(
        name=entry.name,
        type=entry.type,
        outcome="wrong" if wrong else "right",
        decision="defective" if entry.score > threshold else "good",
        verdict=mistake if wrong else "right",
        scores=[_score(value) for value in scores],
        pictures=[
            ("input", _jpeg(entry.image)),
            ("reconstruction", _jpeg(entry.reconstruction)),
            ("heat map", _jpeg(heat)),
            # PNG, because JPEG would blur the edges of a mask.
            ("true mask", _png(entry.mask)),
        ],
    )


def _score(value: float) -> _Score:
    # The script reads the value with JavaScript's `Number`, which knows Infinity and not inf.
    return _Score(repr(_sortable(value)).replace("inf", "Infinity"), f"{value:.6g}")


def _jpeg(picture: np.ndarray | None) -> str | None:
    if picture is None:
        return None
    return _uri("jpeg", pictures.encode(picture, "jpeg", quality=JPEG_QUALITY, optimize=True))


def _png(picture: np.ndarray | None) -> str | None:
    return None if picture is None else _uri("png", pictures.encode(picture))


def _uri(image_format: str, content: bytes) -> str:
    return f"data:image/{image_format};base64,{base64.b64encode(content).decode()}"
