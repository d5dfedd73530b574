"""Profiles hold the steps that were asked for; the loop moves no data between devices unasked."""

import contextlib
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, population, train
from pae_jax.devices import batches, hardware, sharding
from pae_jax.devices.profiler import open_profiler
from pae_jax.workdir.run import open_run

pytestmark = pytest.mark.usefixtures("compilation_cache")
ITERATIONS = 30


@jax.jit
def slow(x):
    return jax.lax.fori_loop(0, ITERATIONS, lambda i, x: jnp.tanh(x @ x), x)


class Event(NamedTuple):
    name: str
    step: int | None  # of a StepTraceAnnotation


def read_events(folder: Path) -> list[Event]:
    """Returns all events of the one trace in a folder; none if there is no trace."""
    files = list(folder.rglob("*.xplane.pb"))
    assert len(files) <= 1
    events = []
    for file in files:
        # JAX 0.12 warns when it makes a type of its own for `stats`, and aborts if that raises.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        # Planes, lines and events point into this object; without it they are invalid.
        data = ProfileData.from_file(str(file))
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    step = dict(event.stats)["step_num"] if event.name == "train" else None
                    events.append(Event(event.name, step))
    return events


def marked_steps(events: list[Event]) -> list[int]:
    return sorted(event.step for event in events if event.step is not None)


@pytest.mark.parametrize(
    ("steps", "start", "stride", "calls"),
    [
        ((4, 8), 0, 1, [4, 5, 6, 7]),
        ((4, 8), 0, 4, [4]),  # exactly one call: neither the one before nor the one after
        ((4, 8), 0, 2, [4, 6]),
        ((4, 8), 6, 2, [6]),  # resumed inside the range
        ((8, 99), 0, 4, [8]),  # beyond the end of the run
        ((4, 8), 8, 4, []),
        ((), 0, 4, []),
    ],
)
def test_a_trace_holds_the_work_of_its_steps_and_no_other(tmp_path, steps, start, stride, calls):
    x = slow(jnp.full((300, 300), 1e-3))
    with open_profiler(steps, tmp_path, last=12) as profiler:
        for step in range(start, 12, stride):
            with profiler.call(step, x):
                x = slow(x)
            profiler.finish_call(step + stride, x)
    events = read_events(tmp_path)
    assert marked_steps(events) == calls
    done = [e for e in events if "tanh" in e.name and not e.name.startswith("end")]
    assert len(done) == ITERATIONS * len(calls)


def test_a_trace_is_written_when_a_call_fails(tmp_path):
    x = slow(jnp.full((300, 300), 1e-3))
    with pytest.raises(ZeroDivisionError), open_profiler((0, 8), tmp_path, last=12) as profiler:
        with profiler.call(0, x):
            x = slow(x)
        with profiler.call(1, x):
            raise ZeroDivisionError
    assert marked_steps(read_events(tmp_path))[0] == 0


def test_calls_end_where_a_profile_begins_and_ends():
    with hardware.building_for("gpu"):
        for profile, expected in (((100, 110), 10), ((100, 105), 5), ((3, 6), 1), ((), 10)):
            settings = config.from_config_dict({"profile": profile})
            assert batches.steps_per_call(settings, on_device=True) == expected, profile
    with pytest.raises(
        BadInput, match=r"train\.steps_per_call: 5 does not divide profile=\(3, 5\)"
    ):
        config.from_config_dict({"profile": (3, 5), "train": {"steps_per_call": 5}})


def test_the_trace_of_a_run_with_several_steps_per_call(trained, tmp_path):
    changes = {"train__steps": 10, "train__validate_every": 5, "train__checkpoint_every": 5}
    settings = runs.load_config(
        trained.root, profile="(5,10)", train__steps_per_call=5, data__on_device="yes", **changes
    )
    train.train_and_evaluate(settings, tmp_path)
    assert marked_steps(read_events(tmp_path / "profile")) == [5]


SHORT = {"train__steps": 6, "train__validate_every": 3, "train__checkpoint_every": 3}


class Guarded:
    """Makes `start` free to transfer: only the loop is tested."""

    def start(self, opened):
        with jax.transfer_guard("allow"):
            return super().start(opened)


class GuardedTrainer(Guarded, train.SingleTrainer):
    pass


class GuardedPopulation(Guarded, population.Population):
    pass


@pytest.mark.parametrize("on_device", ["yes", "no"])
def test_the_loop_transfers_explicitly_alone(trained, tmp_path, on_device):
    settings = runs.load_config(
        trained.root, data__on_device=on_device, sharding__data_parallel=2, **SHORT
    )
    trainer = GuardedTrainer(settings, sharding.make_mesh(settings))
    with open_run(settings, tmp_path) as run, jax.transfer_guard("disallow"):
        (result,) = train.run_loop([run], trainer)
    assert result.outcome == train.FINISHED


def test_the_loop_of_a_population_transfers_explicitly_alone(trained, tmp_path):
    settings = [runs.load_config(trained.root, train__seed=seed, **SHORT) for seed in range(9)]
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(open_run(member, tmp_path / str(i)))
            for i, member in enumerate(settings)
        ]
        trainer = GuardedPopulation(settings)
        with jax.transfer_guard("disallow"):
            results = train.run_loop(opened, trainer)
    assert [result.outcome for result in results] == [train.FINISHED] * 9
