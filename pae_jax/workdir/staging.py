"""Files that are appended to, or written by other libraries, in a workdir on a URI.

Objects of a bucket are written as a whole. Such files are kept in a local folder, and uploaded.
"""

import contextlib
import tempfile
from pathlib import Path

from data_pipelines.errors import BadInput, first_line
from pae_jax.workdir.files import write_atomically
from pae_jax.workdir.paths import AnyPath


class Staging:
    """A local folder whose files are uploaded to the workdir; a context manager.

    For a local workdir the folder is the workdir itself, and nothing is uploaded.

    Attributes:
      folder: the local folder.
    """

    def __init__(self, workdir: AnyPath):
        self._temporary = self._target = None
        if isinstance(workdir, Path):
            self.folder = workdir
        else:
            self._temporary, self._target = tempfile.TemporaryDirectory(prefix="pae_"), workdir
            self.folder = Path(self._temporary.name)
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of the last upload

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Uploads what has changed, and removes a temporary folder."""
        try:
            # After another exception, that one is the cause and is already being raised.
            with contextlib.suppress(*[] if kind is None else [OSError]):
                self.upload()
        finally:
            if self._temporary:
                self._temporary.cleanup()

    def fetch(self, name: str) -> Path:
        """Returns the local path of a file, which an earlier run may have uploaded.

        Raises:
          BadInput: the file exists and cannot be read.
        """
        if self._target:
            source = self._target / name
            try:
                (self.folder / name).write_bytes(source.read_bytes())
            except FileNotFoundError:
                pass
            except Exception as error:  # the drivers of buckets raise many types
                raise BadInput(f"{source}: cannot be read ({first_line(error, 300)})") from error
        return self.folder / name

    def upload(self) -> None:
        """Uploads the files that have changed since the last upload.

        Raises:
          CannotWrite: an upload failed.
        """
        if not self._target:
            return
        for path in sorted(self.folder.rglob("*")):
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if path.is_file() and self._uploaded.get(path) != version:
                write_atomically(
                    self._target / str(path.relative_to(self.folder)), path.read_bytes()
                )
                self._uploaded[path] = version
