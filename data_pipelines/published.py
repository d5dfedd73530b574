"""The number of images and textures of a run, counted or from publications, without decoding.

It serves estimates of memory on a machine that does not have the data.
"""

import importlib
from pathlib import Path

from data_pipelines import patterns, textures
from data_pipelines.dataset import SOURCES
from data_pipelines.errors import BadInput
from data_pipelines.folder import image_files
from data_pipelines.spec import DatasetSpec

# Normal training images by category: MVTec AD (Bergmann et al. 2021, table 1) and the one-class
# split of VisA (Zou et al. 2022).
TRAINING_IMAGES = {
    "bottle": 209,
    "cable": 224,
    "capsule": 219,
    "carpet": 280,
    "grid": 264,
    "hazelnut": 391,
    "leather": 245,
    "metal_nut": 220,
    "pill": 267,
    "screw": 320,
    "tile": 230,
    "toothbrush": 60,
    "transistor": 213,
    "wood": 247,
    "zipper": 240,
    "candle": 900,
    "capsules": 542,
    "cashew": 450,
    "chewinggum": 453,
    "fryum": 450,
    "macaroni1": 900,
    "macaroni2": 900,
    "pcb1": 904,
    "pcb2": 901,
    "pcb3": 905,
    "pcb4": 904,
    "pipe_fryum": 450,
}
DTD_IMAGES = 5_640  # Cimpoi et al. 2014


def count_images(spec: DatasetSpec) -> int | None:
    """Returns the number of training images, held-out ones included; None if it is not known."""
    source = importlib.import_module(SOURCES[spec.source])
    try:
        return len(source.training_items(spec.root, spec.category))
    except BadInput:  # the data are not here
        return TRAINING_IMAGES.get(spec.category.rpartition("/")[2])


def count_textures(name: str) -> int | None:
    """Returns the number of textures of a source, held-out ones included; None if not known."""
    if name == "builtin":
        return textures.PER_FAMILY * (len(textures.PHOTOGRAPHS) + len(patterns.FAMILIES))
    if name.startswith("tfds:"):
        return DTD_IMAGES
    try:
        return len(image_files(Path(name)))
    except BadInput:
        return None
