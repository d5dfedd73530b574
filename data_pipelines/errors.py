"""The exceptions that the command line answers with one line instead of a traceback."""

from pathlib import Path


class BadInput(ValueError):
    """Bad input: one line that names the file or the configuration key at fault.

    The command line prints the line and exits with 2. Any other exception is a failure of the
    run: it exits with 1 and keeps its traceback.
    """


class CannotWrite(OSError):
    """A full or broken disk: one line that names the file or directory, and the reason."""

    def __init__(self, path: Path, error: BaseException):
        reason = error.strerror if isinstance(error, OSError) else None
        super().__init__(f"{path}: cannot be written ({reason or first_line(error, 300)})")


def first_line(error: BaseException, length: int) -> str:
    """Returns at most `length` characters of the first line of an error's message."""
    return str(error).strip().partition("\n")[0][:length]
