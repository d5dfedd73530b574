"""The folder of the cache: where it is without a home, its bound, files in use, `pae cache`."""

import errno
import gc
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import cache, cache_folder
from data_pipelines.errors import BadInput

SHAPE = (10, 4, 4, 1)
PROJECT = Path(__file__).parents[1]


def put(directory, text, *, age=0.0):
    """Adds an array to the cache, last used `age` seconds ago; returns its file."""
    key = cache.content_key(text)
    cache.cached(directory, key, [SHAPE], lambda: (SHAPE, lambda i: np.zeros(SHAPE[1:], np.uint8)))
    path = directory / f"{key}.npy"
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def lines(monkeypatch):
    """The lines that are said, and a temporary folder that is made anew."""
    cache_folder._temporary_folder.cache_clear()
    said = []
    monkeypatch.setattr(cache_folder, "warn", said.append)
    yield said
    cache_folder._temporary_folder.cache_clear()


@pytest.fixture
def homeless(monkeypatch):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("PAE_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_without_a_home_there_is_a_temporary_cache(homeless, lines):
    folder = cache_folder.default_cache()
    assert folder.is_dir()
    assert cache_folder.default_cache() == folder
    assert "no home" in lines[0]
    assert str(folder) in lines[0]
    assert "PAE_CACHE names" in lines[0]
    assert len(set(lines)) == 1


@pytest.mark.parametrize("variable", ["HOME", "PAE_CACHE"])
def test_a_folder_that_cannot_be_written_is_replaced_by_a_temporary_one(
    variable, monkeypatch, lines
):
    monkeypatch.delenv("PAE_CACHE")
    monkeypatch.setenv(variable, "/proc/nowhere")
    folder = cache_folder.default_cache()
    assert not str(folder).startswith("/proc")
    assert "/proc/nowhere" in lines[0]
    array = cache.cached("", cache.content_key("a"), [(1, 2)], lambda: ((1, 2), lambda i: ROW))
    assert np.array_equal(array, [ROW])


ROW = np.array([3, 4], np.uint8)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "a/" * 3000])
def test_a_folder_that_cannot_exist_is_replaced_too(name, lines):
    key = cache.content_key(name)
    cache.cached(name, key, [(1, 2)], lambda: ((1, 2), lambda i: ROW))
    assert len(lines) == 1


def test_a_cache_dir_that_cannot_be_written_is_replaced_by_the_default(tmp_path, lines):
    file = tmp_path / "file"
    file.write_text("")
    key = cache.content_key("b")
    cache.cached(file / "cache", key, [(1, 2)], lambda: ((1, 2), lambda i: ROW))
    assert (cache_folder.default_cache() / f"{key}.npy").exists()
    assert lines == [
        f"data.cache_dir: {file}/cache cannot be written (Not a directory); "
        f"using {cache_folder.default_cache()}"
    ]


def test_a_full_cache_that_can_only_be_read_is_used(tmp_path, monkeypatch, lines):
    path = put(tmp_path, "kept")
    monkeypatch.setattr(cache_folder, "unwritable", lambda folder: "Read-only file system")

    def build():
        raise AssertionError("built again")

    cache.cached(tmp_path, path.stem, [SHAPE], build)
    assert lines == []


def test_no_folder_at_all_is_one_line(homeless, lines, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(BadInput, match=r"^the cache: no folder can be written.*PAE_CACHE$"):
        cache_folder.default_cache()


def test_the_temporary_cache_leaves_with_the_process():
    script = "from data_pipelines.cache import default_cache; print(default_cache())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PAE_CACHE": "/proc/nowhere"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("\n") == 1
    assert not Path(done.stdout.strip()).exists()


# ---- the bound ----


def test_the_oldest_files_leave_beyond_the_bound(tmp_path, monkeypatch):
    size = put(tmp_path, "a", age=300).stat().st_size
    old, new = tmp_path / f"{cache.content_key('a')}.npy", put(tmp_path, "b", age=200)
    old.with_suffix(".txt").write_text("images")
    (tmp_path / "compiled/cpu").mkdir(parents=True)
    program = tmp_path / "compiled/cpu/jit_step-1-cache"
    program.write_bytes(bytes(size))
    os.utime(program, (time.time() - 250,) * 2)
    foreign = tmp_path / "notes.npy"
    foreign.write_bytes(bytes(10 * size))
    gc.collect()
    monkeypatch.setenv(cache_folder.LIMIT, str(3 * size))
    third = put(tmp_path, "c")
    assert not old.exists()
    assert not old.with_suffix(".txt").exists()
    assert program.exists()
    put(tmp_path, "d")
    assert not program.exists()
    assert new.exists()
    assert third.exists()
    assert foreign.exists()  # not a file of the cache


def test_reading_a_file_counts_as_a_use(tmp_path):
    first, second = put(tmp_path, "a", age=300), put(tmp_path, "b", age=200)
    cache.cached(tmp_path, first.stem, [SHAPE], lambda: None)
    assert [entry.path for entry in cache_folder.entries(tmp_path)] == [second, first]


def test_a_file_in_use_by_a_running_process_stays(tmp_path):
    path = put(tmp_path, "a")
    gc.collect()
    script = (
        "import sys; from data_pipelines import cache\n"
        f"array = cache.cached({str(tmp_path)!r}, {path.stem!r}, [{SHAPE}], None)\n"
        "view = array[2:]; del array; print(1, flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin
    assert child.stdout
    child.stdout.readline()
    assert cache_folder.trim(tmp_path, 0) == []
    assert path.exists()
    child.stdin.close()
    child.wait()
    child.stdout.close()
    assert [entry.path for entry in cache_folder.trim(tmp_path, 0)] == [path]
    assert not path.exists()


def test_a_file_is_free_when_its_last_view_is_gone(tmp_path):
    path = put(tmp_path, "a")
    view = cache.cached(tmp_path, path.stem, [SHAPE], lambda: None)[3:5]
    gc.collect()
    assert cache_folder.is_in_use(path)
    descriptors = len(os.listdir("/dev/fd"))
    del view
    gc.collect()
    assert not cache_folder.is_in_use(path)
    assert len(os.listdir("/dev/fd")) < descriptors


def test_without_locks_a_file_counts_as_used_for_a_day(tmp_path, monkeypatch):
    recent, old = put(tmp_path, "a", age=3600), put(tmp_path, "b", age=2 * cache_folder.DAY)

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    assert [entry.path for entry in cache_folder.trim(tmp_path, 0)] == [old]
    assert recent.exists()


@pytest.mark.parametrize("form", [".{0}.tmp", ".{0}.npy.{0}"])
def test_the_rest_of_an_interrupted_write_leaves_after_a_day(form, tmp_path):
    paths = [tmp_path / form.format(letter * 32) for letter in "ab"]
    for path, age in zip(paths, (60, 2 * cache_folder.DAY), strict=True):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    cache_folder.trim(tmp_path, 0)
    assert [path.exists() for path in paths] == [True, False]


@pytest.mark.parametrize(
    ("text", "size"),
    [("500", 500), ("2K", 2048), ("1.5 MiB", 1.5 * 2**20), ("3gb", 3 * 2**30), ("1T", 2**40)],
)
def test_sizes(text, size, monkeypatch):
    monkeypatch.setenv(cache_folder.LIMIT, text)
    assert cache_folder.limit() == size


@pytest.mark.parametrize("text", ["much", "-1", "1 X", "nan", "1e9"])
def test_a_bound_that_is_no_size(text, monkeypatch):
    monkeypatch.setenv(cache_folder.LIMIT, text)
    with pytest.raises(BadInput, match="PAE_CACHE_LIMIT: a size like"):
        cache_folder.limit()
    monkeypatch.delenv(cache_folder.LIMIT)
    assert cache_folder.limit() == 32 * 2**30


def test_pae_cache_lists_and_empties_the_cache(tmp_path, monkeypatch, capsys):
    from pae_jax import main

    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    key = cache.content_key("a")
    row = np.zeros((4, 4, 1), np.uint8)
    used = cache.cached("", key, [SHAPE], lambda: (SHAPE, lambda i: row), purpose="images of screw")
    other = put(tmp_path, "b")
    (tmp_path / "compiled/cpu").mkdir(parents=True)
    (tmp_path / "compiled/cpu/jit_step-1-cache").write_bytes(bytes(2048))
    gc.collect()
    assert main.main(["cache"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path}: 2.6 KiB of at most 32.0 GiB (PAE_CACHE_LIMIT)\n")
    assert "images of screw, in use" in text
    assert "decoded images\n" in text
    assert "2.0 KiB" in text
    assert main.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}: removed 2 files, 2.3 KiB; 1 file in use stays, 288 B\n"
    )
    assert not other.exists()
    assert used.sum() == 0
    assert main.main(["cache", "more"]) == 2
    assert capsys.readouterr().err == "pae cache: more: `pae cache` takes no argument\n"


def test_a_cache_that_cannot_be_emptied_says_why(tmp_path, monkeypatch, capsys):
    from pae_jax import main

    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    path = put(tmp_path, "a")
    path.with_suffix(".txt").write_text("images\n")

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert main.main(["cache", "--clear"]) == 1
    line = f"pae cache: {path}: cannot be written (Read-only file system)\n"
    assert capsys.readouterr().err == line
    assert path.exists()
    # A kill between the two files leaves none that no later call would find.
    unlink = Path.unlink

    def kill_after_the_first(self, missing_ok=False):
        unlink(self, missing_ok)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", kill_after_the_first)
        cache_folder.clear(tmp_path)
    assert cache_folder.clear(tmp_path).startswith(f"{tmp_path}: removed 1 file")
    assert list(tmp_path.iterdir()) == []
