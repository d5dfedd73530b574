"""The test images that a run's record shows: its best, median and worst detections.

The defective images are ordered by a figure of their own: the average precision of the pixels
within the image where the evaluation has pixel metrics (images whose mask is empty are left out);
else the share of the normal test images with a lower score, ties as one half, equal shares by
score. From both ends and from the middle two each, and the normal image with the highest score.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from data_pipelines.dataset import TestSplit, open_test
from data_pipelines.errors import BadInput
from pae_jax import detection, metrics
from pae_jax.report import pictures
from pae_jax.workdir import files, trained_model

EACH = 2  # cases from each end and from the middle
SIDES = (128, 112, 96, 80, 64, 48)  # of a tile in pixels: the first with which the file is small
LARGEST = 250_000  # bytes


class Case(NamedTuple):
    """One of the chosen test images: best, median, worst or normal."""

    kind: str
    index: int


class Cases(NamedTuple):
    """What the record tells of them, and the content of their PNG file."""

    record: dict[str, Any]
    picture: bytes


def find(workdir: Path) -> Cases:
    """Chooses the cases of a run and draws them, a column each.

    Args:
      workdir: of an evaluated run whose test images are still there; its model is applied once
        more, with the settings of the evaluation.

    Raises:
      BadInput: the images are gone or are others than those evaluated.
    """
    evaluation = files.read_json(workdir / "eval/metrics.json")
    settings = evaluation["provenance"]["config"]["eval"]
    words = [f"--config.eval.{key}={value}" for key, value in settings.items()]
    model = trained_model.load(workdir, words)
    test = open_test(model.config.data.spec, channels=model.channels)
    kinds = {*test.types, *evaluation["images"]}
    if evaluation["images"] != {kind: test.types.count(kind) for kind in kinds}:
        raise BadInput(f"{workdir}: other test images than those that were evaluated")
    by_pixels = evaluation["pixel_ap"] is not None
    figures, scores = _figures(model, test, by_pixels=by_pixels)
    cases = choose(figures, scores, np.asarray(test.labels))
    limit = (
        2 * trained_model.thresholds(workdir, model).pixel
    )  # as in the heat maps of `pae predict`
    rows, picture = _draw(model, test, [case.index for case in cases], limit)
    record = {
        "figure": "pixel_ap" if by_pixels else "rank",
        "score": model.config.eval.image_score,
        "rows": rows,
        "images": [
            {
                "case": case.kind,
                "name": test.names[case.index],
                "type": test.types[case.index],
                "figure": float(figures[case.index]),
                "score": float(scores[case.index]),
            }
            for case in cases
        ],
    }
    return Cases(record, picture)


def choose(
    figures: Float[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
) -> list[Case]:
    """Best, median and worst of the defective images by figure, NaN left out; the top normal one.

    Where there are too few defective images, the median and then the worst are missing.
    """
    defined = np.flatnonzero(labels & ~np.isnan(figures)).tolist()
    order = sorted(defined, key=lambda i: (-figures[i], -scores[i], i))
    best, rest = order[:EACH], order[EACH:]
    middle, worst = rest[:-EACH], rest[-EACH:]
    first = max(0, (len(middle) - EACH) // 2)
    normal = sorted(np.flatnonzero(~labels).tolist(), key=lambda i: (-scores[i], i))[:1]
    chosen = {"best": best, "median": middle[first : first + EACH], "worst": worst}
    return [Case(kind, i) for kind, found in (chosen | {"normal": normal}).items() for i in found]


def _figures(
    model: trained_model.Model, test: TestSplit, *, by_pixels: bool
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The figure of every defective image, NaN for the others, and the score of every image."""
    figures, scores = np.full(len(test.names), np.nan), np.zeros(len(test.names))
    for i, found in enumerate(detection.detect_all(model.params, test.images, model.config)):
        scores[i] = found.scores[model.config.eval.image_score]
        if by_pixels and test.masks is not None and test.masks[i].any():
            figures[i] = metrics.average_precision(found.map, test.masks[i])
    normal = scores[~test.labels]
    if not by_pixels and normal.size:
        for i in np.flatnonzero(test.labels):
            figures[i] = (normal < scores[i]).mean() + (normal == scores[i]).mean() / 2
    return figures, scores


def _draw(
    model: trained_model.Model, test: TestSplit, chosen: Sequence[int], limit: float
) -> tuple[list[str], bytes]:
    """The names of the rows, and the PNG file, in tiles as large as it allows."""
    detections = list(
        detection.detect_all(model.params, test.images[np.asarray(chosen)], model.config)
    )
    rows: dict[str, list[np.ndarray]] = {}
    content = b""
    for side in SIDES:
        rows = {}
        for i, found in zip(chosen, detections, strict=True):
            image = pictures.shrink(np.repeat(test.images[i], 3 // model.channels, axis=-1), side)
            tiles = {"image": image}
            if found.reconstruction is not None:  # not every method has one
                picture = pictures.to_uint8(found.reconstruction)
                tiles["reconstruction"] = pictures.shrink(picture, side)
            heat = pictures.heat_map(pictures.shrink_map(found.map, side), limit)
            tiles["anomaly map over the image"] = pictures.overlay(image, heat)
            if test.masks is not None:
                mask = np.repeat(test.masks[i][..., None] * np.uint8(255), 3, axis=-1)
                tiles["mask"] = pictures.shrink(mask, side)
            for name, tile in tiles.items():
                rows.setdefault(name, []).append(tile)
        content = pictures.encode(pictures.grid(list(rows.values())), optimize=True)
        if len(content) <= LARGEST:
            break
    return list(rows), content
