"""A full disk, a lost checkpoint, Ctrl-C: the run reports it, and the next start recovers.

experiments/kill_and_resume.py tests kills at any moment.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from data_pipelines import errors
from pae_jax import config, main, train
from pae_jax.workdir import logs

PROJECT = Path(__file__).parents[1]

# `pae` on a disk that, from the save of step FULL on, holds no file above 4000 bytes.
FULL_DISK = """
import resource, sys
from pae_jax import main
from pae_jax.workdir import checkpoint

full = int(sys.argv.pop(1))
save = checkpoint.Checkpoints.save

def fill(self, step, state):
    if step == full:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    save(self, step, state)

checkpoint.Checkpoints.save = fill
sys.exit(main.main(sys.argv[1:]))
"""


def names(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(("full", "kept"), [(10, ["5"]), (30, ["20", "25"])])
def test_a_full_disk_costs_the_last_save_only(trained, tmp_path, full, kept):
    """The next save reports the failure; after the last save the end of the run reports it."""
    changes = {"train__checkpoint_every": 5, "train__log_every": 1000}  # a small metrics.jsonl
    words = ["train", *runs.words(trained.root, **changes), f"--workdir={tmp_path}"]
    command = [sys.executable, "-c", FULL_DISK, str(full), *words]
    process = subprocess.run(
        command, cwd=PROJECT, env=runs.environment(), capture_output=True, text=True, check=False
    )
    assert process.returncode == 1, process.stderr
    last = process.stderr.splitlines()[-1]
    assert f"{tmp_path / 'checkpoints'}: cannot be written (" in last
    assert last.endswith(")")
    assert "ERROR" not in process.stderr  # Orbax would log one
    assert "Traceback" not in process.stderr
    assert [name for name in names(tmp_path) if name.isdigit()] == kept
    assert runs.read_state(tmp_path)[0] == int(kept[-1])

    result = train.train_and_evaluate(runs.load_config(trained.root, **changes), tmp_path)
    assert (result.outcome, result.step) == (train.FINISHED, runs.STEPS)
    runs.assert_same_state(tmp_path, trained.workdir)
    assert names(tmp_path) == ["25", "30"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_log(tmp_path, monkeypatch):
    options = config.from_config_dict({"train": {"tensorboard": False, "log_every": 1}})
    reason = os.strerror(errno.ENOSPC)
    where = tmp_path / "metrics.jsonl"
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(logs, "_open_lines", lambda *_: full)
        with (
            pytest.raises(errors.CannotWrite, match=rf"^{where}: cannot be written \({reason}\)"),
            logs.RunLog(tmp_path, options, start=0) as log,
        ):
            log.step(1, {"loss": 1.0}, data_seconds=0.0)


def test_ctrl_c_saves_and_stops(trained, tmp_path, monkeypatch, capsys):
    step = logs.RunLog.step

    def interrupt(self, number, *args):
        step(self, number, *args)
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)

    command = ["train", *runs.words(trained.root), f"--workdir={tmp_path}"]
    # A run that ignores the signal then ends at its last step and does not end the tests.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(logs.RunLog, "step", interrupt)
            assert main.main(command) == 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    saved, _ = runs.read_state(tmp_path)
    assert f"stopped at step {saved}" in capsys.readouterr().out
    assert 7 <= saved < 10

    assert main.main(command) == 0
    runs.assert_same_state(tmp_path, trained.workdir)


def test_a_lost_checkpoint(trained, tmp_path):
    """The run resumes from the checkpoint before the lost one; without any, from the start."""
    run = runs.clone(trained, tmp_path)
    options = runs.load_config(run.root)
    for lost, left in ((["30"], ["20"]), (["20", "30"], [])):
        for name in lost:
            shutil.rmtree(run.workdir / "checkpoints" / name)
        assert names(run.workdir) == left
        result = train.train_and_evaluate(options, run.workdir)
        assert (result.outcome, result.step) == (train.FINISHED, runs.STEPS)
        runs.assert_same_state(run.workdir, trained.workdir)
        assert names(run.workdir) == ["20", "30"]
        assert result.validation == undisturbed_validation(trained)


def undisturbed_validation(trained: runs.Run) -> dict[str, float]:
    last = json.loads((trained.workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return {key.removeprefix("validation/"): value for key, value in last.items() if key != "step"}
