"""ELPV: the split by position, on made-up labels and on the package where it is installed."""

import importlib.util

import numpy as np
import pytest

from data_pipelines import elpv
from data_pipelines.errors import BadInput
from data_pipelines.holdout import groups, held_out
from data_pipelines.items import GOOD


@pytest.fixture
def root(tmp_path):
    """60 cells: every third defective or uncertain, and polycrystalline ones that do not count."""
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(60):
        probability = (0.0, 0.0, 1.0 if i % 2 else 0.3333333333333333)[i % 3]
        lines.append(f"images/cell{i:04d}.png  {probability}  mono")
        lines.append(f"images/cell{i + 60:04d}.png  0.0  poly")
        (tmp_path / f"images/cell{i:04d}.png").write_bytes(b"cell %d" % i)
    (tmp_path / "labels.csv").write_text("\n".join(lines[::-1]) + "\n")
    return tmp_path


def test_split_by_contiguous_blocks(root):
    normal = [f"good/cell{i:04d}.png" for i in range(60) if i % 3 < 2]  # 40: blocks of two
    expected_test = [name for b in (0, 3, 12, 15) for name in normal[2 * b : 2 * b + 2]]
    train = elpv.training_items(str(root), "")
    test = elpv.test_items(str(root), "monocrystalline")
    assert [item.name for item in train] == [n for n in normal if n not in expected_test]
    assert [item.name for item in test if item.type == GOOD] == expected_test
    defective = [f"defective/cell{i:04d}.png" for i in range(60) if i % 3 == 2 and i % 2]
    assert [item.name for item in test if item.type == elpv.DEFECTIVE] == defective
    assert all(item.mask is None for item in train + test)
    assert train[0].image() == b"cell 3"
    assert train[0].origin == str(root / "images/cell0003.png")


def test_bad_input(root, tmp_path):
    with pytest.raises(BadInput, match=r"^data\.category: .*'poly'"):
        elpv.training_items(str(root), "poly")
    with pytest.raises(BadInput, match=r"nowhere/labels\.csv: No such file"):
        elpv.training_items(str(tmp_path / "nowhere"), "")
    (root / "labels.csv").write_text("images/cell0000.png 0.0 mono\n")
    with pytest.raises(BadInput, match=r"labels\.csv: 1 normal cells, at least 20 needed"):
        elpv.training_items(str(root), "")
    (root / "labels.csv").write_text("path,probability,type\n")
    with pytest.raises(BadInput, match=r"labels\.csv: not lines of path, probability and type"):
        elpv.training_items(str(root), "")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install elpv-dataset"):
        elpv.training_items("", "")


@pytest.mark.skipif(
    importlib.util.find_spec("elpv_dataset") is None, reason="needs the package elpv-dataset"
)
def test_the_package():
    train, test = elpv.training_items("", ""), elpv.test_items("", "")
    counts = {kind: sum(item.type == kind for item in test) for kind in (GOOD, elpv.DEFECTIVE)}
    assert len(train) == 470
    assert counts == {GOOD: 118, elpv.DEFECTIVE: 313}
    assert train[0].image().startswith(b"\x89PNG")

    names = [item.name for item in train]
    everything = sorted(names + [item.name for item in test if item.type == GOOD])
    position = {name: i for i, name in enumerate(everything)}
    block = np.concatenate([[i] * len(b) for i, b in enumerate(np.array_split(everything, 20))])
    # Each group of the validation is one whole block of training cells.
    group_blocks = [
        {int(block[position[name]]) for name in group}
        for group in groups(names, elpv.HOLDOUT_GROUPS)
    ]
    assert group_blocks == [{i} for i in range(20) if i not in (0, 3, 12, 15)]
    drawn = held_out(names, elpv.HOLDOUT_GROUPS, fraction=0.05, seed=0)
    assert len({block[position[name]] for name in drawn}) == 1
    assert len(drawn) in (29, 30)
