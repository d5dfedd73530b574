"""The start of a training: what is compiled and measured while something else goes on."""

import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from pae_jax import train
from pae_jax.devices import hardware, sharding
from pae_jax.workdir import validation

ONES = np.ones(3, np.float32)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def make_step(fails: bool = False) -> tuple[sharding.CompiledOnce, list[bool]]:
    """Returns x → 2x, and a list of whether it was traced in the main thread."""
    traced = []

    def double(x: jax.Array) -> jax.Array:
        traced.append(threading.current_thread() is threading.main_thread())
        if fails:
            raise ValueError("no such step")
        return 2 * x

    return sharding.CompiledOnce(jax.jit(double)), traced


def test_a_step_is_compiled_in_a_thread_for_its_first_call():
    step, traced = make_step()
    x = jax.device_put(ONES)
    step.start_compiling(x)
    np.testing.assert_array_equal(step(x), 2 * ONES)
    assert traced == [False]
    assert step.flops == 3
    with pytest.raises(TypeError, match="compiled"):
        step(np.ones(4, np.float32))


def test_what_fails_in_the_thread_is_raised_by_the_first_call():
    step, _ = make_step(fails=True)
    x = jax.device_put(ONES)
    step.start_compiling(x)
    with pytest.raises(ValueError, match="no such step"):
        step(x)


def test_nothing_is_compiled_beside_other_work_on_a_gpu():
    step, traced = make_step()
    x = jax.device_put(ONES)
    with hardware.building_for("gpu"):
        step.start_compiling(x)
    np.testing.assert_array_equal(step(x), 2 * ONES)
    assert traced == [True]


def patch_first_validation(monkeypatch, before) -> None:
    """Calls `before` in the thread of the validation that runs beside the training."""
    make_validate = validation.make_validate

    def make(*args):
        validate = make_validate(*args)

        def patched(params):
            if threading.current_thread() is not threading.main_thread():
                before()
            return validate(params)

        return patched

    monkeypatch.setattr(validation, "make_validate", make)


def test_the_first_validation_runs_beside_the_first_steps(trained, tmp_path, monkeypatch):
    """It waits for the third step, and is still the first line, with the same numbers."""
    third_step, calls = threading.Event(), []
    run_steps = train.SingleTrainer.run_steps

    def count(self, *args):
        calls.append(None)
        if len(calls) == 3:
            third_step.set()
        return run_steps(self, *args)

    def wait():
        assert third_step.wait(120), "training waits for the validation"

    monkeypatch.setattr(train.SingleTrainer, "run_steps", count)
    patch_first_validation(monkeypatch, wait)
    config = runs.load_config(trained.root, train__log_every=5)
    result = train.train_and_evaluate(config, tmp_path)

    found = lines(tmp_path)
    assert [line["step"] for line in found] == [0, 5, 10, 10, 15, 20, 20, 25, 30, 30]
    validations = [
        [x for x in log if "validation/loss" in x] for log in (found, lines(trained.workdir))
    ]
    assert validations[0] == validations[1]
    assert result.validation["loss"] == found[-1]["validation/loss"]
    runs.assert_same_state(tmp_path, trained.workdir)


def test_what_fails_in_the_first_validation_ends_the_training(trained, tmp_path, monkeypatch):
    def fail():
        raise ValueError("no validation")

    patch_first_validation(monkeypatch, fail)
    with pytest.raises(ValueError, match="no validation"):
        train.train_and_evaluate(runs.load_config(trained.root), tmp_path)


def test_a_resumed_run_draws_no_initial_parameters(trained, tmp_path, monkeypatch):
    def draw(*_):
        raise AssertionError("a restored state needs no initial one")

    run = runs.clone(trained, tmp_path)
    monkeypatch.setattr(train, "initial_state", draw)
    result = train.train_and_evaluate(runs.load_config(run.root), run.workdir)
    assert (result.outcome, result.step) == (train.FINISHED, runs.STEPS)
    runs.assert_same_state(run.workdir, trained.workdir)
