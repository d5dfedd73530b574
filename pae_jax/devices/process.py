"""The set-up of a process before it touches a device: memory, compilation cache, other processes.

Only light modules are imported here, because the command line calls `restart_with_huge_pages`
before it imports anything else.
"""

import os
import platform
import sys
from pathlib import Path

from data_pipelines.errors import BadInput

TUNABLES = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Restarts this program with glibc's malloc on huge pages; does nothing in the restarted one.

    On a CPU, XLA allocates several hundred MiB in every training step and touches each page of
    them first. With pages of 4 KiB this takes a quarter of the step. glibc (2.35 or later, Linux)
    reads the setting only when a program starts, so the program has to be restarted before it
    has done anything. A GLIBC_TUNABLES that the user set, even to nothing, is left unchanged.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def start(distributed: str | None = None) -> None:
    """Sets up the compilation cache and, if asked to, joins the processes of one training.

    The command line calls it once. A notebook or a test decides for itself.

    Args:
      distributed: "auto" on a TPU slice or under Slurm, "HOST:PORT/COUNT/INDEX" anywhere else;
        None for a single process.

    Raises:
      BadInput: `distributed` has another form.
    """
    use_compilation_cache()
    if distributed:
        join_processes(distributed)


def use_compilation_cache() -> None:
    """Keeps compiled programs in $PAE_CACHE/compiled, so that a second start compiles nothing.

    A directory that was given to JAX itself, in $JAX_COMPILATION_CACHE_DIR or in code, stays.
    """
    import jax

    from data_pipelines.cache import default_cache

    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    directory = default_cache() / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # By default JAX keeps only programs that are slow to compile or large.
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


def join_processes(distributed: str) -> None:
    """Joins the processes that train one run together; see `start` for the argument."""
    import jax

    if distributed == "auto":
        jax.distributed.initialize()
        return
    try:
        address, count_text, index_text = distributed.split("/")
        count, index = int(count_text), int(index_text)
    except ValueError:
        raise BadInput(
            f"--distributed: auto or HOST:PORT/COUNT/INDEX, not {distributed!r}"
        ) from None
    if not 0 <= index < count:
        raise BadInput(f"--distributed: process {index} of {count}")
    jax.distributed.initialize(address, count, index)
