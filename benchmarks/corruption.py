"""Times corruption and augmentation: their fraction of a training step, their speed against numpy.

    python benchmarks/corruption.py [--size 128] [--batch 4] [--rounds 5]

Both sides start from stored uint8 images and textures and return (x̂, x, M). Our side is
`train_step.make_examples`, compiled, one batch per call, on all cores. The numpy side is what a
data loader runs: one image per call, on one core, with numpy and scipy. It does the same work as
our mask family "perlin": a random view of a texture, channel order, contrast and brightness,
three octaves of Perlin noise, opacity, eq. 13.

The contestants take turns, so that other processes slow all of them alike. Each figure is the
median over the rounds after a warm-up round. A step is augmentation, corruption, the loss with
its gradient and Adam, with the default widths.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy
import scipy.ndimage

from pae_jax import corruption, masks
from pae_jax.config import Config, CorruptionConfig, DataConfig
from pae_jax.train_step import init_state, make_examples, make_step
from pae_jax.workdir import provenance

POLICIES = ("none", "flips+quarter_turns", "rotation")


def numpy_perlin(draw: np.random.Generator, size: int, cell: float) -> np.ndarray:
    """Returns one octave of gradient noise, (size, size)."""
    position = np.arange(size, dtype=np.float32) / max(cell, 2.0)
    y, x = (position + draw.random(dtype=np.float32) for _ in range(2))
    i, j = y.astype(np.int32), x.astype(np.int32)
    angle = 2 * np.pi * draw.random((i[-1] + 2, j[-1] + 2), np.float32)
    sin, cos = np.sin(angle), np.cos(angle)
    y, x = (y - i)[:, None], (x - j)[None, :]

    def corner(di: int, dj: int) -> np.ndarray:
        at = np.ix_(i + di, j + dj)
        return sin[at] * (y - di) + cos[at] * (x - dj)

    v, u = (t * t * t * (t * (t * 6 - 15) + 10) for t in (y, x))
    left = corner(0, 0) + v * (corner(1, 0) - corner(0, 0))
    right = corner(0, 1) + v * (corner(1, 1) - corner(0, 1))
    return left + u * (right - left)


def numpy_mask(draw: np.random.Generator, size: int, config: CorruptionConfig) -> np.ndarray:
    """Returns thresholded Perlin noise times an opacity, (size, size)."""
    cell = 2 * config.max_axis * size / 4 ** draw.random()
    noise = np.zeros((size, size), np.float32)
    for i in range(3):
        noise += numpy_perlin(draw, size, cell / 2**i) / 2**i
    noise /= noise.max()
    level = draw.uniform(0.2, 0.7)
    t = np.clip((noise - level) / ((1 - level) * config.softness), 0, 1)
    return draw.uniform(config.min_opacity, config.max_opacity) * t * t * (3 - 2 * t)


def numpy_texture(
    draw: np.random.Generator, texture: np.ndarray, size: int, config: CorruptionConfig
):
    """Returns a rotated, scaled, mirrored window with changed colours, (size, size, 3)."""
    angle, step = draw.uniform(0, 2 * math.pi), 2 ** draw.uniform(-1, 1)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    mirror = draw.choice([-1, 1])
    matrix = np.array([[cos, sin * mirror], [-sin, cos * mirror]])
    offset = draw.random(2) * texture.shape[:2] - matrix @ np.full(2, (size - 1) / 2)
    view = np.empty((size, size, 3), np.float32)
    for target, source in enumerate(draw.permutation(3)):
        scipy.ndimage.affine_transform(
            texture[..., source],
            matrix,
            tuple(offset),  # pyright: ignore[reportArgumentType]
            output_shape=(size, size),
            output=view[..., target],
            order=1,
            mode="reflect",
        )
    gain = 1 + config.contrast * draw.uniform(-1, 1)
    view = gain * (view / 255 - 0.5) + 0.5 + config.brightness * draw.uniform(-1, 1)
    return np.clip(view, 0, 1)


def numpy_augment(draw: np.random.Generator, image: np.ndarray, policy: str) -> np.ndarray:
    if policy == "rotation":
        angle = draw.uniform(0, 360)
        return scipy.ndimage.rotate(image, angle, reshape=False, order=1, mode="reflect")
    if policy == "flips+quarter_turns":
        up, left = draw.choice([-1, 1], 2)
        image = np.rot90(image[::up, ::left], int(draw.integers(4)))
    return image


def numpy_example(
    draw: np.random.Generator,
    image: np.ndarray,
    texture: np.ndarray,
    policy: str,
    config: CorruptionConfig,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (x̂, x, M) for one image."""
    x = numpy_augment(draw, image, policy).astype(np.float32) / 255
    y = numpy_texture(draw, texture, len(x), config)
    mask = (draw.random() >= config.clean_fraction) * numpy_mask(draw, len(x), config)[..., None]
    return mask * y + (1 - mask) * x, x, mask


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns wall-clock time and the processor time of all threads.

    Other processes on the machine disturb the processor time less.
    """
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size, count = options.size, options.batch

    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, size, size, 3), np.uint8)
    textures = draw.integers(0, 256, (count, 256, 256, 3), np.uint8)
    batch = jax.device_put({"image": images, "texture": textures})
    key = jax.random.key(0)
    perlin = CorruptionConfig(mask="perlin")
    corruptions = {f"texture, {mask}": CorruptionConfig(mask=mask) for mask in masks.MASKS}
    corruptions |= {
        kind: CorruptionConfig(kind=kind) for kind in corruption.KINDS if kind != "texture"
    }

    plain = Config(data=DataConfig(height=size, width=size))
    state = init_state(plain, key)
    step = ("training step", "none")
    calls: dict[tuple[str, str], Callable[[], Any]] = {
        step: functools.partial(jax.jit(make_step(plain)), state, batch, key)
    }
    for policy in POLICIES:
        data = dataclasses.replace(plain.data, augmentation=policy)
        # The other kinds of corruption are independent of the augmentation.
        names = list(corruptions) if policy == "none" else list(corruptions)[:2]
        for name in names:
            config = dataclasses.replace(plain, data=data, corruption=corruptions[name])
            sample = jax.jit(functools.partial(make_examples, config=config))
            calls[name, policy] = functools.partial(sample, batch, key, 0)
        calls["numpy, perlin", policy] = lambda policy=policy: [
            numpy_example(draw, image, texture, policy, perlin)
            for image, texture in zip(images, textures, strict=True)
        ]

    rounds = [
        {name: seconds(call) for name, call in calls.items()} for _ in range(options.rounds + 1)
    ][1:]
    print(
        f"{provenance.line('jax', 'numpy', 'scipy')}\n"
        f"{size}×{size}, batch {count}, textures 256×256, widths {plain.model.widths}, "
        f"{options.rounds} rounds\n"
    )
    print("| work | augmentation | ms/image | CPU ms/image | of a step | × numpy | CPU × numpy |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, policy in calls:
        wall, processor = (
            1e3 / count * statistics.median(r[name, policy][i] for r in rounds) for i in range(2)
        )
        fraction = statistics.median(r[name, policy][0] / r[step][0] for r in rounds)
        speed, work = (
            statistics.median(r["numpy, perlin", policy][i] / r[name, policy][i] for r in rounds)
            for i in range(2)
        )
        print(
            f"| {name} | {policy} | {wall:.2f} | {processor:.2f} | {fraction:.2%} "
            f"| {speed:.1f} | {work:.1f} |"
        )


if __name__ == "__main__":
    main()
