"""The cache of decoded images: uint8 arrays on disk, memory-mapped, shared by all runs.

A file's name is the hash of everything its content depends on, so a file never becomes stale.
A file appears by one rename, so a reader sees the whole file or none. Two processes that build
the same file at once write the same bytes. When a file is added, those that were not used for the
longest time leave the cache, until it is within its bound (`cache_folder.limit`).
"""

import contextlib
import hashlib
import io
import os
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipelines import cache_folder
from data_pipelines.cache_folder import default_cache
from data_pipelines.errors import BadInput
from data_pipelines.writing import atomic_file

__all__ = ["cached", "content_key", "default_cache", "in_order", "parallel", "threads"]

S = TypeVar("S")
T = TypeVar("T")


def content_key(*parts: object) -> str:
    """Returns 32 hex digits, a hash of the parts' text; distinct parts give distinct keys."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def parallel(
    function: Callable[[S], T], items: Collection[S], label: str, *, ahead: int = 0
) -> Iterator[T]:
    """Yields function(item) in order, computed by threads a few items ahead; see `in_order`.

    Shows a progress bar named `label` when it takes longer than two seconds.
    """
    from tqdm import tqdm

    with tqdm(total=len(items), desc=label, delay=2, leave=False) as bar:
        for result in in_order(function, items, ahead=ahead or 4 * threads()):
            yield result
            bar.update()


def threads() -> int:
    """Returns how many threads decode or encode at once."""
    return os.cpu_count() or 1


def in_order(
    function: Callable[[S], T], items: Iterable[S], ahead: int
) -> Generator[T, None, None]:
    """Yields function(item) in order, computed by threads.

    Args:
      function: is called by several threads.
      items: may be endless.
      ahead: so many results are computed before they are asked for. It is bounded, because a
        finished result stays in memory until it is taken.
    """
    pending: deque = deque()
    with ThreadPoolExecutor(threads()) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def cached(
    directory: str | Path,
    key: str,
    shapes: Sequence[tuple[int, ...]],
    build: Callable[[], tuple[tuple[int, ...], Callable[[int], np.ndarray]]],
    *,
    purpose: str = "",
) -> np.ndarray:
    """Returns the array of this key, read from `directory`, or built and written there.

    Args:
      directory: the folder of the cache, created when missing; "" is `default_cache()`. Where it
        cannot be written, `default_cache()` takes its place for what it does not hold yet.
      key: a result of `content_key`.
      shapes: the admissible shapes; a file of any other shape, type or length is rebuilt.
      build: called on a miss; returns the array's shape, one of `shapes`, and a function that
        computes row i. Several threads call that function.
      purpose: one line that says what the array holds, for `pae cache`.

    Returns:
      uint8, memory-mapped, read-only.

    Raises:
      BadInput: the disk is full, or no folder at all can be written.
    """
    preferred = Path(directory) if directory else cache_folder.preferred_cache()
    # A folder that can only be read may still hold the file.
    array = _load(preferred / f"{key}.npy", shapes) if preferred else None
    if array is not None:
        return array
    folder = cache_folder.writable_cache(directory)
    path = folder / f"{key}.npy"
    array = _load(path, shapes) if folder != preferred else None
    if array is None:
        bound = cache_folder.limit()
        shape, row = build()
        try:
            _write(path, shape, parallel(row, range(shape[0]), "decoding"))
        except OSError as error:
            advice = "" if directory else ", or set PAE_CACHE to a folder on another disk"
            raise BadInput(
                f"{folder}: the cache cannot be written ({error.strerror or error}); "
                f"make space there{advice}"
            ) from error
        array = _load(path, shapes)
        if array is None:
            raise RuntimeError(f"{path}: written just now, yet not readable")
        if purpose:
            with contextlib.suppress(OSError):  # only `pae cache` reads it
                path.with_suffix(".txt").write_text(f"{purpose}\n", errors="backslashreplace")
        # After the file was opened, which marks it as in use.
        cache_folder.trim(folder, bound)
    return array


def _write(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    # No memory map, because on a full disk it kills the process instead of raising.
    with atomic_file(path) as file:
        file.write(_header(shape))
        for values in rows:
            file.write(values.tobytes())


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _load(path: Path, shapes: Sequence[tuple[int, ...]]) -> np.ndarray | None:
    """Returns the memory-mapped array, or None where there is no valid file.

    The file is marked as in use for as long as the array or a view of it exists.
    """
    release = cache_folder.mark_used(path)
    array = _map(path, shapes)
    if array is None:
        release()
        return None
    # Every view of the array keeps this mapping alive.
    weakref.finalize(array.base, release)
    return np.asarray(array)


def _map(path: Path, shapes: Sequence[tuple[int, ...]]) -> np.memmap | None:
    try:
        size = path.stat().st_size
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if array.dtype != np.uint8 or array.shape not in shapes:
        return None
    # The length is checked, because NumPy maps a file with trailing bytes without complaint.
    expected_size = len(_header(array.shape)) + array.size
    return array if size == expected_size else None
