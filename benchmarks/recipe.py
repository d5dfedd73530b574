"""Which recipe? Variants trained alike and judged on held-out normal images alone.

    python benchmarks/recipe.py --config=configs/recipe.py:output --workdir=W [--config.key=value …]
                    [--unseen=FOLDER] [--maps ssim mse] [--smoothing .083 .042] [--topk .01 .05]

Trains every member of the config's `sweep` (as `pae sweep` does, without its test images) and
shows what it does to normal images held out of training, under corruptions that it may not have
been trained on: each of KINDS, with held-out textures, or with those of --unseen. Beside the
on-manifold bias, each kind has the average precision of the smoothed map against the synthetic
mask (M > 0.1, and the pixel changed), "mean" is their mean; "image sum", "max" and "topk" are the
areas under the ROC curve that tell corrupted from clean held-out images by these scores, averaged
over the kinds. No test image is opened. Finished members are not trained again.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.textures import open_textures
from pae_jax import (
    anomaly_map,
    corruption,
    metrics,
    predict,
    preprocess,
    provenance,
    rng,
    run,
    train,
    unet,
)
from pae_jax.config import Config, CorruptionConfig, EvalConfig
from pae_jax.config_file import load_sweep
from pae_jax.detection import SCORES, VISIBLE, difference

PART = 8  # images at a time
CHANGED = 5 / 255  # a pixel that differs less from the clean image is not asked for
COPIES = 4  # of each held-out image, each under a corruption of its own
KINDS = {  # what a defect may look like; all of one opacity range, so that none is trivial
    "ellipses": {},
    "faint": {"max_opacity": 0.3},
    "small": {"max_axis": 0.03, "max_blobs": 2},
    "perlin": {"mask": "perlin"},
    "cutpaste": {"kind": "cutpaste"},
    "structural": {"kind": "structural"},
    "on structure": {"kind": "structural", "placement": "structure", "max_axis": 0.1},
}


def held_out(config: Config, unseen: str) -> tuple[np.ndarray, np.ndarray]:
    """Held-out normal images and textures in [0, 1], one of each an example."""
    data, textures = run.open_data(config)
    patterns = textures.held_out
    if unseen:
        opened = open_textures(
            unseen, size=config.data.texture_size, cache=config.data.cache, seed=0
        )
        patterns = np.concatenate([opened.held_out, opened.train])
    count = COPIES * len(data.held_out)
    images = np.resize(data.held_out, (count, *data.held_out.shape[1:]))
    chosen = np.random.default_rng(0).integers(len(patterns), size=count)
    patterns = preprocess.to_float(jnp.asarray(patterns[chosen]))
    if images.shape[-1] == 1:
        patterns = preprocess.to_grey(patterns)
    return np.asarray(preprocess.to_float(jnp.asarray(images))), np.asarray(patterns)


def judge(
    config: Config,
    params: Any,
    images: np.ndarray,
    patterns: np.ndarray,
    settings: list[EvalConfig],
) -> Iterator[dict[str, float]]:
    """Measures of one model, a row for each of `settings`."""
    f = jax.jit(unet.bind(config.model, params))

    def in_parts(function: Callable, *arrays: np.ndarray) -> np.ndarray:
        parts = [[a[i : i + PART] for a in arrays] for i in range(0, len(arrays[0]), PART)]
        return np.concatenate([np.asarray(function(*map(jnp.asarray, part))) for part in parts])

    clean = images[: len(images) // COPIES]
    pairs = {"": (clean, in_parts(f, clean))}
    masks = {}
    for kind, changes in KINDS.items():
        drawn = dataclasses.replace(CorruptionConfig(clean=0.0), **changes)
        corrupt = jax.jit(functools.partial(corruption.corrupt, config=drawn))
        key = rng.stream(jax.random.key(7), kind)
        batch = corrupt(key, jnp.asarray(images), jnp.asarray(patterns))
        corrupted = np.asarray(batch.corrupted)
        pairs[kind] = corrupted, in_parts(f, corrupted)
        changed = np.abs(corrupted - images).max(-1) > CHANGED
        masks[kind] = (np.asarray(batch.mask[..., 0]) > VISIBLE) & changed
    bias = float(np.sqrt(np.mean((pairs[""][1] - clean) ** 2)))
    for one in settings:
        compare = functools.partial(difference, config=one)
        maps = {kind: in_parts(compare, *pair) for kind, pair in pairs.items()}
        normal = maps.pop("")
        row = {kind: metrics.average_precision(maps[kind], masks[kind]) for kind in KINDS}
        mean = float(np.mean(list(row.values())))
        row |= {"mean": mean, "bias": bias}
        for score in SCORES:
            found = []
            for kind, values in maps.items():
                corrupted = values[masks[kind].any((1, 2))]
                both = jnp.asarray(np.concatenate([corrupted, normal]))
                scores = np.asarray(anomaly_map.image_score(both, score, one.topk_share))
                found.append(metrics.auroc(scores, np.arange(len(both)) < len(corrupted)))
            row[f"image {score}"] = float(np.mean(found))
        yield row


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
            rows = judge(
                config, predict.load(workdir).params, *held_out(config, arguments.unseen), settings
            )
            for (kind, share, topk), row in zip(choices, rows, strict=True):
                cells = "  ".join(f"{name} {value:.3f}" for name, value in row.items())
                print(f"  {kind:5s} smoothing {share:.3f} topk {topk:.3f}  {cells}", flush=True)
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
