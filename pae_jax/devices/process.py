"""The set-up of a process before it touches a device: memory, compilation cache, other processes.

Only light modules are imported here, because the command line calls `restart_with_huge_pages`
before it imports anything else.
"""

import atexit
import contextlib
import os
import platform
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.cache_folder import default_cache
from data_pipelines.errors import BadInput, CannotWrite, first_line
from pae_jax.devices import surroundings

TUNABLES = "GLIBC_TUNABLES"
# How long a process waits for the others at the start, in seconds.
JOIN_TIMEOUT = 300
# After how many seconds without a sign of life a process counts as lost, and all others end.
HEARTBEAT_TIMEOUT = 60

LOST = (
    "another process of this run has ended or cannot be reached, so this one ends too; the same "
    "command resumes from the last checkpoint"
)


def restart_with_huge_pages(script: str | None = None) -> None:
    """Restarts this program with glibc's malloc on huge pages; does nothing in the restarted one.

    On a CPU, XLA allocates several hundred MiB in every training step and touches each page of
    them first. With pages of 4 KiB this takes a quarter of the step. glibc (2.35 or later, Linux)
    reads the setting only when a program starts, so the program has to be restarted before it
    has done anything. A GLIBC_TUNABLES that the user set, even to nothing, is left unchanged.
    Nothing is restarted where JAX will use an accelerator, nor in a program other than `pae`.

    Args:
      script: a script other than `pae` that may be restarted, because it has done nothing yet.
    """
    if sys.platform != "linux" or TUNABLES in os.environ:
        return
    if surroundings.expects_cpu() and surroundings.may_restart(script):
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start(distributed: str | None = None) -> None:
    """Sets up the compilation cache and, if asked to, joins the processes of one training.

    The command line calls it once. A notebook or a test decides for itself.

    Args:
      distributed: "auto" on a TPU slice, under Slurm or Open MPI, "HOST:PORT/COUNT/INDEX"
        anywhere else; None for a single process.

    Raises:
      BadInput: see `join_processes` and `surroundings.check_devices`.
    """
    use_compilation_cache()
    surroundings.use_cache_without_home(default_cache())
    if distributed:
        join_processes(distributed)
    surroundings.check_devices()


def use_compilation_cache() -> None:
    """Keeps compiled programs in $PAE_CACHE/compiled, so that a second start compiles nothing.

    A directory that was given to JAX itself, in $JAX_COMPILATION_CACHE_DIR or in code, stays.
    """
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    directory = default_cache() / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # JAX keeps by default only programs that are slow to compile or large.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _processor() -> str:
    """Returns twelve hex digits that name the processor's type.

    Programs of different types are kept apart because a home directory may be shared, and
    another processor may lack instructions that a program was compiled for.
    """
    from data_pipelines.cache import content_key

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    return content_key(platform.machine(), platform.processor(), sorted(features))[:12]


def join_processes(distributed: str, timeout: float | None = None) -> None:
    """Joins the processes that train one run together.

    Args:
      distributed: see `start`.
      timeout: how long to wait for the other processes, in seconds; None for `JOIN_TIMEOUT`.

    Raises:
      BadInput: `distributed` has another form, "auto" finds nothing, the port cannot be used, or
        another process does not come in time.
    """
    import jax

    timeout = JOIN_TIMEOUT if timeout is None else timeout
    if distributed == "auto":
        arguments = {}
    else:
        try:
            address, count_text, index_text = distributed.split("/")
            host, _, port_text = address.rpartition(":")
            port, count, index = int(port_text), int(count_text), int(index_text)
        except ValueError:
            host, port, count, index = "", 0, 0, 0
        if not host:
            raise BadInput(f"--distributed: auto or HOST:PORT/COUNT/INDEX, not {distributed!r}")
        if not 0 <= index < count:
            raise BadInput(f"--distributed: process {index} of {count}")
        if not 1 <= port <= 65535:
            raise BadInput(f"--distributed: port {port} is not between 1 and 65535")
        if index == 0:
            _check_port(port)
        arguments = {"coordinator_address": address, "num_processes": count, "process_id": index}

    # JAX ends the process with a C++ stack trace when its own time is over. So it gets more time
    # than it is given here, in a thread that is left behind when it does not come back.
    def join() -> None:
        try:
            jax.distributed.initialize(
                initialization_timeout=int(timeout) + 3600,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                **arguments,
            )
        except Exception as error:
            errors.append(error)

    errors: list[Exception] = []
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        atexit.register(_close_stderr)
        raise BadInput(
            f"--distributed={distributed}: after {timeout:g} s not all processes have joined; "
            "start one for each INDEX, and let HOST:PORT be reachable from all of them"
        )
    for error in errors:
        if distributed == "auto" and isinstance(error, ValueError):
            raise BadInput(
                "--distributed=auto: neither a TPU slice nor a job of Slurm or Open MPI was "
                f"found; give HOST:PORT/COUNT/INDEX ({first_line(error, 200)})"
            ) from error
        raise BadInput(f"--distributed={distributed}: {first_line(error, 200)}") from error


@contextlib.contextmanager
def end_alone() -> Iterator[None]:
    """Ends this process at once if it raises inside the context, where the others do not.

    Otherwise JAX would wait at its exit for the others, which wait for this one in the next
    exchange. Without other processes the context does nothing.

    Yields:
      Nothing.
    """
    import jax

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, BadInput | CannotWrite):
            print(f"pae: {error}", file=sys.stderr)
        elif any(library in str(error).lower() for library in ("gloo", "nccl")):
            # The exchange failed, because another process is lost.
            print(f"pae: {LOST}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, BadInput) else 1)


def _close_stderr() -> None:
    """Drops what JAX's service writes while it is torn down, after the line that says why."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _check_port(port: int) -> None:
    """Checks that this process can listen on a port, as the first process has to.

    Raises:
      BadInput: it cannot.
    """
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise BadInput(
            f"--distributed: process 0 cannot listen on port {port} ({reason}); take another one"
        ) from None


def gather_texts(text: str) -> list[str]:
    """Returns the texts that all processes give, in the order of the processes."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray([len(encoded)], np.int32))[:, 0]
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Ends all processes if one of them raises inside the context.

    Without it the others would wait for that process in their next exchange. All processes have
    to enter the same contexts, which are not nested, and exchange nothing inside them.

    Yields:
      Nothing.

    Raises:
      BadInput: another process raised an exception; the line names it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    texts = gather_texts("" if error is None else _one_line(error))
    if error is not None:
        raise error
    for i, text in enumerate(texts):
        if text:
            raise BadInput(f"process {i} of {len(texts)}: {text}")


def _one_line(error: BaseException) -> str:
    text = first_line(error, 1000)
    return text if text and isinstance(error, BadInput) else f"{type(error).__name__}: {text}"
