"""Memory on huge pages, for a training step on a CPU."""

import os
import sys

TUNABLES = "GLIBC_TUNABLES"


def use_huge_pages() -> None:
    """Starts this program again with glibc's malloc on huge pages; does nothing the second time.

    On a CPU XLA takes the memory of a step anew in every step, hundreds of MiB, and touches each
    page of it first: at 4 KiB a page that is a quarter of the step. glibc (2.35 or later, Linux)
    reads the wish when a program starts and not later. To be called before anything is done;
    whoever sets the variable, if only to nothing, is left alone.
    """
    if sys.platform == "linux" and TUNABLES not in os.environ:
        os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
