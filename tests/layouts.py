"""Small image folders for the tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines import decode, new_images
from data_pipelines.errors import BadInput


def encode(pixels: np.ndarray, suffix: str = ".png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, Image.registered_extensions()[suffix])
    return buffer.getvalue()


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, path.suffix.lower()))


def category(root: Path, *, train: int = 6, colour: bool = False, seed: int = 0) -> Path:
    """Writes a category in MVTec layout: 24×20 images and two defect types with masks."""
    rng = np.random.default_rng(seed)
    size = (20, 24, 3) if colour else (20, 24)

    def image() -> np.ndarray:
        return rng.integers(0, 256, size, dtype=np.uint8)

    for i in range(train):
        write(root / f"train/good/{i:03d}.png", image())
    for i in range(3):
        write(root / f"test/good/{i:03d}.png", image())
    for defect_type in ("crack", "dent"):
        for i in range(2):
            write(root / f"test/{defect_type}/{i:03d}.png", image())
            mask = np.zeros((20, 24), np.uint8)
            mask[4 : 8 + i, 6:12] = 1 + 200 * i
            write(root / f"ground_truth/{defect_type}/{i:03d}_mask.png", mask)
    return root


def tree(root: Path, *names: str) -> Path:
    """Writes 8×6 images of these names that are neither black nor equal in all pixels."""
    pixels = np.zeros((6, 8), np.uint8)
    pixels[1, 2] = 9
    for name in names:
        write(root / name, pixels)
    return root


def open_images(place: str, shape: tuple[int, int], channels: int, trained=None, setting="auto"):
    """Opens new images as a prediction does; returns names, uint8 (m, h, w, c), and errors."""
    found = new_images.list_images(place)
    values = new_images.common_range(found, setting, trained)
    notes, images, errors = new_images.Notes(values), [], {}
    for image in found:
        try:
            opened = new_images.open_image(image, channels, values)
        except BadInput as error:
            errors[image.name] = str(error)
            continue
        images.append(decode.resize(opened.pixels, shape))
        notes.add(str(image.path), opened._replace(pixels=images[-1]))
    notes.warn()
    return [image.name for image in found], np.array(images), errors
