"""One training step as one pure function, and the state it maps."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from pae_jax import augmentation, corruption, image_ops, rng
from pae_jax.config import Config, OptimizerConfig
from pae_jax.devices import hardware
from pae_jax.methods import METHODS

Batch = Mapping[str, Array]  # image (b, h, w, c) and texture (b, t, t, c'), uint8
Metrics = dict[str, Array]


class TrainState(struct.PyTreeNode):
    """All that a run carries from step to step.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: of the method; a network's variables.
      opt_state: optax's state.
      ema: the exponential moving average of `params`, or None when `optimizer.ema_decay` is 0.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any

    @property
    def eval_params(self) -> Any:
        """What is validated, evaluated and shipped: the average if there is one."""
        return self.params if self.ema is None else self.ema


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or a cosine to 0 at `steps`."""
    rest = max(steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.schedule]()
    warmup = optax.linear_schedule(0.0, config.learning_rate, max(config.warmup_steps, 1))
    return (
        optax.join_schedules([warmup, after], [config.warmup_steps])
        if config.warmup_steps
        else after
    )


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam (§4), after clipping by the global norm where `optimizer.clip_norm` is positive."""
    adam = optax.adam(learning_rate(config.optimizer, config.train.steps))
    clip = config.optimizer.clip_norm
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


def init_state(config: Config, key: Array) -> TrainState:
    """The state before the first step."""
    params = METHODS[config.method].init(config, rng.stream_key(key, "init"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(config).init(params),
        # A copy: the same buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None,
    )


def make_examples(
    batch: Batch, key: Array, step: Array | int, config: Config, *, first: Array | int = 0
) -> corruption.CorruptedBatch:
    """Stored images and textures → augmented, cropped and corrupted examples (x̂, x, M).

    `first` is the position in the global batch of this (part of the) batch's first example.
    """
    count = batch["image"].shape[0]

    def keys(name: str) -> Array:
        return rng.example_keys(rng.stream_key(key, name, step), count, first=first)

    textures = image_ops.to_float(batch["texture"])
    if batch["image"].shape[-1] == 1:
        textures = image_ops.to_grey(textures)
    clean = augmentation.augment(
        keys("augmentation"),
        image_ops.to_float(batch["image"]),
        config.data.augmentation,
        config.data.train_shape,
    )
    return corruption.corrupt(keys("corruption"), clean, textures, config.corruption)


def _same(tree: Any) -> Any:
    return tree


def step_flops(counted: float | None, config: Config) -> float | None:
    """FLOP of a step from XLA's count of its program, in which a loop's body counts once."""
    parts = config.train.grad_accumulation_steps
    return counted and counted * parts / hardware.loop_unroll(parts)


def _accumulate(function: Callable[[Any], Any], examples: Any, parts: int) -> Any:
    """The mean of `function` over `parts` equal parts of the examples, one after the other."""
    if parts == 1:
        return function(examples)
    # Part i takes every parts-th example, so that each is spread over all devices.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), examples)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, split, unroll=hardware.loop_unroll(parts))
    return jax.tree.map(lambda x: x / parts, total)


def train_step(
    state: TrainState, batch: Batch, key: Array, *, config: Config, axis: str | None = None
) -> tuple[TrainState, Metrics]:
    """Draws the corruptions, takes one step of Adam on the method's loss: eq. 1 and penalties.

    Args:
      state: the state before the step.
      batch: the global batch; or, where `axis` names a mapped axis, this device's part of it.
      key: the run's root key.
      config: static.
      axis: the mapped axis over which gradients and metrics are averaged, if any.

    Returns:
      The state after the step and scalar metrics: "loss", one entry for each of its terms,
      "gradient_norm" and "parameter_norm" (after the step). With `train.grad_accumulation_steps` = k the
      gradient is taken in k parts of the batch, one after the other, and is the same.
    """
    count = batch["image"].shape[0]
    first = jax.lax.axis_index(axis) * count if axis else 0
    average = functools.partial(jax.lax.pmean, axis_name=axis) if axis else _same
    examples = make_examples(batch, key, state.step, config, first=first)
    probe_keys = rng.example_keys(rng.stream_key(key, "objective", state.step), count, first=first)

    def loss(params: Any, part: tuple[corruption.CorruptedBatch, Array]) -> tuple[Array, Metrics]:
        value, terms = METHODS[config.method].loss(params, *part, config, state.step)
        return jnp.mean(value), {name: jnp.mean(term) for name, term in terms.items()}

    differentiate = jax.value_and_grad(loss, has_aux=True)
    found = _accumulate(
        lambda part: differentiate(state.params, part),
        (examples, probe_keys),
        config.train.grad_accumulation_steps,
    )
    (value, terms), gradient = average(found)
    updates, opt_state = optimizer(config).update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - config.optimizer.ema_decay)
    norms = {"gradient_norm": optax.tree.norm(gradient), "parameter_norm": optax.tree.norm(params)}
    return TrainState(state.step + 1, params, opt_state, ema), {"loss": value, **terms, **norms}
