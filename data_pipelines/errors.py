"""The exceptions that the command line answers with one line, and the lines of warnings."""

import functools
import logging
import os
import re

# Below "pae_jax", because the command line gives that logger its handler.
_logger = logging.getLogger("pae_jax.data")


class BadInput(ValueError):
    """Bad input: one line that names the file or the configuration key at fault.

    The command line prints the line and exits with 2. Any other exception is a failure of the
    run: it exits with 1 and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class CannotWrite(OSError):
    """A full or broken disk: one line that names the file or directory, and the reason."""

    def __init__(self, path: os.PathLike[str], error: BaseException):
        reason = error.strerror if isinstance(error, OSError) else None
        # TensorStore gives the reason after long paths.
        if match := re.search(r"os_error_code='(\d+)'", str(error)):
            reason = os.strerror(int(match[1]))
        line = f"{path}: cannot be written ({reason or first_line(error, 300)})"
        super().__init__(printable(line))


def first_line(error: BaseException, length: int) -> str:
    """Returns at most `length` characters of the first line of an error's message."""
    return str(error).strip().partition("\n")[0][:length]


@functools.cache
def warn(line: str) -> None:
    """Logs one line about the data that needs attention; an equal line only once per process."""
    _logger.warning("%s", printable(line))


@functools.cache
def inform(line: str) -> None:
    """Logs one line about the data; an equal line only once per process."""
    _logger.info("%s", printable(line))


def printable(text: str) -> str:
    r"""Returns one line of text: a control character as \x0a, a byte that is not UTF-8 as \xfc."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def spell(name: str) -> str:
    r"""Returns a name as one line of text, for files and tables; different names stay different.

    Like `printable`, and a backslash of the name is doubled, so that it differs from the others.
    """
    return printable(name.replace("\\", "\\\\"))


def _escaped(char: str) -> str:
    code = ord(char)
    # Python keeps a byte of a file name that is not UTF-8 as a character from U+DC80 on.
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code >= 0x10000:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
