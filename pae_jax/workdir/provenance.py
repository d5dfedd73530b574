"""The origin of a number: configuration, commit, versions, device and seeds."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import pae_jax
from pae_jax.config import Config

PACKAGES = ("pae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe(config: Config, *, step: int | None) -> dict[str, Any]:
    """Returns a JSON-ready record of the origin of numbers.

    Args:
      config: the configuration of the run.
      step: the number of updates that the model was trained for; None without a model of ours.
    """
    device = jax.devices()[0]
    return {
        "config_hash": config.hash,
        "config": config.to_dict(),
        "step": step,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "machine": platform.machine(),
        },
        "seeds": {"train": config.train.seed, "bootstrap": config.eval.bootstrap_seed},
    }


def line(*packages: str) -> str:
    """Returns machine, versions and commit in one line, the head of a benchmark's table.

    Args:
      *packages: the names of the packages whose versions are included.
    """
    versions = "".join(f", {name} {version(name) or 'unknown'}" for name in packages)
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind}; Python {platform.python_version()}{versions}; "
        f"commit {commit() or 'unknown'}"
    )


def version(package: str) -> str | None:
    """Returns the version of a package; None if the package has no metadata."""
    # A checkout on the PYTHONPATH has no metadata, and those of an editable installation may be
    # older than its code.
    if package == pae_jax.__name__:
        return pae_jax.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Returns the commit of the checkout that this code runs from.

    Code that is installed or unpacked somewhere inside another repository does not belong to it,
    so the commit of that repository is not reported.

    Returns:
      The hash, followed by "+" if tracked files differ from it; None outside a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None
        _git(root, "ls-files", "--error-unmatch", "pae_jax/__init__.py")  # fails if untracked
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        return _git(root, "rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    # Without this option `status` locks the index to refresh it. It would then stand in the way of
    # the user's own commands, and on a full disk leave a lock that refuses every later commit.
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.strip()
