"""A full or read-only disk at a file of each kind: one line, and what stood before is whole.

`python -m experiments.full_disk` refuses every file that the verbs write.
"""

import argparse
import errno
import os
import sys
from pathlib import Path

import pytest

from experiments import full_disk, small_runs
from pae_jax import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of the size of files")


@pytest.fixture(scope="module")
def cases(compilation_cache, tmp_path_factory):
    """A function that returns the cases of a verb, which are prepared once."""
    prepared: dict[str, full_disk.Cases] = {}
    patch = pytest.MonkeyPatch()
    # The diagnostics write no file, and most of an evaluation's time is that of compiling them.
    settings = small_runs.SETTINGS | {"eval.diagnostics": False}
    patch.setattr(small_runs, "SETTINGS", settings)

    def get(verb: str) -> full_disk.Cases:
        if verb not in prepared:
            prepared[verb] = full_disk.Cases(verb, tmp_path_factory.mktemp(verb))
        return prepared[verb]

    yield get
    patch.undo()


@pytest.mark.parametrize(
    ("verb", "part", "mode"),
    [
        ("train", "config.json", "read-only"),
        ("train", "metrics.jsonl", "full"),
        ("train", "tfevents", "space"),
        ("train", "tfevents", "full"),
        ("train", "_CHECKPOINT_METADATA", "space"),
        ("train", "state.orbax-checkpoint-tmp", "full"),
        ("train anew", "checkpoints", "read-only"),
        ("train anew", "metrics.jsonl", "space"),
        ("cache", "removal of run/cache/*.npy", "read-only"),
        ("evaluate", "report.html", "space"),
        ("evaluate", "maps/data/test/good/.", "full"),
        ("predict", "heatmaps", "read-only"),
        ("predict", "out/.", "full"),
    ],
)
def test_one_path_fails(cases, verb, part, mode):
    of_verb = cases(verb)
    # The shortest is that of the file itself; the others are temporary ones, and those within.
    name = min((key for key in of_verb.keys if part in key), key=len)
    result = of_verb.run(name, mode)
    assert result.outcome == full_disk.REFUSED, result


def test_the_table_has_every_verb():
    """A new verb either writes no file or stands in the table."""
    (verbs,) = (a for a in main._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {*verbs.choices} - {name.split()[0] for name in small_runs.VERBS} == {
        "compile",
        "configs",
    }


def test_a_cache_that_cannot_be_made_is_said_and_done_without(cases):
    result = cases("evaluate").run("cache", "read-only")
    assert result.outcome == full_disk.WENT_ON, result
    assert "data.cache_dir: " in result.message


def test_each_kind_of_file_is_listed(cases):
    """The list is what the verb was seen to write, so that it cannot miss a new file."""
    written = cases("train").keys
    for part in ("config.json", "metrics.jsonl", "tfevents", "panels/step_#.png", "checkpoints/#"):
        assert any(part in key for key in written), part
    assert {"cache", "run"} < set(written)


def test_the_hook_refuses_what_it_should(tmp_path):
    path, other = tmp_path / "file_17", tmp_path / "other"
    path.write_text("before")
    with full_disk.disk(tmp_path, "file_#", "read-only") as state:
        other.write_text("")
        assert path.read_text() == "before"  # reading is no writing
        for write in (
            lambda: path.write_text("after"),
            lambda: os.open(path, os.O_RDWR),
            lambda: other.replace(path),
        ):
            with pytest.raises(OSError) as caught:
                write()
            assert (caught.value.errno, caught.value.filename) == (errno.EROFS, str(path))
        assert Path(state.path) == path
    assert path.read_text() == "before"
    with full_disk.disk(tmp_path, "file_#", "full"):
        other.write_text("enough space")
        with pytest.raises(OSError) as caught:
            path.write_text("after")
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError) as caught:
            other.write_text("now the disk is full")
    other.write_text("and now it is not")


@pytest.mark.parametrize(
    ("code", "said", "outcome"),
    [
        (2, ["pae train: /d/run/a: cannot be written (No space left on device)"], "refused"),
        (1, ["pae train: /d/run: cannot be written (No space left on device)"], "refused"),
        (0, [], "went on"),
        (0, ["the cache cannot be written"], "went on"),
        (
            1,
            ["pae train: /d/other/b: cannot be written (No space left on device)"],
            "the line does",
        ),
        (1, ["pae train: /d/run/a: cannot be written (OSError)"], "the line does not give the"),
        (1, ["Traceback", "OSError: [Errno 28] No space left on device"], "2 lines"),
        (1, [], "exit code 1 without"),
    ],
)
def test_judgements(code, said, outcome):
    judged = full_disk._judge(code, said, "/d/run/a", "space", "train")
    assert judged.startswith(outcome)
