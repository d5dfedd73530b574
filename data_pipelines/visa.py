"""TFDS builder of VisA, from the extracted archive. `data_pipelines.prepare` runs it."""

import functools
from pathlib import Path

import tensorflow_datasets as tfds

from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item, read_file
from data_pipelines.lists.table import read_csv
from data_pipelines.tfds_builder import OneClassBuilder

CATEGORIES = (
    "candle",
    "capsules",
    "cashew",
    "chewinggum",
    "fryum",
    "macaroni1",
    "macaroni2",
    "pcb1",
    "pcb2",
    "pcb3",
    "pcb4",
    "pipe_fryum",
)
SPLIT_FILE = "split_csv/1cls.csv"  # The official one-class split.
COLUMNS = ("object", "split", "label", "image", "mask")
_TYPES = {"normal": GOOD, "anomaly": "anomaly"}


class Visa(OneClassBuilder):
    """VisA: twelve objects in colour, with pixel masks and one defect type, "anomaly"."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CATEGORIES]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Download the archive from the home page and extract it. The manual directory holds
    CATEGORY/Data/Images/{Normal,Anomaly}, CATEGORY/Data/Masks/Anomaly and split_csv/1cls.csv.
    """
    HOMEPAGE = "https://github.com/amazon-science/spot-diff"
    CITATION = """
    @inproceedings{zou2022spot,
      author = {Yang Zou and Jongheon Jeong and Latha Pemula and Dongqing Zhang and Onkar Dabeer},
      title = {{SPot-the-Difference} Self-Supervised Pre-training for Anomaly Detection and
               Segmentation},
      booktitle = {European Conference on Computer Vision}, year = {2022}
    }"""

    def items(self, root: str, category: str) -> dict[str, list[Item]]:
        """Returns the items of "train" and "test" by the official split file."""
        splits = {"train": [], "test": []}
        for number, row in read_csv(Path(root, SPLIT_FILE), COLUMNS):
            if row["object"] == category:
                where = f"{Path(root, SPLIT_FILE)}, line {number}"
                if row["split"] not in splits or row["label"] not in _TYPES:
                    raise BadInput(f"{where}: split {row['split']!r}, label {row['label']!r}")
                if row["split"] == "train" and row["label"] != "normal":
                    raise BadInput(f"{where}: an anomaly in the training split")
                splits[row["split"]].append(_item(Path(root), row))
        for split, items in splits.items():
            if not items:
                raise BadInput(f"{Path(root, SPLIT_FILE)}: no {split} images of {category}")
        return splits


def _item(root: Path, row: dict[str, str]) -> Item:
    image = root / row["image"]
    defect_type = _TYPES[row["label"]]
    return Item(
        name=f"{defect_type}/{image.name}",
        image=functools.partial(read_file, image),
        type=defect_type,
        mask=functools.partial(read_file, root / row["mask"]) if row["mask"] else None,
        origin=str(image),
    )
