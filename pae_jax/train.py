"""The training loop, and the trainer of a single run."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines import facts
from data_pipelines.errors import printable
from pae_jax import methods, train_step
from pae_jax.config import Config
from pae_jax.devices import hardware, process, profiler, sharding
from pae_jax.workdir.run import (
    DIVERGED,
    FINISHED,
    STOPPED,
    Recorder,
    Run,
    TrainResult,
    open_run,
)

__all__ = ["DIVERGED", "FINISHED", "STOPPED", "TrainResult", "run_loop", "train_and_evaluate"]

_logger = logging.getLogger(__name__)
# Numbers the calls of all runs of this process; equal in all processes, because they run the same.
_call_numbers = itertools.count()
# The number of idle devices that are named.
_MAX_NAMED = 8


@runtime_checkable
class Trainer(Protocol):
    """The compiled training of one run, or of several runs with steps in common.

    `state`, `batch` and `values` are opaque to the loop, which only passes them on.

    Attributes:
      mesh: the devices.
    """

    mesh: jax.sharding.Mesh

    def start(self, runs: Sequence[Run]) -> tuple[int, Any]:
        """Restores the runs and opens their data; returns the step to start from and the state."""
        ...

    def next_batch(self) -> Any:
        """Returns the input of the next call, on the devices."""
        ...

    def run_steps(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Runs the steps of one call; returns the new state and the metrics."""
        ...

    def metrics(self, values: Any) -> list[dict[str, np.ndarray]]:
        """Returns the metrics of every run on the host, (steps,) each."""
        ...

    def state(self, state: Any, run: int) -> train_step.TrainState:
        """Returns the state of one run, to be saved."""
        ...

    def state_on_one_device(self, state: Any, run: int) -> train_step.TrainState:
        """Returns the state of one run on one device of this process, to be validated."""
        ...

    def flops(self) -> float | None:
        """Returns the FLOP of one step of all runs on one device; None before the first call."""
        ...


def train_and_evaluate(config: Config, workdir: str | os.PathLike[str]) -> TrainResult:
    """Trains in `workdir` and validates on held-out corruptions; resumes an earlier run.

    Args:
      config: the run's configuration.
      workdir: a new folder, or one that holds a run of the same configuration, apart from what
        `workdir.changes` allows.

    Returns:
      How the run ended.

    Raises:
      BadInput: the data or the config is unusable, or the workdir belongs to another config.
    """
    with process.fail_together():
        mesh = sharding.make_mesh(config)
    with open_run(config, workdir) as run:
        (result,) = run_loop([run], SingleTrainer(config, mesh))
    return result


def run_loop(runs: Sequence[Run], trainer: Trainer) -> list[TrainResult]:
    """Trains runs of equal length together, to their end.

    Order of the loop: validate → save → next batch → steps → log; after the last save, the
    thresholds are chosen. On a CPU the first validation runs beside the first steps, because its
    programs take as long to compile as the step. All random numbers are derived
    from the step, so a resumed run repeats the uninterrupted one bit for bit.

    Args:
      runs: the runs; all settings that the loop reads are equal.
      trainer: the compiled training of these runs.

    Returns:
      How each run ended.
    """
    config = runs[0].config
    last = methods.steps(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process.end_alone())
        start, state = trainer.start(runs)
        _log_start(runs, trainer, start, state)
        recorders = [stack.enter_context(run.open_recorder(start)) for run in runs]
        interrupted = stack.enter_context(_catch_interruption())
        folder = runs[0].staging.folder / "profile"
        profile = stack.enter_context(profiler.open_profiler(config.profile, folder, last=last))
        call = _CallInFlight(recorders, trainer)
        # One thread, because two would compile the same program twice.
        thread = stack.enter_context(futures.ThreadPoolExecutor(1, "validation"))
        postponed = _PostponedValidations(thread)
        # A trace of the steps would show the validation beside them.
        beside = hardware.validates_beside_training() and not config.profile
        stride = runs[0].steps_per_call(start)
        for step in range(start, last + 1, stride):
            should_stop, is_last = interrupted(), step == last
            due = step % config.train.validate_every == 0
            should_validate = is_last or (due and not should_stop)
            due = step % config.train.checkpoint_every == 0
            should_save = step > start and (is_last or should_stop or due)
            first = step == start and not is_last
            validate = postponed.add if beside and first else Recorder.validate
            if should_validate or should_save or should_stop:
                # A run that has diverged is neither validated nor saved.
                call.flush_metrics()
            for i, recorder in enumerate(recorders):
                if recorder.result is not None:
                    continue
                if should_validate:
                    params = trainer.state_on_one_device(state, i).eval_params
                    validate(recorder, step, params)
                # A run without steps ends where it starts, and has no checkpoint yet.
                if should_save or (is_last and step not in recorder.checkpoints.steps):
                    recorder.save(step, trainer.state(state, i))
                if is_last:
                    params = trainer.state_on_one_device(state, i).eval_params
                    recorder.write_thresholds(step, params)
                if is_last or should_stop:
                    recorder.finish(FINISHED if is_last else STOPPED, step)
            if all(recorder.result for recorder in recorders):
                break
            with profile.call(step, state):
                began = time.perf_counter()
                batch = trainer.next_batch()
                data_seconds = time.perf_counter() - began
                state, values = trainer.run_steps(state, batch)
            # After the step is compiled, which would take longer beside another compilation.
            postponed.start()
            profile.finish_call(step + stride, state)
            # The metrics of the call before, so that the host need not wait for this one.
            call.flush_metrics()
            call.in_flight = step, values, data_seconds
        # Before the handlers of signals go, because launchers send SIGTERM more than once.
        for run in runs:
            run.checkpoints.wait()
    return [recorder.result for recorder in recorders if recorder.result is not None]


@dataclasses.dataclass
class _PostponedValidations:
    """Validations that wait for the compilation of the step, and then run beside the training.

    Attributes:
      thread: runs them, one after the other.
      waiting: recorder, step and a copy of the parameters of each.
    """

    thread: futures.Executor
    waiting: list[tuple[Recorder, int, Any]] = dataclasses.field(default_factory=list)

    def add(self, recorder: Recorder, step: int, params: Any) -> None:
        """Takes the place of `Recorder.validate`; copies the parameters."""
        # The training overwrites the arrays. They are copied by way of the host, because a copy on
        # the device is a small program for each shape.
        copies = jax.tree.map(
            lambda leaf: jax.device_put(np.array(jax.device_get(leaf)), leaf.sharding), params
        )
        self.waiting.append((recorder, step, copies))

    def start(self) -> None:
        """Starts those that wait."""
        for recorder, step, params in self.waiting:
            recorder.validate_beside(self.thread, step, params)
        self.waiting.clear()


@dataclasses.dataclass
class _CallInFlight:
    """The call that the devices may still be running, whose metrics are not logged yet."""

    recorders: Sequence[Recorder]
    trainer: Trainer
    in_flight: tuple[int, Any, float] | None = None  # step, metrics, data_seconds

    def flush_metrics(self) -> None:
        """Logs the metrics of the call; waits for it if it is still running."""
        if self.in_flight is None:
            return
        step, values, data_seconds = self.in_flight
        for recorder, metrics in zip(self.recorders, self.trainer.metrics(values), strict=True):
            if recorder.result is None:
                recorder.log_steps(step, metrics, data_seconds, self.trainer.flops())
        self.in_flight = None


class SingleTrainer:
    """The trainer of one run, on a mesh with the axes "data" and "model"."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self.mesh = mesh
        self._config = config
        # On all devices, because every call would copy it there otherwise.
        replicated = sharding.replicated_sharding(mesh)
        # The seed is an argument, because JAX keeps a program of each static value for ever.
        make_key = jax.jit(jax.random.key, out_shardings=replicated)
        self._key = make_key(np.uint32(config.train.seed))

    def start(self, runs: Sequence[Run]) -> tuple[int, train_step.TrainState]:
        """Restores the run, opens its data and starts to compile the step; see `Trainer`."""
        (run,) = runs
        shapes = state_shapes(self._config, self._key, self.mesh)
        start, state = run.checkpoints.restore(shapes) or (0, None)
        self._batch_size = self._config.train.batch_size
        rows = sharding.local_rows(self.mesh, self._batch_size)
        resident, self._batches = run.open_batches(start, rows)
        self._resident = sharding.to_global(resident, sharding.replicated_sharding(self.mesh))
        self._step = sharding.compile_step(
            train_step.make_step(self._config),
            self.mesh,
            self._config.sharding.transform,
            shapes,
            steps=run.steps_per_call(start),
            compiler_options=hardware.compiler_options(
                deterministic=self._config.train.deterministic
            ),
        )
        if start < methods.steps(self._config):
            # The step takes longest to compile. What comes before it is compiled at the same time.
            first = next(self._batches)
            self._batches = itertools.chain([first], self._batches)
            batch = sharding.batch_to_global(first, self.mesh, self._batch_size)
            self._step.start_compiling(shapes, self._resident, batch, self._key)
        if state is None:
            state = initial_state(self._config, self._key, self.mesh, run.data.images)
        return start, state

    def next_batch(self) -> dict[str, jax.Array]:
        """Returns the input of the next call, divided among the devices."""
        return sharding.batch_to_global(next(self._batches), self.mesh, self._batch_size)

    def run_steps(
        self, state: train_step.TrainState, batch: dict[str, jax.Array]
    ) -> tuple[train_step.TrainState, Any]:
        """Runs the steps of one call; returns the new state and the metrics."""
        return self._step(state, self._resident, batch, self._key)

    def metrics(self, values: Any) -> list[dict[str, np.ndarray]]:
        """Returns the metrics on the host, in a list of one run."""
        return [jax.device_get(sharding.one_copy(values, self.mesh))]

    def state(self, state: train_step.TrainState, run: int) -> train_step.TrainState:
        """Returns the state as it is: a checkpoint is written from all processes."""
        del run
        return state

    def state_on_one_device(self, state: train_step.TrainState, run: int) -> train_step.TrainState:
        """Returns the state on one device of this process."""
        del run
        return sharding.one_copy(state, self.mesh)

    def flops(self) -> float | None:
        """Returns the FLOP of one step on one device; None before the first call."""
        return train_step.step_flops(self._step.flops, self._config)


def state_shapes(config: Config, key: jax.Array, mesh: jax.sharding.Mesh) -> Any:
    """Returns the shapes, types and shardings of a run's state; nothing is computed.

    Args:
      config: the run's configuration.
      key: the run's root key.
      mesh: the devices.
    """
    shapes = jax.eval_shape(_initialiser(config), key)
    return jax.tree.map(
        lambda leaf, placement: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement),
        shapes,
        sharding.state_sharding(mesh, shapes),
    )


def initial_state(
    config: Config, key: jax.Array, mesh: jax.sharding.Mesh, images: np.ndarray | None = None
) -> Any:
    """Returns the state before the first step, with the shardings of the mesh.

    Args:
      config: the run's configuration.
      key: the run's root key.
      mesh: the devices.
      images: uint8 (n, h, w, c), the training images, to which some methods are fitted.
    """
    # The initializers are hundreds of small random draws: slow to compile, and run once.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(config, key, mesh))
    init = jax.jit(_initialiser(config), out_shardings=shardings, compiler_options=options)
    state = init(key)
    fit = methods.METHODS[config.method].fit
    if fit is None or images is None:
        return state
    params = fit(sharding.one_copy(state.params, mesh), images, config)
    if jax.process_count() > 1:
        # Each process has fitted; on other hardware the last bits, or signs, may be others.
        params = multihost_utils.broadcast_one_to_all(params)
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


@functools.lru_cache(maxsize=1)
def _initialiser(config: Config) -> Callable[[jax.Array], train_step.TrainState]:
    """Returns key → state; one object per config, so that JAX traces it once."""
    return functools.partial(train_step.init_state, config)


def _log_start(runs: Sequence[Run], trainer: Trainer, start: int, state: Any) -> None:
    """Logs what is going to be trained, on which devices and from which step on."""
    run, steps = runs[0], methods.steps(runs[0].config)
    workdirs = str(run.workdir)
    if len(runs) > 1:
        workdirs = f"{len(runs)} runs as one program, {run.workdir} to {runs[-1].workdir}"
    mesh = ", ".join(f"{name}={size}" for name, size in trainer.mesh.shape.items())
    kind = trainer.mesh.devices.flat[0].device_kind
    # The arrays of a population have a leading axis of members.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params)) // len(runs)
    training = _format_range([len(run.data.images) for run in runs])
    if any(run.data.reserved for run in runs):
        reserved = _format_range([run.data.reserved for run in runs])
        training += f" ({reserved} of them for the second network alone)"
    held_out = _format_range([len(run.data.held_out) for run in runs])
    storage = "kept on the device" if run.on_device else "streamed from the host"
    resumed = f"resumed from step {start} of {steps}" if start else f"starting, {steps} steps"
    _logger.info("training: %s", printable(workdirs))
    _logger.info("devices: %d of %d %s, mesh %s", trainer.mesh.size, jax.device_count(), kind, mesh)
    if idle := sharding.idle_devices(trainer.mesh):
        names = [str(device) for device in idle[:_MAX_NAMED]]
        names += ["…"] if len(idle) > _MAX_NAMED else []
        _logger.warning("devices without work: %d (%s)", len(idle), ", ".join(names))
    _logger.info("parameters: %s", f"{parameters:,}")
    rule = f"data.holdout_groups={run.config.data.holdout_groups}: {run.data.holdout_rule}"
    _logger.info("images: %s for training, %s held out (%s); %s", training, held_out, rule, storage)
    _logger.info("steps per call: %d; %s", run.steps_per_call(start), resumed)
    if not start:
        for hint in _hints(run):
            _logger.info("hint: %s", hint)
    if start < steps:
        _logger.info("compiling the training step (a minute or so on a CPU)")


def _hints(run: Run) -> Iterator[str]:
    """Yields a line for each fact that the training images show and the config does not state."""
    config, data = run.config, run.data
    method = methods.METHODS[config.method]
    in_place = config.eval.calibration in ("position", "auto")
    return facts.hints(
        data.images,
        data.aspect_ratio,
        # Only a trained network tints what it paints.
        grey=config.model.grey or method.closed_form or not method.localises,
        by_position=in_place or not method.localises,
    )


def _format_range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


@contextlib.contextmanager
def _catch_interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function, to call once per compiled call, that tells whether to stop.

    SIGTERM and the first Ctrl-C stop the run. Further SIGTERMs change nothing, because launchers
    send several; a second Ctrl-C ends the process. If several processes train together, a signal
    to any of them stops all at the same step.
    """
    several = jax.process_count() > 1
    event = threading.Event()

    def interrupted() -> bool:
        if several:
            # JAX answers yes for one number, the next of the process that is furthest ahead. It
            # never does if numbers are left out, as the numbers of steps would be.
            return multihost_utils.reached_preemption_sync_point(next(_call_numbers))
        return event.is_set()

    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Python delivers signals to the main thread only.
        return

    def handle(number: int, _: object) -> None:
        event.set()
        if number == signal.SIGINT:
            signal.signal(number, handlers_before[number])
            if several:
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells all processes

    # With several processes SIGTERM has JAX's handler.
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    handlers_before: dict[int, Any] = {n: signal.signal(n, handle) for n in numbers}
    try:
        yield interrupted
    finally:
        for number in numbers:
            # None is a handler that was not set from Python.
            signal.signal(number, handlers_before[number] or signal.SIG_DFL)
