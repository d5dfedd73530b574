"""The folder of the cache: where it is, what it holds, and its bound.

FOLDER/KEY.npy           decoded images, masks or textures; KEY is 32 hex digits
FOLDER/KEY.txt           one line that says what KEY.npy holds
FOLDER/compiled/*/NAME   programs that JAX has compiled

Where the folder cannot be written, a temporary one takes its place until the process ends.
"""

import atexit
import contextlib
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import BadInput, CannotWrite, first_line, warn

try:
    import fcntl
except ImportError:  # Windows, which refuses to delete a file that is open
    fcntl = None

LIMIT = "PAE_CACHE_LIMIT"
DEFAULT_LIMIT = "32GiB"
# How long a file counts as used where the file system has no locks, and how long the rest of an
# interrupted write stays, in seconds.
DAY = 24 * 3600

_ARRAY = re.compile(r"[0-9a-f]{32}\.npy")
# `writing.atomic_file` gives the first form of name; earlier versions gave the second.
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.(tmp|npy\.[0-9a-f]{32})")
_UNITS = {unit: 1024**i for i, unit in enumerate(("", "K", "M", "G", "T"))}


class Entry(NamedTuple):
    """One file of the cache.

    Attributes:
      path: the file.
      size: its length in bytes.
      used: the time of its last use, in seconds since 1970.
      purpose: what it is for.
    """

    path: Path
    size: int
    used: float
    purpose: str


def preferred_cache() -> Path | None:
    """Returns $PAE_CACHE, or ~/.cache/pae_jax; None where neither is known."""
    if os.environ.get("PAE_CACHE"):
        return Path(os.environ["PAE_CACHE"])
    try:
        return Path.home() / ".cache" / "pae_jax"
    except RuntimeError:  # $HOME is not set, and the user has no entry in /etc/passwd
        return None


def default_cache() -> Path:
    """Returns `preferred_cache`, or a temporary folder where that cannot be written.

    The temporary folder is announced in one line and removed when the process ends.

    Raises:
      BadInput: no folder at all can be written.
    """
    folder = preferred_cache()
    reason = "$HOME is not set and the user has no home" if folder is None else unwritable(folder)
    if folder is not None and not reason:
        return folder
    temporary = _temporary_folder()
    name = "PAE_CACHE" if os.environ.get("PAE_CACHE") else "the cache"
    where = f"{name}: {folder} cannot be written ({reason})" if folder else f"{name}: {reason}"
    warn(
        f"{where}; decoded images and compiled programs are kept in {temporary} until the end of "
        "this process. The environment variable PAE_CACHE names a folder that stays"
    )
    return temporary


def writable_cache(directory: str | Path) -> Path:
    """Returns `directory` if it can be written, else `default_cache()`, announced in one line."""
    if not directory:
        return default_cache()
    reason = unwritable(Path(directory))
    if not reason:
        return Path(directory)
    folder = default_cache()
    warn(f"data.cache_dir: {directory} cannot be written ({reason}); using {folder}")
    return folder


def unwritable(directory: Path) -> str:
    """Returns why files cannot be written to a directory, or ""; makes the directory."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A file is created, because permissions alone do not show a read-only file system.
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else None
        return reason or first_line(error, 200)


@functools.cache
def _temporary_folder() -> Path:
    """Makes a folder that is removed when the process ends.

    It has a new name each time. A folder of a known name in /tmp could be another user's, and
    compiled programs are read from it.
    """
    try:
        folder = tempfile.mkdtemp(prefix="pae_jax_cache_")
    except OSError as error:
        raise BadInput(
            f"the cache: no folder can be written, not even a temporary one "
            f"({error.strerror or error}); set PAE_CACHE"
        ) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


# ---- use ----


def mark_used(path: Path) -> Callable[[], None]:
    """Marks a file as used now, and as in use until the function that it returns is called."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        return lambda: None
    with contextlib.suppress(OSError):
        os.utime(path)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return functools.partial(os.close, descriptor)


def is_in_use(path: Path) -> bool:
    """Returns whether a running process has marked the file as in use.

    Where the file system has no locks, a file counts as in use for a day after its last use.
    """
    try:
        with path.open("rb") as file:
            if fcntl is None:
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                return time.time() - path.stat().st_mtime < DAY
    except OSError:
        return False
    return False


# ---- contents ----


def entries(directory: Path) -> list[Entry]:
    """Returns the files of a cache, by time of use; other files in the folder are left out."""
    found = [entry for path in _scan(directory) for entry in _array_entry(path)]
    compiled = directory / "compiled"
    for folder in _scan(compiled):
        for path in _scan(folder):
            if path.is_file():
                found += _entry(path, "compiled program")
    return sorted(found, key=lambda entry: entry.used)


def _array_entry(path: Path) -> list[Entry]:
    if _ARRAY.fullmatch(path.name):
        try:
            purpose = path.with_suffix(".txt").read_text(errors="replace").strip()
        except OSError:
            purpose = ""
        return _entry(path, purpose or "decoded images")
    return _entry(path, "an interrupted write") if _UNFINISHED.fullmatch(path.name) else []


def _entry(path: Path, purpose: str) -> list[Entry]:
    try:
        status = path.stat()
    except OSError:  # another process has removed it
        return []
    return [Entry(path, status.st_size, status.st_mtime, purpose)]


def _scan(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from sorted(directory.iterdir())


# ---- bound ----


def limit() -> int:
    """Returns the bound of the cache in bytes: $PAE_CACHE_LIMIT, by default 32 GiB.

    Raises:
      BadInput: the variable is not a size.
    """
    text = os.environ.get(LIMIT) or DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise BadInput(f"{LIMIT}: a size like 500M or 32GiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def trim(directory: Path, bound: int) -> list[Entry]:
    """Removes the files that were not used for the longest time, until the rest is in the bound.

    A file that a running process uses stays, even if the bound is then exceeded.

    Args:
      directory: the folder of the cache.
      bound: the largest sum of the sizes, in bytes.

    Returns:
      The files that were removed.
    """
    known = entries(directory)
    total, removed = sum(entry.size for entry in known), []
    for entry in known:
        if total <= bound:
            break
        if _may_remove(entry):
            with contextlib.suppress(OSError):
                _remove(entry.path)
                total -= entry.size
                removed.append(entry)
    return removed


def _may_remove(entry: Entry) -> bool:
    if _UNFINISHED.fullmatch(entry.path.name):  # perhaps another process is writing it
        return time.time() - entry.used > DAY
    return not is_in_use(entry.path)


def _remove(path: Path) -> None:
    # The description first, because one without its array is found by no later call. Another
    # process may have removed either.
    if path.suffix == ".npy":
        path.with_suffix(".txt").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# ---- text ----


def describe(directory: Path) -> str:
    """Returns a table of the files: size, day of the last use, purpose; programs in one row."""
    known = entries(directory)
    programs = [entry for entry in known if entry.purpose == "compiled program"]
    rows = [
        (entry.size, entry.used, entry.purpose + (", in use" if is_in_use(entry.path) else ""))
        for entry in known
        if entry.purpose != "compiled program"
    ]
    if programs:
        size = sum(entry.size for entry in programs)
        rows.append((size, programs[-1].used, f"{len(programs)} files of compiled programs"))
    total = size_text(sum(entry.size for entry in known))
    lines = [f"{directory}: {total} of at most {size_text(limit())} ({LIMIT})"]
    for size, used, purpose in rows:
        day = time.strftime("%Y-%m-%d", time.localtime(used))
        lines.append(f"{size_text(size):>10}  {day}  {purpose}")
    return "\n".join(lines)


def clear(directory: Path) -> str:
    """Removes every file that is not in use; returns one line that says what was removed.

    Raises:
      CannotWrite: a file that is not in use cannot be removed. Those before it are.
    """
    removed, stay = [], []
    for entry in entries(directory):
        if not _may_remove(entry):
            stay.append(entry)
            continue
        try:
            _remove(entry.path)
        except OSError as error:
            if fcntl is None and isinstance(error, PermissionError):  # on Windows, it is open
                stay.append(entry)
                continue
            raise CannotWrite(entry.path, error) from error
        removed.append(entry)
    line = f"{directory}: removed {_count_text(removed)}"
    return f"{line}; {_count_text(stay, ' in use')}" if stay else line


def _count_text(files: list[Entry], state: str = "") -> str:
    size = size_text(sum(entry.size for entry in files))
    noun = f"{len(files)} file{'s' if len(files) != 1 else ''}{state}"
    if not state:
        return f"{noun}, {size}"
    return f"{noun} {'stay' if len(files) != 1 else 'stays'}, {size}"


def size_text(size: float) -> str:
    """Returns a size in bytes as text, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
