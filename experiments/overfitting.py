"""Compares the overfitting of the projection with that of a segmentation network (§3.3).

    python experiments/overfitting.py --config=configs/elpv.py --workdir=W [--config.KEY=VALUE …]
        [--images=64] [--steps=4000] [--points 125 250 500 1000 2000 4000]

Two runs, in W/projection and W/segmentation, have the same images, corruptions, network, steps
and learning rate; only `method` differs. The learning rate is constant, whatever the config says,
so that the model at every point equals the result of a run of that length. The runs train on
--images of the training images (0: on all), because overfitting appears sooner on few images. An
interrupted experiment continues when it is started again. At every point the checkpoint is read
and evaluated on four sets:

    training   training images with training textures
    held_out   held-out images with held-out textures
    unseen     held-out images with another kind of corruption, cutpaste
    real       the test split with its real defects

The first three have `train.validation_examples` fixed examples each. None of their masks and
texture crops was used in training. Held-out textures belong to other families than training
textures and may be easier or harder to detect. Therefore the change of a gap over the steps shows
overfitting, and the gap itself does not.

    pixel_ap           average precision of the map, against M > 0.1 or the masks of the defects
    loss               eq. 1, or cross-entropy + Dice; not comparable between the methods
    image_auroc_SCORE  by the scores sum, max and topk
    on_manifold_bias   for the projection: root mean square of f(x) − x on uncorrupted images

No step, threshold or setting is selected here, so test images serve for the curves only. The
results are W/overfitting.json, .md and .png: numbers, tables and curves.
"""

import argparse
import dataclasses
import io
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.dataset import TestSplit, open_test
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax import detection, methods, metrics, train
from pae_jax.config import Config
from pae_jax.config_file import load
from pae_jax.detection import REPORTED_SCORES
from pae_jax.devices import process
from pae_jax.workdir import checkpoint, files, provenance, record, run, trained_model, validation

COLOURS = {"projection": "tab:blue", "segmentation": "tab:orange"}  # by method
STYLES = {"training": "-", "held_out": "--", "unseen": ":", "real": "-."}
UNSEEN = "cutpaste"
QUANTITIES = {
    "pixel_ap": ("training", "held_out", "unseen", "real"),
    "loss": ("training", "held_out", "unseen"),
    "on_manifold_bias": ("training", "held_out"),
    **{f"image_auroc_{kind}": ("real",) for kind in REPORTED_SCORES},
}
# "method", "step" and, for each quantity and set, "QUANTITY_SET": a number, NaN if undefined.
Row = dict[str, Any]


class Unfinished(Exception):
    """A run that diverged or was stopped."""


class Data(NamedTuple):
    """The images on which the models are evaluated.

    Attributes:
      examples: the fixed corrupted examples by set, in batches.
      test: the test split.
      channels: the channels of the stored images.
      counts: the numbers of images by name.
    """

    examples: dict[str, validation.Examples]
    test: TestSplit
    channels: int
    counts: dict[str, int]


def configurations(
    config_file: str, overrides: Sequence[str], images: int, steps: int, points: Sequence[int]
) -> dict[str, Config]:
    """Returns the configuration of each method.

    Args:
      config_file: a config file, with an optional ":ARG".
      overrides: `--config.KEY=VALUE` for both methods.
      images: the number of training images; 0 for all.
      steps: the number of training steps.
      points: the steps at which the models are evaluated.

    Raises:
      BadInput: with one line that names the option or the key.
    """
    first = points[0]
    if first < 1 or list(points) != sorted({*points}) or points[-1] > steps:
        raise BadInput(f"--points: ascending, from 1 to --steps={steps}, not {listed(points)}")
    if any(point % first for point in points):
        raise BadInput(f"--points: multiples of the first one, not {listed(points)}")
    fixed = {
        "data.max_images": images,
        "optimizer.schedule": "constant",
        "train.steps": steps,
        "train.checkpoint_every": first,
        # All checkpoints are kept. Otherwise the one that an interrupted run saves in addition
        # would displace one of the points.
        "train.keep_checkpoints": steps,
    }
    for word in overrides:
        key = word.removeprefix("--config.").partition("=")[0]
        if key in (*fixed, "method"):
            raise BadInput(f"{key}: set by the experiment; see --images, --steps and --points")
    configs = {}
    for method in COLOURS:
        values = {**fixed, "method": method}
        words = [f"--config.{key}={value}" for key, value in values.items()]
        configs[method] = load(config_file, [*overrides, *words])
        methods.check(configs[method])
        if configs[method].corruption.kind == UNSEEN:
            raise BadInput(f"corruption.kind: {UNSEEN} is the unseen kind, so not for training")
    return configs


def open_everything(config: Config) -> Data:
    """Opens the fixed examples and the test split, which are the same for both methods."""
    split, textures = run.open_data(config)
    unseen = dataclasses.replace(config.corruption, kind=UNSEEN)
    examples = {
        "training": validation.fixed_examples(split.images, textures.train, config),
        "held_out": validation.fixed_examples(split.held_out, textures.held_out, config),
        "unseen": validation.fixed_examples(
            split.held_out, textures.held_out, dataclasses.replace(config, corruption=unseen)
        ),
    }
    test = open_test(config.data.spec, channels=split.channels, value_range=split.value_range)
    counts = {
        "training_images": len(split.images),
        "held_out_images": len(split.held_out),
        "test_images": len(test.names),
        "test_defects": int(test.labels.sum()),
        "examples": sum(len(batch.mask) for batch in examples["training"]),
    }
    return Data(examples, test, split.channels, counts)


def evaluate(workdir: Path, config: Config, points: Sequence[int], data: Data) -> list[Row]:
    """Evaluates the run in `workdir` at each point; returns one row per point."""
    measure = validation.make_measure(config)
    rows = []
    for point in points:
        step, state = trained_model.restore(workdir, config, until=point)
        if step != point:
            raise BadInput(f"{workdir}: the checkpoint of step {point} is gone or unreadable")
        model = trained_model.Model(config, state.eval_params, step, data.channels)
        values = {
            name: measure(model.params, batches)[0] for name, batches in data.examples.items()
        }
        values["real"] = evaluate_test(model, data.test)
        row: Row = {"method": config.method, "step": step}
        for quantity, sets in QUANTITIES.items():
            row |= {f"{quantity}_{name}": values[name].get(quantity, math.nan) for name in sets}
        rows.append(row)
        print(f"{config.method}: step {step} evaluated", flush=True)
    return rows


def evaluate_test(model: trained_model.Model, test: TestSplit) -> dict[str, float]:
    """Evaluates the test split at the network's size, which is the default of `pae evaluate`."""
    detections = list(detection.detect_all(model.detector, test.images, model.config))
    values = {
        f"image_auroc_{kind}": metrics.auroc(
            np.array([detection.scores[kind] for detection in detections]), test.labels
        )
        for kind in REPORTED_SCORES
    }
    if test.masks is not None:
        maps, known = np.stack([detection.map for detection in detections]), test.has_pixel_labels
        values["pixel_ap"] = metrics.average_precision(maps[known], test.masks[known])
    return values


def columns(rows: Sequence[Row], quantity: str) -> list[str]:
    """Returns the sets for which at least one row has a number."""
    return [
        name
        for name in QUANTITIES[quantity]
        if any(math.isfinite(row[f"{quantity}_{name}"]) for row in rows)
    ]


def tables(rows: Sequence[Row]) -> str:
    """Returns one Markdown table per method with one line per point."""
    lines = []
    for method in COLOURS:
        method_rows = [row for row in rows if row["method"] == method]
        names = [f"{q}_{name}" for q in QUANTITIES for name in columns(method_rows, q)]
        header = " | ".join(name.replace("_", " ") for name in names)
        lines += [f"{method}:", "", f"| steps | {header} |", "| --- |" + " --- |" * len(names)]
        for row in method_rows:
            cells = [f"{row[n]:.4g}" if math.isfinite(row[n]) else "–" for n in names]
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def chart(rows: Sequence[Row]) -> bytes:
    """Returns a PNG with one panel per quantity over the steps; each loss has its own panel."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    quantities = [name for name in QUANTITIES if name != "loss" and columns(rows, name)]
    panels = [(quantity, [*COLOURS]) for quantity in quantities]
    # The losses of the two methods are not comparable.
    panels[1:1] = [("loss", [method]) for method in COLOURS]
    column_count, row_count = 4, -(-len(panels) // 4)
    figure = Figure(figsize=(14, 3.2 * row_count + 0.6), layout="constrained")
    lines: dict[tuple[str, str], Any] = {}
    steps = sorted({row["step"] for row in rows})
    for index, (quantity, panel_methods) in enumerate(panels, 1):
        axes = figure.add_subplot(row_count, column_count, index)
        for method in panel_methods:
            method_rows = [row for row in rows if row["method"] == method]
            for name in columns(method_rows, quantity):
                values = [row[f"{quantity}_{name}"] for row in method_rows]
                style = f"o{STYLES[name]}"
                (line,) = axes.plot(steps, values, style, color=COLOURS[method], markersize=3)
                lines.setdefault((method, name), line)
        axes.set_xscale("log")
        axes.set_xticks(steps, map(str, steps))
        axes.minorticks_off()
        single = f", {panel_methods[0]}" if len(panel_methods) == 1 else ""
        axes.set_title(quantity.replace("_", " ") + single)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    order = [(method, name) for method in COLOURS for name in STYLES if (method, name) in lines]
    labels = [f"{method}, {name.replace('_', '-')}" for method, name in order]
    figure.legend([lines[key] for key in order], labels, loc="outside lower center", ncols=4)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def without_folders(text: str) -> str:
    """Shortens the absolute paths in a word or a value to their last part."""
    return re.sub(r"(?<![^=:])[/~](.*/)?(?=[^/])", "", text)


def write(
    workdir: Path, command: str, config: Config, counts: Mapping[str, int], rows: Sequence[Row]
) -> str:
    """Writes the three files; returns the text of overfitting.md."""
    values = config.to_dict()
    del values["method"]
    # The results are published, and the paths of a machine do not belong there.
    for key in ("root", "textures", "cache_dir"):
        values["data"][key] = without_folders(values["data"][key])
    source = provenance.line("jax", "flax", "optax", "numpy")
    settings = {"provenance": source, "config": values, "counts": counts, "unseen": UNSEEN}
    sizes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    text = "\n".join(
        (
            "# Overfitting: projection and segmentation",
            "",
            f"{source}",
            "",
            f"{sizes}; constant learning rate {config.optimizer.learning_rate:g}; kind of "
            f"corruption in training: {config.corruption.kind}, unseen: {UNSEEN}. The columns are "
            "described in experiments/overfitting.py. To repeat:",
            "",
            f"    {command}",
            "",
            tables(rows),
            "![](overfitting.png)",
            "",
        )
    )
    files.write_json(workdir / "overfitting.json", {**settings, "rows": rows})
    files.write_atomically(workdir / "overfitting.md", text)
    files.write_atomically(workdir / "overfitting.png", chart(rows))
    return text


def listed(points: Sequence[int]) -> str:
    """Formats points as they are given on the command line."""
    return " ".join(map(str, points))


def run_experiment(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """Trains and evaluates both methods and writes the results.

    Args:
      options: the options of the command line.
      overrides: `--config.KEY=VALUE` for both methods.

    Returns:
      The text of overfitting.md.

    Raises:
      BadInput: with one line that names the option, key, file or folder; no work has started.
      Unfinished: a run diverged or was stopped.
    """
    steps = options.steps
    if options.points is None and steps % 32:
        raise BadInput(f"--points: required, because 32 does not divide --steps={steps}")
    points = options.points or [steps // 32 * 2**i for i in range(6)]
    configs = configurations(options.config, overrides, options.images, steps, points)
    for method, config in configs.items():
        record.check_workdir(options.workdir / method, config)
    config = next(iter(configs.values()))
    data = open_everything(config)
    for method, method_config in configs.items():
        print(f"{method}: training", flush=True)
        result = train.train_and_evaluate(method_config, options.workdir / method)
        if result.outcome != train.FINISHED:
            raise Unfinished(f"{method}: {result.outcome} at step {result.step}")
    rows = []
    for method, method_config in configs.items():
        rows += evaluate(options.workdir / method, method_config, points, data)
    words = [f"--config={options.config}", "--workdir=W", *overrides]
    words += [f"--images={options.images}", f"--steps={steps}", "--points", *map(str, points)]
    command = f"python experiments/overfitting.py {shlex.join(map(without_folders, words))}"
    return write(options.workdir, command, config, data.counts, rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/X.py[:arg]; see pae train")
    parser.add_argument("--workdir", required=True, type=Path, help="holds the runs and results")
    parser.add_argument("--images", type=int, default=64, help="training images; 0: all")
    parser.add_argument("--steps", type=int, default=4000)
    points = "evaluate at these steps, multiples of the first; default: six, doubling to --steps"
    parser.add_argument("--points", type=int, nargs="+", help=points)
    options, overrides = parser.parse_known_args()
    process.start()
    checkpoint.silence_background_errors()
    try:
        print(run_experiment(options, overrides))
    except (BadInput, CannotWrite, Unfinished) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
