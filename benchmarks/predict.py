"""Times prediction in JAX and in PyTorch: detection alone, `pae predict`, and the first picture.

    python benchmarks/predict.py [--size 128] [--widths 32 64 128] [--images 64] [--png 512]
                                 [--batches 1 2 4 8 16] [--rounds 3]

Without files: `detection.detect`, compiled, on a batch of stored images on the device. It includes
network, SSIM map, smoothing and scores. With files: `predict.predict`, which reads and decodes PNG
images and writes scores, heat maps and masks, with batch size 1 and with the best batch size
without files. Each call begins with reading the checkpoint and the compiled program from disk.
The time per image is therefore the difference between a folder of all images and one of a quarter
of them, and "start" is the remaining time.

The first picture: `pae predict` of one picture in a new process, from its start to its end, with
an empty cache of compiled programs ("cold") and with the cache that this leaves ("warm").

PyTorch (the extra `bench`) runs the same network, map and scores eagerly, predict_torch.py, with
images in both memory layouts; the maps must agree before anything is timed. With files it takes
the place of JAX in `pae predict`, so that reading and writing are the same. Its first picture is a
process that loads network and weights from one file and imports no JAX. Without PyTorch, JAX is
timed alone.

The model has been trained for one step, because its weights do not affect the time. The
measurements take turns; figures are medians over the rounds after a warm-up round. On Linux the
memory of both sides is on huge pages, unless GLIBC_TUNABLES is set.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from pipeline import write_images

from pae_jax import detection, predict, train
from pae_jax.config import from_config_dict
from pae_jax.devices import process
from pae_jax.workdir import provenance, trained_model

LAYOUTS = ("contiguous", "channels_last")
# The largest difference of two maps, whose values lie in [0, 1].
TOLERANCE = 1e-3
Detect = Callable[[np.ndarray], detection.Detection]


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


def make_torch(model: trained_model.Model) -> dict[str, Any]:
    """Returns the detectors of PyTorch by name, after a comparison with ours; none without it."""
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed (the extra bench): JAX alone")
        return {}
    from predict_torch import make_detector

    detectors = {
        f"torch {layout}": make_detector(model.config, model.params, layout) for layout in LAYOUTS
    }
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *model.config.data.shape, model.channels), np.uint8)
    expected = jax.device_get(detection.detect(model.detector, jnp.asarray(images), model.config))
    for name, detector in detectors.items():
        found = by_torch(detector)(images)
        error = float(np.abs(found.map - expected.map).max())
        print(f"{name}: largest difference of the maps {error:.1e}")
        if error > TOLERANCE:
            sys.exit("the two detections differ; nothing was timed")
    return detectors


def by_torch(detector: Any) -> Detect:
    """Returns the detection of a batch in PyTorch, in the form of ours."""
    import torch  # pyright: ignore[reportMissingImports]

    def detect(images: np.ndarray) -> detection.Detection:
        with torch.inference_mode():
            maps, scores = detector(torch.from_numpy(images))
        values = {name: score.numpy() for name, score in scores.items()}
        return detection.Detection(None, maps.numpy(), values)

    return detect


def turns(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Returns the median seconds of each call; the calls take turns after a warm-up round."""
    times: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def without_files(
    model: trained_model.Model, detectors: dict[str, Any], options: argparse.Namespace
) -> dict[tuple[str, int], float]:
    """Returns the seconds per image by contestant and batch size."""
    compiled = jax.jit(functools.partial(detection.detect, config=model.config))
    rng = np.random.default_rng(0)

    def ours(images: np.ndarray) -> Any:
        return jax.block_until_ready(compiled(model.detector, images))

    contestants: dict[str, Callable[[Any], Any]] = {"jax": ours}
    contestants |= {name: by_torch(detector) for name, detector in detectors.items()}

    def call(detect: Callable[[Any], Any], count: int) -> Callable[[], Any]:
        shape = (count, *model.config.data.shape, model.channels)
        images = rng.integers(0, 256, shape, np.uint8)
        return lambda: [detect(images) for _ in range(repeats[count])]

    # Every batch size gets about the same number of images per turn.
    repeats = {count: -(-max(options.batches) // count) for count in options.batches}
    calls = {
        (name, count): call(detect, count)
        for count in options.batches
        for name, detect in contestants.items()
    }
    seconds = turns(calls, options.rounds)
    return {key: value / (key[1] * repeats[key[1]]) for key, value in seconds.items()}


@contextlib.contextmanager
def computing_by(detector: Any) -> Iterator[None]:
    """Lets `predict.predict` compute with a detector of PyTorch; None leaves JAX in its place."""
    if detector is None:
        yield
        return
    detect = by_torch(detector)
    with mock.patch.object(detection, "start_batch", lambda _, images, __: detect(images)):
        yield


def with_files(
    workdir: Path,
    folders: dict[int, Path],
    contestants: dict[tuple[str, int], Any],
    rounds: int,
) -> dict[tuple[str, int, int], float]:
    """Returns the seconds per call by contestant, batch size and number of images."""
    out = workdir.parent / "out"

    def call(detector: Any, batch: int, images: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        with computing_by(detector):
            predict.predict(workdir, images, out, overrides=[f"--config.eval.batch_size={batch}"])

    calls = {
        (name, batch, count): functools.partial(call, detector, batch, path)
        for (name, batch), detector in contestants.items()
        for count, path in folders.items()
    }
    return turns(calls, rounds)


def first_pictures(workdir: Path, picture: Path, detector: Any, rounds: int) -> dict[str, float]:
    """Returns the median seconds of a new process that judges one picture."""
    folder = workdir.parent
    cache, out = folder / "cache_of_first", folder / "first"

    def run(*words: str | Path) -> float:
        shutil.rmtree(out, ignore_errors=True)
        environment = os.environ | {"PAE_CACHE": str(cache)}
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True)
        return time.perf_counter() - start

    ours = ("-m", "pae_jax.main", "predict", f"--workdir={workdir}", f"--images={picture}")
    times: dict[str, list[float]] = {"jax, cold": [], "jax, warm": []}
    if detector is not None:
        from predict_torch import save

        model = trained_model.load(workdir)
        thresholds = trained_model.thresholds(workdir, model)
        save(detector, folder / "detector.pt", model.config.data.shape, thresholds)
        script = Path(__file__).with_name("predict_torch.py")
        theirs = (script, folder / "detector.pt", picture, out)
        times["torch"] = []
        run(*theirs)  # the files of PyTorch come into memory
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        times["jax, cold"].append(run(*ours, f"--out={out}"))
        times["jax, warm"].append(run(*ours, f"--out={out}"))
        if detector is not None:
            times["torch"].append(run(*theirs))
    return {name: statistics.median(values) for name, values in times.items()}


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
    packages = ["jax", "numpy", "pillow"]
    packages += ["torch"] if importlib.util.find_spec("torch") else []
    print(provenance.line(*packages))
    print(f"{options.size}², widths {options.widths}; PNG images of {options.png}²", flush=True)
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
        model = trained_model.load(workdir)
        detectors = make_torch(model)

        print("\n| without files: batch | by | images/s | ms/image |\n| ---: | --- | ---: | ---: |")
        alone = without_files(model, detectors, options)
        for (contestant, count), per_image in alone.items():
            figures = f"{1 / per_image:.1f} | {1e3 * per_image:.1f}"
            print(f"| {count} | {contestant} | {figures} |", flush=True)

        few, many = options.images // 4, options.images
        folders = {few: part, many: folder / "data/train/good"}
        contestants = fastest(alone, detectors, options.batches[0])
        seconds = with_files(workdir, folders, contestants, options.rounds)
        print(f"\n| with files: batch | by | images/s | ms/image | start, s | {many} images, s |")
        print("| ---: | --- | ---: | ---: | ---: | ---: |")
        for contestant, count in contestants:
            total = seconds[contestant, count, many]
            per_image = (total - seconds[contestant, count, few]) / (many - few)
            start = total - many * per_image
            figures = f"{1 / per_image:.1f} | {1e3 * per_image:.1f} | {start:.2f} | {total:.2f}"
            print(f"| {count} | {contestant} | {figures} |", flush=True)

        print("\n| first picture | s |\n| --- | ---: |")
        detector = next(iter(detectors.values()), None)
        for contestant, value in first_pictures(
            workdir, images[0], detector, options.rounds
        ).items():
            print(f"| {contestant} | {value:.2f} |", flush=True)


def fastest(
    seconds: dict[tuple[str, int], float], detectors: dict[str, Any], first: int
) -> dict[tuple[str, int], Any]:
    """Returns what is timed with files: both sides with the first and with their best batch size.

    PyTorch takes the layout that is faster in its best batch.
    """
    chosen: dict[tuple[str, int], Any] = {}
    for side in ("jax", "torch"):
        of_side = {key: value for key, value in seconds.items() if key[0].startswith(side)}
        if of_side:
            name, best = min(of_side, key=of_side.__getitem__)
            chosen |= {(name, count): detectors.get(name) for count in sorted({first, best})}
    return chosen


if __name__ == "__main__":
    process.restart_with_huge_pages(__file__)  # for both sides, as `pae` does
    main()
