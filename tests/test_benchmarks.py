"""The benchmarks' smallest runs, and the equality of what benchmarks/step.py compares."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from pae_jax import unet
from pae_jax.config import ModelConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: the extra bench"
)
TINY = ("--widths", "4", "--rounds", "1")


def run(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    environment = runs.environment() | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def numbers(process: subprocess.CompletedProcess, pattern: str) -> list[float]:
    """What the pattern's one group found on stdout."""
    assert process.returncode == 0, process.stderr
    return [float(text) for text in re.findall(pattern, process.stdout, re.MULTILINE)]


@pytest.mark.parametrize("name", ["step", "pipeline", "predict"])
def test_help_names_every_option_of_the_usage_line(name):
    process = run(name, "--help")
    assert process.returncode == 0, process.stderr
    shown = process.stdout.split("usage:")[1]
    usage, options = shown.split("\noptions:\n")
    named = set(re.findall(r"\[(--\w+)", usage))
    assert {"--rounds", "--widths", "--batch" + "es" * (name == "predict")} <= named
    assert all(option in options for option in named)


def test_step_times_jax_alone():
    process = run("step", "--only", "jax", "--sizes", "8", "16", "--norm", "none", *TINY)
    found = numbers(process, r"^jax +float32 +([\d.]+)")
    assert len(found) == 2
    assert min(found) > 0


def test_step_refuses_sizes_that_the_twin_cannot_pool():
    process = run("step", "--only", "jax", "--sizes", "10", "--widths", "4", "4")
    assert process.returncode == 2
    assert "--sizes 10" in process.stderr


@WITH_TORCH
def test_step_compares_and_gives_a_ratio():
    words = ("--only", "jax", "torch eager", "--sizes", "8", "--norm", "none")
    process = run("step", *words, *TINY, "--threads", "1")
    assert numbers(process, r"^jax / torch eager \w+: ([\d.]+)")[0] > 0


def test_pipeline_measures_batches_and_steps():
    small = ("--images", "6", "--textures", "3", "--png", "24", "--size", "8")
    process = run("pipeline", *small, "--batch", "2", "--steps", "2", *TINY)
    assert numbers(process, r"^warm: batches/s +([\d.]+)")[0] > 0
    assert numbers(process, r"^step alone: steps/s +([\d.]+)")[0] > 0
    assert 0 <= numbers(process, r"^waiting.* ([\d.]+)$")[0] <= 1


def test_predict_measures_with_and_without_files(compilation_cache):
    small = ("--images", "8", "--png", "24", "--size", "8", "--batches", "1", "2")
    process = run("predict", *small, *TINY)
    without, _, files = process.stdout.partition("with files")
    assert process.returncode == 0, process.stderr
    assert re.findall(r"^\| (\d+) \|", without, re.MULTILINE) == ["1", "2"]
    assert re.search(r"^\| 1 \|", files, re.MULTILINE)


@WITH_TORCH
@pytest.mark.parametrize(
    "changes",
    [{}, {"norm": "none"}, {"norm": "instance", "stem": 2}, {"norm": "layer", "kernel": 5}],
    ids=str,
)
def test_the_twin_takes_the_same_step(monkeypatch, changes):
    monkeypatch.syspath_prepend(BENCHMARKS)
    step = importlib.import_module("step")
    settings = {"widths": (8, 16), "branch_width": 8, "rates": (1, 2), "kernel": 3, **changes}
    config = ModelConfig(**settings)
    batch = step.make_batch(16, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    found = step.differences(config, params, batch)
    assert found.keys() == step.TOLERANCES.keys()
    for name, limit in step.TOLERANCES.items():
        assert found[name] <= limit, (name, found)


@WITH_TORCH
def test_a_changed_twin_is_noticed(monkeypatch):
    """The comparison can fail: one kernel of the twin is scaled by a thousandth more."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    step, twin = importlib.import_module("step"), importlib.import_module("step_torch")
    config = ModelConfig(widths=(4,), branch_width=4, rates=(1,), kernel=3)
    batch = step.make_batch(8, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    load = twin.load

    def spoil(module, variables):
        load(module, variables)
        module.Conv_0.weight.data *= 1.001

    monkeypatch.setattr(twin, "load", spoil)
    found = step.differences(config, params, batch)
    assert found["output"] > step.TOLERANCES["output"]


@WITH_TORCH
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layouts_hold_the_same_numbers(monkeypatch, layout):
    monkeypatch.syspath_prepend(BENCHMARKS)
    step, twin = importlib.import_module("step"), importlib.import_module("step_torch")
    config = ModelConfig(widths=(4, 8), branch_width=4, rates=(1, 2), kernel=3)
    batch = step.make_batch(16, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    _, take = twin.make_step(config, params, batch, layout=layout)
    np.testing.assert_allclose(take(), step.loss(params, batch, config), rtol=1e-5)
