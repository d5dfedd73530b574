"""TensorBoard's event file: what is in it, and a full disk under it."""

import errno
import os
import resource
import struct

import numpy as np
import pytest

from data_pipelines.errors import CannotWrite
from pae_jax.workdir.board import Board


def events(path):
    """Returns the events of a file: records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, start, found = path.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        found.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += length + 16
    assert start == len(data)
    return found


def test_what_is_written_is_in_the_file(tmp_path):
    board = Board(tmp_path / "tensorboard", purge_step=3)
    board.scalar("train/loss", 0.5, 3)
    board.image("panel", np.arange(48, dtype=np.uint8).reshape(4, 4, 3), 4)
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, start, scalar, image = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (3, 1)  # START
    (value,) = scalar.summary.value
    assert (scalar.step, value.tag, value.simple_value) == (3, "train/loss", 0.5)
    (value,) = image.summary.value
    assert (image.step, value.image.height, value.image.width) == (4, 4, 4)


def test_two_starts_in_one_second_have_two_files(tmp_path):
    for _ in range(2):
        Board(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_reported_and_nothing_waits(tmp_path):
    board = Board(tmp_path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    reason = os.strerror(errno.EFBIG)
    try:
        with pytest.raises(CannotWrite, match=rf"tfevents.*: cannot be written \({reason}\)"):
            for step in range(10_000):  # until the buffer is full
                board.scalar("train/loss", 0.5, step)
        with pytest.raises(CannotWrite, match=reason):
            board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="file/events"):
        Board(tmp_path / "file")
