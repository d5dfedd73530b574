"""What a process sets up before it touches a device: the compilation cache, its peers."""

import os
import platform
import sys
from pathlib import Path

from data_pipelines.cache import content_key, default_cache
from data_pipelines.errors import BadInput


def start(distributed: str | None = None) -> None:
    """Called once by the command line; a notebook or a test decides for itself.

    Args:
      distributed: "auto" on a TPU slice or under Slurm, "HOST:PORT/COUNT/INDEX" anywhere else;
        None for a single process.
    """
    use_cache()
    if distributed:
        join(distributed)


def use_cache() -> None:
    """Keeps compiled programs in $PAE_CACHE/compiled, unless JAX was told another place.

    A second start of a run compiles nothing.
    """
    import jax

    # Set by $JAX_COMPILATION_CACHE_DIR or in code.
    if getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    directory = default_cache() / "compiled" / _processor()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _processor() -> str:
    """Twelve hex digits for this kind of processor: another one may lack instructions of a
    program that was compiled here, and home directories are shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = {line for line in lines if line.startswith(("flags", "Features"))}
    return content_key(platform.machine(), platform.processor(), sorted(features))[:12]


def join(distributed: str) -> None:
    """Joins the processes that train one run together."""
    import jax

    if distributed == "auto":
        jax.distributed.initialize()
        return
    try:
        address, count, index = distributed.split("/")
        numbers = int(count), int(index)
    except ValueError:
        raise BadInput(
            f"--distributed: auto or HOST:PORT/COUNT/INDEX, not {distributed!r}"
        ) from None
    if not 0 <= numbers[1] < numbers[0]:
        raise BadInput(f"--distributed: process {index} of {count}")
    jax.distributed.initialize(address, *numbers)


TUNABLES = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Starts this program again with glibc's malloc on huge pages; does nothing the second time.

    On a CPU XLA takes the memory of a step anew in every step, hundreds of MiB, and touches each
    page of it first: at 4 KiB a page that is a quarter of the step. glibc (2.35 or later, Linux)
    reads the wish when a program starts and not later. To be called before anything is done;
    whoever sets the variable, if only to nothing, is left alone.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
