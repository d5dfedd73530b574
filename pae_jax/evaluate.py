"""`pae evaluate`: metrics, intervals, per defect type, diagnostics and the report of a run.

W/eval/metrics.json   all numbers; null where undefined
W/eval/scores.csv     the scores and the decision of every test image
W/eval/report.html    the same with pictures, in one file
W/eval/maps/          with save_maps: CATEGORY/test/TYPE/NAME.tiff, float32 at native size

An evaluation with other settings than the run's has a folder W/eval_KEY=VALUE,… beside it. Files of
an earlier evaluation in the same folder are replaced together.
"""

import functools
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.dataset import TestSplit, TrainingSplit, open_test
from data_pipelines.errors import BadInput, spell
from data_pipelines.items import GOOD
from pae_jax import augmentation, detection, diagnostics, image_ops, metrics, rng
from pae_jax.config import EvalConfig
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import REPORTED_SCORES
from pae_jax.methods import METHODS
from pae_jax.metrics import bootstrap
from pae_jax.report import html, pictures, statements
from pae_jax.report.table import is_defined, metric_names
from pae_jax.workdir import eval_folder, files, provenance, trained_model, validation
from pae_jax.workdir.paths import AnyPath, to_workdir

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_aupro", "pixel_f1_max", "pixel_aupimo")

# Diagnostics apply f about a hundred times per corrupted image, so that few images are taken.
DIAGNOSED_EXAMPLES = 16  # in whole batches, so that there may be a few more
TANGENT_IMAGES = 256  # at most so many normal images, from which tangents to ℳ are estimated

Pairs = Callable[[Sequence[int]], Iterator[tuple[np.ndarray, np.ndarray]]]


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
      metrics: the content of metrics.json.
      report: the path of report.html.
    """

    metrics: dict[str, Any]
    report: AnyPath


class _Detections(NamedTuple):
    """The detections of all test images, at the network's size."""

    reconstructions: list[np.ndarray | None]  # uint8 (h, w, 3)
    maps: list[np.ndarray]  # float32 (h, w)
    scores: dict[str, np.ndarray]  # (n,) by name


def evaluate(
    workdir: str | os.PathLike[str], *, overrides: Sequence[str] = (), save_maps: bool = False
) -> Evaluation:
    """Evaluates the newest checkpoint of a workdir on the test split.

    Args:
      workdir: the folder of a training run, local or gs://.
      overrides: words --config.eval.KEY=VALUE, or places of the data, --config.data.root=DIR.
      save_maps: also writes the maps as TIFF, as MVTec's own evaluation script reads them.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    workdir = to_workdir(workdir)
    model = trained_model.load(workdir, overrides)
    settings = model.config.eval
    out = eval_folder.locate(workdir, settings)
    # The folder is made beside its place, or objects of a bucket are written one by one.
    files.check_writable(workdir)
    eval_folder.restore(out)
    split = functools.cache(functools.partial(trained_model.open_split, workdir, model.config))
    if any(not word.startswith("--config.eval.") for word in overrides):
        split()  # whether these are the data of the run
    thresholds = trained_model.thresholds(workdir, model, split)
    test = open_test(model.config.data.spec, channels=model.channels, value_range=model.value_range)
    test = test._replace(names=[*map(spell, test.names)], types=[*map(spell, test.types)])
    # The paths are checked before the work, not after it.
    map_names = _map_names(_category(model), test.names) if save_maps else []
    detections = _detect(model, test)

    content = {
        "schema": SCHEMA,
        **_test_metrics(model, test, detections),
        "threshold": {
            **thresholds._asdict(),
            "source": "held-out normal images",
            **_decision_rates(
                detections.scores[settings.image_score] > thresholds.score, test.labels
            ),
        },
        "evaluated_at": {
            "size": "native" if settings.native_size else "network",
            "network_shape": list(model.config.data.shape),
            # Defective images whose mask is empty at this size.
            "images_without_pixel_labels": int(
                (~_has_labels(test, settings.native_size)).sum() if test.masks is not None else 0
            ),
        },
        "diagnostics": _diagnose(workdir, model, split()) if settings.diagnostics else {},
        "images": {name: test.types.count(name) for name in (GOOD, *_defect_types(test))},
        "provenance": provenance.describe(model.config, step=model.step),
    }
    rows = _score_rows(test, detections, thresholds, settings.image_score)
    report = _report(model, test, detections, thresholds, content)
    with eval_folder.replace(out) as folder:
        if save_maps:
            _write_maps([folder / name for name in map_names], test, detections.maps)
        files.write_csv(folder / "scores.csv", rows)
        html.write_report(folder / "report.html", report)
        # Last, because it stands for the whole evaluation.
        files.write_json(folder / "metrics.json", content)
    return Evaluation(content, out / "report.html")


def _detect(model: trained_model.Model, test: TestSplit) -> _Detections:
    scores = {name: np.zeros(len(test.names)) for name in REPORTED_SCORES}
    detections = _Detections([], [], scores)
    results = detection.detect_all(model.params, test.images, model.config)
    for i, result in enumerate(results):
        image = result.reconstruction
        detections.reconstructions.append(None if image is None else pictures.to_uint8(image))
        detections.maps.append(result.map)
        for name, value in result.scores.items():
            scores[name][i] = value
    return detections


def _test_metrics(
    model: trained_model.Model, test: TestSplit, detections: _Detections
) -> dict[str, Any]:
    """Returns the metrics of all images, their intervals, and the metrics of each defect type."""
    settings = model.config.eval
    pairs = None
    if METHODS[model.config.method].localises:
        pairs = _map_mask_pairs(test, detections.maps, native_size=settings.native_size)

    def measure(
        rows: Sequence[int], resamples: int
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        index = np.asarray(rows)
        scores = {name: values[index] for name, values in detections.scores.items()}
        values, intervals = _image_metrics(scores, test.labels[index], settings, resamples)
        pixel_values, pixel_intervals = _pixel_metrics(pairs, rows, settings, resamples)
        return values | pixel_values, intervals | pixel_intervals

    values, intervals = measure(range(len(test.names)), settings.bootstrap_resamples)
    good = [i for i, name in enumerate(test.types) if name == GOOD]
    per_type = {}
    for defect_type in _defect_types(test):
        # Each type is told from the same normal images.
        defective = [i for i, name in enumerate(test.types) if name == defect_type]
        type_values, _ = measure([*good, *defective], 0)
        per_type[defect_type] = {"images": len(defective), **type_values}
    return {**values, "intervals": intervals, "per_type": per_type}


def _defect_types(test: TestSplit) -> list[str]:
    return [name for name in dict.fromkeys(test.types) if name != GOOD]


def _map_mask_pairs(
    test: TestSplit, maps: Sequence[np.ndarray], *, native_size: bool
) -> Pairs | None:
    """Returns a function from image numbers to their maps and masks; None without masks.

    The function passes over defective images whose masks are empty: their pixels have no labels.
    """
    masks = test.masks
    if masks is None:
        return None
    has_labels = _has_labels(test, native_size)

    def pairs(rows: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in rows:
            if not has_labels[i]:
                continue
            if native_size:
                yield resize_map(maps[i], test.native_shape(i)), test.native_mask(i)
            else:
                yield maps[i], masks[i]

    return pairs


def _has_labels(test: TestSplit, native_size: bool) -> np.ndarray:
    return test.has_native_labels if native_size else test.has_pixel_labels


def resize_map(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns a map (h, w) resized bilinearly in float32. Masks are never resized."""
    from PIL import Image

    height, width = shape
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _image_metrics(
    scores: dict[str, np.ndarray], labels: np.ndarray, settings: EvalConfig, resamples: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns metrics of the image scores and, with resamples, bootstrap intervals of them."""
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for name, score in scores.items():
        values[f"image_auroc_{name}"] = metrics.auroc(score, labels)
        values[f"image_ap_{name}"] = metrics.average_precision(score, labels)
        values[f"image_f1_max_{name}"] = metrics.f1_max(score, labels).value
        if resamples:
            bounds = bootstrap.bootstrap_images(
                score, labels, resamples=resamples, seed=settings.bootstrap_seed
            )
            intervals[f"image_auroc_{name}"] = [bounds.auroc.low, bounds.auroc.high]
            ap = bounds.average_precision
            intervals[f"image_ap_{name}"] = [ap.low, ap.high]
    return values, intervals


def _pixel_metrics(
    pairs: Pairs | None, rows: Sequence[int], settings: EvalConfig, resamples: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the same of the maps' pixels: NaN without masks, as the keys are always there."""
    if pairs is None:
        return dict.fromkeys(PIXEL_METRICS, math.nan), {}
    limit = settings.aupro_limit
    pixels = metrics.pixel_metrics(pairs(rows), limit=limit)
    labelled = list(pairs(rows))
    values = (
        pixels.auroc,
        pixels.average_precision,
        pixels.aupro,
        pixels.f1.value,
        metrics.aupimo([values for values, _ in labelled], [mask for _, mask in labelled]).mean,
    )
    intervals = {}
    if resamples:
        bounds = bootstrap.bootstrap_pixels(
            pairs(rows), limit=limit, resamples=resamples, seed=settings.bootstrap_seed
        )
        # The bootstrap covers the first three metrics.
        for name, interval in zip(PIXEL_METRICS, bounds, strict=False):
            intervals[name] = [interval.low, interval.high]
    return dict(zip(PIXEL_METRICS, values, strict=True)), intervals


def _decision_rates(positive: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the rates of the decisions on test images; never used to choose the threshold."""

    def rate(members: np.ndarray) -> float:
        return float(positive[members].mean()) if members.any() else math.nan

    return {"test_false_positive_rate": rate(~labels), "test_true_positive_rate": rate(labels)}


def _diagnose(
    workdir: AnyPath, model: trained_model.Model, split: TrainingSplit
) -> dict[str, float]:
    """Measures the properties of f as a projection; nothing for a method without an f.

    The images are held out and the corruptions are made of held-out textures. No test image is
    used.
    """
    config, seed = model.config, model.config.train.seed
    reconstruct = METHODS[config.method].reconstruct
    if reconstruct is None:
        return {}
    textures = trained_model.open_textures(workdir, config)
    root = jax.random.key(seed)
    # Crops and probes take streams of their own: both fold by the image's index.
    crop_key, key = (rng.stream_key(root, name) for name in ("diagnostics crops", "diagnostics"))
    normal = image_ops.to_float(jnp.asarray(split.images[:TANGENT_IMAGES]))
    clean = augmentation.augment(crop_key, normal, "none", config.data.train_shape)
    examples = validation.fixed_examples(
        split.held_out, textures.held_out, config, at_most=DIAGNOSED_EXAMPLES
    )
    return diagnostics.diagnose(
        reconstruct(model.params, config),
        clean,
        examples,
        key,
        tolerance=config.eval.fixed_point_tolerance,
        max_steps=config.eval.max_steps,
    )


def _score_rows(
    test: TestSplit,
    detections: _Detections,
    thresholds: detection.Thresholds,
    image_score: str,
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": test.types[i],
            "label": int(test.labels[i]),
            **{f"score_{key}": float(values[i]) for key, values in detections.scores.items()},
            "defective": int(detections.scores[image_score][i] > thresholds.score),
        }
        for i, name in enumerate(test.names)
    ]


def _category(model: trained_model.Model) -> str:
    data = model.config.data
    root = Path(data.root)
    name = root.stem if data.source == "list" else root.name
    return data.category.rpartition("/")[2] or name or data.source


def _map_names(category: str, names: Sequence[str]) -> list[str]:
    """Returns where the official script looks for the maps: the image's name with `.tiff`."""
    folder = Path("maps", category, "test")
    paths = [
        files.output_path(folder, name.removesuffix(Path(name).suffix), ".tiff").as_posix()
        for name in names
    ]
    owners: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if path in owners:
            raise BadInput(f"{owners[path]}, {name}: the map of both would be {path}")
        owners[path] = name
    return paths


def _write_maps(paths: Sequence[AnyPath], test: TestSplit, maps: Sequence[np.ndarray]) -> None:
    import tifffile

    for i, path in enumerate(paths):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, resize_map(maps[i], test.native_shape(i)))
        files.write_atomically(path, buffer.getvalue())


def _report(
    model: trained_model.Model,
    test: TestSplit,
    detections: _Detections,
    thresholds: detection.Thresholds,
    record: dict[str, Any],
) -> html.Report:
    image_score = model.config.eval.image_score
    scores = detections.scores[image_score]
    curve = metrics.image_metrics(scores, test.labels).curve

    def entry(i: int) -> html.ImageEntry:
        return html.ImageEntry(
            name=test.names[i],
            type=test.types[i],
            label=bool(test.labels[i]),
            score=float(scores[i]),
            scores={name: float(values[i]) for name, values in detections.scores.items()},
            image=np.repeat(test.images[i], 3 // model.channels, axis=-1),
            reconstruction=detections.reconstructions[i],
            map=detections.maps[i],
            mask=None if test.masks is None else test.masks[i],
        )

    return html.Report(
        title=f"{_category(model)}: {len(test.names)} test images",
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
            "roc": (curve.false_positive_rate, curve.true_positive_rate),
            "precision_recall": (curve.true_positive_rate, curve.precision),
        },
        threshold=thresholds.score,
        image_score=image_score,
        images=map(entry, range(len(test.names))),
        threshold_source=(
            f"{statements.threshold(thresholds.images, thresholds.false_positive_rate)} No test "
            "image was used for it."
        ),
        notes=_notes(model, record),
    )


def _defined_columns(per_type: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per defect type, with the columns that are defined for one of them."""
    columns = dict.fromkeys(
        name for row in per_type.values() for name, value in row.items() if is_defined(value)
    )
    return [
        {"type": defect_type, **{name: row[name] for name in columns}}
        for defect_type, row in per_type.items()
    ]


def _notes(model: trained_model.Model, record: dict[str, Any]) -> list[str]:
    """Returns sentences on the size of the maps and on the metrics that are left out."""
    if METHODS[model.config.method].localises:
        notes = [f"Pixel metrics at {record['evaluated_at']['size']} size."]
    else:
        notes = [f"The method {model.config.method} scores whole images: its maps are constant."]
    if count := record["evaluated_at"]["images_without_pixel_labels"]:
        notes.append(f"Pixel metrics leave out {count} defective images, whose masks are empty.")
    if record["intervals"]:
        good = record["images"][GOOD]
        defective = sum(record["images"].values()) - good
        notes.append(statements.intervals(model.config.eval.bootstrap_resamples, good, defective))
    undefined = [name for name in metric_names(record) if not is_defined(record[name])]
    if undefined:
        notes.append(f"Undefined for these test images: {', '.join(undefined)}.")
    return notes
