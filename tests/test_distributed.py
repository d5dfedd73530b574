"""Training in two processes of two devices each, compared with one process."""

import fcntl
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import runs
from pae_jax import train
from pae_jax.devices import process

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


# `pae` where jax.make_mesh gives another order, as on TPUs; here devices of two processes by turns.
PERMUTED = """
import sys
import jax
import numpy as np
from pae_jax import main

def by_turns(shape, axes, types, *, devices):
    order = [0, 2, 1, 3] if len(devices) == 4 else range(len(devices))
    return jax.sharding.Mesh(np.asarray(devices)[order].reshape(shape), axes, axis_types=types)

jax.make_mesh = by_turns
sys.exit(main.main(sys.argv[1:]))
"""
PLAIN = "import sys; from pae_jax import main; sys.exit(main.main(sys.argv[1:]))"


def start(root, workdir, *, code=PLAIN, folders=(PROJECT, PROJECT), last=(), **changes):
    """Starts `pae train` in two processes of two devices each.

    Args:
      root: the folder of `runs.make_folder`.
      workdir: the run's folder.
      code: the program.
      folders: the current folder of each process.
      last: further words for the last process.
      changes: keys and values of the config, with "__" for the dot of a key.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    words = runs.words(root, **{**CHANGES, **changes})
    command = [sys.executable, "-c", code, "train", *words, f"--workdir={workdir}"]
    environment = runs.environment() | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(PROJECT)}
    return [
        subprocess.Popen(
            [*command, *(last if index else ()), f"--distributed=localhost:{port}/2/{index}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, folder in enumerate(folders)
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


@pytest.mark.parametrize(
    ("code", "model"), [(PLAIN, 4), (PERMUTED, 1), (PERMUTED, 2)], ids=["1x4", "4x1", "2x2"]
)
def test_any_mesh_trains_as_one_process(trained, alone, tmp_path, code, model):
    """The axis "model" reaches over both processes, or their devices take turns in the mesh."""
    processes = start(trained.root, tmp_path, code=code, sharding__model_parallel=model)
    for status, _, err in finish(processes):
        assert status == 0, err
        assert f"devices: 4 of 4 cpu, mesh data={4 // model}, model={model}" in err
    assert_as_one(tmp_path, alone)


@pytest.mark.parametrize("stride", [1, 5, 10])
def test_a_signal_to_one_process_stops_both_at_the_same_step(trained, tmp_path, stride):
    """Also with several steps a call; a second signal, as launchers send it, changes nothing."""
    long = {"train__steps": 5000, "train__validate_every": 5000, "train__checkpoint_every": 5000}
    processes = start(trained.root, tmp_path, train__steps_per_call=stride, **long)
    while not ((tmp_path / "metrics.jsonl").exists() and train_losses(tmp_path)):
        assert processes[0].poll() is None, processes[0].stderr.read()
    processes[1].send_signal(signal.SIGTERM)
    processes[1].send_signal(signal.SIGTERM)
    processes[0].send_signal(signal.SIGTERM)
    time.sleep(0.3)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [1, 1], results
    (outcome,) = {out.split(": ")[-1].strip() for _, out, _ in results}
    words, _, step = outcome.rpartition(" ")
    assert words == "stopped at step"
    assert runs.read_state(tmp_path)[0] == int(step) < 5000
    assert int(step) % stride == 0


def assert_refused(processes, *lines):
    """Asserts that each process ended with its line and nothing else."""
    results = finish(processes)
    assert [code for code, _, _ in results] == [2, 2], results
    for (_, _, err), line in zip(results, lines, strict=True):
        (printed,) = err.splitlines()
        assert re.fullmatch(f"pae train: {line}", printed), printed


@pytest.mark.parametrize(
    ("word", "lines"),
    [
        ("--config.train.stepz=3", (r"process 1 of 2: (.*train\.stepz.*)", r".*train\.stepz.*")),
        (
            "--config.data.root=nowhere",
            (r"process 1 of 2: .*nowhere.*", r".*nowhere.*"),
        ),
        (
            "--config.train.seed=7",
            (r"process 1 differs from process 0: config\.train\.seed is 0 in .* and 7 in .*",) * 2,
        ),
    ],
)
def test_what_one_process_cannot_use_ends_both(trained, tmp_path, word, lines):
    assert_refused(start(trained.root, tmp_path / "w", last=(word,)), *lines)
    assert not list(tmp_path.glob("w/*.json"))


def test_processes_with_other_data_refuse(trained, tmp_path):
    """Both have the same command, and folders of equal names with one image that differs."""
    for name in ("a", "b"):
        for part in ("data", "textures"):
            shutil.copytree(trained.root / part, tmp_path / name / part)
    image = tmp_path / "b/data/train/good/000.png"
    shutil.copy(image.with_name("001.png"), image)
    folders = (tmp_path / "a", tmp_path / "b")
    line = r"process 1 differs from process 0: data\.fingerprint is '\w+' in .* and '\w+' in .*"
    assert_refused(start(Path(), tmp_path / "w", folders=folders), line, line)
    assert not list(tmp_path.glob("w/*.json"))


def test_processes_with_equal_data_in_other_folders_train_together(trained, alone, tmp_path):
    """A path is no data: its fingerprint is compared, at the start and when a run is resumed."""
    for part in ("data", "textures"):
        shutil.copytree(trained.root / part, tmp_path / "other" / part)
    places = {"root": "data", "textures": "textures", "cache_dir": "cache"}
    last = [f"--config.data.{key}={tmp_path / 'other' / to}" for key, to in places.items()]
    for _ in range(2):
        results = finish(start(trained.root, tmp_path / "w", last=last))
        assert [code for code, _, _ in results] == [0, 0], results
    assert_as_one(tmp_path / "w", alone)
    assert str(tmp_path) not in (tmp_path / "w/config.json").read_text()  # that of process 0


@pytest.mark.parametrize("method", ["pca", "one_class_svm", "deep_svdd"])
def test_a_fit_in_two_processes_equals_that_of_one(trained, tmp_path, method):
    """Also with parameters divided over both processes."""
    changes = {
        "method": method,
        "baseline__pca_components": 4,
        "baseline__svm_side": 4,
        "baseline__svm_images": 12,
        "baseline__svdd_dimensions": 4,
        "corruption__clean_fraction": 1.0,
    }
    single = tmp_path / "single"
    train.train_and_evaluate(runs.load_config(trained.root, **CHANGES | changes), single)
    processes = start(trained.root, tmp_path / "two", sharding__model_parallel=4, **changes)
    for code, _, err in finish(processes):
        assert code == 0, err
    (step, leaves), (other_step, others) = map(runs.read_state, (tmp_path / "two", single))
    assert step == other_step == (20 if method == "deep_svdd" else 0)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves)
    for leaf, another in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, another, rtol=1e-3, atol=1e-5)


# `pae` whose processes notice within ten seconds that another is lost; the last one may fail.
FAILING = """
import sys
from pae_jax import main, train_step
from pae_jax.devices import process
from pae_jax.train import SingleTrainer

process.HEARTBEAT_TIMEOUT = 10
next_batch, calls = SingleTrainer.next_batch, []

def failing(self):
    calls.append(None)
    if "FAIL" in sys.argv and len(calls) == 30:
        raise OSError("the disk is gone")
    return next_batch(self)

SingleTrainer.next_batch = failing
sys.exit(main.main([word for word in sys.argv[1:] if word != "FAIL"]))
"""


@pytest.mark.parametrize(
    ("victim", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGSTOP), (1, None)],
    ids=["kill the first", "stop the last", "exception"],
)
def test_a_lost_process_ends_the_other_in_time(trained, tmp_path, victim, number):
    long = {"train__steps": 50000, "train__validate_every": 50000, "train__checkpoint_every": 50000}
    last = () if number else ("FAIL",)
    processes = start(trained.root, tmp_path, code=FAILING, last=last, **long)
    while not ((tmp_path / "metrics.jsonl").exists() and train_losses(tmp_path)):
        assert processes[0].poll() is None, processes[0].stderr.read()
    began = time.monotonic()
    if number:
        processes[victim].send_signal(number)
    ((code, _, err),) = finish([processes[1 - victim]])
    seconds = time.monotonic() - began
    if number:
        processes[victim].kill()  # a stopped one
    ((_, _, victim_err),) = finish([processes[victim]])
    assert code not in (0, None)
    assert seconds < 10 + 20
    # If JAX notices first, it aborts in C++ with a message of its own.
    assert process.LOST in err or re.search("coordination.service|distributed service|gloo", err)
    if not number:
        assert victim_err.splitlines()[-1] == "OSError: the disk is gone"


def test_a_locked_workdir_ends_both(trained, tmp_path):
    """Only the main process locks it."""
    tmp_path.joinpath("w").mkdir()
    with (tmp_path / "w/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = ".*: another process is training there"
        assert_refused(start(trained.root, tmp_path / "w"), line, f"process 0 of 2: {line}")
