"""What is left out of a folder of images is told; names that differ in spelling only are found."""

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from data_pipelines.dataset import open_test, open_training
from data_pipelines.errors import BadInput, printable
from data_pipelines.folder import image_files, test_items, training_items
from data_pipelines.image_files import suffixes
from data_pipelines.spec import DatasetSpec
from layouts import category, open_images, write

test_items.__test__ = False  # a function of the source, not a test

NOISE = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    return category(tmp_path / "thing")


@pytest.fixture
def spec(root, tmp_path):
    return DatasetSpec("folder", str(root), "", (20, 24), "auto", str(tmp_path / "cache"))


def train(spec):
    return open_training(spec, holdout_fraction=0.2, seed=0)


# Suffixes.


def test_suffixes_are_those_of_pillow():
    listed = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm"}
    assert listed | {".jfif", ".jp2", ".jpe", ".avif", ".tga", ".pnm", ".dib", ".mpo"} <= suffixes()
    assert not suffixes() & {".pdf", ".eps", ".mpg", ".mpeg", ".h5", ".ico", ".psd", ".txt"}


@pytest.mark.parametrize("suffix", [".jfif", ".jp2", ".avif", ".TGA", ".JPG", ".qoi"])
def test_an_image_of_any_suffix_is_read(tmp_path, suffix):
    image = Image.fromarray(NOISE).convert("RGB")
    image.save(tmp_path / f"x{suffix}", Image.registered_extensions()[suffix.lower()])
    names, images, _ = open_images(str(tmp_path), (20, 24), 3)
    assert names == [f"x{suffix}"]
    assert images.std() > 20


def test_what_is_left_out_is_counted_in_one_line(root, messages):
    good = root / "train/good"
    for name in ("notes.txt", "b.txt", ".hidden.png", "README", "film.mpg"):
        (good / name).write_text("x")
    (good / "gone").symlink_to(root / "nowhere")
    training_items(str(root), "")
    assert messages == [
        f"{root}/train: 6 left out: 2 .txt (no image), 1 hidden, 1 without a suffix, "
        "1 .mpg (no image), 1 broken link"
    ]
    assert image_files(good)
    assert messages[1].startswith(f"{good}: 6 left out: ")


def test_images_in_a_wrong_place_are_named(root, messages):
    write(root / "test/a.png", NOISE)
    write(root / "test/b.png", NOISE)
    write(root / "train/c.png", NOISE)
    write(root / "train/bad/d.png", NOISE)
    write(root / "ground_truth/e.png", NOISE)
    write(root / "ground_truth/crack/009_mask.png", NOISE)
    write(root / "ground_truth/scratch/000.png", NOISE)
    assert len(training_items(str(root), "")) == 6
    assert len(test_items(str(root), "")) == 7
    assert messages == [
        f"{root}/train: 1 images left out, directly in it: c.png; training images belong in "
        f"{root}/train/good",
        f"{root}/train: folders left out: bad; training images belong in {root}/train/good",
        f"{root}/test: 2 images left out, directly in it: a.png, b.png; test images belong in "
        f"{root}/test/good or {root}/test/DEFECT",
        f"{root}/ground_truth: 1 images left out, directly in it: e.png; masks belong in "
        f"{root}/ground_truth/DEFECT",
        f"{root}/ground_truth: 2 masks or folders belong to no test image: crack/009_mask.png, "
        "scratch",
    ]


# Links.


def test_linked_folders_are_followed(root, tmp_path):
    good, elsewhere = root / "train/good", tmp_path / "elsewhere"
    good.rename(elsewhere)
    good.mkdir()
    (good / "line1").symlink_to(elsewhere)
    (elsewhere / "000.png").rename(good / "x.png")
    names = [item.name for item in training_items(str(root), "")]
    assert names == [*(f"good/line1/{i:03d}.png" for i in range(1, 6)), "good/x.png"]


def test_a_real_folder_counts_once_and_loops_end(root, messages):
    good = root / "train/good"
    before = [item.name for item in training_items(str(root), "")]
    (good / "real").mkdir()
    write(good / "real/a.png", NOISE)
    (good / "a link").symlink_to(good / "real")  # sorts before the real folder
    (good / "real/up").symlink_to(good)
    (good / "itself").symlink_to("itself")
    # A link to a folder above would bring the images of the test split.
    (good / "root").symlink_to(root)
    (good / "one").symlink_to(good / "two")
    (good / "two").symlink_to(good / "one")
    assert [i.name for i in training_items(str(root), "")] == [*before, "good/real/a.png"]
    assert messages == [
        f"{root}/train: 6 left out: 3 broken link, 3 link to a folder that is read already, or to "
        "one above"
    ]


def test_a_pipe_does_not_block(root, spec, tmp_path):
    os.mkfifo(root / "train/good/900.png")
    with pytest.raises(BadInput, match=r"900\.png: cannot be read \(neither a file nor a folder\)"):
        train(spec)
    (tmp_path / "new").mkdir()
    os.mkfifo(tmp_path / "new/x.png")
    assert "x.png: cannot be read" in open_images(str(tmp_path / "new"), (8, 8), 1)[2]["x.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(root):
    folder = root / "train/good/locked"
    folder.mkdir(mode=0)
    try:
        with pytest.raises(BadInput, match=r"locked: Permission denied$"):
            training_items(str(root), "")
    finally:
        folder.chmod(0o700)


# Normal images under other names.


@pytest.mark.parametrize("name", ["Good", "GOOD", "OK", "ok", "normal", "Defect-Free", "no_defect"])
def test_another_word_for_good(root, spec, messages, name):
    (root / "test/good").rename(root / "test" / name)
    (root / "train/good").rename(root / "train" / name)
    assert train(spec).channels == 1
    test = open_test(spec, channels=1)
    assert test.types.count("good") == 3
    assert not test.labels[[n.startswith(name) for n in test.names]].any()
    assert f"{root}/test: {name}: counts as good, as normal images" in messages


def test_two_folders_of_normal_images(root, messages):
    write(root / "test/OK/000.png", NOISE)
    items = test_items(str(root), "")
    assert [item.name for item in items if item.type == "good"] == [
        "OK/000.png",
        *(f"good/{i:03d}.png" for i in range(3)),
    ]
    assert messages == [f"{root}/test: OK: counts as good, as normal images"]


@pytest.mark.parametrize(("name", "named"), [("goood", True), ("ok_front", True), ("wood", False)])
def test_a_name_close_to_good_is_named_and_not_merged(root, messages, name, named):
    write(root / f"test/{name}/000.png", NOISE)
    write(root / f"ground_truth/{name}/000.png", NOISE)
    assert [i.type for i in test_items(str(root), "")].count(name) == 1
    assert messages == named * [
        f"{root}/test/{name}: counts as a type of defect; if it holds normal images, rename it to "
        "good"
    ]


def test_no_normal_images_at_all(root, messages):
    (root / "test/good").rename(root / "test/flawless")
    write(root / "ground_truth/flawless/000.png", NOISE)
    with pytest.raises(BadInput, match="no mask"):
        test_items(str(root), "")
    assert messages == [
        f"{root}/test: no folder good, so that no metric of whole images is defined; types of "
        "defects: crack, dent, flawless"
    ]


# Equal files.


def test_equal_files_in_training_and_test_are_named(root, spec, messages):
    data = (root / "train/good/003.png").read_bytes()
    (root / "test/good/001.png").write_bytes(data)
    (root / "test/dent/000.png").write_bytes(data)
    open_test(spec, channels=1)
    assert messages == [
        f"{root}/test/dent/000.png: equal to the training image {root}/train/good/003.png, as 2 of "
        "7 test images are to some; results on these say nothing of new images"
    ]


# Names.


@pytest.mark.parametrize(("of_image", "of_mask"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_two_spellings_of_one_name(root, of_image, of_mask):
    def spelled(form):
        return unicodedata.normalize(form, "Öse_prüf")

    (root / "test/dent").rename(root / "test" / spelled(of_image))
    (root / "ground_truth/dent").rename(root / "ground_truth" / spelled(of_mask))
    image = root / "test" / spelled(of_image) / "000.png"
    image.rename(image.with_name(f"{spelled(of_image)}.png"))
    mask = root / "ground_truth" / spelled(of_mask) / "000_mask.png"
    content = mask.read_bytes()
    mask.rename(mask.with_name(f"{spelled(of_mask)}_mask.png"))
    (item,) = [
        i for i in test_items(str(root), "") if "prüf.png" in unicodedata.normalize("NFC", i.name)
    ]
    assert item.mask() == content


def test_two_spellings_of_the_category(root, tmp_path):
    root.rename(tmp_path / unicodedata.normalize("NFD", "Türgriff"))
    assert training_items(str(tmp_path), unicodedata.normalize("NFC", "Türgriff"))


NAMES = [b"Pr\xfcfling", b"a\nb", b"tab\tbell\a", b"\xe2\x80\xae rtl", b"'\"$%&;<>|", b"\x1b[31m"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(root, spec, messages, name):
    for folder, suffix in (
        ("train/good", b""),
        ("test/dent", b""),
        ("ground_truth/dent", b"_mask"),
    ):
        directory = os.fsencode(root / folder) + b"/"
        os.rename(directory + b"000" + suffix + b".png", directory + name + suffix + b".png")
    split, test = train(spec), open_test(spec, channels=1)
    odd = os.fsdecode(name)
    assert f"good/{odd}.png" in split.names + split.held_out_names
    assert f"dent/{odd}.png" in test.names
    (root / "train/good" / f"{odd}.png").write_text("no image")
    with pytest.raises(BadInput) as caught:
        train(spec)
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith(".png: not an image that Pillow can read")


def test_the_draw_takes_the_bytes_of_a_name_that_is_not_utf_8(root, spec):
    os.rename(root / "train/good/000.png", os.fsencode(root / "train/good") + b"/\xfc.png")
    splits = [
        open_training(spec, holdout_fraction=0.2, seed=seed, max_images=2) for seed in range(30)
    ]
    assert len({name for split in splits for name in split.names}) == 6


def test_printable():
    assert printable("a/Öse × 3 ….png") == "a/Öse × 3 ….png"
    assert printable("a\nb\x1b\udcfc\u202e") == r"a\x0ab\x1b\xfc\u202e"


def test_messages_reach_the_terminal(root, spec):
    (root / "train/good/notes.txt").write_text("")
    code = f"from data_pipelines.folder import *; training_items({str(root)!r}, '')"
    python = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert python.stderr == f"{root}/train: 1 left out: 1 .txt (no image)\n"
