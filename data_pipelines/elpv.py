"""Source: ELPV, electroluminescence images of solar cells (Buerhop-Lutz 2018, Deitsch 2019).

The package `elpv-dataset` contains the images (2,624 cells, 300 × 300, grey, no masks). A cell
is normal at a defect probability of 0 and defective at 1; cells in between are left out.

The cells of one module are neighbours in the sorted file names and share its exposure, age and
material. A random split would therefore put near-copies of training images into the test set.
So the 588 normal cells are cut into 20 contiguous blocks, four of which are for testing: 470
normal cells for training; 118 normal and 313 defective cells for testing.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item, read_file

DEFECTIVE = "defective"
BLOCKS = 20
TEST_BLOCKS = (0, 3, 12, 15)
# The meaning of holdout_groups="auto": validation holds out whole blocks, never single cells.
HOLDOUT_GROUPS = f"blocks:{BLOCKS - len(TEST_BLOCKS)}"


def training_items(root: str, category: str) -> list[Item]:
    """Returns the normal cells of the training blocks, sorted by file name.

    Args:
      root: a folder with `labels.csv` and `images/`, or "" for the installed package.
      category: "" or "monocrystalline".
    """
    data = _data(root, category)
    blocks = _normal_blocks(data)
    train = [path for i, block in enumerate(blocks) if i not in TEST_BLOCKS for path in block]
    return [_item(path, GOOD) for path in train]


def test_items(root: str, category: str) -> list[Item]:
    """Returns all defective cells and the normal cells of the test blocks, sorted by name."""
    data = _data(root, category)
    blocks = _normal_blocks(data)
    normal = [path for i in TEST_BLOCKS for path in blocks[i]]
    defective = _cells(data, probability=1.0)
    return [_item(p, DEFECTIVE) for p in defective] + [_item(p, GOOD) for p in normal]


def _data(root: str, category: str) -> Path:
    """Returns the folder of `labels.csv`."""
    if category not in ("", "monocrystalline"):
        raise BadInput(f"data.category: ELPV has only monocrystalline here, not {category!r}")
    if root:
        return Path(root)
    # The package is located, not imported, because only its files are needed.
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise BadInput("data.source: elpv needs its images: pip install elpv-dataset")
    return Path(package.submodule_search_locations[0], "data")


def _cells(data: Path, *, probability: float) -> list[Path]:
    """Returns the monocrystalline cells of this defect probability, sorted by file name."""
    labels = data / "labels.csv"
    try:
        rows = [line.split() for line in labels.read_text().splitlines() if line.strip()]
        cells = [
            data / name
            for name, p, cell_type in rows
            if cell_type == "mono" and float(p) == probability
        ]
    except OSError as error:
        raise BadInput(f"{labels}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{labels}: not lines of path, probability and type") from error
    return sorted(cells, key=lambda path: path.name)


def _normal_blocks(data: Path) -> list[list[Path]]:
    normal = _cells(data, probability=0.0)
    if len(normal) < BLOCKS:
        raise BadInput(
            f"{data / 'labels.csv'}: {len(normal)} normal cells, at least {BLOCKS} needed"
        )
    return [[normal[i] for i in block] for block in np.array_split(np.arange(len(normal)), BLOCKS)]


def _item(path: Path, defect_type: str) -> Item:
    name = f"{defect_type}/{path.name}"
    return Item(
        name=name,
        image=functools.partial(read_file, path),
        type=defect_type,
        mask=None,
        origin=str(path),
    )
