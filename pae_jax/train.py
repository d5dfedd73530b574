"""The training loop."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from data_pipelines.dataset import TrainingSplit, open_training
from data_pipelines.pipeline import batches
from data_pipelines.textures import Textures, open_textures
from pae_jax import augmentation, checkpoint, logs, sharding, train_step, validation
from pae_jax.config import Config

FINISHED, STOPPED, DIVERGED = "finished", "stopped", "diverged"


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
      outcome: FINISHED; STOPPED by SIGTERM, its state saved; or DIVERGED: the loss, the
        gradient or the parameters of `step` were not finite; the last good checkpoint is kept.
      step: updates done, or the number of the update that diverged.
      validation: metrics of the last validation on held-out corruptions.
    """

    outcome: str
    step: int
    validation: dict[str, float]


def train_and_evaluate(config: Config, workdir: str | Path) -> TrainResult:
    """Trains in `workdir`, evaluating on held-out corruptions; resumes what it finds there.

    The order of the loop: validate the state → save it → next batch → step → log. All that is
    random is folded by the step, so a resumed run repeats the undisturbed one bit for bit.

    Raises:
      BadInput: the data or the config is unusable, or the workdir belongs to another config.
    """
    workdir, train = Path(workdir), config.train
    mesh = sharding.make_mesh(config)
    augmentation.check_policy(config.data.augmentation, config.data.shape)
    checkpoint.check_workdir(workdir, config)
    data, textures = open_data(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint.claim_workdir(workdir, config, _describe(data, textures)))
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, keep=train.keep))
        key = jax.random.key(train.seed)
        state = _initial_state(config, key, mesh)
        start, state = checkpoints.restore(state) or (0, state)
        step_function = sharding.compile_step(
            lambda *args, axis=None: train_step.train_step(*args, config=config, axis=axis),
            mesh,
            config.sharding.wrapper,
        )
        examples = validation.fixed_examples(data.held_out, textures.held_out, config)
        validate = validation.make_validate(config, examples)
        stream = batches(
            data.images,
            textures.train,
            seed=train.seed,
            batch_size=train.batch_size,
            start_step=start,
            workers=config.data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        log = stack.enter_context(logs.RunLog(workdir, config, start=start))
        stop = stack.enter_context(_sigterm())
        scores: dict[str, float] = {}
        metrics: dict[str, Any] = {}

        for step in range(start, train.steps + 1):
            stopping, ending = stop.is_set(), step == train.steps
            validating = ending or (step % train.validate_every == 0 and not stopping)
            saving = step > start and (ending or stopping or step % train.checkpoint_every == 0)
            if (validating or saving) and not _finite(metrics):
                return TrainResult(DIVERGED, step, scores)
            if validating:
                scores, panel = validate(state.eval_params)
                log.validation(step, scores, panel)
            if saving:
                checkpoints.save(step, state)
            if ending or stopping:
                return TrainResult(FINISHED if ending else STOPPED, step, scores)
            began = time.perf_counter()
            batch = sharding.place_batch(next(stream), mesh)
            waited = time.perf_counter() - began
            previous = metrics
            state, metrics = step_function(state, batch, key)
            # One step late, so that the host prepares the next step while this one runs.
            if not _finite(previous):
                return TrainResult(DIVERGED, step, scores)
            log.step(step + 1, metrics, waited)
    raise AssertionError("the loop returns")


def open_data(config: Config) -> tuple[TrainingSplit, Textures]:
    """The training images with those held out, and the textures likewise."""
    data = config.data
    split = open_training(data.spec, holdout=data.holdout, seed=config.train.seed)
    return split, open_run_textures(config)


def open_run_textures(config: Config) -> Textures:
    """The textures, with those held out."""
    data, seed = config.data, config.train.seed
    return open_textures(data.textures, size=data.texture_size, cache=data.cache, seed=seed)


def _describe(data: TrainingSplit, textures: Textures) -> dict[str, Any]:
    """What evaluation must know of the training split, and what a reader wants to."""
    return {
        "channels": data.channels,
        "training_images": len(data.images),
        "held_out_names": list(data.held_out_names),
        "fingerprint": data.fingerprint,
        "textures": {"training": len(textures.train), "held_out": len(textures.held_out)},
        "textures_fingerprint": textures.fingerprint,
    }


def _initial_state(config: Config, key: jax.Array, mesh: jax.sharding.Mesh) -> Any:
    # Initialisers are hundreds of small random draws: slow to compile, run once.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    init = jax.jit(
        lambda k: train_step.init_state(config, k),
        out_shardings=sharding.replicated(mesh),
        compiler_options=options,
    )
    return init(key)


def _finite(metrics: dict[str, Any]) -> bool:
    return all(map(math.isfinite, jax.device_get(metrics).values()))


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; a second SIGTERM ends the process as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach the main thread only
        return

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
