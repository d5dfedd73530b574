"""The training loop."""

import abc
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from pae_jax import methods, train_step
from pae_jax.config import Config
from pae_jax.devices import sharding
from pae_jax.workdir.run import DIVERGED, FINISHED, STOPPED, Run, TrainResult

__all__ = ["DIVERGED", "FINISHED", "STOPPED", "TrainResult", "run_loop", "train_and_evaluate"]


class Trainer(abc.ABC):
    """The compiled training of one run, or of several with steps in common."""

    @abc.abstractmethod
    def start(self, runs: Sequence[Run]) -> tuple[int, Any]:
        """Opens the runs' data; returns the step to start from and the state there."""

    @abc.abstractmethod
    def run_steps(self, state: Any) -> tuple[Any, Any, float]:
        """State → state and metrics some steps later, and seconds waited for the data."""

    @abc.abstractmethod
    def metrics(self, values: Any) -> list[dict[str, np.ndarray]]:
        """Of each run, on the host, (steps,) each."""

    @abc.abstractmethod
    def state(self, state: Any, run: int) -> train_step.TrainState:
        """A run's own state, to be saved."""

    @abc.abstractmethod
    def state_on_one_device(self, state: Any, run: int) -> train_step.TrainState:
        """The same on one device of this process, to be validated."""

    @property
    @abc.abstractmethod
    def flops(self) -> float | None:
        """Of one step on one device, of all runs that it trains."""


def train_and_evaluate(config: Config, workdir: str | Path) -> TrainResult:
    """Trains in `workdir`, evaluating on held-out corruptions; resumes what it finds there.

    Raises:
      BadInput: the data or the config is unusable, or the workdir belongs to another config.
    """
    mesh = sharding.make_mesh(config)
    with Run(config, workdir) as run:
        (result,) = run_loop([run], SingleTrainer(config, mesh))
    return result


def run_loop(runs: Sequence[Run], program: Trainer) -> list[TrainResult]:
    """Takes runs of equal length to their end, together.

    The order of the loop: validate the state → save it → next batch → steps → log. All that is
    random is folded by the step, so a resumed run repeats the undisturbed one bit for bit.
    """
    config = runs[0].config
    train = config.train
    start, state = program.start(runs)
    stride = runs[0].steps_per_call
    pending: tuple[int, Any, float] | None = None

    def settle() -> None:
        """Logs the last call; waits for it if it is still running."""
        nonlocal pending
        if pending is not None:
            step, values, waited = pending
            for run, metrics in zip(runs, program.metrics(values), strict=True):
                if run.result is None:
                    run.log_steps(step, metrics, waited, program.flops)
            pending = None

    with _interrupted() as stop, _profiler(config, runs[0].workdir) as profile:
        for step in range(start, methods.steps(config) + 1, stride):
            stopping, ending = stop(step), step == methods.steps(config)
            validating = ending or (step % train.validate_every == 0 and not stopping)
            saving = step > start and (ending or stopping or step % train.checkpoint_every == 0)
            if validating or saving or ending or stopping:
                settle()
            for i, run in enumerate(runs):
                if run.result is None and validating:
                    run.validate(step, program.state_on_one_device(state, i).eval_params)
                # A run without steps ends where it starts.
                unsaved = ending and step not in run.checkpoints.steps
                if run.result is None and (saving or unsaved):
                    run.save(step, program.state(state, i))
                if run.result is None and (ending or stopping):
                    run.finish(FINISHED if ending else STOPPED, step)
            if all(run.result for run in runs):
                break
            profile(step)
            state, values, waited = program.run_steps(state)
            # One call late, so that the host prepares the next one while this one runs.
            settle()
            pending = step, values, waited
    return [run.result for run in runs if run.result is not None]


class SingleTrainer(Trainer):
    """One run on a mesh of the axes data and model."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        self._key = jax.random.key(config.train.seed)

    def start(self, runs: Sequence[Run]) -> tuple[int, train_step.TrainState]:
        (run,) = runs
        mesh = self._mesh
        state = initial_state(self._config, self._key, mesh, run.data.images)
        start, state = run.checkpoints.restore(state) or (0, state)
        store, self._batches = run.begin(start)
        self._store = sharding.to_global(store, sharding.replicated_sharding(mesh))
        self._step = sharding.compile_step(
            lambda *args, axis=None: train_step.train_step(*args, config=self._config, axis=axis),
            mesh,
            self._config.sharding.transform,
            state,
            steps=run.steps_per_call,
        )
        return start, state

    def run_steps(self, state: train_step.TrainState) -> tuple[train_step.TrainState, Any, float]:
        began = time.perf_counter()
        batches = sharding.to_global(next(self._batches), sharding.batch_sharding(self._mesh))
        waited = time.perf_counter() - began
        return *self._step(state, self._store, batches, self._key), waited

    def metrics(self, values: Any) -> list[dict[str, np.ndarray]]:
        return [jax.device_get(sharding.one_copy(values, self._mesh))]

    def state(self, state: train_step.TrainState, run: int) -> train_step.TrainState:
        del run
        return state

    def state_on_one_device(self, state: train_step.TrainState, run: int) -> train_step.TrainState:
        del run
        return sharding.one_copy(state, self._mesh)

    @property
    def flops(self) -> float | None:
        return train_step.step_flops(self._step.flops, self._config)


def initial_state(
    config: Config, key: jax.Array, mesh: jax.sharding.Mesh, images: np.ndarray | None = None
) -> Any:
    """The state before the first step, where the mesh wants it.

    `images`: uint8 (n, h, w, c), those of the training split, to which the method is fitted.
    """
    # Initialisers are hundreds of small random draws: slow to compile, run once.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

    def init(key: jax.Array) -> train_step.TrainState:
        return train_step.init_state(config, key)

    shapes = jax.eval_shape(init, key)
    placed = sharding.state_sharding(mesh, shapes)
    state = jax.jit(init, out_shardings=placed, compiler_options=options)(key)
    fit = methods.METHODS[config.method].fit
    if fit is None or images is None:
        return state
    params = fit(sharding.one_copy(state.params, mesh), images, config)
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


@contextlib.contextmanager
def _profiler(config: Config, workdir: Path) -> Iterator[Callable[[int], None]]:
    """A function of the step, to be called before it, that traces those of `config.profile`."""
    first, end = config.profile or (0, 0)
    running = False

    def at(step: int) -> None:
        nonlocal running
        wanted = first <= step < end
        if wanted and not running:
            jax.profiler.start_trace(str(workdir / "profile"))
        if running and not wanted:
            jax.profiler.stop_trace()
        running = wanted

    try:
        yield at
    finally:
        if running:
            jax.profiler.stop_trace()


@contextlib.contextmanager
def _interrupted() -> Iterator[Callable[[int], bool]]:
    """Whether to stop at a step, since SIGTERM or Ctrl-C came; the second one ends the process.

    Where several processes train together, SIGTERM to any of them stops all at the same step.
    """
    event = threading.Event()
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # signals reach the main thread only
        return

    def handle(number: int, _: object) -> None:
        event.set()
        signal.signal(number, before[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    before: dict[int, Any] = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda step: event.is_set()
    finally:
        for number in numbers:
            signal.signal(number, before[number])
