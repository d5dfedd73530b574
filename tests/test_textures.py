"""Texture sources: held-out images are disjoint, and nothing is decoded or drawn twice."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import decode, holdout, patterns, textures
from data_pipelines.cache import content_key
from data_pipelines.errors import BadInput
from data_pipelines.rows import Rows
from layouts import write

SIZE = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def builtin(cache):
    return textures.open_textures("builtin", size=SIZE, cache_dir=cache, seed=0)


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


def _tree(root, count=10, side=SIZE):
    """Writes grey, RGB and palette images of several shapes, one to three folders deep."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = root / ("", "striped", "zigzagged/rotated")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 256, (side, side + 4 * i, 3), np.uint8)
        image = Image.fromarray(values if i % 2 else values[..., 0])
        (image.convert("P") if i == 3 else image).save(path)
    return root


def test_builtin_is_large_and_varied(builtin):
    both = np.concatenate([builtin.train, builtin.held_out])
    assert both.dtype == np.uint8 and both.shape[1:] == (SIZE, SIZE, 3) and len(both) >= 200
    grey = (both == both[..., :1]).all((1, 2, 3))
    assert 0.25 < grey.mean() < 0.75
    assert len({image.tobytes() for image in both}) > 0.99 * len(both)
    assert 0.05 < len(builtin.held_out) / len(both) < 0.2
    assert all(textures._photograph_path(name).is_file() for name in textures.PHOTOGRAPHS)


@pytest.mark.parametrize("seed", range(3))
def test_builtin_holds_out_whole_families(seed, cache):
    opened = textures.open_textures("builtin", size=SIZE, cache_dir=cache, seed=seed)
    held = np.asarray(opened.held_out).reshape(-1, textures.PER_FAMILY, SIZE, SIZE, 3)
    seen = {image.tobytes() for image in opened.train}
    source = textures._builtin()
    every = np.stack([source.row(i, SIZE) for i in range(len(source.families))])
    every = every.reshape(-1, textures.PER_FAMILY, SIZE, SIZE, 3)
    whole = [any(np.array_equal(group, h) for h in held) for group in every]
    assert sum(whole) == len(held) >= 1
    assert not any(image.tobytes() in seen for group in held for image in group)


def test_builtin_is_drawn_once_and_divided_by_seed(builtin, cache, monkeypatch):
    other = textures.open_textures("builtin", size=SIZE, cache_dir=cache, seed=1)
    textures._open.cache_clear()

    def fail(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(patterns, "draw", fail)
    monkeypatch.setattr(textures, "_crop", fail)
    again = textures.open_textures("builtin", size=SIZE, cache_dir=cache, seed=0)
    np.testing.assert_array_equal(again.train, builtin.train)
    np.testing.assert_array_equal(again.held_out, builtin.held_out)
    assert again.fingerprint == builtin.fingerprint
    assert other.fingerprint != builtin.fingerprint
    assert not np.array_equal(other.held_out, builtin.held_out)


@pytest.mark.parametrize("family", patterns.FAMILIES)
def test_patterns_fill_the_range_and_differ(family):
    images = [patterns.draw(family, i, 32) for i in range(4)]
    for i, image in enumerate(images):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert image.std() > 10
        np.testing.assert_array_equal(image, patterns.draw(family, i, 32))
        assert (image == image[..., :1]).all() == (i % 2 == 1)
    assert len({image.tobytes() for image in images}) == 4


def test_folder_of_any_depth_is_cropped_to_its_centre(tmp_path):
    root = _tree(tmp_path / "dtd")
    opened = textures.open_textures(str(root), size=SIZE, cache_dir=str(tmp_path / "c"), seed=0)
    assert opened.train.shape == (9, SIZE, SIZE, 3) and opened.held_out.shape == (1, SIZE, SIZE, 3)
    # The short side has the requested size already, so the crop is a plain slice.
    expected = set()
    for path in root.rglob("*.png"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        left = (pixels.shape[1] - SIZE) // 2
        expected.add(pixels[:, left : left + SIZE].tobytes())
    assert {image.tobytes() for image in [*opened.train, *opened.held_out]} == expected


def test_folder_resizes_by_the_short_side(tmp_path):
    # Columns 30–59 white: a square crop of the middle third is white throughout.
    wide = np.zeros((30, 90), np.uint8)
    wide[:, 30:60] = 255
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(_png(wide if i else wide.T.copy()))
    opened = textures.open_textures(str(tmp_path), size=10, cache_dir=str(tmp_path / "c"), seed=0)
    for image in (opened.train[0], opened.held_out[0]):
        assert (image[1:-1, 1:-1] == 255).all() and image.min() > 200


def test_folder_follows_its_content_and_its_seed(tmp_path):
    root, cache = _tree(tmp_path / "t"), str(tmp_path / "c")

    def fingerprint(**changes):
        options = {"size": SIZE, "cache_dir": cache, "seed": 0} | changes
        return textures.open_textures(str(root), **options).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    assert len({fingerprint(seed=s) for s in range(8)}) > 2
    assert fingerprint(size=SIZE + 1) != first
    (root / "0.png").write_bytes(_png(np.full((SIZE, SIZE), 7, np.uint8)))
    assert fingerprint() != first


def test_bad_folders_are_named(tmp_path):
    def error(path):
        with pytest.raises(BadInput) as caught:
            textures.open_textures(str(path), size=SIZE, cache_dir=str(tmp_path / "c"), seed=0)
        return str(caught.value)

    assert "missing" in error(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "empty" in error(tmp_path / "empty")
    alone = _tree(tmp_path / "alone", count=1)
    assert "alone" in error(alone) and "two" in error(alone)
    broken = _tree(tmp_path / "broken")
    (broken / "notes.png").write_text("not an image")
    assert "notes.png" in error(broken)


def test_all_seeds_and_fractions_share_one_file_in_the_order_of_the_source(tmp_path):
    root, cache = _tree(tmp_path / "patterns", count=20), tmp_path / "c"
    source = textures._folder(str(root))
    shown = [source.row(i, SIZE) for i in range(20)]
    for seed, fraction in ((0, 0.3), (1, 0.3), (2, 0.3), (2, 0.1)):
        opened = textures.open_textures(
            str(root), size=SIZE, cache_dir=str(cache), seed=seed, holdout_fraction=fraction
        )
        textures._open.cache_clear()  # as in another process
        held_out_names = holdout.held_out(
            sorted(source.families), "none", fraction=fraction, seed=seed
        )
        is_held_out = [name in held_out_names for name in source.families]
        assert 0 < sum(is_held_out) < 20
        for part, chosen in ((opened.train, False), (opened.held_out, True)):
            expected = [row for row, held in zip(shown, is_held_out, strict=True) if held is chosen]
            np.testing.assert_array_equal(part, expected)
        # The fingerprints are those of the files in the source's order.
        content = content_key("textures", SIZE, source.digests)
        assert opened.fingerprint == content_key(content, is_held_out)
        # As older runs recorded it.
        content = content_key("textures", decode.VERSION, SIZE, source.digests)
        assert opened.earlier_fingerprint == content_key(content, is_held_out)
    (file,) = cache.glob("*.npy")
    np.testing.assert_array_equal(np.load(file), shown)


def test_textures_stay_in_the_file_until_they_are_read(builtin):
    for part in builtin[:2]:
        assert isinstance(part._array.base, np.memmap)
        assert part.nbytes == len(part) * SIZE * SIZE * 3 == np.asarray(part).nbytes


def test_rows_are_read_like_an_array():
    array = np.random.default_rng(0).integers(0, 256, (7, 3, 2), np.uint8)
    index = np.array([5, 0, 3])
    part, expected = Rows(array, index), array[index]
    assert (len(part), part.shape, part.dtype) == (3, expected.shape, np.uint8)
    np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(np.concatenate([part, part]), np.concatenate([expected] * 2))
    assert np.asarray(part, np.float32).dtype == np.float32
    keys = (0, -1, slice(1, None), [2, 2, 0], np.array([[0, 1], [2, 0]]))
    for key in (*keys, (slice(None), 1), (1, slice(1, 3), 0), (np.array([[0, 1]]), 2)):
        np.testing.assert_array_equal(part[key], expected[key])
    assert [row.tolist() for row in part] == expected.tolist()
    with pytest.raises(IndexError):
        part[3]


def test_one_process_opens_a_source_once_until_a_file_changes(tmp_path):
    root, options = _tree(tmp_path / "patterns"), {"size": SIZE, "cache_dir": str(tmp_path / "c")}
    first = textures.open_textures(str(root), seed=0, **options)
    for seed in (0, 1):
        again = textures.open_textures(str(root), seed=seed, **options)
        assert again.train._array is first.train._array
    write(root / "0.png", np.full((SIZE, SIZE, 3), 7, np.uint8))
    changed = textures.open_textures(str(root), seed=0, **options)
    assert changed.fingerprint != first.fingerprint
    images = [*changed.train, *changed.held_out]
    assert sum((image == 7).all() for image in images) == 1
    (root / "0.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"0\.png"):
        textures.open_textures(str(root), seed=0, **options)


def test_dtd_is_read_from_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, SIZE, SIZE, 3), np.uint8)

    class Dtd(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = {
                "file_name": tfds.features.Text(),
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            splits = {"train": (0, 1), "validation": (2, 3), "test": (4, 5)}
            return {name: self._generate_examples(i) for name, i in splits.items()}

        def _generate_examples(self, indices):
            for i in indices:
                name = f"banded/{i}.png"
                yield name, {"file_name": name, "image": _png(images[i]), "label": 0}

    def open_dtd(data_dir):
        return textures.open_textures(
            f"tfds:{data_dir}", size=SIZE, cache_dir=str(tmp_path / "c"), seed=0
        )

    with pytest.raises(BadInput, match="tfds build dtd"):
        open_dtd(tmp_path)
    Dtd(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    opened = open_dtd(tmp_path)
    assert len(opened.held_out) == 1
    read = {image.tobytes() for image in [*opened.train, *opened.held_out]}
    assert read == {image.tobytes() for image in images}

    assert "tensorflow" not in sys.modules

    moved = shutil.copytree(tmp_path / "dtd", tmp_path / "other" / "dtd")
    info = moved / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(BadInput, match=r"as tfrecord.*array_record"):
        open_dtd(tmp_path / "other")


def test_tfds_is_imported_late():
    code = "import sys, data_pipelines.textures; sys.exit('tensorflow_datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
