"""Which recipe? Variants trained alike and judged on held-out normal images alone.

    python benchmarks/recipe.py --config=configs/recipe.py:output --workdir=W [--config.key=value …]
                    [--unseen=FOLDER] [--maps ssim mse] [--smoothing .083 .042] [--topk .01 .05]

Trains every member of the config's `sweep` (as `pae sweep` does, without its test images) and
shows what it does to normal images held out of training, under corruptions that it may not have
been trained on: each of KINDS, with held-out textures, or with those of --unseen. Beside the
on-manifold bias, each kind has the average precision of the smoothed map against the synthetic
mask (M > 0.1, and the pixel changed), "mean" is their mean; "auroc" and "aupro" are means over the
kinds of the pixel AUROC and the per-region overlap. "image sum", "max" and "topk" are the areas
under the ROC curve that tell corrupted from clean held-out images by these scores, averaged over
the kinds. No test image is opened. Finished members are not trained again.
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
from pae_jax.anomaly_map import difference
from pae_jax.config import Config, CorruptionConfig, EvalConfig, TrainConfig
from pae_jax.config_file import load_sweep
from pae_jax.detection import REPORTED_SCORES
from pae_jax.devices import process
from pae_jax.masks import VISIBLE
from pae_jax.workdir import checkpoint, provenance, run, trained_model

PART = 8  # images at a time
CHANGED = 5 / 255  # a pixel that differs less from the clean image is not asked for
COPIES = 4  # of each held-out image, each under a corruption of its own
KINDS = {  # what a defect may look like; all of one opacity range, so that none is trivial
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
    """Images of one kind, float32 in [0, 1], and what in them is to be found, (n, h, w) bool."""

    images: np.ndarray
    wrong: np.ndarray


class HeldOut(NamedTuple):
    """Normal images that no variant was trained on, and their corruptions by name."""

    clean: np.ndarray
    corrupted: dict[str, Corrupted]


def open_held_out(config: Config, unseen: str) -> HeldOut:
    """COPIES of each held-out image under each of KINDS, with a texture of its own.

    Variants whose images and textures agree share one reading and one drawing.
    """
    data = dataclasses.replace(config.data, augmentation="none", crop=0)
    return _draw(Config(data=data, train=TrainConfig(seed=config.train.seed)), unseen)


@functools.lru_cache(1)
def _draw(config: Config, unseen: str) -> HeldOut:
    data, textures = run.open_data(config)
    patterns = textures.held_out
    if unseen:
        opened = open_textures(
            unseen, size=config.data.texture_size, cache=config.data.cache_dir, seed=0
        )
        patterns = np.concatenate([opened.held_out, opened.train])
    count = COPIES * len(data.held_out)
    clean = image_ops.to_float(jnp.asarray(data.held_out))
    chosen = np.random.default_rng(0).integers(len(patterns), size=count)
    patterns = image_ops.to_float(jnp.asarray(patterns[chosen]))
    if clean.shape[-1] == 1:
        patterns = image_ops.to_grey(patterns)
    images = jnp.concatenate([clean] * COPIES)
    corrupted = {}
    for kind, changes in KINDS.items():
        drawn = dataclasses.replace(CorruptionConfig(clean_fraction=0.0), **changes)
        corrupt = jax.jit(functools.partial(corruption.corrupt, config=drawn))
        batch = corrupt(rng.stream_key(jax.random.key(7), kind), images, patterns)
        changed = jnp.abs(batch.corrupted - images).max(-1) > CHANGED
        wrong = (batch.mask[..., 0] > VISIBLE) & changed
        corrupted[kind] = Corrupted(np.asarray(batch.corrupted), np.asarray(wrong))
    return HeldOut(np.asarray(clean), corrupted)


def judge(
    config: Config, params: Any, held_out: HeldOut, settings: list[EvalConfig]
) -> Iterator[dict[str, float]]:
    """Measures of one model, a row for each of `settings`."""
    f = jax.jit(unet.bind(config.model, params))

    def in_parts(function: Callable, *arrays: np.ndarray) -> np.ndarray:
        parts = [[a[i : i + PART] for a in arrays] for i in range(0, len(arrays[0]), PART)]
        return np.concatenate([np.asarray(function(*map(jnp.asarray, part))) for part in parts])

    clean, corrupted = held_out
    reconstructions = {kind: in_parts(f, images) for kind, (images, _) in corrupted.items()}
    normal = in_parts(f, clean)
    bias = float(np.sqrt(np.mean((normal - clean) ** 2)))
    for one in settings:
        compare = jax.jit(functools.partial(difference, config=one))
        normal_maps = in_parts(compare, clean, normal)
        found, areas = {}, {name: [] for name in REPORTED_SCORES}
        for kind, (images, wrong) in corrupted.items():
            maps = in_parts(compare, images, reconstructions[kind])
            found[kind] = metrics.pixel_metrics(zip(maps, wrong, strict=True))
            maps = np.concatenate([maps[wrong.any((1, 2))], normal_maps])
            labels = np.arange(len(maps)) < len(maps) - len(normal_maps)
            for name in REPORTED_SCORES:
                scores = anomaly_map.image_score(jnp.asarray(maps), name, one.topk_fraction)
                areas[name].append(metrics.auroc(np.asarray(scores), labels))
        row = {kind: values.average_precision for kind, values in found.items()}
        row["mean"] = statistics.mean(row.values())
        row["auroc"] = statistics.mean(values.auroc for values in found.values())
        row["aupro"] = statistics.mean(values.aupro for values in found.values())
        yield row | {
            "bias": bias,
            **{f"image {name}": statistics.mean(values) for name, values in areas.items()},
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
                dataclasses.replace(config.eval, map=kind, smoothing_share=share, topk_share=topk)
                for kind, share, topk in choices
            ]
            held_out = open_held_out(config, arguments.unseen)
            rows = judge(config, trained_model.load(workdir).params, held_out, settings)
            for (kind, share, topk), row in zip(choices, rows, strict=True):
                cells = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
                print(f"  {kind:5s} smoothing {share:.3f} topk {topk:.3f}  {cells}", flush=True)
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
