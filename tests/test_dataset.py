"""The splits that training and evaluation get, and that training cannot reach the test split."""

import gc
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import decode
from data_pipelines.dataset import open_test, open_training
from data_pipelines.errors import BadInput
from data_pipelines.holdout import held_out
from data_pipelines.spec import DatasetSpec
from layouts import category, encode, open_images, write

_opened: list[str] | None = None


def _hook(event, arguments):
    if _opened is not None and event in ("open", "os.scandir", "os.listdir"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_hook)  # A hook cannot be removed; this one does nothing outside `recorded`.


def recorded(function):
    """Returns the result of `function` and all paths that it opened or listed."""
    global _opened  # noqa: PLW0603
    _opened = []
    try:
        return function(), _opened
    finally:
        _opened = None


@pytest.fixture
def spec(tmp_path):
    root = category(tmp_path / "thing", train=10)
    return DatasetSpec("folder", str(root), "", (20, 24), "auto", str(tmp_path / "cache"))


def training(spec, *, holdout_fraction=0.2, seed=0, max_images=0, reserved_fraction=0.0):
    return open_training(
        spec,
        holdout_fraction=holdout_fraction,
        seed=seed,
        max_images=max_images,
        reserved_fraction=reserved_fraction,
    )


def message(function, *arguments, **options):
    with pytest.raises(BadInput) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(spec, split, name):
    return np.asarray(Image.open(f"{spec.root}/{split}/{name}"))


def test_training_split(spec):
    split = training(spec)
    names = [f"good/{i:03d}.png" for i in range(10)]
    expected = held_out(names, "none", fraction=0.2, seed=0)
    assert split.held_out_names == sorted(expected)
    assert split.names == [name for name in names if name not in expected]
    assert split.images.shape == (8, 20, 24, 1)
    assert split.held_out.shape == (2, 20, 24, 1)
    assert split.channels == 1
    for images, listed in ((split.images, split.names), (split.held_out, split.held_out_names)):
        assert images.dtype == np.uint8
        assert not images.flags.writeable
        for image, name in zip(images, listed, strict=True):
            np.testing.assert_array_equal(image[..., 0], pixels(spec, "train", name))


def test_seed_moves_the_images_that_are_held_out_and_nothing_else(spec):
    splits = [training(spec, seed=seed) for seed in range(5)]
    assert len({tuple(s.held_out_names) for s in splits}) > 1
    assert len({s.fingerprint for s in splits}) == 1
    for s in splits:
        assert sorted(s.names + s.held_out_names) == [f"good/{i:03d}.png" for i in range(10)]


def test_a_part_of_the_images_changes_nothing_else(spec):
    whole = training(spec)
    parts = {n: training(spec, max_images=n) for n in (1, 3, 8, 9)}
    for n, part in parts.items():
        assert part.images.shape == (min(n, 8), 20, 24, 1)
        assert part.names == [name for name in whole.names if name in part.names]
        assert not part.images.flags.writeable
        for image, name in zip(part.images, part.names, strict=True):
            np.testing.assert_array_equal(image[..., 0], pixels(spec, "train", name))
        np.testing.assert_array_equal(part.held_out, whole.held_out)
        same = ("held_out_names", "channels", "fingerprint")
        assert [getattr(part, key) for key in same] == [getattr(whole, key) for key in same]
    assert {*parts[1].names} < {*parts[3].names}


def test_the_seed_draws_the_part(spec):
    draws = [training(spec, holdout_fraction=0.1, seed=seed, max_images=3) for seed in range(5)]
    # One image is held out: a draw that ignores the seed would reach at most four names.
    assert len({name for split in draws for name in split.names}) > 4


def test_a_part_is_decoded_no_second_time(spec, monkeypatch):
    training(spec)
    monkeypatch.setattr(decode, "decode_image", None)
    assert len(training(spec, max_images=3).images) == 3


def test_the_draw_of_a_part_is_pinned(spec):
    # The same on every machine and with every version: a resumed run must find its images again.
    assert training(spec, max_images=3).names == [f"good/{i:03d}.png" for i in (1, 6, 9)]


@pytest.mark.parametrize("seed", range(3))
def test_reserved_images_come_last_in_whole_groups(spec, seed):
    """They change neither which images are held out nor which are trained on."""
    blocks = spec._replace(holdout_groups="blocks:5")  # 0 and 1, 2 and 3 …
    for rule in (spec, blocks):
        whole, part = (training(rule, seed=seed, reserved_fraction=r) for r in (0.0, 0.3))
        assert whole.reserved == 0
        assert part.reserved == (4 if rule is blocks else 3)
        shared, reserved = part.names[: -part.reserved], part.names[-part.reserved :]
        assert sorted(shared) + sorted(reserved) == shared + reserved
        assert sorted(part.names) == whole.names
        if rule is blocks:
            pairs = {int(name[5:8]) // 2 for name in reserved}
            assert len(pairs) == 2
            assert pairs.isdisjoint(int(name[5:8]) // 2 for name in shared)
        assert part.held_out_names == whole.held_out_names
        for image, name in zip(part.images, part.names, strict=True):
            np.testing.assert_array_equal(image[..., 0], pixels(spec, "train", name))
        np.testing.assert_array_equal(part.held_out, whole.held_out)


def test_a_part_needs_images_for_both_networks(spec):
    counts = {training(spec, max_images=4, seed=s, reserved_fraction=0.5).reserved for s in (0, 3)}
    assert counts <= {1, 2, 3}
    with pytest.raises(BadInput, match=r"data\.max_images: of 1 images [01] are reserved"):
        training(spec, max_images=1, reserved_fraction=0.5)


def test_one_group_cannot_be_divided_between_two_networks(spec):
    two = spec._replace(holdout_groups="blocks:2")
    assert len(training(two).images) == 5
    with pytest.raises(BadInput, match=r"one group.*second network.*head\.reserved_fraction=0"):
        training(two, reserved_fraction=0.5)


def test_a_part_that_is_grey_keeps_the_channels_of_all(spec):
    colour = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    dropped = next(n for n in training(spec).names if n not in training(spec, max_images=3).names)
    write(spec_path(spec, f"train/{dropped}"), colour)
    part = training(spec, max_images=3)
    assert dropped not in part.names
    assert part.channels == part.images.shape[-1] == part.held_out.shape[-1] == 3


def test_one_coloured_image_makes_three_channels(spec):
    colour = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    write(spec_path(spec, "train/good/005.png"), np.repeat(colour[..., :1], 3, -1))
    assert training(spec).channels == 1  # three equal channels are grey
    write(spec_path(spec, "train/good/005.png"), colour)
    split = training(spec)
    assert split.channels == 3
    assert split.images.shape[-1] == split.held_out.shape[-1] == 3
    assert open_test(spec, channels=3).images.shape == (7, 20, 24, 3)


def spec_path(spec, name):
    return Path(spec.root, name)


def test_decoded_once(spec, monkeypatch):
    first, first_test = training(spec), open_test(spec, channels=1)
    training(spec._replace(shape=(8, 12)))  # is cached beside it and does not replace it
    monkeypatch.setattr(decode, "decode_image", None)
    monkeypatch.setattr(decode, "decode_mask", None)
    monkeypatch.setattr(decode, "is_grey", None)
    second, second_test = training(spec), open_test(spec, channels=1)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first_test.masks, second_test.masks)
    assert first.fingerprint == second.fingerprint


def test_the_cache_follows_content_name_and_shape(spec):
    before = training(spec)
    write(spec_path(spec, "train/good/000.png"), np.full((20, 24), 77, np.uint8))
    changed = training(spec)
    assert changed.fingerprint != before.fingerprint
    images = dict(
        zip(
            changed.names + changed.held_out_names,
            [*changed.images, *changed.held_out],
            strict=True,
        )
    )
    assert (images["good/000.png"] == 77).all()
    spec_path(spec, "train/good/000.png").rename(spec_path(spec, "train/good/x.png"))
    assert training(spec).fingerprint != changed.fingerprint
    assert training(spec._replace(shape=(8, 12))).images.shape == (8, 8, 12, 1)


def test_test_split(spec):
    split = open_test(spec, channels=1)
    assert split.names[2:5] == ["dent/000.png", "dent/001.png", "good/000.png"]
    assert split.types == ["crack"] * 2 + ["dent"] * 2 + ["good"] * 3
    assert split.labels.tolist() == [True] * 4 + [False] * 3
    assert split.labels.dtype == split.masks.dtype == np.bool_
    for i, name in enumerate(split.names):
        np.testing.assert_array_equal(split.images[i, ..., 0], pixels(spec, "test", name))
        expected = np.zeros((20, 24), bool)
        if split.labels[i]:
            expected[4 : 8 + i % 2, 6:12] = True
        np.testing.assert_array_equal(split.masks[i], expected)
        np.testing.assert_array_equal(split.native_mask(i), expected)


def test_native_size_is_kept(spec):
    split = open_test(spec._replace(shape=(10, 10)), channels=1)
    assert split.masks.shape == (7, 10, 10)
    assert split.native_shape(0) == (20, 24)
    assert split.native_mask(1).sum() == 5 * 6
    assert split.native_mask(6).shape == (20, 24)
    assert not split.native_mask(6).any()


def test_source_without_masks(spec):
    shutil.rmtree(spec_path(spec, "ground_truth"))
    split = open_test(spec, channels=1)
    assert split.masks is None
    assert split.labels.sum() == 4
    with pytest.raises(ValueError, match="no masks"):
        split.native_mask(0)


def test_the_config_imports_no_pipeline():
    code = (
        "import sys, pae_jax.config; heavy = {'numpy', 'PIL', 'jax', 'data_pipelines.dataset'};"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Training cannot see the test split.


def test_training_opens_no_test_path(spec):
    forbidden = (f"{spec.root}/test", f"{spec.root}/ground_truth")
    split, opened = recorded(lambda: training(spec))
    assert any(path.startswith(f"{spec.root}/train/good") for path in opened)
    assert not [path for path in opened if path.startswith(forbidden)]
    # The recorder sees the files of the test split when it is opened.
    _, opened = recorded(lambda: open_test(spec, channels=1))
    assert {f"{spec.root}/test/crack/000.png", f"{spec.root}/ground_truth/crack/000_mask.png"} <= {
        *opened
    }
    assert split.channels == 1


def test_training_does_not_notice_that_there_is_no_test_split(spec):
    before = training(spec)
    shutil.rmtree(spec_path(spec, "test"))
    shutil.rmtree(spec_path(spec, "ground_truth"))
    after = training(spec._replace(cache_dir=spec.cache_dir + "2"))
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.images, before.images)
    np.testing.assert_array_equal(after.held_out, before.held_out)


def reachable(root):
    """Returns every object that is reachable from `root`, except through types and modules."""
    seen, left = {}, [root]
    while left:
        current = left.pop()
        if id(current) in seen or isinstance(current, type | types.ModuleType):
            continue
        seen[id(current)] = current
        left += gc.get_referents(current)
        if isinstance(current, np.ndarray):
            left += [current.base, getattr(current, "__dict__", None)]
    return list(seen.values())


def test_the_training_split_leads_nowhere(spec):
    objects = reachable(training(spec))
    assert not [x for x in objects if callable(x)]
    assert not [x for x in objects if spec.root in str(x) and isinstance(x, str | bytes)]
    # The same walk finds the functions of the test split.
    assert [x for x in reachable(open_test(spec, channels=1)) if callable(x)]


# Bad input: one line that names the file.


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


def directory(path):
    path.unlink()
    path.mkdir()


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


DAMAGES = [
    (truncate, "damaged or unsupported image"),
    (lambda path: path.write_bytes(b""), "empty file"),
    (lambda path: path.write_text("not an image\n"), "not an image"),
    (directory, "cannot be read (Is a directory)"),
    (dangling, "cannot be read (No such file or directory)"),
]
IDS = ["truncated", "empty", "text", "directory", "dangling link"]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=IDS)
def test_damaged_training_image(spec, damage, reason):
    path = spec_path(spec, "train/good/007.png")
    damage(path)
    assert message(training, spec).startswith(f"{path}: {reason}")
    assert not list(spec_path(spec, "../cache").glob("*"))


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=IDS)
def test_damaged_test_image_and_mask(spec, damage, reason):
    mask = spec_path(spec, "ground_truth/dent/001_mask.png")
    write(mask, np.random.default_rng(0).integers(0, 2, (20, 24, 3), dtype=np.uint8))
    damage(mask)
    image = spec_path(spec, "test/dent/001.png")
    assert message(open_test, spec, channels=1).startswith(f"mask of {image}: {reason}")
    damage(image)
    assert message(open_test, spec, channels=1).startswith(f"{image}: {reason}")


def test_mask_of_another_size(spec):
    write(spec_path(spec, "ground_truth/dent/001_mask.png"), np.ones((24, 20), np.uint8))
    assert message(open_test, spec, channels=1) == (
        f"mask of {spec.root}/test/dent/001.png: 20×24 pixels, its image is 24×20 pixels"
    )


def test_bad_files_are_met_before_any_decoding(spec, monkeypatch):
    spec_path(spec, "train/good/009.png").write_text("not an image")
    monkeypatch.setattr(decode, "decode_image", None)
    monkeypatch.setattr(decode, "is_grey", None)
    assert message(training, spec).startswith(f"{spec.root}/train/good/009.png: not an image")


def test_too_few_images(spec):
    for i in range(1, 10):
        spec_path(spec, f"train/good/{i:03d}.png").unlink()
    assert message(training, spec).startswith(f"{spec.root}/train/good/000.png: 1 training images")


def test_unknown_source(spec):
    assert message(training, spec._replace(source="zip")).startswith("data.source: one of folder,")


# Images for prediction.


def test_open_images(tmp_path):
    rng = np.random.default_rng(0)
    shots = {name: rng.integers(0, 256, (8, 6, 3), dtype=np.uint8) for name in ("b", "a/c", "a/b")}
    for name, image in shots.items():
        write(tmp_path / f"{name}.PNG", image)
    (tmp_path / "Thumbs.db").write_text("")
    names, images, errors = open_images(str(tmp_path), (8, 6), 3)
    assert not errors
    assert names == ["a/b.PNG", "a/c.PNG", "b.PNG"]
    np.testing.assert_array_equal(images, [shots[n[:-4]] for n in names])
    assert open_images(str(tmp_path), (4, 4), 1)[1].shape == (3, 4, 4, 1)
    names, images, errors = open_images(str(tmp_path / "a/b.PNG"), (8, 6), 3)
    assert (names, errors) == (["b.PNG"], {})
    np.testing.assert_array_equal(images, [shots["a/b"]])


def test_open_images_bad_input(tmp_path):
    assert message(open_images, str(tmp_path), (8, 8), 1) == f"{tmp_path}: no images in this folder"
    gone = str(tmp_path / "gone")
    assert message(open_images, gone, (8, 8), 1) == f"{gone}: No such file or directory"


def test_a_damaged_new_image_does_not_stop_the_others(tmp_path):
    noise = np.random.default_rng(0).integers(0, 65536, (8, 8)).astype(np.uint16)
    whole = {"b.png": (noise >> 8).astype(np.uint8), "f.png": noise}
    for name, image in whole.items():
        write(tmp_path / name, image)
    cut = encode(np.random.default_rng(1).integers(0, 256, (99, 99), dtype=np.uint8))
    write(tmp_path / "whole.tif", noise)
    damaged = {
        "a.png": b"",
        "c.png": cut[:900],  # damaged behind the header
        "d.tif": (tmp_path / "whole.tif").read_bytes()[:-60],  # of 16 bits
        "e.png": b"notes",
    }
    (tmp_path / "whole.tif").unlink()
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    names, images, errors = open_images(str(tmp_path), (8, 8), 1, (0.0, 65535.0))
    assert names == sorted({*damaged, *whole})
    assert list(errors) == sorted(damaged)
    assert all(line.startswith(f"{tmp_path}/{name}: ") for name, line in errors.items())
    np.testing.assert_array_equal(images[0, ..., 0], whole["b.png"])
    assert np.abs(images[1, ..., 0].astype(int) - noise / 257).max() <= 1
    for name in whole:
        (tmp_path / name).unlink()
    names, images, errors = open_images(str(tmp_path), (8, 8), 1)
    assert not images.size
    assert list(errors) == names
