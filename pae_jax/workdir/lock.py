"""The lock of a folder: one process at a time trains or predicts in it.

W/.lock    on a local disk, a file that the process locks (flock)
W/.owner   where there are no locks, a file that names the owner

Buckets have no locks, nor have some network file systems, and Windows has others. There the owner
writes its name and the time to W/.owner, renews the time every `RENEW_SECONDS`, and removes the
file at its end. Another process is refused until the time is older than `STALE_SECONDS`, or
allowed at once if the owner was a process of the same machine that has ended. An owner that was
replaced stops before its next save.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.workdir.files import read_json, write_json
from pae_jax.workdir.paths import AnyPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RENEW_SECONDS = 30
STALE_SECONDS = 300

# flock answers with these if another process holds the lock. Other numbers mean: no locks.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)

Check = Callable[[], None]


@contextlib.contextmanager
def lock(workdir: AnyPath, use: str = "training") -> Iterator[Check]:
    """Locks a workdir, or the folder of a prediction, while the context is open.

    Args:
      workdir: an existing folder, or a URI.
      use: what the process does there, for the message to another one.

    Yields:
      A function that raises CannotWrite if another process has taken the workdir over.

    Raises:
      BadInput: another process does so already.
      CannotWrite: the workdir cannot be written.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(workdir, Path):
            try:
                file = stack.enter_context((workdir / ".lock").open("a"))
            except OSError as error:
                raise CannotWrite(workdir / ".lock", error) from error
            if _flock(file, workdir, use):
                yield lambda: None
                return
        yield stack.enter_context(_own(workdir / ".owner", use))


def _flock(file: Any, workdir: Path, use: str) -> bool:
    """Locks an open file until it is closed; returns False if the file system has no locks."""
    if fcntl is None:
        return False
    try:
        # The system releases this lock when the process ends, even if it is killed.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise BadInput(f"{workdir}: another process is {use} there") from None
        logging.getLogger("pae_jax").warning(
            "%s: this file system has no locks (%s); the file .owner takes their place",
            workdir,
            error.strerror or error,
        )
        return False
    return True


@contextlib.contextmanager
def _own(path: AnyPath, use: str) -> Iterator[Check]:
    owner = {**_this_process(), "id": uuid.uuid4().hex}

    def renew() -> None:
        write_json(path, {**owner, "time": time.time()})

    def check() -> None:
        other = _read(path)
        if other is None or other.get("id") != owner["id"]:
            name = f"a person who removed {path.name}" if other is None else _name(other)
            raise CannotWrite(path.parent, RuntimeError(f"taken over by {name}"))

    def keep() -> None:
        while not ended.wait(RENEW_SECONDS):
            # A failure now is tried again, and the next save reports it.
            with contextlib.suppress(BadInput, CannotWrite):
                check()
                renew()

    other = _read(path)
    if other is not None and (seconds := _seconds_to_wait(other)) > 0:
        raise BadInput(
            f"{path.parent}: another process is {use} there ({_name(other)}); if it has ended, "
            f"wait {seconds:.0f} s or remove {path}"
        )
    renew()
    # If two processes start at the same time, the one that wrote first usually finds out here.
    check()
    ended = threading.Event()
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # the file becomes stale by itself
            check()
            path.unlink()


def _read(path: AnyPath) -> dict[str, Any] | None:
    """Returns the owner in the file; None without a file."""
    try:
        owner = read_json(path) if path.exists() else None
    except BadInput:
        owner = {}
    # The file of an owner is written at once, so anything else in it is not an owner's.
    return owner if owner is None or isinstance(owner, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} of {owner.get('host', '?')}"


def _seconds_to_wait(owner: dict[str, Any]) -> float:
    """Returns after how many seconds the owner counts as gone."""
    if owner.get("machine") == _this_process()["machine"] and not _is_alive(owner.get("pid")):
        return 0.0
    renewed = owner.get("time")
    return renewed + STALE_SECONDS - time.time() if isinstance(renewed, int | float) else 0.0


def _this_process() -> dict[str, Any]:
    host = socket.gethostname()
    machine = host
    with contextlib.suppress(OSError):
        # Process numbers mean something only within one start of a machine and one container.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return {"host": host, "machine": machine, "pid": os.getpid()}


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        pass
    return True
