"""The list source: rows, splits, groups, hold-out, masks, bad rows, and a run from start to end."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import layouts
import runs
from data_pipelines import holdout
from data_pipelines.dataset import TestSplit, TrainingSplit, open_test, open_training
from data_pipelines.errors import BadInput
from data_pipelines.importers import import_list
from data_pipelines.lists import source
from data_pipelines.lists.list_file import Row, read_list, write_list
from data_pipelines.spec import DatasetSpec
from pae_jax import main

HEADER = "image,split,type,mask"


def image(path: Path, seed: int = 0, shape: tuple[int, ...] = (20, 24)) -> Path:
    layouts.write(path, np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    return path


def mask(path: Path, rows: slice) -> Path:
    pixels = np.zeros((20, 24), np.uint8)
    pixels[rows, 6:12] = 255
    layouts.write(path, pixels)
    return path


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    """Eight images a.png…h.png and two masks, of different rows of pixels."""
    for i, name in enumerate("abcdefgh"):
        image(tmp_path / f"images/{name}.png", i)
    mask(tmp_path / "masks/1.png", slice(2, 5))
    mask(tmp_path / "masks/2.png", slice(9, 12))
    return tmp_path


def spec(path: Path, groups: str = "auto") -> DatasetSpec:
    return DatasetSpec("list", str(path), "", (20, 24), groups, str(path.parent / "cache"))


def training(path: Path, groups: str = "auto", fraction: float = 0.3) -> TrainingSplit:
    return open_training(spec(path, groups), holdout_fraction=fraction, seed=0)


def rows_of(names: str, split: str = "train", kind: str = "good") -> list[str]:
    return [f"images/{name}.png,{split},{kind}," for name in names]


def test_csv_and_json_lines_are_read_alike(folder):
    csv = write(
        folder / "list.csv",
        HEADER + ",group,foreground",
        "images/a.png,train,good,,part 1,",
        "images/b.png,holdout,good,,,fg/b.png",
        "images/c.png,test,scratch,masks/1.png|masks/2.png,,",
    )
    records = [
        {"image": "images/a.png", "split": "train", "type": "good", "mask": "", "group": "part 1"},
        {"image": "images/b.png", "split": "holdout", "type": "good", "mask": None},
        {"image": "images/c.png", "split": "test", "type": "scratch"},
    ]
    records[1]["foreground"] = "fg/b.png"
    records[2]["mask"] = ["masks/1.png", "masks/2.png"]
    lines = write(folder / "list.jsonl", *map(json.dumps, records))
    expected = [
        Row(folder / "images/a.png", "train", "good", group="part 1"),
        Row(folder / "images/b.png", "holdout", "good", foreground=folder / "fg/b.png"),
        Row(
            folder / "images/c.png",
            "test",
            "scratch",
            (folder / "masks/1.png", folder / "masks/2.png"),
        ),
    ]
    for path in (csv, lines):
        assert [row._replace(where="") for row in read_list(path)] == expected
    assert read_list(csv)[2].where == f"{csv}, line 4"
    assert read_list(lines)[2].where == f"{lines}, line 3"


def test_a_list_of_a_spreadsheet(folder):
    text = f"\ufeff{HEADER}\r\n".replace(",", ";") + "images/a.png;train;OK;\r\n"
    (folder / "list.csv").write_bytes(text.encode())
    (row,) = read_list(folder / "list.csv")
    assert row[:3] == (folder / "images/a.png", "train", "good")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_written_list_is_read_back_from_another_folder(folder, suffix):
    rows = [
        Row(folder / "images/a.png", "train", "good", group="x, y"),
        Row(folder / "images/b.png", "test", "a b", (folder / "masks/1.png", folder / "m.png")),
    ]
    path = folder / "lists/deep" / f"l{suffix}"
    write_list(path, rows)
    assert "../../images/a.png" in path.read_text()
    assert [row._replace(where="") for row in read_list(path)] == rows
    before = path.stat().st_mtime_ns
    write_list(path, rows)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(BadInput, match=rf"l{suffix}: exists with other content"):
        write_list(path, rows[:1])


def test_several_masks_are_united(folder):
    path = write(
        folder / "list.csv",
        HEADER,
        *rows_of("abc"),
        "images/d.png,test,good,",
        "images/e.png,test,cut,masks/1.png|masks/2.png",
        "images/f.png,test,dent,masks/2.png",
    )
    split = open_test(spec(path), channels=1)
    assert split.names == ["cut/e.png", "dent/f.png", "good/d.png"]
    assert split.types == ["cut", "dent", "good"]
    expected = np.zeros((3, 20, 24), bool)
    expected[0, 2:5, 6:12] = expected[:2, 9:12, 6:12] = True
    np.testing.assert_array_equal(split.masks, expected)
    np.testing.assert_array_equal(split.native_mask(0), expected[0])
    layouts.write(folder / "masks/2.png", np.zeros((20, 23), np.uint8))
    with pytest.raises(BadInput, match=r"2\.png: another size than .*1\.png"):
        open_test(spec(path), channels=1)


def test_defects_without_masks_are_told_and_left_out_of_the_pixels(folder, messages):
    path = write(
        folder / "list.csv",
        HEADER,
        *rows_of("ab"),
        "images/c.png,test,cut,masks/1.png",
        *rows_of("d", "test", "dent"),
    )
    split = open_test(spec(path), channels=1)
    assert split.has_pixel_labels.tolist() == [True, False]
    assert any("line 5: a defective image without a mask, as 1 of 2" in line for line in messages)
    assert any("no good test image" in line for line in messages)


def test_groups_take_the_place_of_auto(folder):
    groups = dict(zip("abcdefgh", "1122333", strict=False))
    lines = [f"{line},{groups.get(line[7], '')}" for line in rows_of("abcdefgh")]
    path = write(folder / "list.csv", HEADER + ",group", *lines)
    seen = set()
    for seed in range(8):
        split = open_training(spec(path), holdout_fraction=0.01, seed=seed)
        assert split.holdout_rule == holdout.GIVEN_GROUPS
        seen.add("".join(name[5] for name in split.held_out_names))
    assert len(seen) > 1 and seen <= {"ab", "cd", "efg", "h"}
    assert len(training(path, "none", 0.01).held_out_names) == 1
    assert training(path, "blocks:2", 0.01).holdout_rule == "blocks:2"


def test_one_group_leaves_nothing_to_train_on(folder):
    lines = [f"{line},1" for line in rows_of("abc")]
    path = write(folder / "list.csv", HEADER + ",group", *lines)
    with pytest.raises(BadInput, match="all 3 training images are one group"):
        training(path)


def test_holdout_rows_take_the_place_of_the_fraction(folder):
    path = write(folder / "list.csv", HEADER, *rows_of("bdc"), *rows_of("ah", "holdout"))
    for fraction, seed in ((0.05, 0), (0.5, 1)):
        split = open_training(spec(path), holdout_fraction=fraction, seed=seed)
        assert split.held_out_names == ["good/a.png", "good/h.png"]
        assert split.names == ["good/b.png", "good/c.png", "good/d.png"]
        assert split.holdout_rule == holdout.GIVEN_IMAGES
        assert len(split.images) == 3 and len(split.held_out) == 2


def test_names_hold_the_folders_that_differ(tmp_path):
    for name in ("x/1/a.png", "x/2/a.png", "y/a.png"):
        image(tmp_path / "data" / name)
    lines = [f"../data/{name},train,good," for name in ("x/1/a.png", "x/2/a.png")]
    (tmp_path / "lists").mkdir()
    path = write(tmp_path / "lists/l.csv", HEADER, *lines, "../data/y/a.png,test,bad,")
    names = [item.name for item in source.training_items(str(path), "")]
    assert names == ["good/1/a.png", "good/2/a.png"]
    assert [item.name for item in source.test_items(str(path), "")] == ["bad/a.png"]


def test_training_reads_no_test_image(folder):
    path = write(folder / "list.csv", HEADER, *rows_of("abc"), *rows_of("x", "test", "cut"))
    assert len(training(path).names) == 2
    with pytest.raises(BadInput, match=r"list\.csv, line 5: no file .*x\.png; paths are relative"):
        open_test(spec(path), channels=1)


def test_a_group_in_training_and_test_is_told(folder, messages):
    lines = [f"{line},g" for line in (*rows_of("ab"), *rows_of("c", "test"))]
    path = write(folder / "list.csv", HEADER + ",group", *lines)
    source.test_items(str(path), "")
    assert any("line 4: its group g has training images too" in line for line in messages)


A, B = "images/a.png,train,good,", "images/b.png,train,good,"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,split,type", A[:-1]], r"list\.csv: no column mask; the first line names"),
        ([HEADER, A, "images/b.png,valid,good,"], r"line 3: split 'valid'.* train, holdout, test"),
        ([HEADER, A, "images/x.png,train,good,"], r"line 3: no file .*images/x\.png"),
        ([HEADER, A, "images/b.png,train,cut,"], r"line 3: type 'cut' in split train"),
        ([HEADER, A, "images/b.png,holdout,cut,"], r"line 3: type 'cut' in split holdout"),
        ([HEADER, A, B, "images/a.png,test,good,"], r"line 4: .*a\.png in split test.* at line 2"),
        ([HEADER, A, B, "images/./a.png,test,cut,"], r"line 4: .*in split train at line 2; leave"),
        ([HEADER, "images/a.png,test,good,"], r"list\.csv: no row of split train"),
        ([HEADER], r"list\.csv: no row of split train"),
        ([HEADER, A], r"a\.png: 1 training images, at least two needed"),
        ([HEADER, A, "images/b.png,train"], "line 3: too few columns"),
        ([HEADER, A, B + ",,"], "line 3: too many columns"),
        ([HEADER, A, ",train,good,"], "line 3: no image"),
        ([HEADER, A, "images/b.png,test,,"], "line 3: type '', which must be good or"),
        ([HEADER, A, "images/b.png,test,a/b,"], "line 3: type 'a/b'"),
        ([HEADER, A, "images/b.png,test,..,"], r"line 3: type '\.\.'"),
    ],
)
def test_bad_rows_are_one_line(folder, lines, message):
    path = write(folder / "list.csv", *lines)
    with pytest.raises(BadInput, match=message) as error:
        training(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: not an object"),
        ('{"image": "a", "split": "train"}', "line 1: no key type, mask"),
        ('{"image": 1, "split": "train", "type": "good", "mask": ""}', "must be a string"),
        ('{"image": "a", "split": "train", "type": "good", "mask": [1]}', "must be a string"),
        ('{"image": "a\\u0000", "split": "train", "type": "good", "mask": ""}', "must be a string"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    path = write(tmp_path / "list.jsonl", line)
    with pytest.raises(BadInput, match=message):
        read_list(path)


def test_lists_that_are_none(tmp_path):
    with pytest.raises(BadInput, match=r"list\.txt: a list is a file whose name ends in \.csv"):
        read_list(tmp_path / "list.txt")
    with pytest.raises(BadInput, match=r"list\.csv: cannot be read \(No such file"):
        read_list(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_bytes(f"{HEADER}\nm\xfcll.png,train,good,\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"list\.csv: not a CSV file in UTF-8"):
        read_list(tmp_path / "list.csv")
    with pytest.raises(BadInput, match=r"data\.category: 'screw', but a list has no categories"):
        source.training_items("list.csv", "screw")


def test_columns_and_masks_that_are_not_read_are_told(folder, messages):
    path = write(folder / "list.csv", HEADER + ",comment", f"{A}masks/1.png,mine")
    read_list(path)
    assert any("columns that are not read: comment" in line for line in messages)
    assert any("line 2: a good image with a mask, as 1 rows" in line for line in messages)


def test_paths_that_csv_cannot_hold(folder):
    rows = [Row(folder / "a.png", "train", "good")]
    rows.append(Row(folder / "b.png", "test", "cut", (folder / "a|b.png",)))
    with pytest.raises(BadInput, match=r"a\|b\.png: has a \|; end --out in \.jsonl"):
        write_list(folder / "l.csv", rows)
    write_list(folder / "l.jsonl", rows)
    assert read_list(folder / "l.jsonl")[1].masks == (folder / "a|b.png",)
    odd = [Row(folder / "\udcfc.png", "train", "good")]
    with pytest.raises(BadInput, match=r"not UTF-8; end --out in \.jsonl"):
        write_list(folder / "m.csv", odd)
    write_list(folder / "m.jsonl", odd)
    assert read_list(folder / "m.jsonl")[0].image == odd[0].image


@pytest.mark.parametrize("name", ["n" * 251, "\udcfc" * 251], ids=["ASCII", "not UTF-8"])
def test_a_drawn_mask_of_an_image_with_the_longest_name(name, folder):
    mask = (folder / "masks/1.png").read_bytes()
    rows = [
        Row(folder / f"{name}.{suffix}", "test", "cut", drawn=mask) for suffix in ("png", "jpg")
    ]
    write_list(folder / "l.jsonl", [*rows, Row(folder / "images/a.png", "train", "good")])
    masks = [row.masks[0] for row in read_list(folder / "l.jsonl")[:2]]
    assert [path.read_bytes() for path in masks] == [mask, mask]
    assert masks[0] != masks[1]


def test_a_list_with_the_longest_name_leaves_nothing_else(tmp_path):
    path = tmp_path / "lists" / f"{'n' * 251}.csv"
    write_list(path, [Row(tmp_path / "a.png", "train", "good")])
    assert os.listdir(path.parent) == [path.name]


def opened(source_name: str, root: Path, cache: Path) -> tuple[TrainingSplit, TestSplit]:
    data = DatasetSpec(source_name, str(root), "", (16, 18), "auto", str(cache))
    train = open_training(data, holdout_fraction=0.3, seed=1)
    return train, open_test(data, channels=train.channels)


def test_an_imported_tree_opens_as_the_folder_does(tmp_path):
    root = layouts.category(tmp_path / "mvtec/screw", train=10, colour=True)
    import_list("mvtec_ad", str(root), str(tmp_path / "lists/screw.csv"))
    folder_train, folder_test = opened("folder", root, tmp_path / "one")
    list_train, list_test = opened("list", tmp_path / "lists/screw.csv", tmp_path / "two")
    for key in ("names", "held_out_names", "fingerprint", "channels", "holdout_rule"):
        assert getattr(list_train, key) == getattr(folder_train, key), key
    for key in ("images", "held_out"):
        np.testing.assert_array_equal(getattr(list_train, key), getattr(folder_train, key))
    assert (list_test.names, list_test.types) == (folder_test.names, folder_test.types)
    for key in ("images", "labels", "masks", "has_pixel_labels", "has_native_labels"):
        np.testing.assert_array_equal(getattr(list_test, key), getattr(folder_test, key))
    for i in range(len(list_test.names)):
        np.testing.assert_array_equal(list_test.native_mask(i), folder_test.native_mask(i))


def test_a_list_is_trained_evaluated_and_predicted(tmp_path, compilation_cache, capsys):
    root = runs.make_folder(tmp_path)
    path = tmp_path / "lists/data.csv"
    assert main.main(["import", "mvtec_ad", str(root / "data"), f"--out={path}"]) == 0
    assert "12 train, 7 test images; defects: 2 crack, 2 dent" in capsys.readouterr().out
    changes = {"data__source": "list", "data__root": path, "method": "pca"}
    words = runs.words(root, **changes)
    workdir = tmp_path / "run"
    assert main.main(["train", f"--workdir={workdir}", *words]) == 0
    assert main.main(["evaluate", f"--workdir={workdir}"]) == 0
    metrics = json.loads((workdir / "eval/metrics.json").read_text())
    assert 0 <= metrics["pixel_auroc"] <= 1 and 0 <= metrics["image_auroc_sum"] <= 1
    out = tmp_path / "out"
    images = root / "data/test/crack"
    assert main.main(["predict", f"--workdir={workdir}", f"--images={images}", f"--out={out}"]) == 0
    assert len((out / "scores.csv").read_text().splitlines()) == 3
