"""Categories in MVTec layout: the files that are read, ignored and refused."""

import shutil

import pytest

from data_pipelines.errors import BadInput
from data_pipelines.folder import image_files, test_items, training_items
from layouts import category

test_items.__test__ = False  # a function of the source, not a test


@pytest.fixture
def root(tmp_path):
    return category(tmp_path / "thing")


def message(function, *arguments):
    with pytest.raises(BadInput) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_layout(root):
    train = training_items(str(root), "")
    assert [item.name for item in train] == [f"good/{i:03d}.png" for i in range(6)]
    assert {(item.type, item.mask) for item in train} == {("good", None)}
    assert train[2].image() == (root / "train/good/002.png").read_bytes()
    assert train[2].origin == str(root / "train/good/002.png")

    test = test_items(str(root.parent), "thing")
    assert [item.name for item in test] == [
        *("crack/000.png", "crack/001.png", "dent/000.png", "dent/001.png"),
        *("good/000.png", "good/001.png", "good/002.png"),
    ]
    assert [item.type for item in test] == ["crack"] * 2 + ["dent"] * 2 + ["good"] * 3
    assert [item.mask is not None for item in test] == [True] * 4 + [False] * 3
    assert test[3].mask() == (root / "ground_truth/dent/001_mask.png").read_bytes()


def test_mask_names_and_suffixes(root):
    truth = root / "ground_truth/crack"
    (truth / "000_mask.png").rename(truth / "000.PNG")
    (truth / "001_mask.png").rename(truth / "001_mask.bmp")
    (root / "test/crack/001.png").rename(root / "test/crack/001.JPG")
    crack = [item for item in test_items(str(root), "") if item.type == "crack"]
    assert crack[0].mask() == (truth / "000.PNG").read_bytes()
    assert crack[1].mask() == (truth / "001_mask.bmp").read_bytes()


def test_no_ground_truth_means_no_masks(root):
    shutil.rmtree(root / "ground_truth")
    assert all(item.mask is None for item in test_items(str(root), ""))


def test_nested_folders(root):
    (root / "train/good/camera").mkdir()
    (root / "train/good/000.png").rename(root / "train/good/camera/000.png")
    assert training_items(str(root), "")[-1].name == "good/camera/000.png"
    for folder, name in (("test", "000.png"), ("ground_truth", "000_mask.png")):
        (root / folder / "dent/camera").mkdir()
        (root / folder / "dent" / name).rename(root / folder / "dent/camera" / name)
    nested = {item.name: item for item in test_items(str(root), "")}["dent/camera/000.png"]
    assert nested.mask() == (root / "ground_truth/dent/camera/000_mask.png").read_bytes()


def test_other_files_and_hidden_ones_are_ignored(root):
    before = [item.name for item in training_items(str(root), "") + test_items(str(root), "")]
    for folder in ("train/good", "test/good", "test/crack", "ground_truth/crack", "test"):
        for name in ("Thumbs.db", ".DS_Store", "README", "notes.txt", "._000.png"):
            (root / folder / name).write_text("not an image")
    (root / "train/good/.thumbnails").mkdir()
    (root / "train/good/.thumbnails/000.png").write_text("")
    (root / "test/.cache").mkdir()
    after = [item.name for item in training_items(str(root), "") + test_items(str(root), "")]
    assert after == before


def test_training_needs_no_test_folder(root):
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "ground_truth")
    assert len(training_items(str(root), "")) == 6


@pytest.mark.parametrize("function", [training_items, test_items])
def test_missing_root_and_category(root, function):
    gone = root / "nowhere"
    assert message(function, str(gone), "").startswith(f"{gone}: no such folder")
    assert message(function, str(root), "nowhere").startswith(f"{gone}: no such folder")
    long = "x" * 300
    for place, name in ((root / long, ""), (root / long, "a"), (root, long), (root, "a/" * 3000)):
        assert "no such folder" in message(function, str(place), name)


def test_missing_and_empty_train_good(root):
    good = root / "train/good"
    for path in good.iterdir():
        path.unlink()
    assert message(training_items, str(root), "") == f"{good}: no images in this folder"
    (good / "notes.txt").write_text("")
    assert message(training_items, str(root), "") == f"{good}: no images in this folder"
    shutil.rmtree(good)
    assert message(training_items, str(root), "") == f"{good}: No such file or directory"


def test_missing_and_empty_test(root):
    shutil.rmtree(root / "test/dent")
    (root / "test/dent").mkdir()
    assert message(test_items, str(root), "") == f"{root}/test/dent: no images in this folder"
    shutil.rmtree(root / "test")
    assert message(test_items, str(root), "").startswith(f"{root}/test: ")
    (root / "test").mkdir()
    assert message(test_items, str(root), "").startswith(f"{root}/test: no folders of images")


def test_missing_mask(root):
    (root / "ground_truth/dent/001_mask.png").unlink()
    assert message(test_items, str(root), "").startswith(f"{root}/test/dent/001.png: no mask")
    (root / "ground_truth/dent/000_mask.png").unlink()
    truth = root / "ground_truth/dent"
    assert message(test_items, str(root), "") == f"{truth}: no images in this folder"
    truth.rmdir()
    assert message(test_items, str(root), "") == f"{truth}: No such file or directory"


def test_what_looks_like_an_image_is_not_passed_over(root):
    (root / "train/good/900.png").mkdir()
    (root / "train/good/901.png").symlink_to(root / "nowhere")
    assert [path.name for path in image_files(root / "train")][-2:] == ["900.png", "901.png"]
