"""Buckets without a cloud: one in memory, and a server that speaks Cloud Storage's protocol."""

import contextlib
import functools
import http.server
import re
import threading
from collections.abc import Iterator
from http import HTTPStatus
from urllib import parse

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from pae_jax.workdir import paths

ROOT = "gs://bucket"


class MemoryBucket(MemoryFileSystem):
    """Objects in memory. As in a bucket, there are no folders, only names with slashes."""

    protocol = "gs"
    store: dict = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")

    def mkdir(self, *args: object, **kwargs: object) -> None:
        """Does nothing, since a bucket has no folders."""

    makedirs = mkdir


@contextlib.contextmanager
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryBucket]:
    """Lets URIs gs://… name objects in memory."""
    MemoryBucket.store.clear()
    files = MemoryBucket()
    with monkeypatch.context() as patch:
        patch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: files)
        patch.setitem(paths.PACKAGES, "gs", "fsspec")
        yield files


@contextlib.contextmanager
def served() -> Iterator[dict[str, str]]:
    """Serves an empty bucket on this machine.

    Yields:
      The environment variables that send gcsfs, Google's client and TensorStore to it.
    """
    emulator = pytest.importorskip(
        "gcp_storage_emulator.server", reason="pip install gcp-storage-emulator"
    )
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    class Handler(emulator.RequestHandler):
        """Adds generations to the emulator, without which TensorStore refuses an answer."""

        def _object(self) -> tuple[dict | None, dict[str, list[str]]]:
            url = parse.urlparse(self.path)
            query = parse.parse_qs(url.query)
            match = re.fullmatch(r"(?:/\w+)?/storage/v1/b/([^/]+)/o(?:/(.*))?", url.path)
            if not match:
                return None, query
            name = parse.unquote(match[2] or "") or query.get("name", [""])[0]
            try:
                return self.storage.get_file_obj(match[1], name), query
            except NotFound:
                return None, query

        def end_headers(self) -> None:
            found, _ = self._object()
            if found and self.command == "GET":
                self.send_header("x-goog-generation", found["generation"])
            super().end_headers()

        def do_POST(self) -> None:
            # A write under the condition that the object is unchanged, or absent (generation 0).
            found, query = self._object()
            generation = found["generation"] if found else "0"
            if query.get("ifGenerationMatch", [generation]) != [generation]:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_error(HTTPStatus.PRECONDITION_FAILED)
            else:
                super().do_POST()

    class Server(http.server.HTTPServer):
        def handle_error(self, *_: object) -> None:
            """Says nothing about clients that were killed or no longer listen."""

    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(ROOT.removeprefix("gs://"), storage)
    server = Server(("localhost", 0), functools.partial(Handler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}"
    try:
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            # No credentials are looked for.
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "test",
        }
    finally:
        server.shutdown()
        server.server_close()
