"""The model card: README.md of a packed model, in Markdown.

It states data and licence, split, metrics with intervals, the rule of the threshold and the limits.
This module collects what `model_card.md.jinja` lays out. What is not known is said to be so.
"""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from data_pipelines.errors import printable
from data_pipelines.items import GOOD
from pae_jax import unet
from pae_jax.config import Config, DataConfig
from pae_jax.detection import Thresholds
from pae_jax.methods import METHODS
from pae_jax.report import statements
from pae_jax.report.table import is_defined, metric_names, per_type_columns
from pae_jax.workdir.trained_model import Model

# Licences of the images by data.source, or by the data set of a TFDS category.
LICENCES = {
    "elpv": "CC BY-NC-SA 4.0 (ELPV, Buerhop-Lutz et al. 2018): no commercial use",
    "mvtec_ad": "CC BY-NC-SA 4.0 (MVTec AD, Bergmann et al. 2021): no commercial use",
    "visa": "CC BY 4.0 (VisA, Zou et al. 2022)",
    "procedural": "drawn by pae_jax; Apache-2.0",
}
UNKNOWN_LICENCE = "not known to pae_jax; state it here before you pass the model on"
_TEXTURES = {
    "builtin": "photographs of scikit-image and drawn patterns",
    "tfds": "Describable Textures Dataset (Cimpoi et al. 2014), for research",
}


def render(
    model: Model,
    data_record: Mapping[str, Any],
    thresholds: Thresholds,
    metrics: Mapping[str, Any] | None,
    origin: Mapping[str, Any],
) -> str:
    """Returns the text of the card.

    Args:
      model: the model.
      data_record: the content of data.json.
      thresholds: those of the model with its own settings.
      metrics: the content of metrics.json of its evaluation, or None.
      origin: `provenance.describe` of the model.
    """
    environment = jinja2.Environment(
        # The card is text, not HTML. The filter `cell` makes any name safe in a table.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    template = importlib.resources.files("pae_jax.deployment").joinpath("model_card.md.jinja")
    config = model.config
    text = environment.from_string(template.read_text("utf-8")).render(
        title=f"{config.method} on {_data_name(config.data)}",
        summary=_summary(config),
        model=_model(model),
        data=_data(config, data_record),
        metrics=None if metrics is None else _metrics(metrics),
        threshold=_threshold(config, thresholds, metrics),
        limits=_limits(model, thresholds),
        origin=_origin(origin),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def cell(value: Any) -> str:
    """Returns text that stays one cell of a Markdown table, whatever it contains."""
    text = printable(str(value))
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def licence(data: DataConfig) -> str:
    """Returns the licence of the images of a data set, as far as it is known."""
    name = data.category.partition("/")[0] if data.source == "tfds" else data.source
    return LICENCES.get(name, UNKNOWN_LICENCE)


def _data_name(data: DataConfig) -> str:
    # Not the folder's path, which says where one user has the images.
    root = re.split(r"[/\\]", data.root.rstrip("/\\"))[-1]
    return data.category or (root if data.source in ("folder", "list") else "") or data.source


def _summary(config: Config) -> str:
    text = "It gives each image a score"
    if METHODS[config.method].localises:
        text += " and each pixel an anomaly value"
    return (
        f"{text}; larger values are more anomalous. It was trained on normal images only, with "
        "[pae_jax](https://arxiv.org/abs/2606.15280). This folder takes the place of a workdir:"
    )


def _model(model: Model) -> list[tuple[str, Any]]:
    config = model.config
    height, width = config.data.shape
    colour = "grey" if model.channels == 1 else "RGB"
    settings = config.eval
    rows = [
        ("method", config.method),
        ("image size", f"{height} × {width}, {colour}, 8 bits; others are resized"),
        ("parameters", f"{unet.parameter_count(model.params):,}, float32"),
        ("updates", f"{model.step:,}, seed {config.train.seed}"),
        (
            "anomaly map",
            f"{settings.anomaly_map}, f applied: {settings.apply}, smoothing: "
            f"{settings.smoothing} over {settings.smoothing_fraction:.3g} of the side",
        ),
    ]
    if model.calibration is not None:
        rows.append(
            (
                "calibration",
                "the map is in standard deviations of the held-out normal images"
                + (
                    " at each position, so that images have to be aligned as those are"
                    if settings.calibration == "position"
                    else ""
                ),
            )
        )
    if config.optimizer.ema_decay:
        rows.append(("average", f"parameters averaged with decay {config.optimizer.ema_decay:g}"))
    if model.value_range:
        low, high = model.value_range
        rows.append(("more than 8 bits", f"values {low:g} to {high:g} become 0 to 255"))
    return rows


def _data(config: Config, record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data = config.data
    held_out = len(record["held_out_names"])
    textures = record.get("textures", {})
    return [
        ("images", f"{_data_name(data)}, source {data.source}"),
        ("licence", licence(data)),
        (
            "split",
            f"{record['training_images']} normal images for training; {held_out} held out, "
            f"{data.holdout_fraction:.3g} were asked for, by the rule {data.holdout_groups}; test "
            "images are separate",
        ),
        ("augmentation", data.augmentation),
        (
            "corruptions",
            f"kind {config.corruption.kind}; {sum(textures.values())} textures: "
            f"{_TEXTURES.get(data.textures.partition(':')[0], 'a folder of the user')}",
        ),
    ]


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rows of both tables, without metrics that are undefined for the data."""
    rows = []
    for name in metric_names(record):
        if is_defined(record[name]):
            ends = record["intervals"].get(name, [None])
            defined = all(map(is_defined, ends))
            interval = f"[{', '.join(f'{end:.3f}' for end in ends)}]" if defined else "–"
            rows.append((name, f"{record[name]:.4f}", interval))
    per_type = record["per_type"]
    columns = per_type_columns(per_type)
    types = [
        (name, row["images"], [f"{row[n]:.4f}" if is_defined(row.get(n)) else "–" for n in columns])
        for name, row in per_type.items()
    ]
    images = record["images"]
    defective = sum(images.values()) - images[GOOD]
    resamples = record["provenance"]["config"]["eval"]["bootstrap_resamples"]
    return {
        "images": f"{images[GOOD]} good and {defective} defective test images",
        "note": statements.intervals(resamples, images[GOOD], defective) if resamples else "",
        "rows": rows,
        "columns": columns,
        "types": types,
    }


def _threshold(
    config: Config, thresholds: Thresholds, metrics: Mapping[str, Any] | None
) -> list[str]:
    lines = [
        f"An image is called defective if its score `{config.eval.image_score}` exceeds "
        f"{thresholds.score:.6g}; a pixel is marked if the map exceeds {thresholds.pixel:.6g}.",
        statements.threshold(
            thresholds.images,
            thresholds.false_positive_rate,
            calibrated=config.eval.calibration != "none",
        ),
        "No test image was used for it.",
    ]
    if metrics is not None:
        good = metrics["images"][GOOD]
        defective = sum(metrics["images"].values()) - good
        for name, count, truth in (
            ("test_false_positive_rate", good, "good"),
            ("test_true_positive_rate", defective, "defective"),
        ):
            rate = metrics["threshold"][name]
            if count and is_defined(rate):
                lines.append(f"It was exceeded by {round(rate * count)} of {count} {truth} images.")
    return lines


def _limits(model: Model, thresholds: Thresholds) -> list[str]:
    config = model.config
    height, width = config.data.shape
    noun = "image" if thresholds.images == 1 else "images"
    lines = [
        "It knows one class of images, as they were recorded for training. Another product, "
        "camera, lighting, crop or compression is anomalous to it, or makes scores meaningless.",
        f"Images are resized to {height} × {width}. A defect that vanishes there is not found.",
        "Logical anomalies, such as a missing or misplaced part, need not be found.",
        f"The threshold rests on {thresholds.images} held-out normal {noun}. Choose it anew from "
        "images of your own process before you rely on it.",
        "Scores are no probabilities, and scores of different models cannot be compared.",
        "Another processor or version of JAX rounds differently, by about 1e-6 of the map's range "
        "on a CPU; GPUs and TPUs round products to fewer bits.",
    ]
    if not METHODS[config.method].localises:
        lines.insert(2, f"The method {config.method} scores whole images: its maps are constant.")
    return lines


def _origin(origin: Mapping[str, Any]) -> str:
    versions: Mapping[str, Any] = origin["versions"]
    names: Sequence[str] = ("pae_jax", "jax", "flax")
    listed = ", ".join(f"{name} {versions[name] or 'unknown'}" for name in names)
    return (
        f"Packed by {listed}; commit {origin['commit'] or 'unknown'}; configuration "
        f"{origin['config_hash']}."
    )
