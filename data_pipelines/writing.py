"""Files of a local disk that appear at once or not at all, under names that it can hold."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# The bytes of the longest name of a file in most file systems.
MAX_NAME = 255


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to be written, which gets its name when the context ends without an error.

    Args:
      path: replaces what is there. Its folder is made if it is missing.

    Raises:
      OSError: no space or no permission. What stood before is whole.
    """
    # In the same folder, because only a rename within one file system is atomic. The name is not
    # made of the final one, which may be as long as names can be.
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            # Otherwise the name may reach the disk before the content, and a loss of power in
            # between leaves an empty file in place of the earlier one.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # A failure to clean up must not hide the cause.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def short_name(name: str, reserved: int = 0) -> str:
    """Returns the name of a file, of at most `MAX_NAME` bytes less those that are reserved.

    A longer name is cut and gets a part of its hash, so that different names stay different.
    """
    data, limit = name.encode(errors="surrogateescape"), MAX_NAME - reserved
    if len(data) <= limit:
        return name
    digest = hashlib.sha256(data).hexdigest()[:12]
    return data[: limit - 13].decode(errors="ignore") + "~" + digest
