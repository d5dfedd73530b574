"""`pae foreground` from masks and without; a run with a suppressed background, from end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import layouts
import pae_jax
import runs
from data_pipelines import foregrounds, procedural
from data_pipelines.errors import BadInput
from data_pipelines.spec import DatasetSpec
from pae_jax import evaluate, predict, train
from pae_jax.config import Config
from pae_jax.deployment import export, pack
from pae_jax.foreground import summary, train_foreground, verb
from pae_jax.main import main
from pae_jax.workdir import suppression, trained_model

SIZE = (20, 24)


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bright part on dark noise, and its mask."""
    mask = np.zeros(SIZE, bool)
    top, left = rng.integers(3, 6, 2)
    mask[top : top + 11, left : left + 13] = True
    noise = rng.integers(0, 60, SIZE)
    return np.where(mask, 160 + noise, noise).astype(np.uint8), mask


def make_images(root: Path, labelled: int = 8) -> Path:
    """Writes a category of such images, with masks of the part for some of them."""
    rng = np.random.default_rng(0)
    for i in range(16):
        image, mask = draw(rng)
        layouts.write(root / f"data/train/good/{i:03d}.png", image)
        if i < labelled:
            name = f"{i:03d}_mask.png" if i % 2 else f"{i:03d}.png"
            layouts.write(root / f"data/foreground/good/{name}", np.uint8(255) * mask)
    for kind in ("good", "crack"):
        for i in range(3):
            image, mask = draw(rng)
            if kind == "crack":
                defect = mask & (np.arange(SIZE[1]) == 11)
                defect[0, 0] = i == 0  # one anomalous pixel of the background
                image[defect] = 90
                layouts.write(
                    root / f"data/ground_truth/crack/{i:03d}_mask.png", np.uint8(255) * defect
                )
            layouts.write(root / f"data/test/{kind}/{i:03d}.png", image)
    for i in range(6):
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        layouts.write(root / f"textures/{i}.png", pixels)
    return root


def load_config(root: Path, **changes: object) -> Config:
    settings = {"foreground__steps": 60, "foreground__size": 16, "foreground__margin": 0.0}
    return runs.load_config(root, **{"train__steps": 10, **settings, **changes})


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """The network of the foreground with a few hundred weights, which compiles quickly."""
    network = dataclasses.replace(
        suppression.NETWORK, patch_size=1, widths=(8,), branch_width=4, dilation_rates=(1,)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suppression, "NETWORK", network)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("part"))


@pytest.fixture(scope="module")
def network(root, compilation_cache) -> Path:
    """A finished workdir of `pae foreground`, trained on the given masks."""
    train_foreground(load_config(root), root / "F")
    return root / "F"


@pytest.fixture(scope="module")
def run(root, network) -> Path:
    """A finished run with a suppressed background."""
    train.train_and_evaluate(load_config(root, data__foreground=network), root / "W")
    return root / "W"


def test_the_network_finds_the_object_of_new_images(network):
    report = json.loads((network / "foreground.json").read_text())
    assert (report["labels"], report["labelled_images"], report["held_out_labels"]) == (
        *("given", 8),
        1,
    )
    assert report["images_without_object"] == 0
    foreground = suppression.read(network, "")
    assert report["fingerprint"] == foreground.fingerprint
    rng = np.random.default_rng(5)
    for image, mask in (draw(rng) for _ in range(4)):
        found = suppression.find(image[..., None], foreground)
        # The network sees 16 × 16 pixels; a border of one pixel is 36 % of the part.
        assert (found & mask).sum() > 0.75 * (found | mask).sum()
        assert (found & mask).sum() > 0.95 * mask.sum()
    # 12 rows of four cells of 16 × 16 pixels.
    with Image.open(network / "sheet.png") as drawn:
        assert drawn.size == (4 * 20 - 4, 12 * 20 - 4)
    assert "8 of 16 training images" in summary(report)


def test_without_masks_the_labels_are_otsus(tmp_path):
    make_images(tmp_path, labelled=0)
    with pytest.raises(BadInput, match=r"^foreground\.labels: given, but no training image"):
        train_foreground(load_config(tmp_path, foreground__labels="given"), tmp_path / "F")
    assert not (tmp_path / "F").exists()
    report = train_foreground(load_config(tmp_path), tmp_path / "F").report
    assert (report["labels"], report["labelled_images"]) == ("otsu", 16)
    assert report["held_out_overlap"] > 0.8


def test_images_without_an_object_need_masks(tmp_path):
    layouts.category(tmp_path / "data")  # noise
    for path in (tmp_path / "data/train/good").iterdir():
        layouts.write(path, np.full((20, 24), 7, np.uint8))
    with pytest.raises(BadInput, match=r"an object differs from the border in only 0 of 6"):
        train_foreground(load_config(tmp_path), tmp_path / "F")


def test_a_finished_network_and_a_run_are_not_overwritten(root, network, run, capsys):
    before = (network / "foreground.npz").read_bytes()
    for workdir in (network, run):
        words = runs.words(root, foreground__steps=1)
        assert main(["foreground", *words, f"--workdir={workdir}"]) == 2
        line = capsys.readouterr().err
        assert "holds a finished network or a run; choose another --workdir" in line
    assert (network / "foreground.npz").read_bytes() == before


def test_other_files_are_not_replaced(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"holds other files \(notes\.txt\); choose another"):
        train_foreground(load_config(root), tmp_path)


def test_images_with_a_mask_are_taken_first(monkeypatch):
    monkeypatch.setattr(verb, "MOST_IMAGES", 4)
    names = [f"{i}" for i in (3, 1, 0, 2, 5, 4)]
    assert [names[i] for i in verb._choose(names, {"4", "1"})] == ["0", "1", "4", "5"]
    assert [names[i] for i in verb._choose(names, {*names})] == ["0", "1", "2", "3"]


def test_a_run_sees_no_background(root, network, run):
    record = json.loads((run / "data.json").read_text())
    foreground = suppression.read(network, "")
    assert record["foreground"] == foreground.fingerprint
    assert (run / "foreground.npz").read_bytes() == (network / "foreground.npz").read_bytes()
    split = trained_model.open_split(run, trained_model.load(run).config)
    for images in (split.images, split.held_out):
        kept = images.any(axis=-1).mean()
        assert 0.2 < kept < 0.5  # the part has 143 of 480 pixels


def test_evaluation_and_prediction_need_the_workdir_alone(root, run, tmp_path):
    copy = runs.clone(runs.Run(root, run), tmp_path)
    shutil.rmtree(copy.root / "F")
    metrics = evaluate.evaluate(copy.workdir).metrics
    # One of the 34 anomalous pixels lies in the corner; resizing may lose or double single pixels.
    assert 0 < metrics["foreground"]["anomalous_pixels_suppressed"] < 0.2
    assert 0.2 < metrics["foreground"]["fraction"] < 0.5
    rng = np.random.default_rng(9)
    image, mask = draw(rng)
    layouts.write(tmp_path / "new/a.png", image)
    layouts.write(
        tmp_path / "new/b.png", np.where(mask, image, rng.integers(0, 60, SIZE)).astype("u1")
    )
    scores = predict.predict(copy.workdir, tmp_path / "new", tmp_path / "out").read_text()
    # The two differ in the noise of the background alone, which changes few pixels of the mask.
    first, second = (line.split(",") for line in scores.splitlines()[1:])
    np.testing.assert_allclose(float(first[1]), float(second[1]), rtol=0.3)


def test_tiles_see_no_background(run):
    """The map is 0 in the background, and nowhere else."""
    image, _ = draw(np.random.default_rng(9))
    tiled = pae_jax.load(run, tile=64)
    found = tiled(image)
    suppressed = suppression.suppress(image[..., None], tiled.trained.foreground)
    background = ~suppressed.any(axis=-1)
    assert 0.5 < background.mean() < 0.8
    assert not found.map[background].any()
    assert found.map[~background].all()


def test_a_packed_model_keeps_the_network_and_an_exported_one_cannot(run, tmp_path):
    packed = pack.pack(run, tmp_path / "packed")
    foreground = trained_model.load(packed).foreground
    assert foreground and foreground.fingerprint == suppression.read(run, "").fingerprint
    with pytest.raises(BadInput, match=r"suppresses the background .*; `pae pack` keeps both$"):
        export.export(run, tmp_path / "program", format="stablehlo")


def test_another_network_is_refused(root, network, run, tmp_path):
    other = tmp_path / "G"
    foreground = suppression.read(network, "")
    other.mkdir()
    suppression.write(other, suppression.encode(foreground.params, foreground.shape, 0.1))
    with pytest.raises(BadInput, match=r"^data\.foreground: .*G is not the foreground network"):
        evaluate.evaluate(run, overrides=[f"--config.data.foreground={other}"])
    with pytest.raises(BadInput, match=r"^data\.foreground: none is not the foreground network"):
        evaluate.evaluate(run, overrides=["--config.data.foreground="])
    with pytest.raises(BadInput, match=r"holds a run on other data: foreground is"):
        train.train_and_evaluate(load_config(root, data__foreground=other), run)
    with pytest.raises(BadInput, match=r"missing/foreground\.npz: no such file"):
        config = load_config(root, data__foreground=tmp_path / "missing")
        train.train_and_evaluate(config, tmp_path / "new")
    moved = shutil.copytree(network, tmp_path / "moved")
    assert trained_model.load(run, [f"--config.data.foreground={moved}"]).foreground
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.copy(other / "foreground.npz", copy)
    with pytest.raises(BadInput, match=r"another foreground network than that of the training"):
        trained_model.load(copy)
    (copy / "foreground.npz").unlink()
    with pytest.raises(BadInput, match=r"no such file.*copy it from the workdir"):
        trained_model.load(copy)


def spec(source: str, root: Path | str, category: str = "") -> DatasetSpec:
    return DatasetSpec(source, str(root), category, SIZE, "auto", "")


def test_masks_of_a_folder(tmp_path, messages):
    make_images(tmp_path, labelled=3)
    names = [f"good/{i:03d}.png" for i in range(16)]
    layouts.write(tmp_path / "data/foreground/good/lost.png", np.ones(SIZE, np.uint8))
    opened = foregrounds.open_foregrounds(spec("folder", tmp_path / "data"), names)
    assert list(opened) == names[:3]
    rng = np.random.default_rng(0)
    for name in names[:3]:
        np.testing.assert_array_equal(opened[name], draw(rng)[1])
        assert opened[name].view(np.uint8).max() == 1
    assert any("1 masks belong to no training image: lost.png" in line for line in messages)
    layouts.write(tmp_path / "data/foreground/good/002.png", np.ones((4, 4), np.uint8))
    with pytest.raises(BadInput, match=r"002\.png: 4×4 pixels, its image is 24×20 pixels$"):
        foregrounds.open_foregrounds(spec("folder", tmp_path / "data"), names)
    layouts.write(tmp_path / "data/foreground/good/002.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(BadInput, match=r"002\.png: marks nothing;"):
        foregrounds.open_foregrounds(spec("folder", tmp_path / "data"), names)


def test_masks_of_a_list(tmp_path):
    make_images(tmp_path, labelled=1)
    lines = ["image,split,type,mask,foreground"]
    lines += [f"data/train/good/{i:03d}.png,train,good,," for i in range(1, 4)]
    lines += ["data/train/good/000.png,holdout,good,,data/foreground/good/000.png"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    names = [f"good/{i:03d}.png" for i in range(4)]
    opened = foregrounds.open_foregrounds(spec("list", tmp_path / "list.csv"), names)
    assert list(opened) == ["good/000.png"]
    np.testing.assert_array_equal(opened[names[0]], draw(np.random.default_rng(0))[1])
    (tmp_path / "data/foreground/good/000.png").unlink()
    with pytest.raises(BadInput, match=r"list\.csv, line 5: no file .*; paths are relative"):
        foregrounds.open_foregrounds(spec("list", tmp_path / "list.csv"), names)


def test_drawn_clutter_has_exact_masks_of_the_part(monkeypatch):
    shape = (procedural.SIZE, procedural.SIZE)
    drawn = spec("procedural", "", "clutter")._replace(shape=shape)
    names = [item.name for item in procedural.training_items("", "clutter")][:3]
    masks = foregrounds.open_foregrounds(drawn, names)
    assert foregrounds.open_foregrounds(spec("procedural", "", "weave"), names) == {}
    images = [procedural.draw("clutter", "train", "good", i)[0] for i in range(3)]

    def grey(rng, split, y, x, scene=procedural.clutter.scene):
        colours, part = scene(rng, split, y, x)
        return np.full_like(colours, 0.5), part

    monkeypatch.setattr(procedural.clutter, "scene", grey)
    for i, name in enumerate(names):
        without = procedural.draw("clutter", "train", "good", i)[0]
        changed = (without != images[i]).any(axis=-1)
        assert not changed[masks[name]].any() and changed[~masks[name]].mean() > 0.9
    for kind in procedural.DEFECTS:
        areas = [procedural.draw("clutter", "test", kind, i)[1].sum() for i in range(12)]
        assert min(areas) > 0
