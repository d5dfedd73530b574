"""The cache: one build, whole files only, any number of processes."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.cache import cached, content_key, default_cache, parallel
from data_pipelines.errors import BadInput

SHAPE = (40, 3, 2)
EXPECTED = np.arange(240).reshape(SHAPE).astype(np.uint8)


class Builder:
    """A builder of EXPECTED that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return SHAPE, lambda i: EXPECTED[i]


def test_built_once_mapped_and_read_only(tmp_path):
    build = Builder()
    first = cached(tmp_path / "deep" / "cache", "key", [SHAPE], build)
    again = cached(tmp_path / "deep" / "cache", "key", [SHAPE], build)
    assert build.calls == 1
    for array in (first, again):
        np.testing.assert_array_equal(array, EXPECTED)
        assert array.dtype == np.uint8
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable
    assert [p.name for p in (tmp_path / "deep" / "cache").iterdir()] == ["key.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "cache" / "key.npy"), EXPECTED)


def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("PAE_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    cached("", "key", [SHAPE], Builder())
    assert (tmp_path / "key.npy").exists()
    monkeypatch.delenv("PAE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "pae_jax"


def torn(path):
    path.write_bytes(path.read_bytes()[:-1])


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not an array")


def other_type(path):
    np.save(path, EXPECTED.astype(np.int8))


def other_shape(path):
    np.save(path, EXPECTED[1:])


def pickled(path):
    np.save(path, np.array([{}]))


@pytest.mark.parametrize(
    "damage", [torn, longer, empty, text, other_type, other_shape, pickled, Path.unlink]
)
def test_a_torn_or_foreign_file_is_rebuilt(tmp_path, damage):
    build = Builder()
    cached(tmp_path, "key", [SHAPE], build)
    damage(tmp_path / "key.npy")
    np.testing.assert_array_equal(cached(tmp_path, "key", [SHAPE], build), EXPECTED)
    assert build.calls == 2


def test_a_failed_build_leaves_nothing(tmp_path):
    def row(i):
        if i == 30:
            raise BadInput("x.png: damaged")
        return EXPECTED[i]

    with pytest.raises(BadInput, match=r"^x\.png: damaged$"):
        cached(tmp_path, "key", [SHAPE], lambda: (SHAPE, row))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="No space left on device"):
        cached(tmp_path, "key", [SHAPE], Builder())
    assert list(tmp_path.iterdir()) == []


def _build_in_child(directory, barrier, results):
    def build():
        barrier.wait(60)  # Both have found no file before either writes.
        return SHAPE, lambda i: EXPECTED[i]

    results.put(int(cached(directory, "key", [SHAPE], build).sum()))


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    children = [
        context.Process(target=_build_in_child, args=(tmp_path, barrier, results)) for _ in range(2)
    ]
    for child in children:
        child.start()
    sums = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert sums == [EXPECTED.sum()] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["key.npy"]


def test_keys_differ_in_every_part():
    keys = {
        content_key("images", (8, 8), ["a", "b"]),
        content_key("masks", (8, 8), ["a", "b"]),
        content_key("images", (8, 9), ["a", "b"]),
        content_key("images", (8, 8), ["ab"]),
        content_key("images", (8, 8), ["b", "a"]),
    }
    assert len(keys) == 5
    assert content_key("images", (8, 8), ["a", "b"]) in keys


def test_parallel_keeps_the_order_and_stops_early():
    done = []

    def work(i):
        done.append(i)
        return i * i

    assert list(parallel(work, range(500), "squares")) == [i * i for i in range(500)]
    done.clear()
    assert not all(value < 9 for value in parallel(work, range(5000), "squares"))
    assert len(done) < 5000
