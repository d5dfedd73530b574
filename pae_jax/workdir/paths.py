"""The places of a run: local paths, and URIs in buckets such as gs://BUCKET/FOLDER.

A local path is a `pathlib.Path`. A URI is an `etils.epath.Path`, which has the same methods.
"""

import importlib.util
import logging
import os
import re
from pathlib import Path

from etils import epath

from data_pipelines.errors import BadInput

AnyPath = Path | epath.Path

# The schemes that etils.epath reads and writes, and the package that it needs for each.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
# Orbax writes checkpoints with its own drivers. For buckets it has this one only.
WORKDIR_SCHEME = "gs"

# Links work, because Orbax does not resolve them.
_ANOTHER_NAME = "choose another folder, or a link to it with another name"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/+)(.?)")


def to_path(place: str | os.PathLike[str]) -> AnyPath:
    """Returns the path of a local place or of a URI.

    Args:
      place: a local path, or a URI with a scheme of `PACKAGES`.

    Raises:
      BadInput: the URI cannot be used here. It never becomes a local folder of that name.
    """
    text = os.fspath(place)
    match = _SCHEME.match(text)
    if match is None:
        return Path(text)
    scheme, slashes, bucket = match.groups()
    if scheme not in PACKAGES:
        if slashes == "/":
            return Path(text)  # a local folder whose name ends with a colon
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise BadInput(f"{text}: {scheme}:// is not supported; use a local folder or {known}")
    if slashes != "//" or not bucket:
        # pathlib.Path merges the two slashes.
        raise BadInput(f"{text}: a URI is written {scheme}://BUCKET/FOLDER, in Python as a string")
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{text}: needs a package that is not installed: pip install {package}")
    _prepare_driver(scheme)
    return epath.Path(text)


def to_workdir(place: str | os.PathLike[str]) -> AnyPath:
    """Returns the path of a workdir, which holds checkpoints.

    Raises:
      BadInput: see `to_path`; or Orbax can neither write nor read checkpoints there.
    """
    match = _SCHEME.match(os.fspath(place))
    if match and match[1] in PACKAGES and match[1] != WORKDIR_SCHEME:
        raise BadInput(
            f"{place}: a workdir is a local folder or {WORKDIR_SCHEME}://BUCKET/FOLDER, because "
            "checkpoints cannot be written elsewhere"
        )
    path = to_path(place)
    text = _absolute(path)
    if "\\" in text and os.sep != "\\":
        raise BadInput(f"{place}: checkpoints need a path without \\; {_ANOTHER_NAME}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(
            f"{place}: checkpoints need a path that is valid UTF-8; {_ANOTHER_NAME}"
        ) from None
    return path


def check_savable(workdir: AnyPath) -> None:
    """Checks that checkpoints that are saved in a workdir can be read again.

    Orbax looks for the parts of a save with the workdir as a pattern of file names. It would find
    none, or those of a sibling. It reads checkpoints without patterns, so a workdir can be renamed.

    Raises:
      BadInput: the absolute path has a character of such patterns.
    """
    if found := re.search(r"[*?[]", _absolute(workdir)):
        raise BadInput(
            f"{workdir}: checkpoints cannot be saved below a folder with {found[0]} in its name; "
            f"{_ANOTHER_NAME}"
        )


def _absolute(path: AnyPath) -> str:
    return str(path.absolute() if isinstance(path, Path) else path)


def is_uri(path: AnyPath) -> bool:
    """Returns whether the path is a URI, and not on a local disk."""
    return not isinstance(path, Path)


def check_local(name: str, value: str) -> None:
    """Checks that a place of data is not a URI.

    Args:
      name: the option or the configuration key.
      value: a path; it may have a prefix such as "tfds:".

    Raises:
      BadInput: it is a URI.
    """
    if "://" in value:
        raise BadInput(
            f"{name}={value}: images and caches are on a local disk, not on a URI; copy the folder "
            "(`gcloud storage cp --recursive`) or mount the bucket (`gcsfuse`)"
        )


def _prepare_driver(scheme: str) -> None:
    import fsspec.config

    # The bucket is asked at each access, because other processes and TensorStore write there too.
    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False
    # It logs a traceback of each error that it raises.
    logging.getLogger(PACKAGES[scheme]).setLevel(logging.CRITICAL)
