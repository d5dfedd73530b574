"""A run small enough for tests: noise images of 24×20, a network of a few hundred weights."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import layouts
from pae_jax import config_file
from pae_jax.config import Config
from pae_jax.workdir import record, trained_model

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 30

SETTINGS = {
    "data.source": "folder",
    "data.size": 16,
    "data.texture_size": 16,
    "data.holdout_fraction": 0.3,
    "model.widths": (4,),
    "model.convs_per_stage": 1,
    "model.bottleneck_layers": 1,
    "model.branch_width": 4,
    "model.dilation_rates": (1,),
    "model.dilated_kernel_size": 3,
    "optimizer.learning_rate": 1e-2,
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.validate_every": 10,
    "train.checkpoint_every": 10,
    "train.panel_every": STEPS,
    "train.validation_examples": 8,
    "train.tensorboard": False,
    "sharding.data_parallel": 1,
    "eval.bootstrap_resamples": 20,
    "eval.batch_size": 4,
    "eval.diagnostics": False,
    "eval.floor": False,
}


# The beginning of a config file with a sweep, whose `get_config` still has to return the config.
SWEEP_FILE = """
from pae_jax.configs import smoke

def get_config(arg=None):
    config = smoke.get_config()
    config.data.size = config.data.texture_size = 16
    config.model.widths = (4,)
    config.model.dilation_rates = (1,)
    config.model.branch_width = 4
    config.train.steps = 4
    config.train.log_every = 1
    config.train.validate_every = config.train.checkpoint_every = 4
    config.train.validation_examples = 8
    config.train.tensorboard = False
    config.eval.bootstrap_resamples = 0
"""


class Run(NamedTuple):
    """A finished training run, with the folder of its images and textures."""

    root: Path
    workdir: Path


def make_folder(root: Path) -> Path:
    """Writes ROOT/data in MVTec layout and ROOT/textures; returns ROOT."""
    layouts.category(root / "data", train=12)
    rng = np.random.default_rng(1)
    for i in range(6):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        layouts.write(root / f"textures/{i}.png", pixels)
    return root


def words(root: Path, **changes: object) -> list[str]:
    """Returns the command line of a run on `make_folder(root)`.

    `changes` are keys and values, with "__" for the dot of a key.
    """
    places = {
        "data.root": root / "data",
        "data.textures": root / "textures",
        "data.cache_dir": root / "cache",
    }
    settings = SETTINGS | places | {k.replace("__", "."): v for k, v in changes.items()}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={CONFIGS / 'default.py'}", *overrides]


def load_config(root: Path, **changes: object) -> Config:
    """Returns the configuration of the same run."""
    file, *overrides = words(root, **changes)
    return config_file.load(file.removeprefix("--config="), overrides)


def environment() -> dict[str, str]:
    """Returns the environment of a process with the same devices and compilation cache."""
    names = (
        "jax_num_cpu_devices",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    values = {name.upper(): getattr(jax.config, name) for name in names}
    return os.environ | {name: str(value) for name, value in values.items() if value is not None}


def clone(run: Run, to: Path) -> Run:
    """Copies a run and its images, so that a test may change them."""
    shutil.copytree(run.root, to / "images")
    shutil.copytree(run.workdir, to / "run")
    moved = (to / "run/config.json").read_text().replace(str(run.root), str(to / "images"))
    (to / "run/config.json").write_text(moved)
    return Run(to / "images", to / "run")


def set_eval(workdir: Path, **changes: object) -> None:
    """Changes the run's own settings of the section eval, as `pae train` does at a resumption."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config["eval"].update(changes)
    path.write_text(json.dumps(config))


def read_state(workdir: Path) -> tuple[int, list[np.ndarray]]:
    """Returns the step of the newest checkpoint and all arrays of its state."""
    step, state = trained_model.restore(workdir, record.read_config(workdir))
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_state(workdir: Path, other: Path) -> None:
    """Asserts that parameters, optimizer state and step are equal bit for bit."""
    step, leaves = read_state(workdir)
    other_step, others = read_state(other)
    assert step == other_step
    assert len(leaves) == len(others)
    for leaf, another in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(leaf, another)
