"""ELPV: electroluminescence photographs of solar cells (Buerhop-Lutz 2018, Deitsch 2019).

The images come with the package `elpv-dataset` (2,624 cells, 300 × 300, grey, no masks).
Normal is a defect probability of 0, defective one of 1; the cells between are left out.

The cells of one module stand next to each other in the sorted file names and share its
exposure, its age and its material, so a random split would put near-copies of the training
images into the test. The 588 normal cells are therefore cut into 20 contiguous blocks, of
which four are for testing: 470 cells to learn from; 118 normal and 313 defective to judge.
"""

import importlib.util
from pathlib import Path

import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item

DEFECTIVE = "defective"
BLOCKS = 20
TEST_BLOCKS = (0, 3, 12, 15)
# What groups="auto" stands for: validation holds out the same blocks, never single cells.
GROUPS = f"blocks:{BLOCKS - len(TEST_BLOCKS)}"


def training_items(root: str, category: str) -> list[Item]:
    """The normal cells of the training blocks, sorted by file name.

    Args:
      root: a folder with `labels.csv` and `images/`, or "" for the installed package.
      category: "" or "monocrystalline".
    """
    data = _data(root, category)
    blocks = _normal_blocks(data)
    train = [path for i, block in enumerate(blocks) if i not in TEST_BLOCKS for path in block]
    return [_item(path, GOOD) for path in train]


def test_items(root: str, category: str) -> list[Item]:
    """The normal cells of the test blocks and all defective cells, sorted by name."""
    data = _data(root, category)
    blocks = _normal_blocks(data)
    normal = [path for i in TEST_BLOCKS for path in blocks[i]]
    defective = _cells(data, probability=1.0)
    return [_item(p, DEFECTIVE) for p in defective] + [_item(p, GOOD) for p in normal]


def _data(root: str, category: str) -> Path:
    if category not in ("", "monocrystalline"):
        raise BadInput(f"data.category: ELPV has only monocrystalline here, not {category!r}")
    if root:
        return Path(root)
    # Found, not imported: only the files of the package are needed.
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise BadInput("data.source: elpv needs its images: pip install elpv-dataset")
    return Path(package.submodule_search_locations[0], "data")


def _cells(data: Path, *, probability: float) -> list[Path]:
    """Monocrystalline cells of this defect probability, sorted by file name."""
    labels = data / "labels.csv"
    try:
        rows = [line.split() for line in labels.read_text().splitlines() if line.strip()]
        found = [
            data / name for name, p, kind in rows if kind == "mono" and float(p) == probability
        ]
    except OSError as error:
        raise BadInput(f"{labels}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{labels}: not lines of path, probability and type") from error
    return sorted(found, key=lambda path: path.name)


def _normal_blocks(data: Path) -> list[list[Path]]:
    normal = _cells(data, probability=0.0)
    if len(normal) < BLOCKS:
        raise BadInput(
            f"{data / 'labels.csv'}: {len(normal)} normal cells, at least {BLOCKS} needed"
        )
    return [[normal[i] for i in block] for block in np.array_split(np.arange(len(normal)), BLOCKS)]


def _item(path: Path, kind: str) -> Item:
    name = f"{kind}/{path.name}"
    return Item(name=name, image=path.read_bytes, type=kind, mask=None, origin=str(path))
