"""Images judged in a second: the network and its map alone, and `pae predict` on a folder.

    python benchmarks/predict.py [--size 128] [--widths 32 64 128] [--images 64] [--png 512]
                                 [--batches 1 2 4 8 16] [--rounds 3]

Without files: `pae_jax.predict.detect`, compiled, on a batch of stored images that lies on the
device; network, SSIM map, smoothing and scores. With files: `pae_jax.predict.predict`, which
reads and decodes PNG images and writes scores, heat maps and masks, at batch 1 and at the batch
that was best without files. Each call begins with reading the checkpoint and the compiled program
from disk; the time of an image is therefore the difference between folders of all and of a
quarter of the images, and the start what remains. The model has taken one step: its weights do
not matter here. All of it takes turns; medians over the rounds, a warm-up left out.
"""

import argparse
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pipeline import write_images

from pae_jax import detection, predict, train
from pae_jax.config import from_config_dict
from pae_jax.devices import process
from pae_jax.workdir import provenance, trained_model


def make_model(options: argparse.Namespace, folder: Path) -> Path:
    """The workdir of a run of one step on the folder's images."""
    config = from_config_dict(
        {
            "data": {
                "source": "folder",
                "root": str(folder / "data"),
                "textures": str(folder / "data/train/good"),
                "size": options.size,
                "texture_size": options.size,
                "cache": str(folder / "cache"),
            },
            "model": {"widths": options.widths, "branch_width": options.widths[0]},
            "train": {
                "steps": 1,
                "batch_size": 1,
                "validation_examples": 1,
                "tensorboard": False,
            },
            "sharding": {"data_parallel": 1},
        }
    )
    train.train_and_evaluate(config, folder / "run")
    return folder / "run"


def turns(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each call; they take turns, and the first round does not count."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def without_files(workdir: Path, options: argparse.Namespace) -> dict[int, float]:
    """Seconds of an image by batch size."""
    model = trained_model.load(workdir)
    run = jax.jit(functools.partial(detection.detect, config=model.config))
    rng = np.random.default_rng(0)

    def call(count: int) -> Callable[[], Any]:
        shape = (count, *model.config.data.shape, model.channels)
        images = jax.device_put(rng.integers(0, 256, shape, np.uint8))
        # As many images a turn for every batch size.
        repeats = -(-max(options.batches) // count)
        return lambda: [jax.block_until_ready(run(model.params, images)) for _ in range(repeats)]

    found = turns({count: call(count) for count in options.batches}, options.rounds)
    return {n: value / (n * -(-max(options.batches) // n)) for n, value in found.items()}


def with_files(
    workdir: Path, folders: dict[int, Path], batches: list[int], rounds: int
) -> dict[tuple[int, int], float]:
    """Seconds of a call by batch size and number of images."""
    out = workdir.parent / "out"

    def call(batch: int, images: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        predict.predict(workdir, images, out, overrides=[f"--config.eval.batch_size={batch}"])

    # One batch size after the other: the workdir keeps the thresholds of one at a time.
    found: dict[tuple[int, int], float] = {}
    for batch in batches:
        calls = {
            (batch, count): functools.partial(call, batch, path) for count, path in folders.items()
        }
        found |= turns(calls, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--images", type=int, default=64, help="at least four")
    parser.add_argument("--png", type=int, default=512, help="side of the PNG images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.images < 4:
        parser.error("--images: at least four")
    print(provenance.line("jax", "numpy", "pillow"))
    print(f"{options.size}², widths {options.widths}; PNG images of {options.png}²\n", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PAE_CACHE"] = str(folder / "cache")
        process.use_cache()  # as the command does
        write_images(folder / "data/train/good", options.images, options.png, 0)
        part = folder / "part"
        part.mkdir()
        images = sorted((folder / "data/train/good").iterdir())
        for path in images[: options.images // 4]:
            shutil.copy(path, part)
        workdir = make_model(options, folder)

        print("| without files: batch | images/s | ms/image |\n| ---: | ---: | ---: |")
        alone = without_files(workdir, options)
        for count, each in alone.items():
            print(f"| {count} | {1 / each:.1f} | {1e3 * each:.1f} |", flush=True)
        best = min(alone, key=alone.__getitem__)

        few, many = options.images // 4, options.images
        folders = {few: part, many: folder / "data/train/good"}
        chosen = sorted({options.batches[0], best})
        found = with_files(workdir, folders, chosen, options.rounds)
        print(f"\n| with files: batch | images/s | ms/image | start, s | {many} images, s |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        for count in chosen:
            whole = found[count, many]
            each = (whole - found[count, few]) / (many - few)
            start = whole - many * each
            print(f"| {count} | {1 / each:.1f} | {1e3 * each:.1f} | {start:.2f} | {whole:.2f} |")


if __name__ == "__main__":
    main()
