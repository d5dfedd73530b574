"""Training end to end: interruptions, the files of a run, and no access to the test split."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
from pae_jax import main, train
from pae_jax.workdir import logs

PROJECT = Path(__file__).parents[1]


def lines(workdir: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps_of(workdir: Path, kind: str) -> list[int]:
    return [line["step"] for line in lines(workdir) if any(k.startswith(kind) for k in line)]


def all_steps(workdir: Path) -> tuple[list[int], list[int]]:
    return steps_of(workdir, "train/"), steps_of(workdir, "validation/")


def test_the_files_of_a_run(trained):
    assert all_steps(trained.workdir) == (list(range(1, runs.STEPS + 1)), [0, 10, 20, 30])
    assert sorted(p.name for p in (trained.workdir / "checkpoints").iterdir()) == ["20", "30"]
    panels = sorted(p.name for p in (trained.workdir / "panels").iterdir())
    assert panels == ["step_0000000.png", "step_0000030.png"]
    record = json.loads((trained.workdir / "data.json").read_text())
    assert record["channels"] == 1
    assert record["training_images"] + len(record["held_out_names"]) == 12


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, tmp_path):
    long = {"train__steps": 300, "train__checkpoint_every": 40, "train__validate_every": 60}
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    words = runs.words(trained.root, **long)
    command = [sys.executable, "-m", "pae_jax.main", "train", *words, f"--workdir={killed}"]
    process = subprocess.Popen(
        command, cwd=PROJECT, env=runs.environment(), stderr=subprocess.DEVNULL
    )
    try:
        saved = reached = 0
        deadline = time.monotonic() + 600
        while not (saved and reached >= saved + 5):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
            saved = max((int(p.name) for p in (killed / "checkpoints").glob("*0")), default=0)
            if (killed / "metrics.jsonl").exists():
                reached = (killed / "metrics.jsonl").read_text().count('"train/loss"')
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert saved < steps_of(killed, "train/")[-1] < 300

    config = runs.load_config(trained.root, **long)
    for workdir in (killed, undisturbed):
        result = train.train_and_evaluate(config, workdir)
        assert (result.outcome, result.step) == (train.FINISHED, 300)
    runs.assert_same_state(killed, undisturbed)
    assert all_steps(killed) == all_steps(undisturbed)
    assert lines(killed)[-1] == lines(undisturbed)[-1]  # the last validation


def test_sigterm_saves_and_stops(trained, tmp_path, monkeypatch, capsys):
    step = logs.RunLog.step

    def terminate(self, number, *args):  # while the step after it runs
        step(self, number, *args)
        if number == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    command = ["train", *runs.words(trained.root), f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        patch.setattr(logs.RunLog, "step", terminate)
        assert main.main(command) == 1
    assert "stopped at step 8" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert runs.read_state(tmp_path)[0] == 8

    assert main.main(command) == 0
    runs.assert_same_state(tmp_path, trained.workdir)
    assert all_steps(tmp_path) == all_steps(trained.workdir)
    # Once more: nothing is left to do, and nothing changes.
    assert main.main(command) == 0
    runs.assert_same_state(tmp_path, trained.workdir)
    assert all_steps(tmp_path) == all_steps(trained.workdir)


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(trained, tmp_path, capsys):
    """The learning rate is 0 in the first step of the warm-up and 1e29 in the second."""
    changes = {
        "optimizer__learning_rate": 1e30,
        "optimizer__warmup_steps": 10,
        "train__checkpoint_every": 1,
        "train__validate_every": 1,
    }
    command = ["train", *runs.words(trained.root, **changes), f"--workdir={tmp_path}"]
    for _ in range(2):  # the second run resumes at step 1, and fails at the same step
        assert main.main(command) == 1
        assert "step 2: loss, gradient or parameters are not finite" in capsys.readouterr().err
        step, leaves = runs.read_state(tmp_path)
        assert step == 1
        assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert steps_of(tmp_path, "validation/") == [0, 1]
    assert lines(tmp_path)[-1]["train/parameter_norm"] is None


def test_a_torn_checkpoint_is_reported_and_the_previous_one_is_used(trained, tmp_path, capsys):
    run = runs.clone(trained, tmp_path)
    torn = run.workdir / "checkpoints/30"
    for path in (torn / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    assert runs.read_state(run.workdir)[0] == 20
    assert f"{torn}: unreadable" in capsys.readouterr().err

    result = train.train_and_evaluate(runs.load_config(run.root), run.workdir)
    assert result.step == 30
    assert f"{torn}: unreadable" in capsys.readouterr().err
    runs.assert_same_state(run.workdir, trained.workdir)


def test_training_never_opens_the_test_split(trained, tmp_path):
    """It opens no file there, and unreadable images and missing masks do not change the result."""
    root = tmp_path / "images"
    shutil.copytree(trained.root, root, ignore=shutil.ignore_patterns("cache"))
    for path in (root / "data/test").rglob("*.png"):
        path.write_bytes(b"poison")
    shutil.rmtree(root / "data/ground_truth")
    forbidden = tuple(str(root / "data" / name) for name in ("test", "ground_truth"))
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir"):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)  # for the rest of the process: a hook cannot be removed
    try:
        train.train_and_evaluate(runs.load_config(root), tmp_path / "run")
    finally:
        watching = False
    assert any(path.startswith(str(root / "data/train")) for path in opened)
    assert not [path for path in opened if path.startswith(forbidden)]
    runs.assert_same_state(tmp_path / "run", trained.workdir)


def test_no_module_of_training_opens_the_test_split():
    seen: set[str] = set()
    waiting = ["pae_jax.train"]
    while waiting:
        module = waiting.pop()
        path = PROJECT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [alias.name for alias in node.names]
                waiting += [node.module, *(f"{node.module}.{name}" for name in names)]
                assert "open_test" not in names, module
            elif isinstance(node, ast.Attribute):
                assert node.attr != "open_test", module
    assert {"pae_jax.workdir.validation", "pae_jax.detection", "data_pipelines.dataset"} <= seen
    assert not {"pae_jax.evaluate", "pae_jax.predict"} & seen


def test_the_start_is_reported(trained, tmp_path, messages):
    """The report is a few lines, logged before the training step is compiled."""
    once = dict.fromkeys(("train__steps", "train__validate_every", "train__checkpoint_every"), 1)
    config = runs.load_config(trained.root, **once)
    record = json.loads((trained.workdir / "data.json").read_text())
    images = f"{record['training_images']} for training, {len(record['held_out_names'])} held out"
    images += " (data.holdout_groups=auto: none)"
    for start in ("starting, 1 steps", "resumed from step 1 of 1"):
        messages.clear()
        train.train_and_evaluate(config, tmp_path)
        _, leaves = runs.read_state(tmp_path)
        # Parameters and the two moments of Adam, besides three counters of steps.
        size = (sum(leaf.size for leaf in leaves) - 3) // 3
        assert messages[:6] == [
            f"training: {tmp_path}",
            "devices: 1 of 8 cpu, mesh data=1, model=1",
            f"devices without work: 7 ({', '.join(map(str, jax.devices()[1:]))})",
            f"parameters: {size:,}",
            f"images: {images}; streamed from the host",
            f"steps per call: 1; {start}",
        ]
        at_first = [
            "hint: all images are grey; --config.model.grey=True keeps reconstructions grey",
            "compiling the training step (a minute or so on a CPU)",
        ]
        assert messages[6:] == (at_first if start.startswith("starting") else [])


def test_update_norm_and_learning_rate_are_logged(trained):
    (first, *_) = (line for line in lines(trained.workdir) if "train/loss" in line)
    assert first["train/learning_rate"] == pytest.approx(1e-2)
    assert first["train/update_norm"] > 0
    assert 0 <= first["speed/data_wait_fraction"] <= 1
