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
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.dataset import TestSplit, TrainingSplit, open_test
from data_pipelines.errors import BadInput, spell, warn
from data_pipelines.items import GOOD
from pae_jax import augmentation, detection, diagnostics, image_ops, metrics, rng
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import REPORTED_SCORES
from pae_jax.methods import METHODS, floor
from pae_jax.metrics import measure
from pae_jax.report import html, page, pictures, statements
from pae_jax.workdir import (
    eval_folder,
    files,
    provenance,
    suppression,
    trained_model,
    validation,
)
from pae_jax.workdir.paths import AnyPath, to_workdir

_logger = logging.getLogger(__name__)

# Diagnostics apply f about a hundred times per corrupted image, so that few images are taken.
DIAGNOSED_EXAMPLES = 16  # in whole batches, so that there may be a few more
MAX_SUPPRESSED = 0.01  # a larger fraction of suppressed anomalous pixels is told in a line
TANGENT_IMAGES = 256  # at most so many normal images, from which tangents to ℳ are estimated


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
      metrics: the content of metrics.json.
      report: the path of report.html.
    """

    metrics: dict[str, Any]
    report: AnyPath


class Detections(NamedTuple):
    """The detections of all test images, at the network's size.

    Attributes:
      reconstructions: uint8 (h, w, 3) each; None where the method makes none.
      maps: float32 (h, w) each.
      scores: (n,) by name.
    """

    reconstructions: list[np.ndarray | None]
    maps: list[np.ndarray]
    scores: dict[str, np.ndarray]


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
    map_names = eval_folder.map_names(model.config.data, test.names) if save_maps else []
    detections = detect_test(model, test)
    pairs = pixel_pairs(model, test, detections)

    content = {
        "schema": SCHEMA,
        **measure.split_metrics(test, detections.scores, pairs, model.config.eval),
        "threshold": {
            **thresholds._asdict(),
            "source": "held-out normal images",
            **measure.decision_rates(
                detections.scores[settings.image_score] > thresholds.score, test.labels
            ),
        },
        "evaluated_at": {
            "size": "native" if settings.native_size else "network",
            "network_shape": list(model.config.data.shape),
            # Defective images whose mask is empty at this size.
            "images_without_pixel_labels": int(
                (~measure.has_labels(test, settings.native_size)).sum()
                if test.masks is not None
                else 0
            ),
        },
        "diagnostics": _diagnose(workdir, model, split()) if settings.diagnostics else {},
        "floor": _measure_floor(model, test, split) if settings.floor else {},
        "images": {name: test.types.count(name) for name in (GOOD, *measure.defect_types(test))},
        "provenance": provenance.describe(model.config, step=model.step),
    }
    if model.foreground:
        content["foreground"] = _foreground(
            test, _suppressed(model, test), model.foreground.fingerprint
        )
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


def detect_test(model: trained_model.Model, test: TestSplit) -> Detections:
    """Returns the detections of a model on the test images."""
    scores = {name: np.zeros(len(test.names)) for name in REPORTED_SCORES}
    detections = Detections([], [], scores)
    results = detection.detect_all(model.detector, _suppressed(model, test), model.config)
    for i, result in enumerate(results):
        image = result.reconstruction
        detections.reconstructions.append(None if image is None else pictures.to_uint8(image))
        detections.maps.append(result.map)
        for name, value in result.scores.items():
            scores[name][i] = value
    return detections


def pixel_pairs(
    model: trained_model.Model, test: TestSplit, detections: Detections
) -> measure.Pairs | None:
    """Returns the maps of a model with their masks; None without masks, or for constant maps."""
    if not METHODS[model.config.method].localises:
        return None
    native_size = model.config.eval.native_size
    return measure.map_mask_pairs(test, detections.maps, native_size=native_size)


def _measure_floor(
    model: trained_model.Model, test: TestSplit, split: Callable[[], TrainingSplit]
) -> dict[str, Any]:
    """Returns the metrics of PCA on the training images; nothing for a run that is PCA itself."""
    if model.config.method == floor.METHOD:
        return {}
    try:
        images = split().images
    except BadInput as error:
        _logger.warning("%s; the floor is left out (--config.data.root=DIR names the data)", error)
        return {}
    fitted = floor.fit(model.config, images)
    simple = model._replace(config=fitted.config, params=fitted.params, calibration=None)
    detections = detect_test(simple, test)
    pairs = pixel_pairs(simple, test, detections)
    return {
        "method": floor.METHOD,
        "components": fitted.config.baseline.pca_components,
        "training_images": fitted.images,
        **measure.all_metrics(test, detections.scores, pairs, model.config.eval),
    }


def _suppressed(model: trained_model.Model, test: TestSplit) -> np.ndarray:
    """Returns the test images as the model sees them."""
    cache_dir = model.config.data.cache_dir
    return suppression.suppress_all(test.images, model.foreground, cache_dir=cache_dir, part="test")


def _foreground(test: TestSplit, images: np.ndarray, fingerprint: str) -> dict[str, Any]:
    """Returns how much of the test images is the object, and how much of the defects is not.

    Args:
      test: the test split.
      images: its images with suppressed backgrounds.
      fingerprint: that of the network.
    """
    kept = [image.any(axis=-1) for image in images]
    content = {"fingerprint": fingerprint, "fraction": float(np.mean([k.mean() for k in kept]))}
    if test.masks is None or not test.masks.any():
        return {**content, "anomalous_pixels_suppressed": None}
    lost = sum(int((mask & ~k).sum()) for mask, k in zip(test.masks, kept, strict=True))
    fraction = lost / int(test.masks.sum())
    if fraction > MAX_SUPPRESSED:
        warn(
            f"data.foreground: {fraction:.1%} of the anomalous pixels were suppressed as "
            "background and cannot be found; a larger foreground.margin keeps more"
        )
    return {**content, "anomalous_pixels_suppressed": fraction}


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
    detections: Detections,
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


def _write_maps(paths: Sequence[AnyPath], test: TestSplit, maps: Sequence[np.ndarray]) -> None:
    import tifffile

    for i, path in enumerate(paths):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, measure.resize_map(maps[i], test.native_shape(i)))
        files.write_atomically(path, buffer.getvalue())


def _report(
    model: trained_model.Model,
    test: TestSplit,
    detections: Detections,
    thresholds: detection.Thresholds,
    record: dict[str, Any],
) -> html.Report:
    settings = model.config.eval
    curve = metrics.image_metrics(detections.scores[settings.image_score], test.labels).curve
    if METHODS[model.config.method].localises:
        notes = [f"Pixel metrics at {record['evaluated_at']['size']} size."]
    else:
        notes = [f"The method {model.config.method} scores whole images: its maps are constant."]
    if model.calibration is not None:
        by_position = model.calibration.by_position
        notes.append(statements.calibration(thresholds.images, settings, by_position=by_position))
    content = page.Content(
        title=f"{eval_folder.category(model.config.data)}: {len(test.names)} test images",
        scores=detections.scores,
        image_score=settings.image_score,
        threshold=thresholds.score,
        threshold_source=(
            statements.threshold(
                thresholds.images,
                thresholds.false_positive_rate,
                calibrated=model.calibration is not None,
            )
            + " No test image was used for it."
        ),
        maps=detections.maps,
        reconstructions=detections.reconstructions,
        false_positive_rate=curve.false_positive_rate,
        true_positive_rate=curve.true_positive_rate,
        precision=curve.precision,
        notes=notes,
        pixel_threshold=thresholds.pixel if METHODS[model.config.method].localises else None,
    )
    return page.make_report(record, test, content, resamples=settings.bootstrap_resamples)
