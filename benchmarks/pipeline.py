"""Times the input pipeline against the training step that consumes its batches.

    python benchmarks/pipeline.py [--images 200] [--png 512] [--size 128] [--batch 8] [--rounds 3]

A folder of generated PNG images and one of textures are opened as a run opens them.

Cold: the files are not in the system's memory (if it allows us to drop them), and no decoded
arrays are on disk. The time includes opening and one epoch of batches. Warm: the decoded arrays
are on disk. Opening, which still reads every file to check that it is unchanged, and the batches
are timed separately.

"step alone" repeats the step on one batch. "step fed by the pipeline" takes batches from the
pipeline and asks for the next one after each step; training asks while the device is busy.
"waiting" is the fraction of this loop's time in which no batch is on the device. The measurements
take turns; figures are medians over the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from data_pipelines.pipeline import batches
from pae_jax import train_step
from pae_jax.config import Config, from_config_dict
from pae_jax.workdir import provenance, run

Batches = Iterator[dict[str, np.ndarray]]


def write_images(folder: Path, count: int, side: int, seed: int) -> None:
    """Writes PNG files of smooth colours with a little noise, which compress like photographs."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-4, 5, smooth.shape, np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.png")


def forget(folder: Path) -> None:
    """Asks the system to drop the files from its memory."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*.png"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_batches(config: Config) -> tuple[Batches, int]:
    """Returns the batches of a run from step 0 on, and their number in an epoch."""
    data, textures = run.open_data(config)
    train, workers = config.train, config.data.num_threads
    stream = batches(
        data.images, textures.train, seed=0, batch_size=train.batch_size, num_threads=workers
    )
    return stream, -(-len(data.images) // train.batch_size)


def take(stream: Batches, count: int) -> None:
    """Takes `count` batches from the stream."""
    for _ in range(count):
        next(stream)


def seconds(call: Callable[[], Any]) -> float:
    """Returns the duration of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Copies a batch to the device and removes its leading axis of one step."""
    return {name: jax.device_put(value[0]) for name, value in batch.items()}


def loop(step: Callable[..., Any], state: Any, stream: Batches, count: int) -> float:
    """Takes `count` steps; returns the seconds spent waiting for batches."""
    key, waited = jax.random.key(0), 0.0
    for _ in range(count):
        start = time.perf_counter()
        batch = to_device(next(stream))
        waited += time.perf_counter() - start
        # Waits for the step, so that its time does not count as waiting for the next batch.
        state = jax.block_until_ready(step(state, batch, key))[0]
    return waited


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--textures", type=int, default=50)
    parser.add_argument("--png", type=int, default=512, help="side of the PNG images")
    parser.add_argument("--size", type=int, default=128, help="side at which they are trained on")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--steps", type=int, default=5, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(provenance.line("jax", "grain", "numpy", "pillow"))
    print(
        f"{options.images} PNG images of {options.png}² and {options.textures} textures, trained "
        f"at {options.size}², batch {options.batch}, widths {options.widths}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, value in measure(options, Path(folder)).items():
            print(f"{name:44s}{value:12.3f}")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Returns the figures of the table by their labels."""
    write_images(folder / "data/train/good", options.images, options.png, 0)
    write_images(folder / "textures", options.textures, options.png, 1)

    def configuration(cache: str) -> Config:
        return from_config_dict(
            {
                "data": {
                    "source": "folder",
                    "root": str(folder / "data"),
                    "textures": str(folder / "textures"),
                    "size": options.size,
                    "texture_size": options.size,
                    "cache_dir": str(folder / cache),
                },
                "model": {"widths": options.widths, "branch_width": options.widths[0]},
                "train": {"batch_size": options.batch},
            }
        )

    config = configuration("warm")
    stream, epoch = open_batches(config)
    key = jax.random.key(0)
    state = train_step.init_state(config, key)
    step = jax.jit(train_step.make_step(config))
    ready = to_device(next(stream))
    jax.block_until_ready(step(state, ready, key))

    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    for i in range(options.rounds):
        forget(folder)
        fresh = configuration(f"cold_{i}")
        note("cold", seconds(lambda fresh=fresh: take(open_batches(fresh)[0], epoch)) / epoch)
        start = time.perf_counter()
        stream, _ = open_batches(config)
        take(stream, 1)
        note("opening", time.perf_counter() - start)
        # A large number, because up to two batches per thread are prepared in advance.
        count = max(10 * epoch, 200)
        note("warm", seconds(lambda stream=stream, n=count: take(stream, n)) / count)
        steps = options.steps
        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(step(state, ready, key))
        note("step", (time.perf_counter() - start) / steps)
        stream, _ = open_batches(config)
        take(stream, 1)  # so that the threads have started
        start = time.perf_counter()
        waited = loop(step, state, stream, steps)
        took = time.perf_counter() - start
        note("loop", took / steps)
        note("waiting", waited / took)

    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {
        "cold: opening and one epoch, batches/s": 1 / medians["cold"],
        "warm: opening and the first batch, s": medians["opening"],
        "warm: batches/s": 1 / medians["warm"],
        "step alone: steps/s": 1 / medians["step"],
        "step fed by the pipeline: steps/s": 1 / medians["loop"],
        "waiting for batches, fraction of the time": medians["waiting"],
        "cold batches per step": medians["step"] / medians["cold"],
        "warm batches per step": medians["step"] / medians["warm"],
    }


if __name__ == "__main__":
    main()
