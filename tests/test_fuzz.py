"""The fuzzer: 500 cases without a fault, and that it finds the faults that are planted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import fuzz

PROJECT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
# The fuzzer with cases that fail in known ways.
PLANTED = """
import sys, time
from experiments import fuzz, fuzz_cases
from data_pipelines.errors import BadInput

def lines(rng, folder):
    error = BadInput("")
    error.args = ("one\\ntwo",)
    raise error

def fill(rng, folder):
    return len(bytearray(int(1.3 * fuzz.MEMORY)))

def refuse(rng, folder):
    raise BadInput(f"{folder}: no")

fuzz.SECONDS, fuzz.HANG_SECONDS, fuzz.MEMORY = 1.0, 3.0, 2**27
fuzz_cases.KINDS.update(
    good=lambda rng, folder: None,
    refuse=refuse,
    crash=lambda rng, folder: [][rng.randrange(9)],
    lines=lines,
    sleep=lambda rng, folder: time.sleep(1.5),
    hang=lambda rng, folder: time.sleep(60),
    fill=fill,
    die=lambda rng, folder: __import__("os")._exit(7),
)
sys.exit(fuzz.main())
"""


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROJECT)}


def test_500_cases():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.fuzz", "--cases=500", "--seed=0", "--jobs=2"],
        cwd=PROJECT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {tuple(line.split()[:2]): int(line.split()[2]) for line in table(done.stdout)}
    assert sum(counts.values()) == 500
    for kind in ("image", "config", "tree"):
        # A fuzzer whose cases are all refused, or all fine, tries little.
        assert counts[kind, "ok"] > 10
        assert counts[kind, "refused"] > 30


def table(text):
    return text.partition("longest case")[0].splitlines()


def test_planted_faults_are_found(tmp_path, monkeypatch):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    kinds = ["good", "refuse", "crash", "lines", "sleep", "hang", "fill", "die"]
    command = [sys.executable, str(script), "--seed=0", f"--kinds={','.join(kinds)}"]
    results = fuzz.run_all(command, len(kinds), 1)
    assert [result["number"] for result in results] == list(range(len(kinds)))
    assert [result["outcome"] for result in results] == [
        *("ok", "refused", "IndexError", "BadInput of several lines", "slow", "hang", "memory"),
        "the process died (7)",
    ]
    assert results[1]["message"] == "FOLDER: no"
    assert not fuzz.report(results)
    assert fuzz.report(results[:2])


def test_a_case_depends_on_its_number_only(tmp_path):
    import random

    from experiments import fuzz_images

    first, again = (fuzz_images.mutated_image(random.Random(f"0/image/{i}")) for i in (30, 30))
    assert first == again
    assert first != fuzz_images.mutated_image(random.Random("0/image/33"))
