"""The drawn images: deterministic, varied, and with exact masks."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from data_pipelines import procedural
from data_pipelines.errors import BadInput


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_items_name_the_splits():
    train, test = procedural.training_items("", ""), procedural.test_items("", "weave")
    assert len(train) == 96 and {i.type for i in train} == {"good"}
    counts = {t: sum(i.type == t for i in test) for t in ("good", "spot", "cut", "stretch")}
    assert counts == {"good": 24, "spot": 12, "cut": 12, "stretch": 12}
    for items in (train, test):
        assert len({i.name for i in items}) == len(items)
        assert all((i.mask is None) == (i.type == "good") for i in items)
    assert test[-1].name == "stretch/011.png"


def test_files_are_encoded_lazily_and_repeat():
    item = procedural.test_items("", "")[30]
    again = pickle.loads(pickle.dumps(item))  # worker processes
    assert item.mask is not None and again.mask is not None
    assert item.image() == again.image() and item.mask() == again.mask()
    image, mask = procedural.draw("weave", "test", item.type, int(item.name[-7:-4]))
    np.testing.assert_array_equal(_decode(item.image()), image)
    np.testing.assert_array_equal(_decode(item.mask()) > 0, mask)


def test_normal_images_vary():
    images = {
        procedural.draw(c, s, "good", i)[0].tobytes()
        for c in procedural.PATTERNS
        for s in ("train", "test")
        for i in range(4)
    }
    assert len(images) == 16


@pytest.mark.parametrize("category", procedural.PATTERNS)
@pytest.mark.parametrize("defect", procedural.DEFECTS)
def test_masks_are_exact(category, defect, monkeypatch):
    drawn = [procedural.draw(category, "test", defect, i) for i in range(4)]
    draw_defect = procedural.DEFECTS[defect]

    def unchanged(rng, y, x):
        return np.zeros((2, *y.shape)), lambda colours: colours, draw_defect(rng, y, x)[2]

    monkeypatch.setitem(procedural.DEFECTS, defect, unchanged)
    for i, (image, mask) in enumerate(drawn):
        normal, _ = procedural.draw(category, "test", defect, i)
        changed = (image != normal).any(-1)
        assert not (changed & ~mask).any()
        # A stretch of a hole-free part of the sheet changes nothing, so not all of the mask.
        assert changed.sum() > 0.25 * mask.sum() > 0
        assert 0.001 < mask.mean() < 0.15


def test_unknown_pattern_names_the_known_ones():
    for items in (procedural.training_items, procedural.test_items):
        with pytest.raises(BadInput, match=r"weave, dots, clutter .*'silk'"):
            items("", "silk")
