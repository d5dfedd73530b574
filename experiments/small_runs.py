"""The smallest run that has every part, for the experiments that repeat it many times.

24×20 noise images in MVTec layout, a network of a few hundred weights, a few seconds per verb.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
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
    "train.steps": STEPS,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.validate_every": 4,
    "train.checkpoint_every": 4,
    "train.panel_every": 4,
    "train.validation_examples": 4,
    "sharding.data_parallel": 1,
    "eval.bootstrap_resamples": 10,
    "eval.batch_size": 4,
    "eval.max_steps": 3,
}
SWEEP = """
from pae_jax.configs import default

def get_config(arg=None):
    return default.get_config()

def sweep(add, arg=None):
    add("plain", 0, {"train.seed": 0})
    add("squared form", 0, {"objective.jacobian.weight": 0.1, "objective.jacobian.form": "squared"})
"""


def make_images(root: Path) -> None:
    """Writes ROOT/data in MVTec layout, ROOT/textures, and ROOT/sweep.py with two members."""
    rng = np.random.default_rng(0)

    def write(name: str, pixels: np.ndarray) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def image() -> np.ndarray:
        return rng.integers(0, 256, (20, 24), dtype=np.uint8)

    for i in range(12):
        write(f"data/train/good/{i}.png", image())
    for i in range(2):
        write(f"data/test/good/{i}.png", image())
        write(f"data/test/crack/{i}.png", image())
        mask = np.zeros((20, 24), np.uint8)
        mask[4 : 8 + i, 6:12] = 255
        write(f"data/ground_truth/crack/{i}_mask.png", mask)
    for i in range(6):
        write(f"textures/{i}.png", rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    (root / "sweep.py").write_text(SWEEP)


def overrides(root: Path, **changes: object) -> list[str]:
    """Returns the words of a run on `make_images(root)`; "__" stands for the dot of a key."""
    places = {
        "data.root": root / "data",
        "data.textures": root / "textures",
        "data.cache_dir": root / "cache",
    }
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--config.{key}={value}" for key, value in (SETTINGS | places | changed).items()]


def command(verb: str, root: Path, workdir: Path, **changes: object) -> list[str]:
    """Returns the words after `pae`; predict writes to WORKDIR/out."""
    if verb in ("train", "sweep"):
        file = "default" if verb == "train" else root / "sweep.py"
        return [verb, f"--config={file}", *overrides(root, **changes), f"--workdir={workdir}"]
    if verb == "evaluate":
        return [verb, f"--workdir={workdir}", "--save_maps"]
    return [verb, f"--workdir={workdir}", f"--images={root / 'data/test'}", f"--out={workdir}/out"]


def environment(cache: Path) -> dict[str, str]:
    """Returns the environment of processes on the CPU that share one cache of programs."""
    # The restart for huge pages would start Python twice, and gains nothing in so short a run.
    return os.environ | {"PAE_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
