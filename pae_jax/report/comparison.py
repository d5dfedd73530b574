"""`comparison.html`: a self-contained page on several runs on the same images. Host code.

This module computes what `comparison.html.jinja` lays out, and the table that `pae compare`
prints. The runs are numbered from 1, because their folders are too long for columns.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from pae_jax.report import frame, pictures
from pae_jax.report.frame import Picture, Score, Table
from pae_jax.report.table import align, is_defined
from pae_jax.workdir.files import AnyPath


class View(NamedTuple):
    """One image as one run sees it.

    Attributes:
      score: the image score that decides.
      defective: the decision.
      image: uint8, at the size of the run's network.
      map: the anomaly map, of the same size.
    """

    score: float
    defective: bool
    image: UInt8[np.ndarray, "h w 3"]
    map: Float[np.ndarray, "h w"]


class ComparedImage(NamedTuple):
    """One image of the gallery.

    Attributes:
      name: its path, as the user knows it.
      type: "good" or the defect type.
      label: the truth, True for defective.
      mask: the true mask; None where there is none.
      views: one of each run.
    """

    name: str
    type: str
    label: bool
    mask: Bool[np.ndarray, "h w"] | None
    views: Sequence[View]


class Comparison(NamedTuple):
    """The content of the page.

    Attributes:
      title: its heading.
      notes: sentences under the heading.
      record: the numbers of the comparison.
      pixel_thresholds: those of the runs, whose regions are outlined; None for no outlines.
      images: consumed once, one at a time.
    """

    title: str
    notes: Sequence[str]
    record: Mapping[str, Any]
    pixel_thresholds: Sequence[float | None]
    images: Iterable[ComparedImage]


class _View(NamedTuple):
    """A cell of the gallery: score and decision of one run, and its heat map.

    Attributes:
      score: the score.
      decision: "defective" or "good".
      outcome: "right" or "wrong".
      heat: the heat map.
    """

    score: Score
    decision: str
    outcome: str
    heat: Picture


class _Row(NamedTuple):
    """A row of the gallery.

    Attributes:
      name: the image's name.
      type: "good" or the defect type.
      decisions: "differ" or "agree".
      input: the image.
      mask: the true mask.
      views: one of each run.
    """

    name: str
    type: str
    decisions: str
    input: Picture
    mask: Picture
    views: Sequence[_View]


def write_page(path: AnyPath, comparison: Comparison) -> None:
    """Writes the page at once or not at all.

    The memory needed is that of the thumbnails, and that of the page.
    """
    thresholds = comparison.pixel_thresholds
    images = [_shrink(image, thresholds) for image in comparison.images]
    # Images on which the runs disagree come first, then those with the highest scores of run 1.
    images.sort(key=lambda pair: (_differ(pair[0]), frame.sortable(pair[0].views[0].score)))
    frame.write(path, "comparison.html.jinja", _context(comparison, images[::-1]))


def format_comparison(record: Mapping[str, Any]) -> str:
    """Returns the runs, the metrics with their differences, and the disagreements.

    Args:
      record: the numbers of the comparison.
    """
    runs = [f"{i}  {run['workdir']}" for i, run in enumerate(record["runs"], 1)]
    tables = (_metrics(record), _decisions(record))
    blocks = [runs, *(align([table.columns, *table.rows]) for table in tables)]
    blocks[1].append(f"[…]: 95 % of {record['resamples']} draws, the same ones for every run.")
    blocks[1].append("*: such an interval of the difference does not hold 0.")
    return "\n\n".join("\n".join(map(str.rstrip, lines)) for lines in blocks)


def _metrics(record: Mapping[str, Any]) -> Table:
    """Returns a row per metric: of each run the value, then of each but the first the difference.

    A difference is marked by * if its interval does not hold 0.
    """
    numbers = range(1, len(record["runs"]) + 1)
    columns = ["metric", *map(str, numbers), *(f"{i} − 1" for i in numbers[1:])]
    rows = []
    for name, entries in record["metrics"].items():
        values = [_with_interval(entry["value"], entry["interval"]) for entry in entries]
        differences = [
            _with_interval(entry["difference"], entry["difference_interval"], "+")
            for entry in entries[1:]
        ]
        rows.append([name, *values, *differences])
    return Table(columns, rows)


def _with_interval(value: Any, ends: Sequence[Any], sign: str = "") -> str:
    if not is_defined(value):
        return "–"
    text = f"{value:{sign}.4f}"
    if all(map(is_defined, ends)):
        low, high = ends
        text += f" [{low:{sign}.3f}, {high:{sign}.3f}]"
        if sign:
            text += " *" if low > 0 or high < 0 else "  "
    return text


def _decisions(record: Mapping[str, Any]) -> Table:
    """Returns how many images of each class the runs call defective: each, only one, all."""
    numbers = range(1, len(record["runs"]) + 1)
    columns = ["called defective", *(f"by {i}" for i in numbers)]
    columns += [*(f"only by {i}" for i in numbers), "by all", "by some", "by none"]
    rows = [
        [
            f"{truth} images",
            *map(str, counts["called_by_run"]),
            *map(str, counts["called_by_this_run_only"]),
            *(str(counts[name]) for name in ("all", "some", "none")),
        ]
        for truth, counts in record["decisions"].items()
    ]
    return Table(columns, rows)


def _differ(image: ComparedImage) -> bool:
    return len({view.defective for view in image.views}) > 1


def _shrink(
    image: ComparedImage, thresholds: Sequence[float | None]
) -> tuple[ComparedImage, list[np.ndarray | None]]:
    """Returns the image with thumbnails, and the outlines of each run's regions."""
    views, outlines = [], []
    for view, threshold in zip(image.views, thresholds, strict=True):
        outline = None
        if threshold is not None and (anomalous := view.map > threshold).any():
            outline = pictures.outline(frame.thumbnail_mask(anomalous))
        outlines.append(outline)
        small = pictures.shrink(view.image, frame.THUMBNAIL_SIDE)
        views.append(
            view._replace(image=small, map=pictures.shrink_map(view.map, frame.THUMBNAIL_SIDE))
        )
    mask = None if image.mask is None else frame.thumbnail_mask(image.mask)
    return image._replace(views=views, mask=mask), outlines


def _context(
    comparison: Comparison, images: Sequence[tuple[ComparedImage, list[np.ndarray | None]]]
) -> dict[str, Any]:
    record = comparison.record
    runs = [
        {
            "number": i + 1,
            "workdir": run["workdir"],
            "rule": f"{run['image_score']} > {run['threshold']['score']:.6g}",
            "held_out": run["threshold"]["images"],
            "method": run["provenance"]["config"]["method"],
            "step": run["provenance"]["step"],
        }
        for i, run in enumerate(record["runs"])
    ]
    # Maps of different methods have different scales, so that each run has its own.
    limits = [frame.heat_limit(image.views[k].map for image, _ in images) for k in range(len(runs))]
    return {
        "title": comparison.title,
        "notes": comparison.notes,
        "runs": Table(
            ["run", "workdir", "method", "step", "called defective", "held-out images"],
            [
                [str(run[key]) for key in ("number", "workdir", "method", "step", "rule")]
                + [str(run["held_out"])]
                for run in runs
            ],
            texts=[1, 2, 4],
        ),
        "metrics": _metrics(record),
        "decisions": _decisions(record),
        "numbers": [run["number"] for run in runs],
        "scales": [frame.heat_scale(limit) for limit in limits],
        "types": sorted(Counter(image.type for image, _ in images).items()),
        "outlines": any(threshold is not None for threshold in comparison.pixel_thresholds),
        # A generator, so that the encoded pictures are held once, in the page.
        "images": _rows(images, limits),
    }


def _rows(
    images: Sequence[tuple[ComparedImage, list[np.ndarray | None]]], limits: Sequence[float]
) -> Iterator[_Row]:
    for image, outlines in images:
        yield _Row(
            name=image.name,
            type=image.type,
            decisions="differ" if _differ(image) else "agree",
            input=Picture("input", frame.jpeg(image.views[0].image)),
            mask=Picture("true mask", None if image.mask is None else frame.png(image.mask)),
            views=[
                _view(*parts, image.label, i + 1)
                for i, parts in enumerate(zip(image.views, outlines, limits, strict=True))
            ],
        )


def _view(view: View, outline: np.ndarray | None, limit: float, label: bool, number: int) -> _View:
    heat = pictures.overlay(view.image, pictures.heat_map(view.map, limit))
    return _View(
        score=frame.score_cell(view.score),
        decision="defective" if view.defective else "good",
        outcome="right" if view.defective == label else "wrong",
        heat=Picture(
            f"heat map of run {number}",
            frame.jpeg(heat),
            None if outline is None else frame.png(outline),
            f"outlines of the regions of run {number}",
        ),
    )
