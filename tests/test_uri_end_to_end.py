"""Train, kill, resume, evaluate on gs://, with a server in place of Cloud Storage."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import bucket
import runs
from pae_jax import main
from pae_jax.workdir import files, paths

PROJECT = Path(__file__).parents[1]
WORKDIR = f"{bucket.ROOT}/runs/a"

# `pae train`, killed before the save of step 20, when that of step 10 is complete.
KILLED = """
import os, signal, sys
from pae_jax import main
from pae_jax.workdir import checkpoint

save = checkpoint.Checkpoints.save

def kill(self, step, state):
    if step == 20:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, state)

checkpoint.Checkpoints.save = kill
sys.exit(main.main(sys.argv[1:]))
"""
WHOLE = "import sys; from pae_jax import main; sys.exit(main.main(sys.argv[1:]))"


@pytest.fixture
def environment(monkeypatch):
    with bucket.served() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield runs.environment() | variables


def steps(root: paths.AnyPath) -> list[int]:
    lines = (root / "metrics.jsonl").read_bytes().splitlines()
    return [record["step"] for record in map(json.loads, lines) if "train/loss" in record]


def names(folder: paths.AnyPath) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_train_kill_resume_evaluate(trained, environment, tmp_path):
    def pae(program: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", program, *words]
        variables = environment | {"PYTHONPATH": str(PROJECT)}
        return subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )

    changes = {"train__tensorboard": True, "profile": (12, 14)}
    train = ["train", *runs.words(trained.root, **changes), f"--workdir={WORKDIR}"]
    done = pae(KILLED, *train)
    assert done.returncode == -signal.SIGKILL, done.stderr
    root = paths.to_path(WORKDIR)
    assert names(root / "checkpoints") == ["10"]
    assert steps(root) == list(range(1, 21))  # nothing is lost that the checkpoint has
    assert (root / ".owner").exists()
    # A save that was interrupted, since it has no mark of being complete.
    (root / "checkpoints/20/state/part").write_bytes(b"")

    done = pae(WHOLE, *train)
    assert done.returncode == 0, done.stderr
    assert f"{WORKDIR}: finished at step {runs.STEPS}" in done.stdout
    assert "resumed from step 10 of 30" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(root) == list(range(1, runs.STEPS + 1))
    assert names(root / "checkpoints") == ["20", "30"]
    assert len(names(root / "tensorboard")) == 2  # one file for each start
    assert len(names(root / "profile/plugins/profile")) == 2
    assert not (root / ".owner").exists()
    runs.assert_same_state(root, trained.workdir)

    local = runs.clone(trained, tmp_path).workdir
    for workdir in (WORKDIR, str(local)):
        assert main.main(["evaluate", f"--workdir={workdir}"]) == 0
    metrics, expected = (files.read_json(w / "eval/metrics.json") for w in (root, local))
    for record in (metrics, expected):
        del record["provenance"]  # another folder of images
    assert metrics == expected
    assert names(root / "eval") == ["metrics.json", "report.html", "scores.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]  # no folder gs:
