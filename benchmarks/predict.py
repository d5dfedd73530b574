"""Times prediction: the compiled detection alone, and `pae predict` on a folder of images.

    python benchmarks/predict.py [--size 128] [--widths 32 64 128] [--images 64] [--png 512]
                                 [--batches 1 2 4 8 16] [--rounds 3]

Without files: `detection.detect`, compiled, on a batch of stored images on the device. It includes
network, SSIM map, smoothing and scores. With files: `predict.predict`, which reads and decodes PNG
images and writes scores, heat maps and masks, with batch size 1 and with the best batch size
without files. Each call begins with reading the checkpoint and the compiled program from disk.
The time per image is therefore the difference between a folder of all images and one of a quarter
of them, and "start" is the remaining time.

The model has been trained for one step, because its weights do not affect the time. The
measurements take turns; figures are medians over the rounds after a warm-up round.
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
    """Trains a run of one step on the folder's images; returns its workdir."""
    config = from_config_dict(
        {
            "data": {
                "source": "folder",
                "root": str(folder / "data"),
                "textures": str(folder / "data/train/good"),
                "size": options.size,
                "texture_size": options.size,
                "cache_dir": str(folder / "cache"),
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
    """Returns the median seconds of each call; the calls take turns after a warm-up round."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def without_files(workdir: Path, options: argparse.Namespace) -> dict[int, float]:
    """Returns the seconds per image by batch size."""
    model = trained_model.load(workdir)
    detect = jax.jit(functools.partial(detection.detect, config=model.config))
    rng = np.random.default_rng(0)

    def call(count: int) -> Callable[[], Any]:
        shape = (count, *model.config.data.shape, model.channels)
        images = jax.device_put(rng.integers(0, 256, shape, np.uint8))
        return lambda: [
            jax.block_until_ready(detect(model.detector, images)) for _ in range(repeats[count])
        ]

    # Every batch size gets about the same number of images per turn.
    repeats = {count: -(-max(options.batches) // count) for count in options.batches}
    seconds = turns({count: call(count) for count in options.batches}, options.rounds)
    return {count: value / (count * repeats[count]) for count, value in seconds.items()}


def with_files(
    workdir: Path, folders: dict[int, Path], batches: list[int], rounds: int
) -> dict[tuple[int, int], float]:
    """Returns the seconds per call by batch size and number of images."""
    out = workdir.parent / "out"

    def call(batch: int, images: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        predict.predict(workdir, images, out, overrides=[f"--config.eval.batch_size={batch}"])

    # One batch size after the other.
    seconds: dict[tuple[int, int], float] = {}
    for batch in batches:
        calls = {
            (batch, count): functools.partial(call, batch, path) for count, path in folders.items()
        }
        seconds |= turns(calls, rounds)
    return seconds


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
        process.use_compilation_cache()  # as the command `pae` does
        write_images(folder / "data/train/good", options.images, options.png, 0)
        part = folder / "part"
        part.mkdir()
        images = sorted((folder / "data/train/good").iterdir())
        for path in images[: options.images // 4]:
            shutil.copy(path, part)
        workdir = make_model(options, folder)

        print("| without files: batch | images/s | ms/image |\n| ---: | ---: | ---: |")
        alone = without_files(workdir, options)
        for count, per_image in alone.items():
            print(f"| {count} | {1 / per_image:.1f} | {1e3 * per_image:.1f} |", flush=True)
        best = min(alone, key=alone.__getitem__)

        few, many = options.images // 4, options.images
        folders = {few: part, many: folder / "data/train/good"}
        sizes = sorted({options.batches[0], best})
        seconds = with_files(workdir, folders, sizes, options.rounds)
        print(f"\n| with files: batch | images/s | ms/image | start, s | {many} images, s |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        for count in sizes:
            total = seconds[count, many]
            per_image = (total - seconds[count, few]) / (many - few)
            start = total - many * per_image
            print(
                f"| {count} | {1 / per_image:.1f} | {1e3 * per_image:.1f} | {start:.2f} "
                f"| {total:.2f} |"
            )


if __name__ == "__main__":
    main()
