"""`pae judge`: the exact metrics, intervals and report for the maps of another tool.

OUT/metrics.json   all numbers; null where undefined
OUT/scores.csv     the score and the decision of every test image
OUT/report.html    the same with pictures, in one file
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.dataset import TestSplit, open_test
from data_pipelines.errors import BadInput, spell
from data_pipelines.items import GOOD
from pae_jax import config_file, image_ops, metrics
from pae_jax.config import Config, EvalConfig
from pae_jax.config_schema import SCHEMA
from pae_jax.judge import maps as map_files
from pae_jax.judge import protocols
from pae_jax.metrics import measure
from pae_jax.report import html, page
from pae_jax.workdir import eval_folder, files, provenance
from pae_jax.workdir.paths import AnyPath, check_local, to_path

GIVEN, MAXIMUM = "given", "max"  # names of the image score: from scores.csv, or of the map


class Judgement(NamedTuple):
    """The result of `judge`.

    Attributes:
      metrics: the content of metrics.json.
      score_source: one sentence on where the image scores come from.
      report: the path of report.html; None where nothing was written.
    """

    metrics: dict[str, Any]
    score_source: str
    report: AnyPath | None


class _Threshold(NamedTuple):
    """The threshold of the image score, and what it is chosen by."""

    score: float
    source: str


def judge(
    maps: str | os.PathLike[str],
    config: str,
    out: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
) -> Judgement:
    """Computes metrics, intervals and the report of anomaly maps that another tool has made.

    Maps of the images' own sizes are judged there, with the masks as they are. Maps of the
    config's size (`data.height`, `data.width`) are judged there, with masks resized by nearest
    neighbour; `eval.native_size` resamples them bilinearly to the images' own sizes instead.

    Args:
      maps: a local folder, see `maps.find_maps`; with scores.csv for image scores, or without.
      config: names the test data, see `config_file.load`.
      out: a folder or URI that does not exist yet or is empty; None writes nothing.
      overrides: words --config.KEY=VALUE.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    check_local("--maps", str(maps))
    folder, settings = Path(maps), config_file.load(config, overrides)
    place = None if out is None else to_path(out)
    # The places are checked before the images are read.
    if place is not None:
        files.check_empty(place)
    if not os.path.isdir(folder):  # `Path.is_dir` raises for a name that is too long
        raise BadInput(f"--maps={folder}: no such folder")
    test = open_test(settings.data.spec, channels=image_ops.CHANNELS)
    test = test._replace(names=[*map(spell, test.names)], types=[*map(spell, test.types)])
    paths = map_files.find_maps(folder, settings.data, test.names)
    given = map_files.read_scores(paths, folder, test.names)
    found = map_files.read_maps(
        paths, test, settings.data.shape, resample=settings.eval.native_size
    )
    if place is not None:
        files.check_writable(place)

    if given is None:
        image_score = MAXIMUM
        scores = {MAXIMUM: np.array([one.max() for one in found.values], np.float64)}
        score_source = "Image scores: the maximum of each map, because there is no scores.csv."
    else:
        image_score, scores = GIVEN, {GIVEN: given}
        score_source = f"Image scores: the column score of {map_files.SCORES}."
    threshold = _choose_threshold(scores[image_score], test.labels)
    content = _measure(settings, test, found, scores)
    content["threshold"] = {
        **threshold._asdict(),
        "image_score": image_score,
        **measure.decision_rates(scores[image_score] > threshold.score, test.labels),
    }
    content["provenance"] |= {"maps": str(folder), "maps_digest": found.digest}
    if place is None:
        return Judgement(content, score_source, None)
    rows = [
        {
            "name": name,
            "type": test.types[i],
            "label": int(test.labels[i]),
            f"score_{image_score}": float(scores[image_score][i]),
            "defective": int(scores[image_score][i] > threshold.score),
        }
        for i, name in enumerate(test.names)
    ]
    report = _report(settings, test, found, content, scores=scores, score_source=score_source)
    with eval_folder.replace(place) as written:
        files.write_csv(written / "scores.csv", rows)
        html.write_report(written / "report.html", report)
        # Last, because it stands for the whole judgement.
        files.write_json(written / "metrics.json", content)
    return Judgement(content, score_source, place / "report.html")


def _measure(
    settings: Config, test: TestSplit, maps: map_files.Maps, scores: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the content of metrics.json, but the threshold."""
    at_native = _at_native(settings.eval, maps)
    pairs = measure.map_mask_pairs(test, maps.values, native_size=at_native)
    values = measure.split_metrics(test, scores, pairs, settings.eval)
    labelled = measure.has_labels(test, at_native)
    return {
        "schema": SCHEMA,
        **values,
        "protocols": protocols.compute(
            test,
            maps,
            values,
            settings.eval,
            at_native=at_native,
            network_shape=settings.data.shape,
        ),
        "evaluated_at": {
            "size": "native" if at_native else "network",
            "network_shape": list(settings.data.shape),
            "resampled": at_native and not maps.native,
            "images_without_pixel_labels": 0 if test.masks is None else int((~labelled).sum()),
        },
        "diagnostics": {},
        "images": {name: test.types.count(name) for name in (GOOD, *measure.defect_types(test))},
        "provenance": provenance.describe(settings, step=None),
    }


def _at_native(settings: EvalConfig, maps: map_files.Maps) -> bool:
    return maps.native or settings.native_size


def _choose_threshold(scores: np.ndarray, labels: np.ndarray) -> _Threshold:
    """Returns the threshold with the largest F1 of the images; the tool names no other."""
    best = metrics.f1_max(scores, labels).threshold
    if np.isnan(best):
        source = "the largest score, because there are no defective images"
        return _Threshold(float(scores.max()), source)
    # Images are called defective above the threshold, and F1 counts those at `best`.
    below = scores[scores < best]
    # Without a score below, any smaller number; at a distance that a chart can show.
    limit = (best + below.max()) / 2 if below.size else best - (abs(best) or 1.0)
    limit = limit if limit < best else np.nextafter(best, -np.inf)
    source = "the largest F1 of these test images, with their labels: new images tend to fare worse"
    return _Threshold(float(limit), source)


def _report(
    settings: Config,
    test: TestSplit,
    maps: map_files.Maps,
    record: dict[str, Any],
    *,
    scores: dict[str, np.ndarray],
    score_source: str,
) -> html.Report:
    image_score = record["threshold"]["image_score"]
    curve = metrics.image_metrics(scores[image_score], test.labels).curve
    low = min(float(one.min()) for one in maps.values)
    shape = settings.data.shape
    size = record["evaluated_at"]["size"]
    resampled = ", maps resampled bilinearly" if record["evaluated_at"]["resampled"] else ""
    content = page.Content(
        title=f"{eval_folder.category(settings.data)}: {len(test.names)} judged maps",
        scores=scores,
        image_score=image_score,
        threshold=record["threshold"]["score"],
        threshold_source=f"The threshold is chosen by {record['threshold']['source']}.",
        # Pictures only: the scale of other tools need not begin at 0.
        maps=[measure.resize_map((one - low).astype(np.float32), shape) for one in maps.values],
        reconstructions=[None] * len(test.names),
        false_positive_rate=curve.false_positive_rate,
        true_positive_rate=curve.true_positive_rate,
        precision=curve.precision,
        notes=[
            f"Anomaly maps of another tool. Pixel metrics at {size} size{resampled}.",
            score_source,
            f"In the heat maps 0 is {low:.6g}, the smallest value of all maps.",
        ],
    )
    return page.make_report(record, test, content, resamples=settings.eval.bootstrap_resamples)
