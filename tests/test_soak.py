"""The soak: its arithmetic, and three rounds in one process."""

import csv
import json
import subprocess
import sys

import pytest

import runs
from experiments import small_runs, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the numbers are those of /proc")


def rounds(memory, files=None, threads=None):
    """Returns rounds with these numbers; open files and threads are constant by default."""
    count = len(memory)
    columns = (memory, files or [20] * count, threads or [30] * count)
    return [soak.Round(i, 1.0, *values) for i, values in enumerate(zip(*columns, strict=True))]


def flat(values):
    memory, _, files, threads = map(soak.is_flat, soak.growths(values))
    return [memory, files, threads]


def test_growth_is_that_of_the_second_half():
    memory, lost, files, threads = soak.growths(rounds([500, 600, 700, 800, 800, 801, 802, 803]))
    assert (memory.first, memory.last, memory.median) == (500, 803, 800)
    assert memory.per_round == pytest.approx(1)
    assert memory.growth == pytest.approx(3)
    assert memory.bound == pytest.approx(16)
    assert files.growth == pytest.approx(0, abs=1e-9)
    assert threads.bound == 1
    assert lost.growth == 0


def test_what_counts_as_flat():
    # The start, while programs are compiled, does not count.
    assert flat(rounds([100, 300, 700, 800, 800, 800, 800, 800])) == [True, True, True]
    # Noise is not growth.
    assert flat(rounds([800 + 10 * (i % 2) for i in range(40)])) == [True, True, True]
    # 0.5 MiB a round, over 60 rounds.
    assert flat(rounds([800 + 0.5 * i for i in range(120)])) == [False, True, True]
    same = [800] * 10
    assert flat(rounds(same, files=[20 + i for i in range(10)])) == [True, False, True]
    assert flat(rounds(same, threads=[30] * 5 + [30, 30, 31, 31, 31])) == [True, True, False]


def test_what_tensorstore_loses_is_no_growth_of_ours():
    entries = [entry._replace(lost=0.2 * i) for i, entry in enumerate(rounds([800] * 100))]
    grown = [entry._replace(memory=entry.memory + entry.lost) for entry in entries]
    assert flat(grown) == [True, True, True]
    # Memory that was not lost there is ours.
    assert flat([entry._replace(memory=entry.memory + entry.number) for entry in grown]) == [
        *(False, True, True)
    ]


def test_lost_parts_are_counted():
    # The constants of this module have other references.
    value = json.loads('{"a long name": [{"another name": 1000}, 1.5]}')
    assert soak.lost_bytes(value) == 0
    kept = value["a long name"]  # a reference too many, as TensorStore leaves it
    parts = (kept, kept[0], *kept[0], *kept[0].values(), kept[1])
    exact = sum(map(sys.getsizeof, parts))
    assert exact <= soak.lost_bytes(value) < exact + 16 * len(parts)


def test_the_table_names_what_grows():
    lines = soak.table(soak.growths(rounds([800] * 8, files=[20 + i for i in range(8)])))
    assert [line.rsplit("|", 2)[1].strip() for line in lines.splitlines()[2:]] == [
        *("yes", "yes", "NO", "yes")
    ]


def test_three_rounds(compilation_cache, tmp_path, monkeypatch):
    """Every round trains anew, and leaves no file, no open file and no thread behind."""
    monkeypatch.setattr(soak, "MIN_ROUNDS", 3)
    monkeypatch.setattr(small_runs, "SETTINGS", small_runs.SETTINGS | {"eval.diagnostics": False})
    place = tmp_path / "place"
    done = soak.soak(0, tmp_path, place)
    with (tmp_path / "soak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == [0, 1, 2]
    assert all(300 < float(row["memory"]) < 10_000 for row in rows)
    assert not (place / "run").exists()
    assert done[2].files <= done[1].files
    soak.draw(done, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 5000


def test_a_leak_is_found(tmp_path):
    """The command ends with 1 if every round leaves a file open."""
    script = """
import os, sys
from pathlib import Path
from experiments import soak
def leak(number, images, workdir):
    os.open(os.devnull, os.O_RDONLY)
    return soak.state(number, 0.1)
soak.run_round = leak
sys.exit(soak.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "--minutes=0", f"--out={tmp_path}"],
        cwd=small_runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("| open files"))
    assert line.endswith("| NO |")
