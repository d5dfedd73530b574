"""Training in two processes of two devices each, compared with one process."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runs
from pae_jax import train

PROJECT = Path(__file__).parents[1]
CHANGES = {
    # Adam turns the rounding errors of a gradient that a norm makes zero into full steps.
    "model__norm": "none",
    "optimizer__learning_rate": 1e-3,
    "train__steps": 20,
    "train__validate_every": 10,
    "train__checkpoint_every": 10,
    "sharding__data_parallel": -1,
}


def start(root, workdir, count=2, **changes) -> list[subprocess.Popen]:
    """Starts `pae train` in `count` processes of two devices each."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    words = runs.words(root, **{**CHANGES, **changes})
    command = [sys.executable, "-m", "pae_jax.main", "train", *words, f"--workdir={workdir}"]
    environment = runs.environment() | {"JAX_NUM_CPU_DEVICES": "2"}
    return [
        subprocess.Popen(
            [*command, f"--distributed=localhost:{port}/{count}/{index}"],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes) -> list[tuple[int, str, str]]:
    try:
        texts = [process.communicate(timeout=200) for process in processes]
        return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def train_losses(workdir: Path) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory, compilation_cache):
    workdir = tmp_path_factory.mktemp("alone")
    train.train_and_evaluate(runs.load_config(trained.root, **CHANGES), workdir)
    return workdir


def assert_as_one(workdir, alone):
    np.testing.assert_allclose(train_losses(workdir), train_losses(alone), rtol=1e-5)
    (step, leaves), (other_step, others) = runs.read_state(workdir), runs.read_state(alone)
    assert step == other_step == 20
    for leaf, another in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, another, rtol=1e-3, atol=1e-5)


def test_two_processes_train_as_one(trained, alone, tmp_path):
    for index, (code, out, err) in enumerate(finish(start(trained.root, tmp_path))):
        assert code == 0, err
        assert f"[process {index} of 2] devices: 4 of 4 cpu" in err
        assert "finished at step 20" in out
    assert len(train_losses(tmp_path)) == 20  # only the main process writes
    assert_as_one(tmp_path, alone)


def test_a_signal_to_one_process_stops_both_at_the_same_step(trained, tmp_path):
    long = {"train__steps": 5000, "train__validate_every": 5000, "train__checkpoint_every": 5000}
    processes = start(trained.root, tmp_path, **long)
    while not ((tmp_path / "metrics.jsonl").exists() and train_losses(tmp_path)):
        assert processes[0].poll() is None, processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [1, 1], results
    (outcome,) = {out.split(": ")[-1].strip() for _, out, _ in results}
    words, _, step = outcome.rpartition(" ")
    assert words == "stopped at step"
    assert runs.read_state(tmp_path)[0] == int(step) < 5000
