"""Does the projection overfit less than a segmentation network, as §3.3 of the paper says?

    python benchmarks/overfitting.py --config=configs/elpv.py --workdir=W [--config.KEY=VALUE …]
        [--images=64] [--steps=4000] [--points 125 250 500 1000 2000 4000]

Two runs of one config, in W/projection and W/segmentation, differ in `method` alone: same images,
corruptions, network, steps and learning rate. The rate is constant, whatever the config says, so
that the model at every point is what a run of so many steps would have given. They train on
--images of the training images (0: on all), since few are learned by heart sooner. Repeated, the
command goes on where it was. At every point the checkpoint is read back and judged on

    training   training images under training textures
    held_out   held-out images under held-out textures
    unseen     held-out images under another kind of corruption, cutpaste
    real       the test split with its real defects

The first three are `train.validation_examples` fixed examples each. Masks and cuts of textures are
fresh in all of them; held-out textures are of other families than training textures and may be
harder or easier to find, so it is the course of a gap that tells of overfitting, not the gap.

    pixel_ap           average precision of the map: against M > 0.1, or the masks of the defects
    loss               eq. 1, or cross-entropy + Dice: not to be compared between the methods
    image_auroc_SCORE  by sum, max and topk of the map
    bias               of the projection: root mean square of f(x) − x on uncorrupted images

Nothing is chosen here, neither a step nor a threshold or a setting: test images are read for the
curve alone. W/overfitting.json, .md and .png hold the numbers, the tables and the curves.
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
from pae_jax.corruption import CorruptedBatch
from pae_jax.detection import REPORTED_SCORES
from pae_jax.devices import process
from pae_jax.workdir import checkpoint, files, provenance, record, run, trained_model, validation

COLOURS = {"projection": "tab:blue", "segmentation": "tab:orange"}  # the two methods
STYLES = {"training": "-", "held_out": "--", "unseen": ":", "real": "-."}
UNSEEN = "cutpaste"
QUANTITIES = {
    "pixel_ap": ("training", "held_out", "unseen", "real"),
    "loss": ("training", "held_out", "unseen"),
    "bias": ("training", "held_out"),
    **{f"image_auroc_{kind}": ("real",) for kind in REPORTED_SCORES},
}
Row = dict[str, Any]  # "method", "step", and QUANTITY_SET: a number, NaN where undefined


class Unfinished(Exception):
    """A run came to no end."""


class Data(NamedTuple):
    """What the models are judged on, and how much there is of it."""

    examples: dict[str, list[CorruptedBatch]]
    test: TestSplit
    channels: int
    counts: dict[str, int]


def configurations(
    config_file: str, overrides: Sequence[str], images: int, steps: int, points: Sequence[int]
) -> dict[str, Config]:
    """The config of each method.

    Raises:
      BadInput: one line that names the option or the key.
    """
    first = points[0]
    if first < 1 or list(points) != sorted({*points}) or points[-1] > steps:
        raise BadInput(f"--points: ascending, from 1 to --steps={steps}, not {listed(points)}")
    if any(point % first for point in points):
        raise BadInput(f"--points: multiples of the first one, not {listed(points)}")
    own = {
        "data.max_images": images,
        "optimizer.schedule": "constant",
        "train.steps": steps,
        "train.checkpoint_every": first,
        # All of them: a run that is interrupted saves there too, and no point may go for that.
        "train.keep_checkpoints": steps,
    }
    for word in overrides:
        key = word.removeprefix("--config.").partition("=")[0]
        if key in (*own, "method"):
            raise BadInput(f"{key}: set by the experiment; see --images, --steps and --points")
    configs = {}
    for method in COLOURS:
        values = {**own, "method": method}
        words = [f"--config.{key}={value}" for key, value in values.items()]
        configs[method] = load(config_file, [*overrides, *words])
        methods.check(configs[method])
        if configs[method].corruption.kind == UNSEEN:
            raise BadInput(f"corruption.kind: {UNSEEN} is the kind that must not be trained on")
    return configs


def open_everything(config: Config) -> Data:
    """The fixed examples and the test split; the same for both methods."""
    split, textures = run.open_data(config)
    other = dataclasses.replace(config.corruption, kind=UNSEEN)
    examples = {
        "training": validation.fixed_examples(split.images, textures.train, config),
        "held_out": validation.fixed_examples(split.held_out, textures.held_out, config),
        "unseen": validation.fixed_examples(
            split.held_out, textures.held_out, dataclasses.replace(config, corruption=other)
        ),
    }
    test = open_test(config.data.spec, channels=split.channels)
    counts = {
        "training_images": len(split.images),
        "held_out_images": len(split.held_out),
        "test_images": len(test.names),
        "test_defects": int(test.labels.sum()),
        "examples": sum(len(batch.mask) for batch in examples["training"]),
    }
    return Data(examples, test, split.channels, counts)


def judge(workdir: Path, config: Config, points: Sequence[int], data: Data) -> list[Row]:
    """A row a point, of the run in `workdir`."""
    measure = validation.make_measure(config)
    rows = []
    for point in points:
        step, state = trained_model.restore(workdir, config, until=point)
        if step != point:
            raise BadInput(f"{workdir}: the checkpoint of step {point} is gone or unreadable")
        model = trained_model.Model(config, state.eval_params, step, data.channels)
        found = {name: measure(model.params, batches)[0] for name, batches in data.examples.items()}
        found["real"] = judge_real(model, data.test)
        row: Row = {"method": config.method, "step": step}
        for quantity, sets in QUANTITIES.items():
            row |= {f"{quantity}_{name}": found[name].get(quantity, math.nan) for name in sets}
        rows.append(row)
        print(f"{config.method}: step {step} judged", flush=True)
    return rows


def judge_real(model: trained_model.Model, test: TestSplit) -> dict[str, float]:
    """At the network's size, as `pae evaluate` has it by default."""
    found = list(detection.detect_all(model.params, test.images, model.config))
    values = {
        f"image_auroc_{kind}": metrics.auroc(
            np.array([one.scores[kind] for one in found]), test.labels
        )
        for kind in REPORTED_SCORES
    }
    if test.masks is not None:
        maps = np.stack([one.map for one in found])
        values["pixel_ap"] = metrics.average_precision(maps, test.masks)
    return values


def columns(rows: Sequence[Row], quantity: str) -> list[str]:
    """The sets for which some row has a number."""
    sets = QUANTITIES[quantity]
    return [s for s in sets if any(math.isfinite(row[f"{quantity}_{s}"]) for row in rows)]


def tables(rows: Sequence[Row]) -> str:
    """A table a method, a line a point; in Markdown."""
    lines = []
    for method in COLOURS:
        chosen = [row for row in rows if row["method"] == method]
        names = [f"{q}_{name}" for q in QUANTITIES for name in columns(chosen, q)]
        header = " | ".join(name.replace("_", " ") for name in names)
        lines += [f"{method}:", "", f"| steps | {header} |", "| --- |" + " --- |" * len(names)]
        for row in chosen:
            cells = [f"{row[n]:.4g}" if math.isfinite(row[n]) else "–" for n in names]
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def picture(rows: Sequence[Row]) -> bytes:
    """PNG: a panel a quantity, over the steps; a panel each for the methods' losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    together = [(quantity, [*COLOURS]) for quantity in QUANTITIES if quantity != "loss"]
    panels = [(q, ms) for q, ms in together if columns(rows, q)]
    panels[1:1] = [("loss", [method]) for method in COLOURS]
    across, down = 4, -(-len(panels) // 4)
    figure = Figure(figsize=(14, 3.2 * down + 0.6), layout="constrained")
    lines: dict[tuple[str, str], Any] = {}
    steps = sorted({row["step"] for row in rows})
    for place, (quantity, shown) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place)
        for method in shown:
            chosen = [row for row in rows if row["method"] == method]
            for name in columns(chosen, quantity):
                values = [row[f"{quantity}_{name}"] for row in chosen]
                style = f"o{STYLES[name]}"
                (line,) = axes.plot(steps, values, style, color=COLOURS[method], markersize=3)
                lines.setdefault((method, name), line)
        axes.set_xscale("log")
        axes.set_xticks(steps, map(str, steps))
        axes.minorticks_off()
        axes.set_title(quantity.replace("_", " ") + (f", {shown[0]}" if len(shown) == 1 else ""))
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
    order = [(method, name) for method in COLOURS for name in STYLES if (method, name) in lines]
    labels = [f"{method}, {name.replace('_', '-')}" for method, name in order]
    figure.legend([lines[key] for key in order], labels, loc="outside lower center", ncols=4)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def without_folders(text: str) -> str:
    """Absolute paths in a word or a value, cut down to their last part."""
    return re.sub(r"(?<![^=:])[/~](.*/)?(?=[^/])", "", text)


def write(
    workdir: Path, command: str, config: Config, counts: Mapping[str, int], rows: Sequence[Row]
) -> str:
    """The three files; returns the text of overfitting.md."""
    values = config.to_dict()
    del values["method"]
    for key in ("root", "textures", "cache"):
        values["data"][key] = without_folders(values["data"][key])
    source = provenance.line("jax", "flax", "optax", "numpy")
    record = {"provenance": source, "config": values, "counts": counts, "unseen": UNSEEN}
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    text = "\n".join(
        (
            "# Overfitting: projection and segmentation",
            "",
            f"{source}",
            "",
            f"{told}; constant learning rate {config.optimizer.learning_rate:g}; the kind of "
            f"corruption trained on: {config.corruption.kind}, unseen: {UNSEEN}. What the columns "
            "are stands in benchmarks/overfitting.py. Again:",
            "",
            f"    {command}",
            "",
            tables(rows),
            "![](overfitting.png)",
            "",
        )
    )
    files.write_json(workdir / "overfitting.json", {**record, "rows": rows})
    files.write_atomically(workdir / "overfitting.md", text)
    files.write_atomically(workdir / "overfitting.png", picture(rows))
    return text


def listed(points: Sequence[int]) -> str:
    return " ".join(map(str, points))


def experiment(options: argparse.Namespace, overrides: Sequence[str]) -> str:
    """All of it; returns the text of overfitting.md.

    Raises:
      BadInput: one line that names the option, key, file or folder, before any work starts.
      Unfinished: a run diverged or was stopped.
    """
    steps = options.steps
    if options.points is None and steps % 32:
        raise BadInput(f"--points: name them, where 32 does not divide --steps={steps}")
    points = options.points or [steps // 32 * 2**i for i in range(6)]
    configs = configurations(options.config, overrides, options.images, steps, points)
    for method, config in configs.items():
        record.check_workdir(options.workdir / method, config)
    config = next(iter(configs.values()))
    data = open_everything(config)
    for method, one in configs.items():
        print(f"{method}: training", flush=True)
        result = train.train_and_evaluate(one, options.workdir / method)
        if result.outcome != train.FINISHED:
            raise Unfinished(f"{method}: {result.outcome} at step {result.step}")
    rows = []
    for method, one in configs.items():
        rows += judge(options.workdir / method, one, points, data)
    words = [f"--config={options.config}", "--workdir=W", *overrides]
    words += [f"--images={options.images}", f"--steps={steps}", "--points", *map(str, points)]
    command = f"python benchmarks/overfitting.py {shlex.join(map(without_folders, words))}"
    return write(options.workdir, command, config, data.counts, rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/X.py[:arg]; see pae train")
    parser.add_argument("--workdir", required=True, type=Path, help="holds the runs and results")
    parser.add_argument("--images", type=int, default=64, help="training images; 0: all")
    parser.add_argument("--steps", type=int, default=4000)
    points = "steps at which to judge, multiples of the first; by default six, doubling to --steps"
    parser.add_argument("--points", type=int, nargs="+", help=points)
    options, overrides = parser.parse_known_args()
    process.start()
    checkpoint.silence_background_errors()
    try:
        print(experiment(options, overrides))
    except (BadInput, CannotWrite, Unfinished) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
