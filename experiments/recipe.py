"""Compares training recipes on held-out normal images with synthetic defects; opens no test image.

    python experiments/recipe.py --config=experiments/recipe:output --workdir=W
        [--config.KEY=VALUE …] [--unseen=FOLDER] [--maps ssim mse] [--smoothing 0.083 0.042]
        [--topk 0.01 0.05]

Trains every member of the config's `sweep`, as `pae sweep` does; finished members are not trained
again. The members are then evaluated on normal images that were held out of training, under
corruptions that may not have occurred in training: each of KINDS, with held-out textures or with
those of --unseen.

    KIND             average precision of the smoothed map against the synthetic mask, which is
                     M > 0.1 where the pixel changed
    mean             mean of the above over the kinds
    auroc, aupro     pixel AUROC and per-region overlap, means over the kinds
    on_manifold_bias root mean square of f(x) − x on uncorrupted images
    image SCORE      AUROC of corrupted against clean images by this score, mean over the kinds
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.textures import open_textures
from pae_jax import anomaly_map, corruption, image_ops, metrics, rng, train, unet
from pae_jax.config import Config, CorruptionConfig, EvalConfig, TrainConfig
from pae_jax.config_file import load_sweep
from pae_jax.detection import REPORTED_SCORES
from pae_jax.devices import process
from pae_jax.masks import VISIBLE
from pae_jax.workdir import checkpoint, provenance, run, trained_model

BATCH_SIZE = 8
CHANGED = 5 / 255  # a pixel that differs less from the clean image is not part of the defect
COPIES = 4  # of each held-out image, each with another corruption
# Kinds of synthetic defects. All but "faint" have the same range of opacity, so that none is easy.
KINDS = {
    "ellipses": {},
    "faint": {"max_opacity": 0.3},
    "small": {"max_axis": 0.03, "max_blobs": 2},
    "perlin": {"mask": "perlin"},
    "cutpaste": {"kind": "cutpaste"},
    "mixed": {"kind": "mixed"},
    "on edges": {"kind": "mixed", "placement": "edges", "max_axis": 0.1},
    "broad": {"kind": "mixed", "min_axis": 0.2, "max_axis": 0.5, "max_blobs": 1},
}


class Corrupted(NamedTuple):
    """Corrupted images of one kind.

    Attributes:
      images: (n, h, w, 3), float32 in [0, 1].
      defects: (n, h, w), bool, the pixels to be detected.
    """

    images: np.ndarray
    defects: np.ndarray


class HeldOut(NamedTuple):
    """Normal images that no variant was trained on.

    Attributes:
      clean: (n, h, w, 3), float32 in [0, 1].
      corrupted: COPIES of them under each of KINDS.
    """

    clean: np.ndarray
    corrupted: dict[str, Corrupted]


def open_held_out(config: Config, unseen: str) -> HeldOut:
    """Opens the held-out images and corrupts them, each copy with another texture.

    Variants with the same images and textures share the result.

    Args:
      config: the configuration of the variant.
      unseen: a folder of textures that replace the held-out ones, or "".
    """
    # Settings that do not affect held-out images are reset, so that variants of them share it too.
    data = dataclasses.replace(config.data, augmentation="none", crop_size=0)
    return _draw(Config(data=data, train=TrainConfig(seed=config.train.seed)), unseen)


@functools.lru_cache(1)
def _draw(config: Config, unseen: str) -> HeldOut:
    data, textures = run.open_data(config)
    patterns = textures.held_out
    if unseen:
        opened = open_textures(
            unseen, size=config.data.texture_size, cache_dir=config.data.cache_dir, seed=0
        )
        patterns = np.concatenate([opened.held_out, opened.train])
    count = COPIES * len(data.held_out)
    clean = image_ops.to_float(jnp.asarray(data.held_out))
    indices = np.random.default_rng(0).integers(len(patterns), size=count)
    patterns = image_ops.to_float(jnp.asarray(patterns[indices]))
    if clean.shape[-1] == 1:
        patterns = image_ops.to_grey(patterns)
    images = jnp.concatenate([clean] * COPIES)
    corrupted = {}
    for kind, changes in KINDS.items():
        kind_config = dataclasses.replace(CorruptionConfig(clean_fraction=0.0), **changes)
        corrupt = jax.jit(functools.partial(corruption.corrupt, config=kind_config))
        batch = corrupt(rng.stream_key(jax.random.key(7), kind), images, patterns)
        changed = jnp.abs(batch.corrupted - images).max(-1) > CHANGED
        defects = (batch.mask[..., 0] > VISIBLE) & changed
        corrupted[kind] = Corrupted(np.asarray(batch.corrupted), np.asarray(defects))
    return HeldOut(np.asarray(clean), corrupted)


def evaluate(
    config: Config, params: Any, held_out: HeldOut, settings: list[EvalConfig]
) -> Iterator[dict[str, float]]:
    """Yields the measures of one model for each of `settings`."""
    f = jax.jit(unet.bind(config.model, params))

    def in_batches(function: Callable, *arrays: np.ndarray) -> np.ndarray:
        starts = range(0, len(arrays[0]), BATCH_SIZE)
        batches = [[a[i : i + BATCH_SIZE] for a in arrays] for i in starts]
        return np.concatenate([np.asarray(function(*map(jnp.asarray, b))) for b in batches])

    clean, corrupted = held_out
    reconstructions = {kind: in_batches(f, images) for kind, (images, _) in corrupted.items()}
    clean_reconstruction = in_batches(f, clean)
    bias = float(np.sqrt(np.mean((clean_reconstruction - clean) ** 2)))
    for eval_config in settings:
        smoothed_map = jax.jit(functools.partial(anomaly_map.smoothed_map, config=eval_config))
        clean_maps = in_batches(smoothed_map, clean, clean_reconstruction)
        pixels, aurocs = {}, {name: [] for name in REPORTED_SCORES}
        for kind, (images, defects) in corrupted.items():
            maps = in_batches(smoothed_map, images, reconstructions[kind])
            pixels[kind] = metrics.pixel_metrics(zip(maps, defects, strict=True))
            # Corrupted images without a visible defect are neither positive nor negative.
            maps = np.concatenate([maps[defects.any((1, 2))], clean_maps])
            labels = np.arange(len(maps)) < len(maps) - len(clean_maps)
            for name in REPORTED_SCORES:
                scores = anomaly_map.image_score(jnp.asarray(maps), name, eval_config.topk_fraction)
                aurocs[name].append(metrics.auroc(np.asarray(scores), labels))
        row = {kind: result.average_precision for kind, result in pixels.items()}
        row["mean"] = statistics.mean(row.values())
        row["auroc"] = statistics.mean(result.auroc for result in pixels.values())
        row["aupro"] = statistics.mean(result.aupro for result in pixels.values())
        yield row | {
            "on_manifold_bias": bias,
            **{f"image {name}": statistics.mean(values) for name, values in aurocs.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--unseen", default="", help="another folder of textures")
    parser.add_argument("--maps", nargs="+", default=["ssim"])
    parser.add_argument("--smoothing", nargs="+", type=float, default=[1 / 12, 1 / 24, 1 / 48])
    parser.add_argument("--topk", nargs="+", type=float, default=[0.01])
    arguments, overrides = parser.parse_known_args()
    choices = list(itertools.product(arguments.maps, arguments.smoothing, arguments.topk))
    process.start()
    checkpoint.silence_background_errors()
    try:
        members = load_sweep(arguments.config, overrides)
        print(provenance.line("jax", "flax", "optax"), arguments.config, *overrides)
        for variant, seed, config in members:
            workdir = arguments.workdir / f"{variant}-{seed}"
            start = time.perf_counter()
            result = train.train_and_evaluate(config, workdir)
            if result.outcome != train.FINISHED:
                print(f"{workdir}: {result.outcome} at step {result.step}", file=sys.stderr)
                sys.exit(1)
            seconds = time.perf_counter() - start
            print(f"{variant}, seed {seed}: {result.step} steps, {seconds:.0f} s", flush=True)
            settings = [
                dataclasses.replace(
                    config.eval,
                    anomaly_map=name,
                    smoothing_fraction=smoothing,
                    topk_fraction=topk,
                )
                for name, smoothing, topk in choices
            ]
            held_out = open_held_out(config, arguments.unseen)
            rows = evaluate(config, trained_model.load(workdir).params, held_out, settings)
            for (name, smoothing, topk), row in zip(choices, rows, strict=True):
                cells = "  ".join(f"{label} {value:.3f}" for label, value in row.items())
                print(f"  {name:5s} smoothing {smoothing:.3f} topk {topk:.3f}  {cells}", flush=True)
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
