"""Checkpoints: restoring, torn ones, cleaning up; and the small files of a workdir."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.workdir import checkpoint, files, record


def state(value: float, devices: int = 1):
    mesh = jax.make_mesh(
        (devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    tree = {"a": jnp.arange(5.0) * value, "step": jnp.asarray(int(value)), "ema": None}
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def save(workdir, *steps, keep=2, devices=1):
    with checkpoint.Checkpoints(workdir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step, devices))


def restore(workdir, devices=1):
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(state(0, devices))


def test_the_newest_are_kept_and_the_newest_is_read(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["20", "30"]
    step, tree = restore(tmp_path)
    assert step == tree["step"] == 30
    np.testing.assert_array_equal(tree["a"], 30 * np.arange(5))


@pytest.mark.parametrize(("written", "read"), [(1, 8), (8, 1), (8, 2)])
def test_any_number_of_devices(tmp_path, written, read):
    save(tmp_path, 10, devices=written)
    _, tree = restore(tmp_path, devices=read)
    assert len(tree["a"].sharding.device_set) == read
    np.testing.assert_array_equal(tree["a"], 10 * np.arange(5))


def truncated(directory):
    for path in directory.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])


def zeros(directory):
    for path in directory.rglob("d/*"):
        path.write_bytes(bytes(path.stat().st_size))


def without_state(directory):
    shutil.rmtree(directory / "state")


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("tear", [truncated, zeros, without_state, empty])
def test_torn_checkpoints(tmp_path, tear, capsys):
    save(tmp_path, 10, 20)
    tear(tmp_path / "checkpoints/20")
    step, tree = restore(tmp_path)
    assert (step, int(tree["step"])) == (10, 10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'checkpoints/20'}: unreadable, skipped (")

    save(tmp_path, 15, keep=1)  # a torn checkpoint does not displace a good one
    assert restore(tmp_path)[0] == 15
    save(tmp_path, 20)
    assert restore(tmp_path)[0] == 20

    for path in (tmp_path / "checkpoints").iterdir():
        tear(path)
    with pytest.raises(BadInput, match="checkpoints: none of the checkpoints can be read"):
        restore(tmp_path)


def test_a_torn_checkpoint_is_replaced(tmp_path):
    save(tmp_path, 10, 20)
    truncated(tmp_path / "checkpoints/20")
    save(tmp_path, 20)
    step, tree = restore(tmp_path)
    assert (step, int(tree["step"])) == (20, 20)


def test_only_the_writer_cleans_up(tmp_path):
    save(tmp_path, 10)
    broken_off = tmp_path / "checkpoints/20.orbax-checkpoint-tmp"
    broken_off.mkdir()
    assert restore(tmp_path)[0] == 10
    assert broken_off.exists()
    save(tmp_path, 30)
    assert names(tmp_path) == ["10", "30"]


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep/file.json"
    files.write_json(path, {"b": float("nan"), "a": [1.5, float("inf")], "c": (None, "x")})
    text = path.read_text()
    assert json.loads(text) == {"a": [1.5, None], "b": None, "c": [None, "x"]}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {})
    assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_spoiled_small_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"train": {')
    with pytest.raises(BadInput, match=rf"^{tmp_path}/config.json: cannot be read"):
        record.read_config(tmp_path)
    with pytest.raises(BadInput, match=rf"^{tmp_path}/data.json: not found"):
        record.read_data_record(tmp_path)


DATA_RECORD = {
    "channels": 1,
    "fingerprint": "x",
    "held_out_names": ["a.png"],
    "textures": {"training": 5, "held_out": 1},
    "value_range": [0, 4095],
}
DAMAGES = [
    {"channels": None},
    {"channels": -1},
    {"fingerprint": None},
    {"held_out_names": 5},
    {"held_out_names": [{}]},
    {"textures": []},
    {"textures": {"training": {}}},
    {"value_range": [1]},
    {"value_range": [1, None]},
    {"value_range": [4095, 0]},
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_data_json_is_one_line(damage, tmp_path):
    path = tmp_path / "data.json"
    files.write_json(path, DATA_RECORD)
    assert record.read_data_record(tmp_path) == DATA_RECORD
    files.write_json(path, DATA_RECORD | damage)
    with pytest.raises(BadInput, match=rf"^{path}: damaged; restore it from a copy"):
        record.read_data_record(tmp_path)


def forgotten(directory, step):
    shutil.rmtree(directory / str(step))


def without_arrays(directory, step):
    for path in (directory / str(step) / "state").rglob("manifest.ocdbt"):
        path.unlink()


def without_data(directory, step):
    shutil.rmtree(directory / str(step) / "data")


@pytest.mark.filterwarnings("ignore:Exception ignored in.*:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spoil", [forgotten, without_arrays, without_data])
@pytest.mark.parametrize("then", ["wait", "save", "exit"])
def test_a_save_that_failed_in_silence_is_named(tmp_path, monkeypatch, spoil, then):
    """Orbax only logs some failures of its background thread."""
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    checkpoints.save(10, state(10))
    checkpoints.wait()
    checkpoints.save(20, state(20))
    wait = checkpoints._orbax.wait

    def wait_and_spoil():
        wait()
        if (tmp_path / "checkpoints/20").exists():
            spoil(tmp_path / "checkpoints", 20)

    monkeypatch.setattr(checkpoints._orbax, "wait", wait_and_spoil)
    with pytest.raises(CannotWrite, match=r"checkpoints/20: cannot be written \(after saving it, "):
        if then == "wait":
            checkpoints.wait()
        elif then == "save":
            checkpoints.save(30, state(30))
        else:
            checkpoints.__exit__(None, None, None)
    checkpoints._orbax.close()
    assert not (tmp_path / "checkpoints/30").exists()
    assert restore(tmp_path)[0] == 10
