"""One process in a folder: by a lock, and by a file where the file system has no locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.workdir import lock

PROJECT = Path(__file__).parents[1]
NO_LOCKS = ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL", "EIO", "EBADF")
# Holds the folder of its argument until its standard input ends; "none" for no locks.
HOLDER = """
import errno, fcntl, sys
from pathlib import Path
from pae_jax.workdir import lock
def flock(*_): raise OSError(errno.ENOLCK, "No locks available")
if sys.argv[2] == "none": fcntl.flock = flock
with lock.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder, how):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), how],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout
    assert child.stdout.readline() == b"held\n"
    return child


def end(child, *, kill=False):
    if kill:
        child.kill()
    child.stdin.close()
    child.wait()
    child.stdout.close()


def refuse(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def test_a_held_lock_is_refused_and_released(tmp_path):
    child = holder(tmp_path, "locks")
    with pytest.raises(BadInput) as caught, lock.lock(tmp_path):
        pass
    assert str(caught.value) == f"{tmp_path}: another process is training there"
    end(child, kill=True)
    with lock.lock(tmp_path):
        assert not (tmp_path / ".owner").exists()


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_codes_of_a_held_lock(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(getattr(errno, name)))
    with pytest.raises(BadInput, match="another process"), lock.lock(tmp_path):
        pass


@pytest.mark.parametrize("name", NO_LOCKS)
def test_without_locks_a_warning_and_an_owner_file(name, tmp_path, monkeypatch, messages):
    monkeypatch.setattr(fcntl, "flock", refuse(getattr(errno, name)))
    with lock.lock(tmp_path):
        assert json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()
        # This process runs, so it is refused a second time.
        with pytest.raises(BadInput, match=rf"process {os.getpid()} of"), lock.lock(tmp_path):
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    reason = os.strerror(getattr(errno, name))
    assert messages[0] == (
        f"{tmp_path}: this file system has no locks ({reason}); the file .owner takes their place"
    )


def test_without_fcntl_there_is_an_owner_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.lock(tmp_path):
        assert (tmp_path / ".owner").exists()
    assert not (tmp_path / ".owner").exists()


def test_the_owner_of_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    child = holder(tmp_path, "none")
    with pytest.raises(BadInput, match=rf"process {child.pid} of "), lock.lock(tmp_path):
        pass
    end(child, kill=True)
    assert (tmp_path / ".owner").exists()
    with lock.lock(tmp_path):  # of this machine and dead: known at once
        assert json.loads((tmp_path / ".owner").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "half {", "[]"])
def test_a_file_without_an_owner_is_replaced(content, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    (tmp_path / ".owner").write_text(content)
    with lock.lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written():
    with pytest.raises(CannotWrite, match=r"/proc/\.lock"), lock.lock(Path("/proc")):
        pass
