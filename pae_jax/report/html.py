"""`report.html`: one self-contained page on one evaluation. Host code.

The page needs no network and no other file: pictures are data URIs, drawings inline SVG, and
its content security policy forbids the browser to fetch anything. Without scripts it shows
everything, in order of falling score; the script adds sorting and filtering.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from pae_jax.report import charts, page, pictures
from pae_jax.workdir.files import write_atomically

SIDE = 160  # pixels of a thumbnail's longer side
QUALITY = 75  # of JPEG
LIMIT_SHARE = 0.999  # of the maps' pixels lie below the end of the heat scale

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)

Measure = float | tuple[float, float, float] | None


class ImageEntry(NamedTuple):
    """What the report shows of one test image.

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
      threshold: an image is called defective where its score is above.
      score_kind: the name of the score that decides.
      images: consumed once, one at a time.
      threshold_source: one sentence on where the threshold comes from.
      notes: sentences that stand under the heading.
    """

    title: str
    metrics: Mapping[str, Measure]
    per_type: Sequence[Mapping[str, Any]]
    diagnostics: Mapping[str, Measure]
    provenance: Mapping[str, Any]
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
    threshold: float
    score_kind: str
    images: Iterable[ImageEntry]
    threshold_source: str = ""
    notes: Sequence[str] = ()


class _Counts(NamedTuple):
    """Images by truth and by decision."""

    hits: int
    missed: int
    alarms: int
    passed: int


def write_report(path: Path, report: Report) -> None:
    """Writes the page at once or not at all.

    The memory needed is that of the thumbnails, 0.3 MB an image at most.
    """
    images = sorted(map(_shrink, report.images), key=lambda entry: -_sortable(entry.score))
    report = report._replace(threshold=float(report.threshold))
    text = "\n".join(_document(report, images))
    # A file's name, and so the page, need not be valid text.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _sortable(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _is_wrong(entry: ImageEntry, threshold: float) -> bool:
    return (entry.score > threshold) != entry.label


def _shrink(entry: ImageEntry) -> ImageEntry:
    """The entry with thumbnails, so that hundreds fit in memory."""
    mask, reconstruction = entry.mask, entry.reconstruction
    if mask is not None:
        # One anomalous pixel marks its thumbnail's pixel: small defects stay visible.
        mask = pictures.shrink_map(mask.astype(np.float32), SIDE) > 0
    return entry._replace(
        label=bool(entry.label),
        score=float(entry.score),
        image=pictures.shrink(entry.image, SIDE),
        reconstruction=None if reconstruction is None else pictures.shrink(reconstruction, SIDE),
        map=pictures.shrink_map(entry.map, SIDE),
        mask=mask,
    )


def _document(report: Report, images: Sequence[ImageEntry]) -> Iterator[str]:
    """The page's parts in order; `images` as they are to stand."""
    counts = _count(images, report.threshold)
    limit = _limit(images)
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(report.title)}</title><style>{page.STYLE}</style></head><body>"
    yield f"<header><h1>{escape(report.title)}</h1>"
    decision = (
        f"{len(images)} images. Called defective where the score ({report.score_kind}) is above "
        f"{report.threshold:.6g}."
    )
    for note in (f"{decision} {report.threshold_source}".strip(), *report.notes):
        yield f"<p>{escape(note)}</p>"
    yield '</header><main><section><h2>Metrics</h2><div class="row">'
    yield _measures("of the test images", report.metrics)
    yield _decisions(counts)
    yield '</div></section><section><h2>Curves</h2><div class="row">'
    yield from _charts(report, images, counts)
    yield '</div><p class="legend">'
    yield charts.legend(
        [("good", "good"), ("defective", "defective"), ("threshold", "threshold in use")]
    )
    yield "</p></section>"
    if report.per_type:
        yield "<section><h2>By defect type</h2>"
        columns = list(dict.fromkeys(key for row in report.per_type for key in row))
        cells = [[row.get(column) for column in columns] for row in report.per_type]
        yield f"{_table('', columns, cells)}</section>"
    if report.diagnostics:
        yield "<section><h2>Diagnostics of the projection</h2>"
        yield f"{_measures('', report.diagnostics)}</section>"
    yield from _gallery(report, images, limit)
    yield "<section><h2>Provenance</h2><dl>"
    for key, value in _flatten(report.provenance):
        yield f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
    yield f"</dl></section></main><script>{page.SCRIPT}</script></body></html>\n"


def _count(images: Sequence[ImageEntry], threshold: float) -> _Counts:
    right = [not _is_wrong(entry, threshold) for entry in images]
    outcomes = Counter((entry.label, r) for entry, r in zip(images, right, strict=True))
    return _Counts(
        outcomes[True, True], outcomes[True, False], outcomes[False, False], outcomes[False, True]
    )


def _limit(images: Sequence[ImageEntry]) -> float:
    """The end of the heat scale, common to all images."""
    if not images:
        return 0.0
    return float(np.quantile(np.concatenate([i.map.ravel() for i in images]), LIMIT_SHARE))


def _charts(report: Report, images: Sequence[ImageEntry], counts: _Counts) -> Iterator[str]:
    scores = np.array([entry.score for entry in images], np.float64)
    labels = np.array([entry.label for entry in images], bool)
    yield charts.histogram(scores, labels, report.threshold)
    defective, good = counts.hits + counts.missed, counts.alarms + counts.passed
    called = counts.hits + counts.alarms
    if "roc" in report.curves:
        point = (counts.alarms / good, counts.hits / defective) if good and defective else None
        yield charts.roc(*report.curves["roc"], point)
    if "precision_recall" in report.curves:
        point = (counts.hits / defective, counts.hits / called) if counts.hits else None
        yield charts.precision_recall(*report.curves["precision_recall"], point)


def _decisions(counts: _Counts) -> str:
    rows = [["defective", counts.hits, counts.missed], ["good", counts.alarms, counts.passed]]
    return _table("decisions at the threshold", ["truth", "called defective", "called good"], rows)


def _measures(caption: str, measures: Mapping[str, Measure]) -> str:
    """A table of values, with their intervals where there are any."""
    rows = []
    for name, measure in measures.items():
        value, *ends = measure if isinstance(measure, tuple) else (measure,)
        rows.append([name, value, "–".join(map(_text, ends))])
    columns = ["", "value", "95 % interval"]
    if not any(row[2] for row in rows):
        columns, rows = columns[:2], [row[:2] for row in rows]
    return _table(caption, columns, rows)


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first column names the row; numbers stand to the right."""
    head = "".join(
        f'<th scope="col"{_NUMBER if i else ""}>{escape(column)}</th>'
        for i, column in enumerate(columns)
    )
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td{_NUMBER}>{escape(_text(value))}</td>" for value in values)
        body += f'<tr><th scope="row">{escape(_text(name))}</th>{cells}</tr>'
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    table = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


_NUMBER = ' class="number"'


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, tuple | list):  # (value, low, high)
        point, *ends = map(_text, value)
        return f"{point} ({'–'.join(ends)})"
    if isinstance(value, float | np.floating):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"
    return str(value)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                value if isinstance(value, str) else json.dumps(value, default=str),
            )


def _gallery(report: Report, images: Sequence[ImageEntry], limit: float) -> Iterator[str]:
    """The table of all images, its filters, and the heat scale."""
    others = list(dict.fromkeys(k for i in images for k in i.scores if k != report.score_kind))
    yield '<section><h2>Images</h2><form class="filters" hidden>'
    types = sorted(Counter(entry.type for entry in images).items())
    yield _select("type", [(kind, f"{kind} ({count})") for kind, count in types])
    yield _select("decision", [("right", "right"), ("wrong", "wrong")])
    yield '<output id="count"></output></form>'
    bar = pictures.heat_map(np.linspace(0, 1, 128)[None], 1.0)
    yield (
        f'<p class="scale"><span>heat maps: 0</span><img alt="colour scale" src="{_png(bar)}">'
        f"<span>{limit:.3g}, one scale for all; {LIMIT_SHARE:.1%} of all pixels lie below</span>"
        "</p>"
    )
    yield '<div class="scroll"><table id="images"><thead><tr>'
    yield _head("image") + _head("type") + _head("decision")
    yield _head(f"score ({report.score_kind})", number=True, sort="descending")
    yield "".join(_head(name, number=True) for name in others)
    for name in ("input", "reconstruction", "heat map", "true mask"):
        yield f'<th scope="col">{name}</th>'
    yield "</tr></thead><tbody>"
    for entry in images:
        yield _row(entry, report.threshold, others, limit)
    yield "</tbody></table></div></section>"


def _select(name: str, options: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f'<option value="{escape(v)}">{escape(text)}</option>' for v, text in options)
    return (
        f'<label>{name} <select name="{name}"><option value="">all</option>{rows}</select></label>'
    )


def _head(name: str, number: bool = False, sort: str = "") -> str:
    order = f' aria-sort="{sort}"' if sort else ""
    button = f'<button type="button">{escape(name)}</button>'
    return f'<th scope="col"{_NUMBER if number else ""}{order}>{button}</th>'


def _row(entry: ImageEntry, threshold: float, others: Sequence[str], limit: float) -> str:
    wrong = _is_wrong(entry, threshold)
    called = "defective" if entry.score > threshold else "good"
    verdict = ("missed" if entry.label else "false alarm") if wrong else "right"
    name, kind = escape(entry.name), escape(entry.type)
    numbers = [entry.score, *(float(entry.scores.get(k, math.nan)) for k in others)]
    state = "wrong" if wrong else "right"
    heat = pictures.overlay(entry.image, pictures.heat_map(entry.map, limit))
    cells = [
        f'<tr data-type="{kind}" data-decision="{state}">',
        f'<th scope="row" data-value="{name}">{name}</th><td data-value="{kind}">{kind}</td>',
        f'<td data-value="{called} {verdict}">{called}, ',
        f'<span class="{state}">{verdict}</span></td>',
        *map(_score, numbers),
        _image("input", entry.image, _jpeg),
        _image("reconstruction", entry.reconstruction, _jpeg),
        _image("heat map", heat, _jpeg),
        _image("true mask", entry.mask, _png),
        "</tr>",
    ]
    return "".join(cells)


def _score(value: float) -> str:
    number = repr(_sortable(value)).replace("inf", "Infinity")  # as the script reads it
    return f'<td{_NUMBER} data-value="{number}">{value:.6g}</td>'


def _image(text: str, picture: np.ndarray | None, encode: Callable[[np.ndarray], str]) -> str:
    if picture is None:
        return "<td>none</td>"
    return f'<td><img alt="{text}" loading="lazy" decoding="async" src="{encode(picture)}"></td>'


def _jpeg(picture: np.ndarray) -> str:
    return _uri("jpeg", pictures.encode(picture, "jpeg", quality=QUALITY, optimize=True))


def _png(picture: np.ndarray) -> str:
    return _uri("png", pictures.encode(picture))


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
