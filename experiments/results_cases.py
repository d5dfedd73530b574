"""The test images that a run's record shows: its best, median and worst detections.

The defective images are sorted by a figure. If the evaluation has pixel metrics, the figure is the
average precision of the pixels within the image, and images with an empty mask are left out.
Otherwise it is the fraction of normal test images with a lower score, where a tie counts one half;
images of equal fraction are sorted by score. Two images each are taken from both ends and from the
middle, and one normal image: the one with the highest score.
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
SIDES = (128, 112, 96, 80, 64, 48)  # pixels of a tile; the first that keeps the file small is used
LARGEST = 250_000  # bytes


class Case(NamedTuple):
    """A selected test image and the reason: best, median, worst or normal."""

    name: str
    index: int


class Cases(NamedTuple):
    """The selected images as an entry of the record, and as the content of a PNG file."""

    record: dict[str, Any]
    picture: bytes


def find(workdir: Path) -> Cases:
    """Selects the cases of a run and draws each of them as a column.

    Args:
      workdir: the workdir of an evaluated run whose test images still exist. Its model is applied
        once more, with the settings of the evaluation.

    Raises:
      BadInput: the images are gone or are not those that were evaluated.
    """
    evaluation = files.read_json(workdir / "eval/metrics.json")
    settings = evaluation["provenance"]["config"]["eval"]
    words = [f"--config.eval.{key}={value}" for key, value in settings.items()]
    model = trained_model.load(workdir, words)
    spec = model.config.data.spec
    test = open_test(spec, channels=model.channels, value_range=model.value_range)
    types = {*test.types, *evaluation["images"]}
    if evaluation["images"] != {name: test.types.count(name) for name in types}:
        raise BadInput(f"{workdir}: other test images than those that were evaluated")
    by_pixels = evaluation["pixel_ap"] is not None
    figures, scores = _figures(model, test, by_pixels=by_pixels)
    cases = choose(figures, scores, np.asarray(test.labels))
    # The heat maps of `pae predict` have the same limit.
    limit = 2 * trained_model.thresholds(workdir, model).pixel
    rows, picture = _draw(model, test, [case.index for case in cases], limit)
    record = {
        "figure": "pixel_ap" if by_pixels else "rank",
        "score": model.config.eval.image_score,
        "rows": rows,
        "images": [
            {
                "case": case.name,
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
    """Returns the best, median and worst defective images and the normal one with the top score.

    Images whose figure is NaN are left out. If there are too few defective images, the median
    cases are missing first, then the worst.
    """
    defined = np.flatnonzero(labels & ~np.isnan(figures)).tolist()
    order = sorted(defined, key=lambda i: (-figures[i], -scores[i], i))
    best, rest = order[:EACH], order[EACH:]
    middle, worst = rest[:-EACH], rest[-EACH:]
    first = max(0, (len(middle) - EACH) // 2)
    median = middle[first : first + EACH]
    normal = sorted(np.flatnonzero(~labels).tolist(), key=lambda i: (-scores[i], i))[:1]
    selected = {"best": best, "median": median, "worst": worst, "normal": normal}
    return [Case(name, i) for name, indices in selected.items() for i in indices]


def _figures(
    model: trained_model.Model, test: TestSplit, *, by_pixels: bool
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Returns the figure of every defective image, NaN for the others, and every image's score."""
    figures, scores = np.full(len(test.names), np.nan), np.zeros(len(test.names))
    detections = detection.detect_all(model.detector, test.images, model.config)
    for i, detected in enumerate(detections):
        scores[i] = detected.scores[model.config.eval.image_score]
        if by_pixels and test.masks is not None and test.masks[i].any():
            figures[i] = metrics.average_precision(detected.map, test.masks[i])
    normal = scores[~test.labels]
    if not by_pixels and normal.size:
        for i in np.flatnonzero(test.labels):
            figures[i] = (normal < scores[i]).mean() + (normal == scores[i]).mean() / 2
    return figures, scores


def _draw(
    model: trained_model.Model, test: TestSplit, indices: Sequence[int], limit: float
) -> tuple[list[str], bytes]:
    """Returns the names of the rows, and a PNG file with tiles as large as `LARGEST` allows."""
    images = test.images[np.asarray(indices)]
    detections = list(detection.detect_all(model.detector, images, model.config))
    rows: dict[str, list[np.ndarray]] = {}
    content = b""
    for side in SIDES:
        rows = {}
        for i, detected in zip(indices, detections, strict=True):
            image = pictures.shrink(np.repeat(test.images[i], 3 // model.channels, axis=-1), side)
            tiles = {"image": image}
            if detected.reconstruction is not None:  # not every method has one
                picture = pictures.to_uint8(detected.reconstruction)
                tiles["reconstruction"] = pictures.shrink(picture, side)
            heat = pictures.heat_map(pictures.shrink_map(detected.map, side), limit)
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
