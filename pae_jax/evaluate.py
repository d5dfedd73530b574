"""`pae evaluate`: metrics, intervals, per defect type, diagnostics and the report of a run.

W/eval/metrics.json   all numbers; null where undefined
W/eval/scores.csv     every test image's scores and decision
W/eval/report.html    the same with pictures, in one file
W/eval/maps/          with save_maps: CATEGORY/test/TYPE/NAME.tiff, float32 at native size
"""

import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.dataset import TestSplit, TrainingSplit, open_test
from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD
from pae_jax import augmentation, detection, diagnostics, image_ops, metrics, rng
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import REPORTED_SCORES
from pae_jax.methods import METHODS
from pae_jax.metrics import bootstrap
from pae_jax.report import html, pictures
from pae_jax.workdir import files, provenance, run, trained_model, validation

DIAGNOSED = 16  # about so many corrupted images: each takes a hundred applications of f
NORMAL_IMAGES = 256  # at most so many, from which tangents to ℳ are estimated
Pairs = Callable[[Sequence[int]], Iterator[tuple[np.ndarray, np.ndarray]]]


class Evaluation(NamedTuple):
    """The content of metrics.json, and where the report is."""

    metrics: dict[str, Any]
    report: Path


class _Found(NamedTuple):
    """What the model says of the test images, at the network's size."""

    reconstructions: list[np.ndarray | None]  # uint8 (h, w, 3)
    maps: list[np.ndarray]  # float32 (h, w)
    scores: dict[str, np.ndarray]  # (n,) by name


def evaluate(
    workdir: str | Path, *, overrides: Sequence[str] = (), save_maps: bool = False
) -> Evaluation:
    """Evaluates the newest checkpoint of a workdir on the test split.

    Args:
      workdir: of a training run.
      overrides: words --config.eval.KEY=VALUE.
      save_maps: writes the maps as TIFF too, as MVTec's own evaluation script reads them.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    workdir = Path(workdir)
    model = trained_model.load(workdir, overrides)
    settings, out = model.config.eval, workdir / "eval"
    files.check_writable(out)
    split = functools.cache(functools.partial(trained_model.open_split, workdir, model.config))
    limits = trained_model.thresholds(workdir, model, split)
    test = open_test(model.config.data.spec, channels=model.channels)
    map_paths = _map_paths(out / "maps" / _category(model), test.names) if save_maps else []
    found = _detect(model, test)
    pairs = None
    if METHODS[model.config.method].pixels:
        pairs = _pairs(test, found.maps, native=settings.native_size)

    everything = range(len(test.names))
    values, intervals = _metrics(test, found, pairs, everything, model)
    good = [i for i in everything if not test.labels[i]]
    types = [kind for kind in dict.fromkeys(test.types) if kind != GOOD]
    per_type = {}
    for kind in types:
        chosen = [*good, *(i for i in everything if test.types[i] == kind)]
        per_type[kind], _ = _metrics(test, found, pairs, chosen, model, resamples=0)
        per_type[kind]["images"] = len(chosen) - len(good)

    size = "native" if settings.native_size else "network"
    record = {
        "schema": SCHEMA,
        **values,
        "intervals": intervals,
        "per_type": per_type,
        "threshold": {
            **limits._asdict(),
            "source": "held-out normal images",
            **_decisions(found.scores[settings.image_score] > limits.score, test.labels),
        },
        "evaluated_at": {"size": size, "network_shape": list(model.config.data.shape)},
        "diagnostics": _diagnose(model, split()) if settings.diagnostics else {},
        "images": {kind: test.types.count(kind) for kind in (GOOD, *types)},
        "provenance": provenance.describe(model.config, step=model.step),
    }
    files.write_json(out / "metrics.json", record)
    files.write_csv(out / "scores.csv", _rows(test, found, limits, settings.image_score))
    if save_maps:
        _write_maps(map_paths, test, found.maps)
    html.write_report(out / "report.html", _report(model, test, found, limits, record))
    return Evaluation(record, out / "report.html")


def _diagnose(model: trained_model.Model, data: TrainingSplit) -> dict[str, float]:
    """Is f a projection? On held-out images under held-out corruptions; no test image.

    Nothing is said of a method without an f.
    """
    config, seed = model.config, model.config.train.seed
    reconstruct = METHODS[config.method].reconstruct
    if reconstruct is None:
        return {}
    textures = run.open_run_textures(config)
    key = rng.stream_key(jax.random.key(seed), "diagnostics")
    normal = image_ops.to_float(jnp.asarray(data.images[:NORMAL_IMAGES]))
    clean = augmentation.augment(key, normal, "none", config.data.train_shape)
    examples = validation.fixed_examples(
        data.held_out, textures.held_out, config, at_most=DIAGNOSED
    )
    return diagnostics.diagnose(
        reconstruct(model.params, config),
        clean,
        examples,
        key,
        tolerance=config.eval.fixed_point_tolerance,
        max_steps=config.eval.max_steps,
    )


def format_table(evaluation: Evaluation) -> str:
    """The metrics with their intervals, overall and per defect type, as text."""
    record = evaluation.metrics
    lines = []
    for name in (key for key in record if key.startswith(("image_", "pixel_"))):
        low, high = record["intervals"].get(name, (math.nan, math.nan))
        interval = "" if math.isnan(low) else f"   [{low:.3f}, {high:.3f}]"
        lines.append(f"{name:22s} {_number(record[name])}{interval}")
    columns = ("images", "image_auroc_sum", "image_auroc_max", "image_auroc_topk")
    columns += ("pixel_auroc", "pixel_ap", "pixel_aupro")
    for name, value in record["diagnostics"].items():
        lines.append(f"{name:22s} {_number(value)}")
    lines.append("\n" + f"{'defect type':16s}" + "".join(f"{name:>18s}" for name in columns))
    for kind, row in record["per_type"].items():
        cells = [f"{row['images']}", *(_number(row[name]) for name in columns[1:])]
        lines.append(f"{kind:16s}" + "".join(f"{cell:>18s}" for cell in cells))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "  -  " if value is None or math.isnan(value) else f"{value:.4f}"


def _detect(model: trained_model.Model, test: TestSplit) -> _Found:
    found = _Found([], [], {kind: np.zeros(len(test.names)) for kind in REPORTED_SCORES})
    for i, one in enumerate(detection.detect_all(model.params, test.images, model.config)):
        picture = one.reconstruction
        found.reconstructions.append(None if picture is None else pictures.to_uint8(picture))
        found.maps.append(one.map)
        for kind, value in one.scores.items():
            found.scores[kind][i] = value
    return found


def _pairs(test: TestSplit, maps: Sequence[np.ndarray], *, native: bool) -> Pairs | None:
    """(map, mask) of chosen images at the network's or at native size; None without masks."""
    masks = test.masks
    if masks is None:
        return None

    def pairs(chosen: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in chosen:
            if native:
                yield resize_map(maps[i], test.native_shape(i)), test.native_mask(i)
            else:
                yield maps[i], masks[i]

    return pairs


def resize_map(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map (h, w) resized bilinearly in float32; masks, in contrast, are never touched."""
    from PIL import Image

    height, width = shape
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _metrics(
    test: TestSplit,
    found: _Found,
    pairs: Pairs | None,
    chosen: Sequence[int],
    model: trained_model.Model,
    *,
    resamples: int | None = None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics of the chosen images, and bootstrap intervals of those that have them."""
    settings = model.config.eval
    resamples = settings.bootstrap_resamples if resamples is None else resamples
    index = np.asarray(chosen)
    labels = test.labels[index]
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for kind, scores in found.scores.items():
        values[f"image_auroc_{kind}"] = metrics.auroc(scores[index], labels)
        values[f"image_ap_{kind}"] = metrics.average_precision(scores[index], labels)
        values[f"image_f1_max_{kind}"] = metrics.f1_max(scores[index], labels).value
        if resamples:
            drawn = bootstrap.bootstrap_images(
                scores[index], labels, resamples=resamples, seed=settings.bootstrap_seed
            )
            intervals[f"image_auroc_{kind}"] = [drawn.auroc.low, drawn.auroc.high]
            ap = drawn.average_precision
            intervals[f"image_ap_{kind}"] = [ap.low, ap.high]
    names = ("pixel_auroc", "pixel_ap", "pixel_aupro", "pixel_f1_max", "pixel_aupimo")
    values |= dict.fromkeys(names, math.nan)
    if pairs is not None:
        limit = settings.aupro_limit
        pixels = metrics.pixel_metrics(pairs(chosen), limit=limit)
        maps, masks = zip(*pairs(chosen), strict=True)
        aupimo = metrics.aupimo(maps, masks).mean
        found_values = (pixels.auroc, pixels.average_precision, pixels.aupro, pixels.f1.value)
        values |= dict(zip(names, (*found_values, aupimo), strict=True))
        if resamples:
            drawn = bootstrap.bootstrap_pixels(
                pairs(chosen), limit=limit, resamples=resamples, seed=settings.bootstrap_seed
            )
            for name, one in zip(names, drawn, strict=False):
                intervals[name] = [one.low, one.high]
    return values, intervals


def _decisions(called: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What the threshold does on the test images; reported, never used to choose it."""

    def rate(which: np.ndarray) -> float:
        return float(called[which].mean()) if which.any() else math.nan

    return {"test_false_positive_rate": rate(~labels), "test_true_positive_rate": rate(labels)}


def _rows(
    test: TestSplit, found: _Found, limits: detection.Thresholds, kind: str
) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "type": test.types[i],
            "label": int(test.labels[i]),
            **{f"score_{k}": float(scores[i]) for k, scores in found.scores.items()},
            "defective": int(found.scores[kind][i] > limits.score),
        }
        for i, name in enumerate(test.names)
    ]


def _category(model: trained_model.Model) -> str:
    data = model.config.data
    return data.category.rpartition("/")[2] or Path(data.root).name or data.source


def _map_paths(directory: Path, names: Sequence[str]) -> list[Path]:
    """Where the official script looks for the maps: the image's name with the ending .tiff."""
    paths = [(directory / "test" / name).with_suffix(".tiff") for name in names]
    owners: dict[Path, str] = {}
    for path, name in zip(paths, names, strict=True):
        if path in owners:
            raise BadInput(f"{owners[path]}, {name}: the map of both would be {path}")
        owners[path] = name
    return paths


def _write_maps(paths: Sequence[Path], test: TestSplit, maps: Sequence[np.ndarray]) -> None:
    import tifffile

    for i, path in enumerate(paths):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, resize_map(maps[i], test.native_shape(i)))
        files.write_atomically(path, buffer.getvalue())


def _report(
    model: trained_model.Model,
    test: TestSplit,
    found: _Found,
    limits: detection.Thresholds,
    record: dict[str, Any],
) -> html.Report:
    settings = model.config.eval
    scores = found.scores[settings.image_score]
    curve = metrics.image_metrics(scores, test.labels).curve
    names = [name for name in record if name.startswith(("image_", "pixel_"))]
    measures = {name: (record[name], *record["intervals"].get(name, ())) for name in names}

    def entry(i: int) -> html.ImageEntry:
        return html.ImageEntry(
            name=test.names[i],
            type=test.types[i],
            label=bool(test.labels[i]),
            score=float(scores[i]),
            scores={kind: float(values[i]) for kind, values in found.scores.items()},
            image=np.repeat(test.images[i], 3 // model.channels, axis=-1),
            reconstruction=found.reconstructions[i],
            map=found.maps[i],
            mask=None if test.masks is None else test.masks[i],
        )

    return html.Report(
        title=f"{_category(model)}: {len(test.names)} test images",
        metrics={k: v if len(v) == 3 else v[0] for k, v in measures.items()},
        per_type=[{"type": kind, **row} for kind, row in record["per_type"].items()],
        diagnostics=record.get("diagnostics", {}),
        provenance=record["provenance"],
        curves={
            "roc": (curve.false_positive_rate, curve.true_positive_rate),
            "precision_recall": (curve.true_positive_rate, curve.precision),
        },
        threshold=limits.score,
        score_kind=settings.image_score,
        images=map(entry, range(len(test.names))),
        threshold_source=(
            f"The threshold is exceeded by {limits.false_positive_rate:.0%} of {limits.images} "
            "normal images held out of training; no test image had a part in it."
        ),
        notes=[
            f"Pixel metrics at {record['evaluated_at']['size']} size."
            if METHODS[model.config.method].pixels
            else f"The method {model.config.method} judges whole images: its maps are constant."
        ],
    )
