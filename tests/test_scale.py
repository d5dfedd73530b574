"""Training does not depend on the layout: resident data, precision, accumulation, devices."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, train, train_step
from pae_jax.devices import batches, hardware, sharding
from pae_jax.workdir import logs

pytestmark = pytest.mark.usefixtures("compilation_cache")

PROJECT = Path(__file__).parents[1]
LONG = {
    # Adam turns the rounding errors of a gradient that a norm makes zero into full steps.
    "model__norm": "none",
    "optimizer__learning_rate": 1e-3,
    "train__steps": 50,
    "train__validate_every": 50,
    "train__checkpoint_every": 25,
}


@pytest.fixture(scope="module")
def trained_with(trained, tmp_path_factory):
    """Returns the workdir of a run of fifty steps with some changes; trains it once."""
    workdirs = {}

    def workdir(**changes):
        key = tuple(sorted(changes.items()))
        if key not in workdirs:
            workdirs[key] = tmp_path_factory.mktemp("run")
            settings = runs.load_config(trained.root, **{**LONG, **changes})
            assert train.train_and_evaluate(settings, workdirs[key]).outcome == train.FINISHED
        return workdirs[key]

    return workdir


def losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def assert_equal_training(workdir, other, rtol=1e-5):
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=rtol)
    (step, leaves), (other_step, others) = runs.read_state(workdir), runs.read_state(other)
    assert step == other_step == 50
    for leaf, another in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, another, rtol=1e-3, atol=1e-5)


def test_data_on_the_device_gives_the_same_parameters(trained_with):
    resident = trained_with(data__on_device="yes")
    runs.assert_same_state(resident, trained_with())
    assert losses(resident) == losses(trained_with())
    several = trained_with(data__on_device="yes", train__steps_per_call=5)
    assert_equal_training(several, trained_with())
    assert_equal_training(trained_with(train__steps_per_call=5), trained_with())


def test_accumulated_gradients_equal_those_of_the_batch(trained_with):
    assert_equal_training(trained_with(train__grad_accumulation_steps=2), trained_with())
    assert_equal_training(
        trained_with(train__grad_accumulation_steps=4, sharding__data_parallel=-1), trained_with()
    )


def test_bfloat16_is_close_and_keeps_float32_parameters(trained_with):
    narrow, wide = trained_with(model__dtype="bfloat16"), trained_with()
    assert losses(narrow) != losses(wide)
    # The mean of the last steps, since single batches differ by far more than the precision.
    np.testing.assert_allclose(np.mean(losses(narrow)[-5:]), np.mean(losses(wide)[-5:]), rtol=0.02)
    _, leaves = runs.read_state(narrow)
    assert {leaf.dtype.name for leaf in leaves} <= {"float32", "int32"}


def test_a_run_resumes_on_fewer_and_on_more_devices(trained, trained_with, tmp_path, monkeypatch):
    """The same config is trained on 8, then 4, then 1, then 2 devices."""
    changes = {"sharding__data_parallel": -1, "train__batch_size": 8}
    settings = runs.load_config(trained.root, **{**LONG, **changes})
    devices, step, seen = jax.devices(), logs.RunLog.step, []
    place = sharding.batch_to_global

    def placed(arrays, mesh, batch_size):
        seen.append(mesh.size)
        return place(arrays, mesh, batch_size)

    monkeypatch.setattr(sharding, "batch_to_global", placed)
    for count, last in ((8, 10), (4, 20), (1, 30), (2, 50)):

        def stop(self, number, *args, last=last):
            step(self, number, *args)
            if number == last - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda count=count: devices[:count])
            patch.setattr(jax, "device_count", lambda count=count: count)
            if last < 50:
                patch.setattr(logs.RunLog, "step", stop)
            assert train.train_and_evaluate(settings, tmp_path).step == last
        assert set(seen) == {count}
        seen.clear()
    assert_equal_training(tmp_path, trained_with(train__batch_size=8))


def test_a_second_start_compiles_nothing(trained, tmp_path):
    """JAX counts the compilations, in a separate process with a separate cache."""
    code = (
        "import collections, sys, jax\n"
        "from pae_jax import main\n"
        "events = collections.Counter()\n"
        "jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))\n"
        "assert main.main(sys.argv[1:]) == 0\n"
        "print(events['/jax/compilation_cache/cache_misses'],"
        " events['/jax/compilation_cache/cache_hits'])\n"
    )
    words = runs.words(trained.root, **{**LONG, "train__steps": 10, "train__validate_every": 10})
    environment = {
        name: value for name, value in runs.environment().items() if "COMPIL" not in name
    }
    counts = []
    for start in range(2):
        printed = subprocess.run(
            [sys.executable, "-c", code, "train", *words, f"--workdir={tmp_path / str(start)}"],
            cwd=PROJECT,
            env=environment | {"PAE_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert printed.returncode == 0, printed.stderr
        counts.append([int(word) for word in printed.stdout.split()[-2:]])
    (misses, _), (again, hits) = counts
    assert misses > 3
    assert again == 0
    assert hits >= misses
    assert list((tmp_path / "cache/compiled").glob("*/*"))


def test_profile_traces_the_given_steps(trained, tmp_path):
    changes = {"profile": "(2,4)", "train__steps": 10}
    settings = runs.load_config(trained.root, **{**LONG, **changes})
    assert settings.profile == (2, 4)
    train.train_and_evaluate(settings, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train__steps_per_call": 7}, r"train\.steps_per_call: 7 does not divide train\.steps=50"),
        ({"profile": "(3,)"}, r"profile: \(first step, step after the last\), not \(3,\)"),
        ({"profile": "(3,2)"}, r"profile: \(first step, step after the last\)"),
        ({"sharding__model_parallel": 3}, r"sharding\.model_parallel: 3 does not divide 8 devices"),
        (
            {"sharding__model_parallel": 2, "sharding__transform": "pmap"},
            r"sharding\.model_parallel: 2 needs sharding\.transform=jit",
        ),
        (
            {"train__grad_accumulation_steps": 3},
            r"train\.batch_size: 4 is not divisible by train\.grad_accumulation_steps=3",
        ),
    ],
)
def test_impossible_layouts_are_refused(trained, tmp_path, changes, line):
    with pytest.raises(BadInput, match=line):
        train.train_and_evaluate(
            runs.load_config(trained.root, **{**LONG, **changes}), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_resident_data_and_steps_per_call(monkeypatch):
    images, textures = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)
    auto = config.Config()
    assert not batches.is_resident(auto, images, textures)  # a CPU
    assert batches.steps_per_call(auto, on_device=True) == 1

    class Device:
        platform = "gpu"
        device_kind = "NVIDIA H100 80GB HBM3"

        def __init__(self, limit):
            self._limit = limit

        def memory_stats(self):
            return {"bytes_limit": self._limit}

    # A batch of validation examples: two images of three channels and a mask, float32.
    few = config.from_config_dict({"data": {"size": 8}, "train": {"validation_examples": 3}})
    size = images.nbytes + textures.nbytes + 3 * 8 * 8 * (3 + 3 + 1) * 4
    for limit, expected in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(jax, "local_devices", lambda limit=limit: [Device(limit)])
        assert batches.is_resident(few, images, textures) is expected
    # Where the device does not say, the vendor's figure is taken.
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert batches.is_resident(few, images, textures)
    assert not batches.is_resident(few, np.broadcast_to(images[:1], (30 * 2**28, 4, 4, 3)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert batches.steps_per_call(auto, on_device=True) == 10
    assert batches.steps_per_call(auto, on_device=False) == 1
    # A run may have been stopped at any step where calls had one step.
    assert batches.steps_per_call(auto, on_device=True, start=37) == 1
    assert batches.steps_per_call(auto, on_device=True, start=36) == 4
    odd = config.from_config_dict({"train": {"steps": 1200, "validate_every": 400}})
    assert batches.steps_per_call(odd, on_device=True) == 10
    assert hardware.peak_flops() == 989e12
    assert hardware.chip("cpu") is None


def test_utilisation_is_logged_if_the_peak_is_known(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now)
    monkeypatch.setattr(hardware, "peak_flops", lambda: 100.0)
    settings = config.from_config_dict({"train": {"log_every": 2, "tensorboard": False}})
    with logs.RunLog(tmp_path, settings, start=0) as log:
        for step in (1, 2):
            now += 0.5
            log.step(step, {"loss": 1.0}, 0.1, flops=10.0)
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["speed/model_flop_utilisation"] == pytest.approx(0.2)


def test_flops_do_not_depend_on_the_layout(trained):
    """The FLOP of a step on one device: half on each of two, the same in parts and in scans."""
    flops = {}
    for name, changes in {
        "plain": {},
        "two devices": {"sharding__data_parallel": 2},
        "shard_map": {"sharding__data_parallel": 2, "sharding__transform": "shard_map"},
        "parts": {"train__grad_accumulation_steps": 2},
        "several steps": {"train__steps_per_call": 5},
    }.items():
        settings = runs.load_config(trained.root, **{**LONG, **changes})
        mesh = sharding.make_mesh(settings)
        program = train.SingleTrainer(settings, mesh)
        state = train.initial_state(settings, jax.random.key(0), mesh)
        program._step = sharding.compile_step(
            train_step.make_step(settings),
            mesh,
            settings.sharding.transform,
            state,
            steps=settings.train.steps_per_call or 1,
        )
        shape = (settings.train.steps_per_call or 1, 4, 16, 16, 1)
        pixels = {name: np.zeros(shape, np.uint8) for name in ("image", "texture")}
        batch = sharding.to_global(pixels, sharding.batch_sharding(mesh))
        program._step(state, {}, batch, jax.random.key(0))
        flops[name] = program.flops()
    for name, divisor in {"two devices": 2, "shard_map": 2, "parts": 1, "several steps": 1}.items():
        assert flops[name] == pytest.approx(flops["plain"] / divisor, rel=0.1), name
