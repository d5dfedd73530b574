"""Importers: made trees of the published layouts, wrong trees, and what is written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import BadInput
from data_pipelines.importers import IMPORTERS, Options, import_list
from data_pipelines.lists.list_file import read_list
from layouts import tree, write
from pae_jax import main


def black(path: Path) -> None:
    write(path, np.zeros((6, 8), np.uint8))


def imported(name: str, root: Path, **options: float) -> list[tuple]:
    """Returns the rows: image, split, type, masks and group, with paths relative to `root`."""

    def relative(path: Path) -> str:
        return path.relative_to(root).as_posix()

    return [
        (
            relative(row.image),
            row.split,
            row.type,
            *map(relative, row.masks),
            *filter(None, [row.group]),
        )
        for row in IMPORTERS[name](root, Options(**options))
    ]


MVTEC = (
    "train/good/000.png",
    "test/good/000.png",
    "test/scratch_head/000.png",
    "ground_truth/scratch_head/000_mask.png",
)


@pytest.mark.parametrize("name", ["mvtec_ad", "mpdd"])
def test_mvtec_ad_and_mpdd(tmp_path, name):
    root = tree(tmp_path, *MVTEC, "train/good/001.png")
    assert imported(name, root) == [
        ("train/good/000.png", "train", "good"),
        ("train/good/001.png", "train", "good"),
        ("test/good/000.png", "test", "good"),
        (
            "test/scratch_head/000.png",
            "test",
            "scratch_head",
            "ground_truth/scratch_head/000_mask.png",
        ),
    ]


def test_mvtec_ad_2(tmp_path):
    root = tree(
        tmp_path,
        "train/good/000_regular.png",
        "validation/good/000_regular.png",
        "test_public/good/000_regular.png",
        "test_public/bad/000_overexposed.png",
        "test_public/ground_truth/bad/000_overexposed_mask.png",
        "test_private/000_regular.png",
        "test_private_mixed/000_mixed.png",
    )
    assert imported("mvtec_ad_2", root) == [
        ("train/good/000_regular.png", "train", "good"),
        ("validation/good/000_regular.png", "holdout", "good"),
        (
            "test_public/bad/000_overexposed.png",
            "test",
            "bad",
            "test_public/ground_truth/bad/000_overexposed_mask.png",
        ),
        ("test_public/good/000_regular.png", "test", "good"),
    ]


def test_mvtec_loco(tmp_path):
    root = tree(
        tmp_path,
        "train/good/000.png",
        "validation/good/000.png",
        "test/good/000.png",
        "test/logical_anomalies/000.png",
        "test/structural_anomalies/000.png",
        "ground_truth/logical_anomalies/000/000.png",
        "ground_truth/logical_anomalies/000/001.png",
        "ground_truth/structural_anomalies/000/000.png",
    )
    (root / "defects_config.json").write_text("[]")
    assert imported("mvtec_loco", root) == [
        ("train/good/000.png", "train", "good"),
        ("validation/good/000.png", "holdout", "good"),
        ("test/good/000.png", "test", "good"),
        (
            "test/logical_anomalies/000.png",
            "test",
            "logical_anomalies",
            "ground_truth/logical_anomalies/000/000.png",
            "ground_truth/logical_anomalies/000/001.png",
        ),
        (
            "test/structural_anomalies/000.png",
            "test",
            "structural_anomalies",
            "ground_truth/structural_anomalies/000/000.png",
        ),
    ]


def test_btad(tmp_path):
    root = tree(
        tmp_path,
        "train/ok/0000.bmp",
        "test/ok/0010.bmp",
        "test/ko/0001.bmp",
        "ground_truth/ko/0001.png",
    )
    assert imported("btad", root) == [
        ("train/ok/0000.bmp", "train", "good"),
        ("test/ko/0001.bmp", "test", "ko", "ground_truth/ko/0001.png"),
        ("test/ok/0010.bmp", "test", "good"),
    ]


def test_visa(tmp_path):
    images = ("Normal/0000.JPG", "Normal/0001.JPG", "Anomaly/000.JPG")
    for name in images:
        tree(tmp_path, f"pcb1/Data/Images/{name}")
    tree(tmp_path, "pcb1/Data/Masks/Anomaly/000.png")
    table = tmp_path / "split_csv/1cls.csv"
    table.parent.mkdir()
    lines = [
        "object,split,label,image,mask",
        "pcb1,train,normal,pcb1/Data/Images/Normal/0000.JPG,",
        "candle,train,normal,candle/Data/Images/Normal/0000.JPG,",
        "pcb1,test,normal,pcb1/Data/Images/Normal/0001.JPG,",
        "pcb1,test,anomaly,pcb1/Data/Images/Anomaly/000.JPG,pcb1/Data/Masks/Anomaly/000.png",
    ]
    table.write_text("\n".join(lines) + "\n")
    root = tmp_path / "pcb1"
    assert imported("visa", root) == [
        ("Data/Images/Normal/0000.JPG", "train", "good"),
        ("Data/Images/Normal/0001.JPG", "test", "good"),
        ("Data/Images/Anomaly/000.JPG", "test", "anomaly", "Data/Masks/Anomaly/000.png"),
    ]
    with pytest.raises(BadInput, match=r"1cls\.csv: no object pcb9; it has candle, pcb1"):
        IMPORTERS["visa"](tmp_path / "pcb9", Options())
    table.unlink()
    with pytest.raises(BadInput, match=r"1cls\.csv: no such file; expected is ROOT/CATEGORY"):
        IMPORTERS["visa"](root, Options())


@pytest.mark.parametrize("place", ["realiad_jsons/realiad_jsons", "realiad_1024/realiad_jsons"])
def test_real_iad(tmp_path, place, messages):
    ok, bad = "OK/S0001/audiojack_0001_OK_C1_2023.jpg", "NG/BX/S0021/audiojack_0021_NG_C1_2023"
    root = tree(tmp_path / "realiad_1024/audiojack", ok, f"{bad}.jpg", f"{bad}_mask.png")

    def record(image: str, kind: str, mask: str | None = None) -> dict:
        category = {"category": "audiojack", "anomaly_class": kind}
        return category | {"image_path": image, "mask_path": mask}

    data = {
        "meta": {"normal_class": "OK", "prefix": "audiojack/"},
        "train": [record(ok, "OK"), record("NG/x.jpg", "AK", "NG/x_mask.png")],
        "test": [record(f"{bad}.jpg", "BX", f"{bad}_mask.png")],
    }
    path = tmp_path / place / "audiojack.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    assert imported("real_iad", root) == [
        (ok, "train", "good", "OK/S0001"),
        (f"{bad}.jpg", "test", "BX", f"{bad}_mask.png", "NG/BX/S0021"),
    ]
    assert any("1 defective training images are left out" in line for line in messages)
    path.write_text('{"train": []}')
    with pytest.raises(BadInput, match=r"audiojack\.json: not a JSON file of Real-IAD \(no 'meta"):
        IMPORTERS["real_iad"](root, Options())
    path.unlink()
    with pytest.raises(
        BadInput, match=r"audiojack\.json: no such file, nor .*; it gives the split"
    ):
        IMPORTERS["real_iad"](root, Options())


def test_kolektor_sdd2(tmp_path, messages):
    names = ("train/10000", "train/10001", "test/20000", "test/20001")
    tree(tmp_path, *(f"{name}.png" for name in names), "train/10001_GT.png", "test/20001_GT.png")
    black(tmp_path / "train/10000_GT.png")
    black(tmp_path / "test/20000_GT.png")
    assert imported("kolektor_sdd2", tmp_path) == [
        ("train/10000.png", "train", "good"),
        ("test/20000.png", "test", "good"),
        ("test/20001.png", "test", "defect", "test/20001_GT.png"),
    ]
    assert any("train: 1 defective training images are left out" in line for line in messages)


def test_dagm_2007(tmp_path, messages):
    tree(
        tmp_path,
        *(f"{split}/{name}.PNG" for split in ("Train", "Test") for name in ("0001", "0002")),
        "Train/Label/0002_label.PNG",
        "Test/Label/0001_label.PNG",
    )
    (tmp_path / "Test/Label/Labels.txt").write_text("1\n")
    assert imported("dagm_2007", tmp_path) == [
        ("Train/0001.PNG", "train", "good"),
        ("Test/0001.PNG", "test", "defect", "Test/Label/0001_label.PNG"),
        ("Test/0002.PNG", "test", "good"),
    ]
    assert any("Train: 1 defective training images are left out" in line for line in messages)
    tree(tmp_path, "Test/Label/0009_label.PNG")
    with pytest.raises(BadInput, match=r"0009_label\.PNG: no image of this name in .*Test"):
        IMPORTERS["dagm_2007"](tmp_path, Options())


EXPECTED = {
    "mvtec_ad": ("train/good", "train/good, test, ground_truth"),
    "mvtec_ad_2": ("train/good", "validation/good, test_public, test_public/ground_truth"),
    "mvtec_loco": ("train/good", "train/good, validation/good, test, ground_truth"),
    "btad": ("train/ok", "train/ok, test, ground_truth"),
    "mpdd": ("train/good", "train/good, test, ground_truth"),
    "real_iad": ("OK", "OK and NG"),
    "kolektor_sdd2": ("train", "NAME.png with NAME_GT"),
    "dagm_2007": ("Train", "Train and Test, and Label in each"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_wrong_trees_are_one_line(tmp_path, name):
    folder, layout = EXPECTED[name]
    (tmp_path / "one" / folder).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInput) as error:
        IMPORTERS[name](tmp_path, Options())
    text = str(error.value)
    assert text.startswith(f"{tmp_path / folder}: no such folder; expected is ROOT")
    assert layout in text and text.endswith("; name a category: one")


def test_wrong_files_are_one_line(tmp_path):
    root = tree(tmp_path / "a", *MVTEC)
    (root / "ground_truth/scratch_head/000_mask.png").rename(root / "ground_truth/x.png")
    with pytest.raises(BadInput, match="scratch_head: no images in this folder"):
        imported("mvtec_ad", root)
    tree(root, "ground_truth/scratch_head/009_mask.png")
    with pytest.raises(BadInput, match=r"000\.png: no mask, neither 000_mask\.\* nor 000\.\* in"):
        imported("mvtec_ad", root)
    (tmp_path / "k/train").mkdir(parents=True)
    (tmp_path / "k/test").mkdir()
    with pytest.raises(BadInput, match=r"train: no image NAME\.png with a mask NAME_GT\.png"):
        imported("kolektor_sdd2", tmp_path / "k")


def files_below(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_nothing_is_written_into_the_data_set(tmp_path, capsys):
    root = tree(tmp_path / "data/screw", *MVTEC)
    before = files_below(tmp_path / "data")
    words = ["import", "mvtec_ad", str(root)]
    assert main.main([*words, f"--out={root}/list.csv"]) == 2
    assert "inside the data set's folder" in capsys.readouterr().err
    out = tmp_path / "lists/screw.csv"
    for _ in range(2):
        assert main.main([*words, f"--out={out}"]) == 0
    assert out.read_text().splitlines() == [
        "image,split,type,mask",
        "../data/screw/train/good/000.png,train,good,",
        "../data/screw/test/good/000.png,test,good,",
        "../data/screw/test/scratch_head/000.png,test,scratch_head,"
        "../data/screw/ground_truth/scratch_head/000_mask.png",
    ]
    assert os.listdir(out.parent) == ["screw.csv"]
    tree(root, "train/good/001.png")
    capsys.readouterr()
    assert main.main([*words, f"--out={out}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"pae import: {out}: exists with other content; name another file by --out"
    (root / "train/good/001.png").unlink()
    changed = files_below(tmp_path / "data")
    assert changed.keys() == before.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mvtec", "{}", "--out=l.csv"], "mvtec: no such data set; one of mvtec_ad, mvtec_ad_2"),
        (["visa", "{}/none", "--out=l.csv"], "none: no such file or folder"),
        (["mvtec_ad", "{}/data", "--out=l.txt"], "l.txt: a list is a file whose name ends in"),
        (["mvtec_ad", "{}/data", "--out=gs://b/l.csv"], "a list is a local file"),
        (["coco", "{}/data", "--out=l.csv", "--test_fraction=2"], "--test_fraction: 2.0"),
        (["coco", "{}/data", "--out=l.csv", "--config.x=1"], "takes no such argument"),
    ],
)
def test_bad_commands(tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "data", *MVTEC)
    assert main.main(["import", *(word.format(tmp_path) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pae import: ") and message in line
    assert os.listdir(tmp_path) == ["data"]


def test_a_file_that_a_table_names_is_missing(tmp_path):
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "pcb1").mkdir()
    lines = "object,split,label,image,mask\npcb1,train,normal,pcb1/0.JPG,\n"
    (tmp_path / "split_csv/1cls.csv").write_text(lines)
    with pytest.raises(BadInput, match=r"pcb1/0\.JPG: no such file; .*1cls\.csv, line 2 names it"):
        import_list("visa", str(tmp_path / "pcb1"), str(tmp_path / "l.csv"))


def test_links_above_the_data_set_and_the_list(tmp_path):
    tree(tmp_path / "disk/a/b/screw", *MVTEC)
    (tmp_path / "data").symlink_to(tmp_path / "disk/a/b")
    (tmp_path / "disk/lists/x").mkdir(parents=True)
    (tmp_path / "lists").symlink_to(tmp_path / "disk/lists/x")
    import_list("mvtec_ad", str(tmp_path / "data/screw"), str(tmp_path / "lists/l.csv"))
    rows = read_list(tmp_path / "lists/l.csv")
    assert len(rows) == 3 and all(row.image.is_file() for row in rows)
