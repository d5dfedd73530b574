"""The cache of decoded images: uint8 arrays on disk, memory-mapped, shared by all runs.

A file's name is the hash of everything its content depends on, so a file never becomes stale.
A file appears by one rename, so a reader sees the whole file or none. Two processes that build
the same file at once write the same bytes.
"""

import contextlib
import hashlib
import io
import os
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipelines.errors import BadInput

S = TypeVar("S")
T = TypeVar("T")


def default_cache() -> Path:
    """Returns $PAE_CACHE, or ~/.cache/pae_jax where it is not set."""
    return Path(os.environ.get("PAE_CACHE") or Path.home() / ".cache" / "pae_jax")


def content_key(*parts: object) -> str:
    """Returns 32 hex digits, a hash of the parts' text; distinct parts give distinct keys."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def parallel(function: Callable[[S], T], items: Collection[S], label: str) -> Iterator[T]:
    """Yields function(item) in order, computed by threads a few items ahead.

    Shows a progress bar named `label` when it takes longer than two seconds.
    """
    from tqdm import tqdm

    threads = os.cpu_count() or 1
    pending: deque = deque()
    # The queue is bounded, because a finished result stays in memory until it is taken.
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(items), desc=label, delay=2, leave=False) as bar,
    ):
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 4 * threads:
                    yield pending.popleft().result()
                    bar.update()
            while pending:
                yield pending.popleft().result()
                bar.update()
        finally:
            for future in pending:
                future.cancel()


def cached(
    directory: str | Path,
    key: str,
    shapes: Sequence[tuple[int, ...]],
    build: Callable[[], tuple[tuple[int, ...], Callable[[int], np.ndarray]]],
) -> np.ndarray:
    """Returns the array of this key, read from `directory`, or built and written there.

    Args:
      directory: the folder of the cache, created when missing; "" is `default_cache()`.
      key: a result of `content_key`.
      shapes: the admissible shapes; a file of any other shape, type or length is rebuilt.
      build: called on a miss; returns the array's shape, one of `shapes`, and a function that
        computes row i. Several threads call that function.

    Returns:
      uint8, memory-mapped, read-only.

    Raises:
      BadInput: the directory cannot be written.
    """
    directory = Path(directory) if directory else default_cache()
    path = directory / f"{key}.npy"
    array = _load(path, shapes)
    if array is None:
        shape, row = build()
        _write(path, shape, parallel(row, range(shape[0]), "decoding"))
        array = _load(path, shapes)
        if array is None:
            raise RuntimeError(f"{path}: written just now, yet not readable")
    return array


def _write(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    """Writes a temporary file beside `path` and renames it when it is complete."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # No memory map, because on a full disk it kills the process instead of raising.
        with open(temporary, "xb") as file:
            file.write(_header(shape))
            for values in rows:
                file.write(values.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(
            f"{path.parent}: the cache cannot be written ({reason}); see data.cache_dir, PAE_CACHE"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _load(path: Path, shapes: Sequence[tuple[int, ...]]) -> np.ndarray | None:
    """Returns the memory-mapped array, or None where there is no valid file."""
    try:
        size = path.stat().st_size
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if array.dtype != np.uint8 or array.shape not in shapes:
        return None
    # The length is checked, because NumPy maps a file with trailing bytes without complaint.
    expected_size = len(_header(array.shape)) + array.size
    return np.asarray(array) if size == expected_size else None
