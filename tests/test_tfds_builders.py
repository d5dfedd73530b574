"""Tiny fake archives of MVTec AD and VisA: built, read back, and compared byte by byte."""

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import tfds_source
from data_pipelines.decode import decode_mask
from data_pipelines.errors import BadInput
from data_pipelines.items import Item
from data_pipelines.prepare import main, prepare

SHAPE = (12, 10)


def _save(path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _image(path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    _save(path, rng.integers(0, 256, SHAPE if seed % 2 else (*SHAPE, 3), np.uint8))


def _mask(path, seed: int, value: int) -> np.ndarray:
    mask = np.random.default_rng(seed).random(SHAPE) < 0.3
    _save(path, value * mask.astype(np.uint8))
    return mask


@pytest.fixture
def mvtec(tmp_path):
    """Writes the official layout, two categories; returns it and the masks by image name."""
    root, masks = tmp_path / "mvtec", {}
    for category in ("screw", "zipper"):
        for i in range(5):
            _image(root / category / "train/good" / f"{i:03d}.png", i)
        for i in range(3):
            _image(root / category / "test/good" / f"{i:03d}.png", 10 + i)
            _image(root / category / "test/thread_side" / f"{i:03d}.png", 20 + i)
            truth = root / category / "ground_truth/thread_side" / f"{i:03d}_mask.png"
            masks[f"thread_side/{i:03d}.png"] = _mask(truth, i, 255)
    return root, masks


@pytest.fixture
def visa(tmp_path):
    """Writes the official layout with its split file; masks have small values, not 255."""
    root, masks = tmp_path / "visa", {}
    rows = ["object,split,label,image,mask"]
    for category in ("candle", "pcb1"):
        for i in range(6):
            image = f"{category}/Data/Images/Normal/{i:04d}.JPG"
            _image(root / image, 30 + i)
            rows.append(f"{category},{'train' if i < 4 else 'test'},normal,{image},")
        for i in range(2):
            image = f"{category}/Data/Images/Anomaly/{i:03d}.JPG"
            mask = f"{category}/Data/Masks/Anomaly/{i:03d}.png"
            _image(root / image, 40 + i)
            masks[f"anomaly/{i:03d}.JPG"] = _mask(root / mask, i, 1 + i)
            rows.append(f"{category},test,anomaly,{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n")
    return root, masks


def _compare_masks(items, masks):
    assert {item.name for item in items if item.mask} == set(masks)
    for item in items:
        assert (item.mask is None) == (item.type == "good")
        if item.mask is not None:
            data = item.mask()
            np.testing.assert_array_equal(decode_mask(data, item.name, None), masks[item.name])
            assert set(np.unique(np.asarray(Image.open(io.BytesIO(data))))) == {0, 255}


def test_mvtec_ad_comes_back_byte_for_byte(mvtec, tmp_path):
    root, masks = mvtec
    data_dir = str(tmp_path / "tfds")
    assert prepare("mvtec_ad/screw", str(root), data_dir) == ["mvtec_ad/screw"]
    train = tfds_source.training_items(data_dir, "mvtec_ad/screw")
    test = tfds_source.test_items(data_dir, "mvtec_ad/screw")
    assert [item.name for item in train] == [f"good/{i:03d}.png" for i in range(5)]
    assert {item.type for item in train} == {"good"}
    assert [item.type for item in test] == ["good"] * 3 + ["thread_side"] * 3
    for split, items in (("train", train), ("test", test)):
        for item in items:
            expected = (root / "screw" / split / item.name).read_bytes()
            assert item.image() == expected
            assert pickle.loads(pickle.dumps(item)).image() == expected
    _compare_masks(test, masks)
    assert "tensorflow" not in sys.modules


def test_visa_follows_its_split_file(visa, tmp_path):
    root, masks = visa
    data_dir = str(tmp_path / "tfds")
    prepare("visa/candle", str(root), data_dir)
    train = tfds_source.training_items(data_dir, "visa/candle")
    test = tfds_source.test_items(data_dir, "visa/candle")
    assert [item.name for item in train] == [f"good/{i:04d}.JPG" for i in range(4)]
    assert [item.type for item in test] == ["good"] * 2 + ["anomaly"] * 2
    images = root / "candle/Data/Images"
    for item in [*train, *test]:
        name = item.name.replace("good/", "Normal/").replace("anomaly/", "Anomaly/")
        assert item.image() == (images / name).read_bytes()
    _compare_masks(test, masks)


def test_the_dataset_serves_any_reader_of_tfds(mvtec, tmp_path):
    import tensorflow_datasets as tfds

    root, masks = mvtec
    data_dir = tmp_path / "tfds"
    prepare("mvtec_ad/zipper", str(root), str(data_dir))
    builder = tfds.builder_from_directory(data_dir / "mvtec_ad/zipper/1.0.0")
    assert builder.info.splits["train"].num_examples == 5
    assert builder.info.features["label"].names == ["normal", "anomalous"]
    for example in builder.as_data_source("test"):
        name = example["name"].decode()
        assert example["label"] == (name in masks)
        mask = example["mask"]
        assert mask.shape == (*SHAPE, 1)
        np.testing.assert_array_equal(mask[..., 0] != 0, masks.get(name, np.zeros(SHAPE, bool)))


def test_all_configurations_are_there():
    from data_pipelines import mvtec_ad, visa

    assert len(mvtec_ad.MvtecAd.builder_configs) == 15
    assert len(visa.Visa.builder_configs) == 12


def test_nothing_prepared_names_the_command(tmp_path):
    for category in ("mvtec_ad/screw", "visa/candle"):
        command = f"data_pipelines.prepare {category} --manual_dir=DIR --data_dir={tmp_path}"
        with pytest.raises(BadInput) as caught:
            tfds_source.training_items(str(tmp_path), category)
        assert command in str(caught.value)
    with pytest.raises(BadInput, match=r"data\.category"):
        tfds_source.test_items(str(tmp_path), "")


def _fails(name, root, tmp_path, *parts):
    with pytest.raises(BadInput) as caught:
        prepare(name, str(root), str(tmp_path / "tfds"))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message
    assert not list((tmp_path / "tfds").rglob("dataset_info.json"))


def test_a_wrong_manual_directory_is_named(mvtec, visa, tmp_path):
    _fails("mnist", tmp_path, tmp_path, "mnist", "mvtec_ad, visa")
    _fails("visa/screw", tmp_path, tmp_path, "visa/screw", "candle")
    _fails("visa/candle", tmp_path / "nowhere", tmp_path, "nowhere", "manual_dir")
    _fails("mvtec_ad/bottle", mvtec[0], tmp_path, "mvtec", "bottle")
    _fails("mvtec_ad", mvtec[0], tmp_path, "bottle")
    (mvtec[0] / "zipper/ground_truth/thread_side/001_mask.png").unlink()
    _fails("mvtec_ad/zipper", mvtec[0], tmp_path, "001.png", "mask")
    (mvtec[0] / "screw/test/good/001.png").write_bytes(b"")
    _fails("mvtec_ad/screw", mvtec[0], tmp_path, "screw/test/good/001.png", "empty")


def test_a_wrong_visa_archive_is_named(visa, tmp_path):
    root, _ = visa
    split = root / "split_csv/1cls.csv"
    text = split.read_text()
    (root / "pcb1/Data/Masks/Anomaly/001.png").unlink()
    _fails("visa/pcb1", root, tmp_path, "mask of", "pcb1/Data/Images/Anomaly/001.JPG")
    _save(root / "candle/Data/Masks/Anomaly/001.png", np.ones((3, 4), np.uint8))
    _fails("visa/candle", root, tmp_path, "mask of", "candle/Data/Images/Anomaly/001.JPG", "4×3")
    split.write_text(text.replace("candle/Data/Masks/Anomaly/001.png", ""))
    _fails("visa/candle", root, tmp_path, "mask of", "missing")
    split.write_text(text.replace("candle,test,anomaly", "candle,train,anomaly"))
    _fails("visa/candle", root, tmp_path, "1cls.csv, line 8", "training")
    split.write_text(text.replace("candle,test", "candle,dev"))
    _fails("visa/candle", root, tmp_path, "1cls.csv, line 6", "dev")
    split.write_text(text.replace("split,label", "set,label"))
    _fails("visa/candle", root, tmp_path, "1cls.csv", "split")
    split.write_text(text.replace("candle,", "other,"))
    _fails("visa/candle", root, tmp_path, "1cls.csv", "candle")
    split.unlink()
    _fails("visa/candle", root, tmp_path, "1cls.csv")


def test_command(mvtec, tmp_path, monkeypatch, capsys):
    root, _ = mvtec

    def run(name):
        flags = [f"--manual_dir={root}", f"--data_dir={tmp_path / 'tfds'}"]
        monkeypatch.setattr(sys, "argv", ["prepare", name, *flags])
        main()

    run("mvtec_ad/screw")
    assert "prepared mvtec_ad/screw" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run("mvtec_ad/tile")
    assert caught.value.code == 2
    assert "tile" in capsys.readouterr().err.splitlines()[-1]


def test_tfds_is_imported_late():
    code = (
        "import sys, data_pipelines.tfds_source, data_pipelines.prepare;"
        "sys.exit('tensorflow_datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_split_file_that_is_not_utf_8_or_has_too_few_columns(tmp_path):
    from data_pipelines.visa import COLUMNS, read_csv

    path = tmp_path / "1cls.csv"
    path.write_bytes(b"object,split,label,image,mask\npcb1,train,normal,Pr\xfcfling.JPG,\n")
    with pytest.raises(BadInput, match=r"1cls\.csv: not a CSV file in UTF-8"):
        list(read_csv(path, COLUMNS))
    path.write_text("object,split,label,image,mask\npcb1,train\n")
    with pytest.raises(BadInput, match=r"1cls\.csv, line 2: too few columns"):
        list(read_csv(path, COLUMNS))


def test_a_name_that_tfds_cannot_store_is_refused():
    from data_pipelines import mvtec_ad

    item = Item("good/Pr\udcfcfling.png", lambda: b"", "good", None, "/data/Pr\udcfcfling.png")
    with pytest.raises(BadInput, match=r"^/data/Pr\\xfcfling\.png: .* rename this file$"):
        next(mvtec_ad.MvtecAd._generate_examples(None, [item]))
