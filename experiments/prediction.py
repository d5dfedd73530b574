"""Measures the memory and the speed of `pae predict` by the number of images.

    python -m experiments.prediction [--images 2000 20000] [--size 256] [--widths 32 64 128]
                                     [--workdir=RUN] [--folder=DIR]

Draws the images once, of the size of the network, and trains a network for one step on some of
them, because its weights affect neither memory nor time; `--workdir` takes a trained run instead.
Each number of images is then predicted by a process of its own, which reads the first so many
images by a list. Printed are

- the peak memory of that process (VmHWM), which should not grow with the number;
- images/s, from the start of the stream to its end, without loading and compiling;
- the idle share of the host: the part of its CPU time that the process did not use meanwhile. On a
  machine without accelerator the network computes on the CPU, too.

Exit code 1 if the peak of the largest number exceeds that of the smallest by more than a tenth.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from experiments import small_runs

# How much the peak may grow, because allocators never return all memory.
GROWTH = 1.1


def draw(folder: Path, images: int, size: int) -> None:
    """Draws smooth images with a bright spot in some, if they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        path = folder / f"{i:06d}.png"
        if path.exists():
            continue
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(60, 200, (6, 6, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((size, size), Image.Resampling.BICUBIC))
        if i % 5 == 0:
            top, left = rng.integers(0, size - size // 8, 2)
            pixels[top : top + size // 8, left : left + size // 8] = 255
        partial = path.with_name(f".{path.name}.partial")
        Image.fromarray(pixels).save(partial, "png")
        partial.replace(path)


def train(images: Path, size: int, widths: list[int], folder: Path) -> Path:
    """Trains a run of one step on 40 of the images; returns its workdir."""
    from pae_jax import config_file, train

    good = folder / "data/train/good"
    good.mkdir(parents=True, exist_ok=True)
    for path in sorted(images.glob("*.png"))[:40]:
        with contextlib.suppress(FileExistsError):
            (good / path.name).symlink_to(path.resolve())
    settings = {
        "data.source": "folder",
        "data.root": folder / "data",
        "data.textures": good,
        "data.size": size,
        "data.texture_size": size,
        "data.cache_dir": folder / "cache",
        "model.widths": tuple(widths),
        "model.branch_width": widths[0],
        "train.steps": 1,
        "train.batch_size": 1,
        "train.validation_examples": 1,
        "train.tensorboard": False,
        "sharding.data_parallel": 1,
    }
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    train.train_and_evaluate(config_file.load("default", words), folder / "run")
    return folder / "run"


def measure(workdir: Path, images: Path, out: Path) -> str:
    """Predicts in this process; returns the cells of its row."""
    from pae_jax import predict
    from pae_jax.devices import process
    from pae_jax.inference.model import Model

    process.start()
    began: list[tuple[float, float]] = []
    start = Model.start

    def watched(model: Model, batch: np.ndarray, **options: bool) -> object:
        result = start(model, batch, **options)
        if not began:  # the first call has compiled the network
            began.append((time.perf_counter(), time.process_time()))
        return result

    Model.start = watched  # type: ignore[method-assign]
    predict.predict(workdir, images, out)
    wall, cpu = time.perf_counter() - began[0][0], time.process_time() - began[0][1]
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    count = len((out / "scores.csv").read_text().splitlines()) - 1
    cores = len(os.sched_getaffinity(0))
    idle = 1 - cpu / (wall * cores)
    return f"{count} {peak:.0f} {count / wall:.1f} {100 * idle:.0f}"


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--workdir", type=Path, help="a trained run")
    parser.add_argument("--folder", type=Path, help="where the drawn images stay")
    parser.add_argument("--worker", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(measure(*options.worker))
        return 0
    peaks = []
    with tempfile.TemporaryDirectory(prefix="pae_prediction_") as name:
        folder = (options.folder or Path(name)).absolute()
        images = folder / f"images_{options.size}"
        draw(images, max(options.images), options.size)
        workdir = options.workdir or train(images, options.size, options.widths, Path(name))
        print("| images | peak memory, MiB | images/s | host idle |\n| ---: | ---: | ---: | ---: |")
        for count in options.images:
            listed = images / f"first_{count}.txt"
            listed.write_text("".join(f"{i:06d}.png\n" for i in range(count)))
            process = subprocess.run(
                [
                    *(sys.executable, "-m", "experiments.prediction", "--worker"),
                    *map(str, (workdir.absolute(), listed, Path(name) / f"out_{count}")),
                ],
                cwd=small_runs.ROOT,
                env=os.environ | {"PAE_CACHE": str(Path(name) / "cache")},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            done, peak, speed, idle = process.stdout.split()[-4:]
            peaks.append(float(peak))
            print(f"| {done} | {peak} | {speed} | {idle} % |", flush=True)
    return 1 if peaks[-1] > GROWTH * peaks[0] else 0


if __name__ == "__main__":
    sys.exit(main())
