"""The cases of fuzz.py: mutated image files, config values and folder trees, each from a seed."""

import contextlib
import functools
import json
import os
import random
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

from data_pipelines.dataset import open_test, open_training
from data_pipelines.errors import BadInput
from data_pipelines.new_images import common_range, list_images, open_image
from data_pipelines.spec import DatasetSpec
from experiments.fuzz_images import SUFFIXES, make_tree, mutate, mutated_image, plain_image
from pae_jax import augmentation, config_file, methods
from pae_jax.config import Config
from pae_jax.devices import sharding
from pae_jax.workdir import record, run

SHAPE = (16, 16)
WORDS = ("", " ", "auto", "true", "None", "nan", "-inf", "1e999", "0", "-1", "3", "1.5", "9" * 30)
MORE_WORDS = (
    *(
        "()",
        "(1,)",
        "(1,2,3)",
        "[]",
        "{}",
        "{'a': 1}",
        "(((1,),),)",
        "1" * 5000,
        "(" * 300,
        "lambda",
    ),
    *(
        "a\0b",
        "ü",
        "\udcff",
        "--config.x=1",
        "/proc/self/mem",
        "/dev/zero",
        "../..",
        "~",
        "x" * 300,
    ),
    *("65536", "1048576", "1000000000000", "1e-300", "b'x'", "1j", "...", "'quoted'", "__import__"),
)
NAMES = (
    *("a b.png", "ü.png", "u\u0308.png", "\udcfc.png", "a\nb.png", "\t.png", "-rf.png", "%s.png"),
    *("n" * 245 + ".png", "..png", ".hidden.png", "con.png", "X.PNG", "a.png.png", "a:b.png"),
    *(
        "x.jfif",
        "notes.txt",
        "Thumbs.db",
        "a",
        "[0].png",
        "\\.png",
        "\u202e.png",
        "🙂.png",
        "a'.png",
    ),
)
FOLDERS = ("Good", "OK", "good ", "crack", "Crack", "train", "test", "\udcfc", "a\nb", "n" * 250)


def image_case(rng: random.Random, folder: Path) -> None:
    """Opens a folder with one mutated image, as training, test, mask or new image."""
    data, kind = mutated_image(rng)
    name = f"m{SUFFIXES.get(kind, f'.{kind.lower()}')}"
    use = rng.choice(("training", "test", "mask", "new"))
    if use == "new":
        (folder / name).write_bytes(data)
        _open_new(folder, rng.choice((1, 3)))
        return
    make_tree(folder)
    place = {"training": "train/good", "test": "test/crack", "mask": "ground_truth/crack"}[use]
    if use == "test":
        (folder / f"ground_truth/crack/{Path(name).stem}_mask.png").write_bytes(plain_image(0))
    if use == "mask":
        (folder / f"{place}/0_mask.png").unlink()
        name = f"0_mask{Path(name).suffix}"
    (folder / place / name).write_bytes(data)
    _open_all(_spec(folder))


def config_case(rng: random.Random, folder: Path) -> None:
    """Reads a config with odd values from the command line, a file or config.json, and uses it."""
    make_tree(folder / "data")
    (folder / "textures").mkdir()
    for i in range(3):
        (folder / f"textures/{i}.png").write_bytes(plain_image(i))
    base = [
        f"--config.data.{key}={value}"
        for key, value in (
            ("source", "folder"),
            ("root", folder / "data"),
            ("textures", folder / "textures"),
            ("cache_dir", folder / "cache"),
            ("size", 16),
            ("texture_size", 16),
        )
    ]
    form = rng.choice(("words", "words", "words", "json", "file"))
    if form == "words":
        word = _mutated_word(rng)
        config = config_file.load(rng.choice(("default", "default", "smoke")), [*base, word])
    elif form == "json":
        values = config_file.load("default", base).to_dict()
        values["schema"] = rng.choice((None, 2, 3, 99, "x", -1)) if rng.random() < 0.2 else 3
        text = json.dumps(_mutated_values(rng, values))
        if rng.random() < 0.3:
            text = mutate(rng, text.encode()).decode(errors="surrogateescape")
        (folder / "config.json").write_text(text, errors="surrogateescape")
        config = record.read_config(folder)
    else:
        path = folder / rng.choice(("c.py", "a:b.py", "ü.py"))
        text = "from pae_jax.configs import default\ndef get_config(arg=None):\n"
        text += "    config = default.get_config()\n"
        text += "    nan, inf = float('nan'), float('inf')\n"
        text += f"    config.{rng.choice(keys())} = {_odd(rng)!r}\n    return config\n"
        path.write_text(text, errors="surrogateescape")
        config = config_file.load(str(path), base)
    # A training asks this before it compiles.
    sharding.make_mesh(config)
    augmentation.check_policy(config.data.augmentation, config.data.shape)
    methods.check(config)
    if config.data.source == "folder":
        run.open_data(config)


def tree_case(rng: random.Random, folder: Path) -> None:
    """Opens a folder tree in MVTec layout after a few changes that happen to such folders."""
    root = folder / "data"
    make_tree(root)
    for _ in range(rng.randint(1, 4)):
        with contextlib.suppress(OSError):  # a change that this tree no longer allows
            rng.choice(CHANGES)(rng, root)
    rules = ("auto", "auto", "none", "number:2", "prefix:_", "blocks:2", "regex:(.)", "rot")
    errors = []
    for use in (
        functools.partial(_open_all, _spec(root, rng.choice(rules), rng.choice(("", "", "data")))),
        functools.partial(_open_new, root / rng.choice(("test", "train/good", ".")), 1),
    ):
        try:
            use()
        except BadInput as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _open_new(folder: Path, channels: int) -> None:
    """Opens images as `pae predict` does, which writes errors of single files into its table."""
    images = list_images(str(folder))
    values = common_range(images, "auto", None)
    for image in images:
        open_image(image, channels, values)


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "image": image_case,
    "config": config_case,
    "tree": tree_case,
}


def _spec(root: Path, rule: str = "auto", category: str = "") -> DatasetSpec:
    return DatasetSpec(
        source="folder",
        root=str(root),
        category=category,
        shape=SHAPE,
        holdout_groups=rule,
        cache_dir=str(root.parent / "cache"),
    )


def _open_all(spec: DatasetSpec) -> None:
    """Opens both splits; the second also if the first is refused."""
    channels, refused = 1, None
    try:
        channels = open_training(spec, holdout_fraction=0.3, seed=0).channels
    except BadInput as error:
        refused = error
    test = open_test(spec, channels=channels)
    for i in range(len(test.names)):
        test.native_shape(i)
        if test.masks is not None:
            test.native_mask(i)
    if refused is not None:
        raise refused


# ---- configs ----


@functools.cache
def keys() -> list[str]:
    """Returns the dotted keys of a config."""

    def flat(values: dict, prefix: str = "") -> list[str]:
        names = []
        for key, value in values.items():
            full = f"{prefix}{key}"
            names += flat(value, f"{full}.") if isinstance(value, dict) else [full]
        return names

    return [*flat(Config().to_dict()), "data.size"]


def _mutated_word(rng: random.Random) -> str:
    key, value = rng.choice(keys()), rng.choice(WORDS + MORE_WORDS)
    if rng.random() < 0.3:
        value = str(_odd(rng))
    if rng.random() < 0.1:
        key = mutate(rng, key.encode()).decode(errors="surrogateescape")
    word = f"--config.{key}={value}"
    if rng.random() < 0.1:
        word = mutate(rng, word.encode(errors="surrogateescape")).decode(errors="surrogateescape")
    return word


def _mutated_values(rng: random.Random, values: dict) -> dict:
    """Changes, removes or adds a key of nested dictionaries."""
    section, name = values, rng.choice(keys())
    for part in name.split(".")[:-1]:
        section = section[part]
    name = name.rpartition(".")[2]
    change = rng.randrange(4)
    if change == 0:
        section.pop(name, None)
    elif change == 1:
        section[name + "x"] = _odd(rng)
    elif change == 2:
        values[rng.choice(list(values))] = _odd(rng)
    else:
        section[name] = _odd(rng)
    return values


def _odd(rng: random.Random) -> object:
    numbers = (0, -1, 1, 3, 7, 2**16, 2**20, 2**63, 10**30, 0.0, 0.5, 1e-300, 1e300)
    special = (float("nan"), float("inf"), float("-inf"), None, True, False, "", "auto", "x" * 400)
    nested = ([], [1], [1, 2], [-1, 0], [[1]], {}, {"a": 1}, "\udcff", "a\nb", "a\0b", "/dev/zero")
    return rng.choice(numbers + special + nested)


# ---- trees ----


def _any(rng: random.Random, root: Path) -> Path:
    return rng.choice(sorted(path for path in root.rglob("*") if not path.is_symlink()) or [root])


def _folder(rng: random.Random, root: Path) -> Path:
    return rng.choice([root, *sorted(path for path in root.rglob("*") if path.is_dir())])


def _new(rng: random.Random, root: Path) -> Path:
    return _folder(rng, root) / rng.choice(NAMES + FOLDERS)


def _rename(rng: random.Random, root: Path) -> None:
    path = _any(rng, root)
    path.rename(path.with_name(rng.choice(NAMES + FOLDERS)))


def _move(rng: random.Random, root: Path) -> None:
    _any(rng, root).rename(_new(rng, root))


def _remove(rng: random.Random, root: Path) -> None:
    path = _any(rng, root)
    path.rename(root.parent / f"removed{rng.random()}")


def _link(rng: random.Random, root: Path) -> None:
    targets = (root, _any(rng, root), root / "nowhere", Path("."), Path("/dev/zero"), Path("/"))
    _new(rng, root).symlink_to(rng.choice(targets[:5]))


def _link_to_itself(rng: random.Random, root: Path) -> None:
    path = _new(rng, root)
    path.symlink_to(path)


def _special(rng: random.Random, root: Path) -> None:
    path = _new(rng, root)
    if rng.random() < 0.6:
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))


def _add_folder(rng: random.Random, root: Path) -> None:
    _new(rng, root).mkdir()


def _add_file(rng: random.Random, root: Path) -> None:
    data = rng.choice((b"", b"text", plain_image(5), rng.randbytes(30)))
    path = _new(rng, root)
    path.write_bytes(data)


def _copy(rng: random.Random, root: Path) -> None:
    source = _any(rng, root)
    if source.is_file():
        _new(rng, root).write_bytes(source.read_bytes())


def _other_normal_form(rng: random.Random, root: Path) -> None:
    path = _any(rng, root)
    name = unicodedata.normalize("NFD", f"ü{path.name}")
    path.rename(path.with_name(name))


def _deep(rng: random.Random, root: Path) -> None:
    folder = _folder(rng, root).joinpath(*["deep"] * rng.choice((3, 3, 3, 100)))
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(plain_image(3))


def _unreadable(rng: random.Random, root: Path) -> None:
    _any(rng, root).chmod(rng.choice((0, 0o200, 0o400)))


def _file_for_folder(rng: random.Random, root: Path) -> None:
    path = _folder(rng, root)
    path.rename(root.parent / f"away{rng.random()}")
    path.write_bytes(b"")


CHANGES = (
    *(_rename, _move, _remove, _link, _link, _link_to_itself, _special, _add_folder, _add_file),
    *(_copy, _other_normal_form, _deep, _unreadable, _file_for_folder),
)
