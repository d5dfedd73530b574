"""Where a number comes from: configuration, commit, versions, device and seeds."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from pae_jax.config import Config

PACKAGES = ("pae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def describe(config: Config, *, step: int) -> dict[str, Any]:
    """A JSON-ready record of what made a model's numbers, `step` updates into its training."""
    device = jax.devices()[0]
    return {
        "config_hash": config.hash,
        "config": config.to_dict(),
        "step": step,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
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
    """Machine, versions of Python and `packages`, and commit: the head of a benchmark's table."""
    versions = "".join(f", {name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores, "
        f"{jax.devices()[0].device_kind}; Python {platform.python_version()}{versions}; "
        f"commit {commit() or 'unknown'}"
    )


def commit() -> str | None:
    """The checkout's commit, "+" behind it when files differ; None outside a checkout."""
    try:
        return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
    return done.stdout.strip()
