"""Which recipe? Variants trained alike and judged on held-out normal images alone.

    python benchmarks/recipe.py --config=configs/recipe.py:output --workdir=W [--config.key=value …]
                                [--unseen=FOLDER] [--smoothing 1/12 1/24]

Trains every member of the config's `sweep` (as `pae sweep` does, without its test images) and
shows what it does to normal images held out of training, under corruptions that it may not have
been trained on: each of KINDS, with held-out textures, or with those of --unseen. Beside the
on-manifold bias, each kind has the average precision of the smoothed map against the synthetic
mask (M > 0.1); "image sum" and "image max" are the areas under the ROC curve that tell corrupted
from clean held-out images by sum and maximum of the map, averaged over the kinds. No test image is
opened. Finished members are not trained again.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
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
from pae_jax.config import Config, CorruptionConfig, load_sweep
from pae_jax.validation import VISIBLE

COPIES = 4  # of each held-out image, each under a corruption of its own
KINDS = {  # what a defect may look like; all of one opacity range, so that none is trivial
    "ellipses": {},
    "faint": {"max_opacity": 0.3},
    "small": {"max_axis": 0.03, "max_blobs": 2},
    "perlin": {"mask": "perlin"},
    "cutpaste": {"kind": "cutpaste"},
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
    config: Config, params: Any, images: np.ndarray, patterns: np.ndarray, shares: list[float]
) -> Iterator[dict[str, float]]:
    """A row of measures for each smoothing share."""
    f = unet.bind(config.model, params)
    raw = dataclasses.replace(config.eval, smoothing="none")

    @jax.jit
    def maps_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return predict.localise(f, x, raw)

    def localise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [maps_of(jnp.asarray(x[i : i + 4])) for i in range(0, len(x), 4)]
        y, maps = (np.concatenate(part) for part in zip(*parts, strict=True))
        return y, maps

    clean = images[: len(images) // COPIES]
    reconstruction, clean_maps = localise(clean)
    bias = float(np.sqrt(np.mean((reconstruction - clean) ** 2)))
    made = {}
    for kind, changes in KINDS.items():
        settings = dataclasses.replace(CorruptionConfig(clean=0.0), **changes)
        corrupt = jax.jit(functools.partial(corruption.corrupt, config=settings))
        batch = corrupt(
            rng.stream(jax.random.key(7), kind), jnp.asarray(images), jnp.asarray(patterns)
        )
        made[kind] = (
            np.asarray(batch.mask[..., 0]) > VISIBLE,
            localise(np.asarray(batch.corrupted))[1],
        )
    for share in shares:
        smooth = functools.partial(anomaly_map.smooth, kind="gaussian", share=share)
        row = {"smoothing": share, "bias": bias}
        sums, tops = [], []
        normal = np.asarray(smooth(jnp.asarray(clean_maps)))
        for kind, (masks, maps) in made.items():
            smoothed = np.asarray(smooth(jnp.asarray(maps)))
            row[kind] = metrics.average_precision(smoothed, masks)
            seen = masks.any((1, 2))
            labels = np.concatenate([np.ones(seen.sum()), np.zeros(len(normal))]).astype(bool)
            for scores, reduce in ((sums, np.sum), (tops, np.max)):
                both = np.concatenate([reduce(smoothed[seen], (1, 2)), reduce(normal, (1, 2))])
                scores.append(metrics.auroc(both, labels))
        row["mean"] = float(np.mean([row[kind] for kind in KINDS]))
        row["image sum"], row["image max"] = float(np.mean(sums)), float(np.mean(tops))
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
    parser.add_argument("--smoothing", nargs="+", type=float, default=[1 / 12, 1 / 24, 1 / 48])
    arguments, overrides = parser.parse_known_args()
    try:
        members = load_sweep(arguments.config, overrides)
        print(provenance.line("jax", "flax", "optax"), arguments.config, *overrides)
        opened: dict[Any, Any] = {}
        for variant, seed, config in members:
            workdir = arguments.workdir / f"{variant}-{seed}"
            start = time.perf_counter()
            result = train.train_and_evaluate(config, workdir)
            seconds = time.perf_counter() - start
            model = predict.load(workdir)
            key = (config.data, seed)
            if key not in opened:
                opened[key] = held_out(config, arguments.unseen)
            for row in judge(config, model.params, *opened[key], arguments.smoothing):
                cells = " ".join(f"{name} {value:.4f}" for name, value in row.items())
                print(
                    f"{variant:20s} {seed} {result.step:6d} {seconds:6.0f} s  {cells}", flush=True
                )
    except BadInput as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
