"""The smallest run that has every part, for the experiments that repeat it many times.

24×20 noise images in MVTec layout, a network of a few hundred weights, a few seconds per verb.
`VERBS` says how each verb that writes or removes files is run on them.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
    "foreground.size": 16,
    "foreground.steps": 3,
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
    """Writes two data sets in MVTec layout, textures, and the config of a sweep of two members.

    ROOT/data holds noise. ROOT/objects holds bright squares on dark noise, for `pae foreground`.
    """
    rng = np.random.default_rng(0)

    def write(name: str, pixels: np.ndarray) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def image() -> np.ndarray:
        return rng.integers(0, 256, (20, 24), dtype=np.uint8)

    def object_image() -> np.ndarray:
        pixels = image() // 8
        pixels[5:15, 6:18] += 200
        return pixels

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
        write(f"objects/train/good/{i}.png", object_image())
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


# ---- verbs ----


class Verb(NamedTuple):
    """How the experiments run a verb.

    Attributes:
      words: returns the words after `pae`, from the folder of the images and the workdir.
      before: the verb whose results it needs in its workdir; "" for none.
      renews: whether it runs again where its results stand. The others refuse that.
      prepare: writes into the workdir what else it needs.
      cut: removes a part of its results, so that it goes on with the rest.
      clears: whether it removes files from the cache, which is then WORKDIR/cache.
    """

    words: Callable[[Path, Path], list[str]]
    before: str = ""
    renews: bool = False
    prepare: Callable[[Path], None] | None = None
    cut: Callable[[Path], None] | None = None
    clears: bool = False


def _train(root: Path, workdir: Path) -> list[str]:
    return ["train", "--config=default", *overrides(root), f"--workdir={workdir}"]


def _sweep(root: Path, workdir: Path) -> list[str]:
    return ["sweep", f"--config={root / 'sweep.py'}", *overrides(root), f"--workdir={workdir}"]


def _evaluate(root: Path, workdir: Path) -> list[str]:
    return ["evaluate", f"--workdir={workdir}", "--save_maps"]


def _predict(root: Path, workdir: Path) -> list[str]:
    return [
        "predict",
        f"--workdir={workdir}",
        f"--images={root / 'data/test'}",
        f"--out={workdir}/out",
    ]


def _compare(root: Path, workdir: Path) -> list[str]:
    return ["compare", f"{workdir}/members/plain-0", f"{workdir}/members/squared_form-0"]


def _compare_to_page(root: Path, workdir: Path) -> list[str]:
    return [*_compare(root, workdir), f"--out={workdir}/page.html"]


def _judge(root: Path, workdir: Path) -> list[str]:
    words = ["judge", f"--maps={workdir}/eval/maps", "--config=default", *overrides(root)]
    return [*words, f"--out={workdir}/judged"]


def _pack(root: Path, workdir: Path) -> list[str]:
    return ["pack", f"--workdir={workdir}", f"--out={workdir}/packed"]


def _export(root: Path, workdir: Path) -> list[str]:
    return ["export", f"--workdir={workdir}", f"--out={workdir}/model.stablehlo"]


def _foreground(root: Path, workdir: Path) -> list[str]:
    settings = overrides(root, data__root=root / "objects")
    return ["foreground", "--config=default", *settings, f"--workdir={workdir}"]


def _import(root: Path, workdir: Path) -> list[str]:
    return ["import", "mvtec_ad", str(root / "data"), f"--out={workdir}/lists/list.csv"]


def _clear_cache(root: Path, workdir: Path) -> list[str]:
    return ["cache", "--clear"]


def _fill_cache(workdir: Path) -> None:
    """Writes three arrays, the rest of an interrupted write, and a compiled program."""
    from data_pipelines import cache

    folder = workdir / "cache"
    for i in range(3):
        rows = np.full((4, 8), i, np.uint8)
        key = cache.content_key("small", i)
        cache.cached(
            folder, key, [(4, 8)], lambda rows=rows: ((4, 8), rows.__getitem__), purpose="rows"
        )
    rest = folder / f".{'0' * 32}.npy.{'1' * 32}"
    rest.write_bytes(b"a part")
    os.utime(rest, (0, 0))
    (folder / "compiled/cpu").mkdir(parents=True)
    (folder / "compiled/cpu/program").write_bytes(b"a program")


def _forget_last_checkpoint(workdir: Path) -> None:
    shutil.rmtree(workdir / f"checkpoints/{STEPS}")


def _forget_second_member(workdir: Path) -> None:
    shutil.rmtree(workdir / "members/squared_form-0")


def _forget_list(workdir: Path) -> None:
    (workdir / "lists/list.csv").unlink()


VERBS = {
    "train": Verb(_train, renews=True, cut=_forget_last_checkpoint),
    "train anew": Verb(_train),
    "evaluate": Verb(_evaluate, "train", renews=True),
    "predict": Verb(_predict, "train"),
    "sweep": Verb(_sweep, renews=True, cut=_forget_second_member),
    "compare": Verb(_compare, "sweep", renews=True),
    "compare --out": Verb(_compare_to_page, "sweep"),
    "judge": Verb(_judge, "evaluate"),
    "pack": Verb(_pack, "evaluate"),
    "export": Verb(_export, "train"),
    "foreground": Verb(_foreground),
    "import": Verb(_import, renews=True, cut=_forget_list),
    "cache": Verb(_clear_cache, renews=True, prepare=_fill_cache, clears=True),
}


def chain(verb: str) -> list[str]:
    """Returns the verbs that come before a verb, in their order."""
    before = VERBS[verb].before
    return [*chain(before), before] if before else []


def environment(cache: Path) -> dict[str, str]:
    """Returns the environment of processes on the CPU that share one cache of programs."""
    # The restart for huge pages would start Python twice, and gains nothing in so short a run.
    return os.environ | {"PAE_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}
