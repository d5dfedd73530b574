"""The training of the foreground network: a few hundred steps in memory, without resumption."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, UInt8
from tqdm import tqdm

from data_pipelines.pipeline import index_batch
from data_pipelines.rows import Stored
from pae_jax import augmentation, corruption, image_ops, rng
from pae_jax.config import CorruptionConfig
from pae_jax.methods.segmentation import region_losses
from pae_jax.workdir.suppression import init, logits

BATCH_SIZE = 8
LEARNING_RATE = 2e-3
LOG_EVERY = 50
# Every transform keeps an object an object. The label is moved as a further channel.
POLICY = "flips+shift"
BRIGHTNESS, CONTRAST = 0.1, 0.2

State = tuple[Any, Any]  # parameters and optimizer state


def train(
    images: UInt8[np.ndarray, "n h w c"],
    labels: Bool[np.ndarray, "n h w"],
    textures: Stored,
    *,
    steps: int,
    seed: int,
) -> Any:
    """Trains the network from random parameters.

    The images are corrupted as those of the detection task are, and their labels are not. The
    network thus learns that a defect of the object belongs to the object: it judges by shape and
    surroundings, and does not cut out what looks foreign.

    Args:
      images: training images, at the size of the network.
      labels: their masks.
      textures: (m, t, t, c') uint8, the patterns of the corruptions.
      steps: the number of updates.
      seed: of parameters, batches and transforms.

    Returns:
      The parameters on the host.
    """
    root = jax.random.key(seed)
    params = init(rng.stream_key(root, "foreground"))
    state = params, _optimizer(steps).init(params)
    key = rng.stream_key(root, "foreground examples")
    for number in (bar := tqdm(range(steps), desc="foreground", delay=2, leave=False)):
        rows = index_batch(
            len(images), len(textures), seed=seed, batch_size=BATCH_SIZE, step=number
        )
        batch = images[rows["image"]], labels[rows["image"]], textures[rows["texture"]]
        state, value = _step(state, batch, key, np.int32(number), steps=steps)
        if number % LOG_EVERY == 0 or number == steps - 1:
            bar.set_postfix(loss=f"{float(value):.3f}", refresh=False)
            if not np.isfinite(value):
                raise FloatingPointError(f"step {number + 1}: the loss is not finite")
    return jax.device_get(state[0])


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="state")
def _step(
    state: State, batch: Any, key: Array, number: Array, *, steps: int
) -> tuple[State, Array]:
    images, labels, textures = batch
    x, target = make_examples(images, labels, textures, jax.random.fold_in(key, number))

    def loss(params: Any) -> Array:
        entropy, dice = region_losses(logits(params, x), target)
        return jnp.mean(entropy + dice)

    params, opt_state = state
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = _optimizer(steps).update(gradient, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def make_examples(
    images: UInt8[Array, "b h w c"],
    labels: Bool[Array, "b h w"],
    textures: UInt8[Array, "b t t c2"],
    key: Array,
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w"]]:
    """Augments and corrupts images, and moves their labels alike.

    Args:
      images: stored images.
      labels: their masks.
      textures: the patterns of the corruptions.
      key: the key of the step.

    Returns:
      Images in [0, 1] and labels that are 0 or 1.
    """
    move_key, tone_key, corruption_key = jax.random.split(key, 3)
    x = jnp.concatenate([image_ops.to_float(images), labels[..., None]], axis=-1)
    x = augmentation.augment(move_key, x, POLICY, (x.shape[1], x.shape[2]))
    x, target = x[..., :3], x[..., 3]
    tone = functools.partial(corruption.change_tone, brightness=BRIGHTNESS, contrast=CONTRAST)
    x = jax.vmap(tone)(jax.random.split(tone_key, len(x)), x)
    patterns = image_ops.to_float(textures)
    if images.shape[-1] == 1:
        # A grey image with a defect is grey.
        patterns = image_ops.to_grey(patterns)
    return corruption.corrupt(corruption_key, x, patterns, CorruptionConfig()).corrupted, target


def overlap(mask: Bool[np.ndarray, "h w"], label: Bool[np.ndarray, "h w"]) -> float:
    """Returns the intersection of two masks over their union; 1 if both are empty."""
    union = np.logical_or(mask, label).sum()
    return float(np.logical_and(mask, label).sum() / union) if union else 1.0
