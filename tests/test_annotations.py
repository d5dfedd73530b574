"""Importers of annotations: COCO JSON and the JSON export of Label Studio; masks are drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import BadInput
from data_pipelines.importers import IMPORTERS, Options, import_list
from data_pipelines.importers.label_studio import decode_rle
from data_pipelines.lists.list_file import Row, read_list
from layouts import tree

# pycocotools 2.0.11 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SQUARE = np.zeros((6, 8), bool)
SQUARE[1:4, 2:6] = True


def coco(root: Path, annotations: list[dict], count: int = 4) -> Path:
    images = [{"id": 10 + i, "file_name": f"{i}.png"} for i in range(count)]
    for image in images:
        tree(root, f"images/{image['file_name']}")
        image |= {"height": 6, "width": 8}
    records = [{"id": i, "iscrowd": 0, **record} for i, record in enumerate(annotations)]
    categories = [{"id": 1, "name": "crack"}, {"id": 2, "name": "in/out"}]
    data = {"images": images, "annotations": records, "categories": categories}
    path = root / "annotations/instances.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def drawn(row: Row) -> np.ndarray:
    """Returns the mask of a row of a list that was written."""
    (path,) = row.masks
    pixels = np.asarray(Image.open(path))
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels > 0


POLYGON = [[2, 1, 6, 1, 6, 4, 2, 4]]
# Runs along the columns: 13 pixels before, three of every column and three between, 16 after.
COUNTS = [13, 3, 3, 3, 3, 3, 3, 3, 14]


@pytest.mark.parametrize(
    "segmentation", [POLYGON, {"size": [6, 8], "counts": COUNTS}, "compressed"], ids=str
)
def test_coco(tmp_path, segmentation):
    coco_mask = pytest.importorskip("pycocotools.mask")
    if segmentation == "compressed":
        segmentation = coco_mask.encode(np.asfortranarray(SQUARE.astype(np.uint8)))
        segmentation["counts"] = segmentation["counts"].decode()
    dot = [[0, 0, 1, 0, 1, 1, 0, 1]]
    path = coco(
        tmp_path / "data",
        [
            {"image_id": 11, "category_id": 2, "segmentation": segmentation},
            {"image_id": 11, "category_id": 1, "segmentation": dot},
            {"image_id": 12, "category_id": 1, "segmentation": segmentation},
        ],
    )
    out = tmp_path / "lists/parts.csv"
    assert "1 train, 3 test images; defects: 1 crack, 1 crack+in_out" in import_list(
        "coco", str(path), str(out), Options(test_fraction=0.5)
    )
    rows = {row.image.name: row for row in read_list(out)}
    assert sorted(rows) == ["0.png", "1.png", "2.png", "3.png"]
    assert {rows["0.png"].split, rows["3.png"].split} == {"train", "test"}
    assert rows["2.png"].masks == (tmp_path / "lists/masks/parts/2.png.png",)
    np.testing.assert_array_equal(drawn(rows["2.png"]), SQUARE)
    both = SQUARE.copy()
    both[0, 0] = True
    np.testing.assert_array_equal(drawn(rows["1.png"]), both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": []}, "annotation 0: no segmentation; only polygons and RLE"),
        ({"segmentation": [[0, 0, 1, 1]]}, "annotation 0: a polygon needs"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "annotation 0: not polygons or RLE"),
        ({"segmentation": {"size": [6, 8], "counts": [99]}}, r"\(RLE of 99 pixels\)"),
        ({"segmentation": {"size": [6, 8]}}, r"annotation 0: not .* \(no 'counts'\)"),
        ({"image_id": 99}, "annotation 0: no image 99"),
        ({"category_id": 99}, r"instances\.json: not COCO JSON .*\(no 99\)"),
    ],
)
def test_bad_coco(tmp_path, change, message):
    pytest.importorskip("pycocotools.mask")
    path = coco(tmp_path, [{"image_id": 10, "category_id": 1, "segmentation": POLYGON, **change}])
    with pytest.raises(BadInput, match=message):
        IMPORTERS["coco"](path, Options())


def test_annotations_without_images_or_of_another_form(tmp_path):
    path = coco(tmp_path, [])
    (tmp_path / "images/0.png").unlink()
    with pytest.raises(BadInput, match=r"instances\.json: image 0\.png in none of "):
        IMPORTERS["coco"](path, Options())
    with pytest.raises(BadInput, match=r": 0 JSON files; name the file"):
        IMPORTERS["coco"](tmp_path, Options())
    for name, message in (("coco", "not COCO JSON"), ("label_studio", "not an array of tasks")):
        path.write_text("{}")
        with pytest.raises(BadInput, match=message):
            IMPORTERS[name](path.parent, Options())
        path.write_text("{")
        with pytest.raises(BadInput, match=r"instances\.json: not a JSON file"):
            IMPORTERS[name](path, Options())


def test_the_code_of_label_studio():
    # The example of its own converter's tests.
    code = [0, 0, 0, 18, 57, 27, 252, 96, 32, 1, 0, 6, 0, 40, 0, 192, 3, 128, 17, 56, 32]
    values = [1, 1, 1, 1, 2, 3, 5, 6, 7, 8, 4, 4, 4, 4, 4, 4, 4, 4]
    assert decode_rle(bytes(code), 18).tolist() == values
    with pytest.raises(ValueError, match="ends too early"):
        decode_rle(bytes(code[:-4]), 18)
    with pytest.raises(ValueError, match="18 values where 20 are needed"):
        decode_rle(bytes(code), 20)


def brush_code(mask: np.ndarray) -> list[int]:
    """Encodes a mask as a brush: 8 bits per value, each block one run of up to 2¹⁶ values."""
    values = np.repeat(mask.ravel() * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    ends = [*(np.flatnonzero(np.diff(values)) + 1), len(values)]
    for start, end in zip([0, *ends], ends, strict=False):
        bits += f"111{end - start - 1:016b}{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


def brush(label: str, mask: np.ndarray = SQUARE, **changes: object) -> dict:
    value = {"format": "rle", "rle": brush_code(mask), "brushlabels": [label]}
    size = {"original_height": 6, "original_width": 8, "image_rotation": 0}
    return {"type": "brushlabels", "value": value, **size, **changes}


def task(number: int, image: str, *results: dict, **changes: object) -> dict:
    annotation = {"result": list(results), "was_cancelled": False, **changes}
    return {"id": number, "data": {"note": "text", "image": image}, "annotations": [annotation]}


def export(root: Path, *tasks: dict) -> Path:
    path = root / "project-1.json"
    path.write_text(json.dumps(tasks))
    return path


def test_label_studio(tmp_path, messages):
    root = tree(
        tmp_path / "data", "a b.png", "images/b.png", "deep/c.png", "d.png", "e.png", "f.png"
    )
    choice = {"type": "choices", "value": {"choices": ["dirty"]}}
    good = {"type": "choices", "value": {"choices": ["Good"]}}
    corner = np.zeros_like(SQUARE)
    corner[5, 7] = True
    labels = brush("", corner)
    labels["value"]["labels"] = [labels["value"].pop("brushlabels") and "dent"]
    tasks = [
        task(1, "/data/upload/1/0a1b2c3d-a%20b.png", brush("crack"), brush("dent", corner)),
        task(2, "https://example.com/x/b.png"),
        task(3, "/data/local-files/?d=deep/c.png", choice),
        task(4, "d.png", good),
        task(5, "e.png", was_cancelled=True),
        task(6, "f.png"),
    ]
    tasks[5]["annotations"].append({"result": [labels], "ground_truth": True})
    out = tmp_path / "l.jsonl"
    export(root, *tasks)
    text = import_list("label_studio", str(root), str(out), Options(test_fraction=0.5))
    assert "1 train, 4 test images; defects: 1 crack+dent, 1 dent, 1 dirty" in text
    rows = {row.image.relative_to(root).as_posix(): row for row in read_list(out)}
    assert sorted(rows) == ["a b.png", "d.png", "deep/c.png", "f.png", "images/b.png"]
    assert {rows["d.png"].split, rows["images/b.png"].split} == {"train", "test"}
    assert rows["deep/c.png"][2:4] == ("dirty", ())
    np.testing.assert_array_equal(drawn(rows["a b.png"]), SQUARE | corner)
    np.testing.assert_array_equal(drawn(rows["f.png"]), corner)
    assert any("1 tasks without an annotation are left out" in line for line in messages)
    assert any("1 tasks with several annotations" in line for line in messages)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"image": "a.png", "id": 1}], r"task 1: not a task of the JSON export .*annotations"),
        ([7], "task 0: not a task"),
        ([task(1, "x.png")], r"task 1: image x\.png is neither in"),
        ([task(1, "text")], "task 1: names no image"),
        ([task(1, "a.png", brush("c", original_width=9))], r"task 1: .*values where 216 are"),
        ([task(1, "a.png", brush("c", image_rotation=90))], "task 1: a mask of a rotated image"),
        (
            [task(1, "a.png", {"type": "rectanglelabels", "value": {"x": 1}})],
            "task 1: a region of type rectanglelabels; export it as COCO",
        ),
    ],
)
def test_bad_label_studio(tmp_path, tasks, message):
    tree(tmp_path, "a.png")
    with pytest.raises(BadInput, match=message):
        IMPORTERS["label_studio"](export(tmp_path, *tasks), Options())
