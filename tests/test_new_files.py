"""Results that belong together: after a kill at any write the same command writes them anew."""

import os
import signal
import subprocess
import sys

import pytest

from data_pipelines import writing
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.workdir import files

# Writes two files in one context, and is killed by SIGKILL before the call of this number that
# renames or removes a file.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from pae_jax.workdir import files

calls = 0

def killing(function):
    def call(*words, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*words, **options)
    return call

os.replace = killing(os.replace)
Path.unlink = killing(Path.unlink)
paths = [Path(sys.argv[1], name) for name in ("a.json", "a.html")]
with files.new_files(*paths):
    for path in paths:
        files.write_atomically(path, path.name)
"""


def write(folder, content="") -> None:
    paths = folder / "a.json", folder / "a.html"
    files.check_new(*paths)
    with files.new_files(*paths):
        for path in paths:
            files.write_atomically(path, content or path.name)


def read(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name[0] != "."}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(
    ("call", "stood"),
    [(1, []), (2, []), (3, ["a.json"]), (4, ["a.html", "a.json"]), (5, ["a.html", "a.json"])],
)
def test_a_kill_at_any_write_is_repaired_by_the_same_command(call, stood, tmp_path):
    end = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(call)], check=False)
    assert end.returncode == (0 if call == 5 else -signal.SIGKILL)
    assert sorted(read(tmp_path)) == stood
    if call == 5:  # it ended, so that these are results
        with pytest.raises(BadInput, match=r"a\.json: exists; results are never overwritten"):
            write(tmp_path)
        return
    write(tmp_path, "anew")
    assert read(tmp_path) == {"a.json": "anew", "a.html": "anew"}
    # Nothing but the part of a file that was cut off stays, and its name is temporary.
    assert all(name.endswith(".tmp") for name in os.listdir(tmp_path) if name[0] == ".")
    with pytest.raises(BadInput, match="never overwritten"):
        write(tmp_path)


def test_after_an_error_nothing_stands(tmp_path):
    paths = tmp_path / "a.json", tmp_path / "a.html"
    with pytest.raises(CannotWrite, match="No space left"), files.new_files(*paths):
        files.write_atomically(paths[0], "whole")
        raise CannotWrite(paths[1], OSError(28, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_what_appeared_meanwhile_is_not_overwritten(tmp_path):
    paths = tmp_path / "a.json", tmp_path / "a.html"
    files.check_new(*paths)
    paths[1].write_text("the user's")
    with pytest.raises(BadInput, match=r"a\.html: exists"), files.new_files(*paths):
        files.write_atomically(paths[1], "ours")
    assert read(tmp_path) == {"a.html": "the user's"}


def test_the_longest_name_has_its_mark(tmp_path):
    path = tmp_path / ("n" * writing.MAX_NAME)
    with files.new_files(path):
        path.write_text("whole")
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == [path.name]
