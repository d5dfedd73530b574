"""The surroundings of this process: how Python was started, which devices JAX finds, the system.

Only light modules are imported here, because the command line asks before it imports anything
else.
"""

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import BadInput, first_line

MODULE = "pae_jax.main"
# Options of Python whose value is the next word.
_WITH_VALUE = ("-X", "-W", "--check-hash-based-pycs")
# Linux shows NVIDIA and AMD GPUs, those of Windows under WSL, and TPUs under these names.
_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "dxg", "accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")

WINDOWS = (
    "Windows is not tested: train, evaluate, predict and sweep are expected to work on the CPU. "
    "A file with the owner's name takes the place of the lock of a workdir, and a run saves before "
    "it stops on Ctrl-C only. WSL 2 counts as Linux."
)


def system_note() -> str | None:
    """Returns a line that says what works on this system where not everything does, or None."""
    return WINDOWS if sys.platform == "win32" else None


def may_restart(script: str | Path | None = None) -> bool:
    """Returns whether Python runs nothing but `pae`, which may then be started again.

    Anything else that calls the command line must not run twice: a user's script, a program from
    standard input, an interactive session, a notebook. A debugger or profiler would lose its
    hold.

    Args:
      script: a script that may be started again as well.
    """
    if sys.flags.inspect or sys.flags.interactive or sys.gettrace() or sys.getprofile():
        return False
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    if monitoring and any(monitoring.get_tool(tool) for tool in range(6)):
        return False
    program = _program(sys.orig_argv[1:])
    if program == ("-m", MODULE):
        return True
    scripts = [script] if script else []
    scripts += [Path(folder, "pae") for folder in _script_folders()]
    return program[0] == "" and any(_is_same_file(program[1], path) for path in scripts)


def _program(words: Sequence[str]) -> tuple[str, str]:
    """Returns what the words after `python` run: ("-m", module), ("-c", code) or ("", file)."""
    i = 0
    while i < len(words) and words[i].startswith("-") and words[i] != "-":
        if words[i] in _WITH_VALUE:
            i += 1
        elif not words[i].startswith(("--", "-X", "-W")):
            # Options of one letter may be joined: -Im is -I -m.
            for j, letter in enumerate(words[i][1:], 1):
                if letter in "mc":
                    rest = words[i][j + 1 :] or next(iter(words[i + 1 :]), "")
                    return f"-{letter}", rest
        i += 1
    return "", words[i] if i < len(words) else "-"


def _script_folders() -> list[str]:
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    return [sysconfig.get_path("scripts", scheme) for scheme in schemes]


def _is_same_file(name: str, path: str | Path) -> bool:
    try:
        return os.path.samefile(name, path)
    except (OSError, ValueError):
        return False


def expects_cpu() -> bool:
    """Returns whether JAX is expected to compute on the CPU, without importing JAX."""
    platforms = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if platforms:
        return platforms.split(",")[0].strip().lower() == "cpu"
    can_use_others = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return not (can_use_others and any(any(Path("/dev").glob(name)) for name in _DEVICE_FILES))


def use_cache_without_home(cache: Path) -> None:
    """Puts Matplotlib's folder into the cache if the home cannot be written.

    Otherwise it would make a temporary one in every process, with two lines that say so.
    """
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))


def check_devices() -> None:
    """Checks that JAX finds a device; it takes hold of the devices.

    Raises:
      BadInput: the environment names a platform that is not there, or its driver fails.
    """
    import jax

    try:
        jax.devices()
    except Exception as error:  # JAX raises errors of many types, and some without a message
        # JAX advises to set the variable to nothing; the advice below says the same.
        reason = first_line(error, 300).partition(" (set JAX_PLATFORMS=")[0]
        reason = f" ({reason})" if reason else ""
        wanted = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        if wanted:
            raise BadInput(
                f"JAX_PLATFORMS={wanted}: JAX finds no such device{reason}; unset the variable to "
                "use the devices that there are"
            ) from error
        raise BadInput(
            f"JAX cannot use the devices of this machine{reason}; JAX_PLATFORMS=cpu uses the CPU"
        ) from error
