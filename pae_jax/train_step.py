"""One training step as a pure function, and the state that it updates."""

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
from pae_jax.objective import Hyperparameters

# image (b, h, w, c), texture (b, t, t, c') and maybe reserved (b, h, w, c), uint8
Batch = Mapping[str, Array]
Metrics = dict[str, Array]


class TrainState(struct.PyTreeNode):
    """The state that a run carries from step to step.

    Attributes:
      step: int32 scalar, the number of updates done.
      params: the method's parameters; for a network, its variables.
      opt_state: the state of the optax optimizer.
      ema: the exponential moving average of `params`, or None when `optimizer.ema_decay` is 0.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any

    @property
    def eval_params(self) -> Any:
        """The parameters to validate, evaluate and ship: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def learning_rate(
    config: OptimizerConfig, steps: int, peak: float | Array | None = None
) -> optax.Schedule:
    """Returns a schedule: linear warm-up from 0, then constant or a cosine to 0.

    Args:
      config: the shape of the schedule.
      steps: the step at which the cosine reaches 0.
      peak: the rate after the warm-up; None takes `config.learning_rate`.

    Returns:
      A function of the number of updates done.
    """
    peak = config.learning_rate if peak is None else peak
    if config.schedule == "cosine":
        # `join_schedules` starts the count of this schedule after the warm-up. The warm-up may be
        # as long as the run, while optax needs at least one step.
        after_warmup = optax.cosine_decay_schedule(peak, max(steps - config.warmup_steps, 1))
    else:
        after_warmup = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after_warmup
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


def optimizer(config: Config, peak: float | Array | None = None) -> optax.GradientTransformation:
    """Returns Adam (§4), after clipping by the global norm if `optimizer.clip_norm` is positive.

    Args:
      config: the run's configuration.
      peak: the peak of the learning rate; None takes the config's.
    """
    adam = optax.adam(learning_rate(config.optimizer, config.train.steps, peak))
    clip_norm = config.optimizer.clip_norm
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam) if clip_norm else adam


def ema_decay(decay: float, updates: Array) -> Array:
    """Returns the effective decay of the moving average: min(decay, (1 + n) / (10 + n)).

    The average starts at the random initial parameters. With a smaller decay in the first
    updates it forgets them sooner.

    Args:
      decay: `optimizer.ema_decay`, the limit for many updates.
      updates: n, the number of updates done.
    """
    return jnp.minimum(decay, (1 + updates) / (10 + updates))


def init_state(config: Config, key: Array) -> TrainState:
    """Returns the state before the first step."""
    params = METHODS[config.method].init(config, rng.stream_key(key, "init"))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer(config).init(params),
        # A copy, because the same buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None,
    )


def make_examples(
    batch: Batch, key: Array, step: Array | int, config: Config, *, first: Array | int = 0
) -> corruption.Examples:
    """Augments, crops and corrupts stored images.

    Args:
      batch: stored images and textures.
      key: the run's root key.
      step: the number of updates done; with `key` it determines every random choice.
      config: the run's configuration.
      first: the position of the first example of `batch` in the global batch.

    Returns:
      Examples (x̂, x, M) with values in [0, 1]; a pair of them if `batch` has reserved images.
    """
    # Stored images and textures are uint8 up to this point, because float32 takes four times the
    # memory and transfer.
    textures = image_ops.to_float(batch["texture"])
    if batch["image"].shape[-1] == 1:
        # A corrupted grey image has to stay grey, as an image with a real defect would.
        textures = image_ops.to_grey(textures)

    def make(images: Array, prefix: str = "") -> corruption.CorruptedBatch:
        def keys(name: str) -> Array:
            return rng.example_keys(rng.stream_key(key, prefix + name, step), count, first=first)

        clean = augmentation.augment(
            keys("augmentation"),
            image_ops.to_float(images),
            config.data.augmentation,
            config.data.train_shape,
        )
        examples = corruption.corrupt(keys("corruption"), clean, textures, config.corruption)
        return corruption.spare_background(examples) if config.data.foreground else examples

    count = batch["image"].shape[0]
    examples = make(batch["image"])
    if "reserved" not in batch:
        return examples
    # Other patterns and masks on the same textures, so that f's examples are the same as without.
    return corruption.Pair(examples, make(batch["reserved"], "reserved "))


def step_flops(program_flops: float | None, config: Config) -> float | None:
    """Returns the FLOP of a step from XLA's count for its program.

    XLA counts the body of a loop once, so the count is multiplied by the number of iterations
    of the loop over the parts of an accumulated gradient.
    """
    parts = config.train.grad_accumulation_steps
    return program_flops and program_flops * parts / hardware.loop_unroll(parts)


def _mean_over_parts(function: Callable[[Any], Any], examples: Any, parts: int) -> Any:
    """Returns the mean of `function` over `parts` equal parts of the examples, in sequence."""
    if parts == 1:
        return function(examples)
    # Part i takes every parts-th example, so that each part is spread over all devices.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), examples)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    # A scan needs the shapes of its sums beforehand. `eval_shape` finds them without computing.
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, split, unroll=hardware.loop_unroll(parts))
    return jax.tree.map(lambda x: x / parts, total)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Array,
    *,
    config: Config,
    hyperparameters: Hyperparameters | None = None,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """Draws the corruptions and takes one step of Adam on the method's loss.

    With `train.grad_accumulation_steps` = k the gradient is computed in k parts of the batch, one
    after the other, and is the same.

    Args:
      state: the state before the step.
      batch: the global batch; or, if `axis` names a mapped axis, this device's part of it.
      key: the run's root key.
      config: static.
      hyperparameters: the values of weights and rates; None takes those of `config`.
      axis: the mapped axis over which gradients and metrics are averaged, if any.

    Returns:
      The state after the step and scalar metrics: "loss" and each of its terms, "learning_rate",
      "gradient_norm" (before clipping), "update_norm" and "parameter_norm" (after the step).
    """
    values = Hyperparameters.from_config(config) if hyperparameters is None else hyperparameters
    count = batch["image"].shape[0]
    # A key depends on the example's position in the global batch, so that the random numbers do not
    # depend on the number of devices.
    first = jax.lax.axis_index(axis) * count if axis else 0
    examples = make_examples(batch, key, state.step, config, first=first)
    probe_keys = rng.example_keys(rng.stream_key(key, "objective", state.step), count, first=first)

    def loss(params: Any, part: tuple[corruption.Examples, Array]) -> tuple[Array, Metrics]:
        method = METHODS[config.method]
        value, terms = method.loss(params, *part, config, state.step, hyperparameters=values)
        return jnp.mean(value), {name: jnp.mean(term) for name, term in terms.items()}

    loss_and_gradient = jax.value_and_grad(loss, has_aux=True)
    (value, terms), gradient = _mean_over_parts(
        functools.partial(loss_and_gradient, state.params),
        (examples, probe_keys),
        config.train.grad_accumulation_steps,
    )
    # All devices hold equally many examples, so the mean of their means is the mean of the batch.
    # Without a mapped axis, `loss` is already the mean of the global batch.
    if axis:
        (value, terms), gradient = jax.lax.pmean(((value, terms), gradient), axis)

    # The optimizer is built in every trace, because its rate may be traced. Its state holds no
    # rate, so the state from `init_state` fits.
    transform = optimizer(config, values.learning_rate)
    updates, opt_state = transform.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        # n counts this update as well.
        decay = ema_decay(config.optimizer.ema_decay, state.step + 1)
        ema = optax.incremental_update(params, ema, 1 - decay)

    schedule = learning_rate(config.optimizer, config.train.steps, values.learning_rate)
    metrics = {
        "loss": value,
        **terms,
        # optax evaluates the schedule at the number of updates done before this one. A constant
        # schedule returns a Python float, while metrics are arrays.
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "gradient_norm": optax.tree.norm(gradient),
        "update_norm": optax.tree.norm(updates),
        "parameter_norm": optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics


def make_step(config: Config) -> Callable[..., tuple[TrainState, Metrics]]:
    """Binds `train_step` to one configuration.

    Args:
      config: the run's configuration.

    Returns:
      The function step(state, batch, key, hyperparameters=None, *, axis=None) → (state, metrics).
    """

    def step(
        state: TrainState,
        batch: Batch,
        key: Array,
        hyperparameters: Hyperparameters | None = None,
        *,
        axis: str | None = None,
    ) -> tuple[TrainState, Metrics]:
        return train_step(
            state, batch, key, config=config, hyperparameters=hyperparameters, axis=axis
        )

    return step
