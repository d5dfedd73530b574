"""`pae judge`: the exact numbers through the command, our own maps, and every refusal."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import layouts
import runs
from pae_jax import evaluate, main
from pae_jax.metrics import legacy

OFFICIAL = "data/test"  # CATEGORY/test below the folder of maps


def picture(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Returns a grey image that is not constant and takes little space."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return ((rows + (1 + seed) * columns) % 251).astype(np.uint8)


def write_data(root: Path, masks: dict[str, np.ndarray]) -> Path:
    """Writes test images ROOT/data of the masks' sizes, by TYPE/NAME, and the masks."""
    for i, (name, mask) in enumerate(masks.items()):
        layouts.write(root / f"data/test/{name}.png", picture(mask.shape, i))
        if not name.startswith("good/"):
            levels = (255 * (mask != 0)).astype(np.uint8)
            layouts.write(root / f"data/ground_truth/{name}_mask.png", levels)
    return root / "data"


def write_maps(folder: Path, maps: dict[str, np.ndarray], suffix: str = ".tiff") -> Path:
    for name, values in maps.items():
        path = folder / OFFICIAL / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(path, values)
        elif suffix == ".png":
            Image.fromarray(values).save(path)
        else:
            tifffile.imwrite(path, values)
    return folder


def write_scores(path: Path, scores: dict[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["name,score", *(f"{name}.png,{score!r}" for name, score in scores.items())]
    path.write_text("\n".join(lines) + "\n")


def judge(root: Path, maps: Path, out: Path | None = None, *words: str) -> int:
    """Runs the command on ROOT/data at 16×16 pixels, without intervals."""
    settings = (f"data.root={root / 'data'}", "data.size=16", "eval.bootstrap_resamples=0")
    overrides = [f"--config.{setting}" for setting in (*settings, *words)]
    places = [f"--maps={maps}", *([f"--out={out}"] if out else [])]
    return main.main(["judge", "--config=folder", *places, *overrides])


def judged(root: Path, maps: Path, out: Path, *words: str) -> dict:
    assert judge(root, maps, out, *words) == 0
    return json.loads((out / "metrics.json").read_text())


# --- values from the tests of other implementations ------------------------------------------

RAMP = (np.arange(2800) / 2800).reshape(400, 7)
ONE, THREE = (np.tile(row, (400, 1)) for row in ([0, 0, 0, 1, 0, 0, 0], [0, 1] * 3 + [0]))


@pytest.mark.parametrize("suffix", [".tiff", ".npy"])
def test_aupro_of_a_ramp(tmp_path, suffix):
    cases = {"one": (ONE,), "three": (THREE,), "both": (ONE, THREE)}
    expected = {"one": 0.1666656, "three": 0.1666661, "both": 0.1666660}
    for case, masks in cases.items():
        root = tmp_path / case
        names = [f"cut/{i}" for i in range(len(masks))]
        write_data(root, dict(zip(names, masks, strict=True)))
        maps = write_maps(root / "maps", dict.fromkeys(names, RAMP), suffix)
        record = judged(root, maps, root / "out", f"eval.aupro_limit={1 / 3}")
        assert record["pixel_aupro"] == pytest.approx(expected[case], abs=1e-7)
        assert record["evaluated_at"]["size"] == "native"


def test_aupro_of_the_extremes(tmp_path):
    mask = np.zeros((20, 20))
    mask[3:9, 4:17] = 1
    masks = {"good/0": np.zeros((20, 20)), "cut/0": mask, "diagonal/0": np.eye(20)}
    write_data(tmp_path, masks)
    for name, change, aupro in (
        ("mask", lambda m: m, 1),
        ("inverse", lambda m: -m, 0),
        ("constant", lambda m: 0 * m + 0.5, 0.15),
    ):
        changed = {key: change(m).astype(np.float32) for key, m in masks.items()}
        record = judged(tmp_path, write_maps(tmp_path / name, changed), tmp_path / f"{name}-out")
        assert record["pixel_aupro"] == pytest.approx(aupro, abs=1e-12)
        assert record["per_type"]["cut"]["pixel_aupro"] == pytest.approx(aupro, abs=1e-12)
    # The diagonal is one region, so both types weigh alike.
    partial = {key: m * (key == "cut/0") for key, m in masks.items()}
    record = judged(tmp_path, write_maps(tmp_path / "partial", partial), tmp_path / "partial-out")
    assert record["pixel_aupro"] == pytest.approx((1 + 0.15) / 2, abs=0.002)


# Labels, scores, and the values of the three metrics that the case states.
IMAGES = {
    "distinct": ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], {"auroc": 0.75, "ap": 0.8333333}),
    "tied": (
        [0, 0, 1, 1, 1, 0],
        [0.2, 0.5, 0.5, 0.5, 0.9, 0.9],
        {"auroc": 0.6111111, "ap": 0.5666667},
    ),
    "separable": ([0, 1, 1, 1], [0.1, 0.5, 0.9, 1.0], {"f1_max": 1.0}),
    "missed": ([0, 1, 1, 1], [0.1, 0.5, 0.9, 0.1], {"f1_max": 6 / 7}),
}


@pytest.mark.parametrize("case", IMAGES)
def test_image_scores(tmp_path, case):
    labels, scores, expected = IMAGES[case]
    names = [f"{'cut' if label else 'good'}/{i}" for i, label in enumerate(labels)]
    mask = np.ones((6, 7))
    write_data(tmp_path, {name: mask * label for name, label in zip(names, labels, strict=True)})
    maps = write_maps(tmp_path / "maps", {name: mask * 0.5 for name in names})
    # Beside the types, and for all categories: the nearer file counts.
    write_scores(maps / OFFICIAL / "scores.csv", dict(zip(names, scores, strict=True)))
    write_scores(maps / "scores.csv", dict.fromkeys(names, 0.0))
    record = judged(tmp_path, maps, tmp_path / "out")
    for key, value in expected.items():
        assert record[f"image_{key}_given"] == pytest.approx(value, abs=1e-6)
    with (tmp_path / "out/scores.csv").open() as lines:
        rows = {row["name"]: row for row in csv.DictReader(lines)}
    assert [float(rows[f"{n}.png"]["score_given"]) for n in names] == scores
    # The decisions are those of the largest F1.
    called = np.array([int(rows[f"{name}.png"]["defective"]) for name in names])
    true = (called & np.array(labels)).sum()
    assert 2 * true / (called.sum() + sum(labels)) == pytest.approx(record["image_f1_max_given"])


def test_aupimo(tmp_path):
    counts = [1, 9, 90, 900, 9_000, 90_000, 900_000]
    scores = np.repeat(np.arange(7, 0, -1), counts).reshape(1000, 1000).astype(np.uint16)
    masks = np.zeros((3, 1000, 1000), np.uint8)
    masks[1], masks[2, :100] = 1, 1
    names = ["good/0", "all/0", "part/0"]
    write_data(tmp_path, dict(zip(names, masks, strict=True)))
    maps = write_maps(tmp_path / "maps", dict.fromkeys(names, scores), ".png")
    record = judged(tmp_path, maps, tmp_path / "out")
    assert record["per_type"]["all"]["pixel_aupimo"] == pytest.approx(5.5e-5, rel=1e-9)
    assert record["per_type"]["part"]["pixel_aupimo"] == pytest.approx(5.5e-4, rel=1e-9)


# --- our own maps -----------------------------------------------------------------------------


def test_our_own_maps_have_our_numbers(trained, tmp_path, capsys):
    run = runs.clone(trained, tmp_path)
    words = ["--config.eval.native_size=True", "--config.eval.bootstrap_resamples=30"]
    result = evaluate.evaluate(run.workdir, overrides=words, save_maps=True)
    own, folder = result.metrics, Path(result.report).parent
    root, resamples = run.root, "eval.bootstrap_resamples=30"
    with (folder / "scores.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    shutil.copytree(folder / "maps", tmp_path / "maps")
    for name in ("sum", "max"):
        scores = {row["name"].removesuffix(".png"): float(row[f"score_{name}"]) for row in rows}
        write_scores(tmp_path / "maps/data/scores.csv", scores)
        out = tmp_path / f"out-{name}"
        other = judged(root, tmp_path / "maps", out, resamples)
        for key in (key for key in own if key.startswith("pixel_")):
            assert other[key] == own[key], key
            for defect in ("crack", "dent"):
                assert other["per_type"][defect][key] == own["per_type"][defect][key]
        for key in ("pixel_auroc", "pixel_ap", "pixel_aupro"):
            assert other["intervals"][key] == own["intervals"][key]
        for key in (f"image_auroc_{name}", f"image_ap_{name}", f"image_f1_max_{name}"):
            given = (
                key.replace(name, "given") if name == "sum" else f"{key.removesuffix('_max')}_given"
            )
            assert other[given] == own[key], key
        auroc = f"image_auroc_{name}"
        assert other["intervals"]["image_auroc_given"] == own["intervals"][auroc]
    assert other["images"] == own["images"]
    assert other["provenance"]["step"] is None
    printed = capsys.readouterr().out
    assert "Image scores: the column score of scores.csv." in printed
    assert f"pixel_aupro             {own['pixel_aupro']:.4f}   [" in printed
    report = (out / "report.html").read_text()
    assert "The same maps under other protocols" in report and "crack/000.png" in report
    assert "https://" not in report


# --- sizes and protocols ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def category(tmp_path_factory) -> Path:
    """A category of 24×20 images with two types of defects, and maps of several sizes."""
    root = tmp_path_factory.mktemp("category")
    layouts.category(root / "data", train=1)
    random = np.random.default_rng(0)
    for path in sorted((root / "data/test").rglob("*.png")):
        name = path.relative_to(root / "data/test").with_suffix("").as_posix()
        values = random.random((20, 24)).astype(np.float32) - 2
        mask = root / f"data/ground_truth/{name}_mask.png"
        if mask.exists():
            with Image.open(mask) as image:
                values += 0.3 * (np.asarray(image) > 0)
        write_maps(root / "native", {name: values})
        write_maps(root / "network", {name: random.random((16, 16)).astype(np.float32)})
    return root


def read(root: Path, size: str) -> tuple[list[np.ndarray], list[np.ndarray], list[bool]]:
    """Returns the maps, the native masks and the labels, in the order of the names."""
    maps, masks = [], []
    for path in sorted((root / size / OFFICIAL).rglob("*.tiff")):
        name = path.relative_to(root / size / OFFICIAL).with_suffix("")
        mask = root / f"data/ground_truth/{name}_mask.png"
        maps.append(tifffile.imread(path))
        masks.append(
            np.asarray(Image.open(mask)) > 0 if mask.exists() else np.zeros((20, 24), bool)
        )
    return maps, masks, [mask.any() for mask in masks]


def resized(values: np.ndarray, shape: tuple[int, int], method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(shape[::-1], method))


def test_the_sizes_and_the_protocols(category, tmp_path, capsys):
    """Native maps, network maps, and network maps resampled; recomputed by scikit-learn."""
    cases = {"native": (), "network": (), "resampled": ("eval.native_size=True",)}
    for case, words in cases.items():
        size = "network" if case == "resampled" else case
        record = judged(category, category / size, tmp_path / case, *words)
        maps, masks, labels = read(category, size)
        up = [resized(m, (20, 24), Image.Resampling.BILINEAR) for m in maps]
        down = [resized(m, (16, 16), Image.Resampling.BILINEAR) for m in maps]
        small = [resized(m.astype(np.uint8), (16, 16), Image.Resampling.NEAREST) for m in masks]
        sizes = {"native": (up, masks), "network": (down, small)}
        at = "network" if case == "network" else "native"
        other = "native" if case == "network" else "network"
        assert record["evaluated_at"]["size"] == at
        assert record["evaluated_at"]["resampled"] == (case == "resampled")
        for row, key in (
            (record, at),
            (record["protocols"][0], at),
            (record["protocols"][1], other),
        ):
            values, truth = (np.ravel(part) for part in sizes[key])
            assert row["pixel_auroc"] == pytest.approx(roc_auc_score(truth > 0, values))
            assert row["pixel_ap"] == pytest.approx(average_precision_score(truth > 0, values))
        scores = [m.max() for m in maps]
        assert record["image_auroc_max"] == pytest.approx(roc_auc_score(labels, scores))
        for row in record["protocols"][2:]:
            name = row["protocol"].partition(":")[0]
            expected = getattr(legacy, name)(*sizes[at])
            assert row["pixel_aupro"] == pytest.approx(expected, abs=1e-12)
            assert row["pixel_auroc"] is None
        assert [row["protocol"].partition(":")[0] for row in record["protocols"][2:]] == [
            "aupro_linear_200",
            "aupro_dilated",
            "aupro_mean_of_images",
        ]
    printed = capsys.readouterr().out
    assert "Image scores: the maximum of each map" in printed
    assert "aupro_dilated: the same, predictions dilated by 5×5" in printed
    assert "largest F1 of these test images" in printed
    assert "nan" not in printed and "defect type" in printed


def test_the_layouts_and_formats(category, tmp_path, capsys):
    """Without CATEGORY, without test; NPY and 16-bit PNG; nothing is written without --out."""
    maps, _, _ = read(category, "native")
    paths = sorted((category / "native" / OFFICIAL).rglob("*.tiff"))
    for folder, suffix in (("test", ".npy"), ("", ".png"), ("data/test", ".npy")):
        place = tmp_path / f"maps-{folder.replace('/', '-')}{suffix}"
        for path, values in zip(paths, maps, strict=True):
            target = place / folder / path.relative_to(category / "native" / OFFICIAL)
            target.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".npy":
                np.save(target.with_suffix(suffix), values[None].astype(np.float64))
            else:
                levels = ((values + 2) * 50_000).round().astype(np.uint16)
                Image.fromarray(levels).save(target.with_suffix(suffix))
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert judge(category, place) == 0
        assert sorted(tmp_path.rglob("*")) == before
        outputs = capsys.readouterr().out
        assert judge(category, category / "native") == 0
        reference = capsys.readouterr().out
        line = next(one for one in reference.splitlines() if one.startswith("pixel_aupro "))
        assert line in outputs


def test_only_good_images_and_no_masks(category, tmp_path, capsys):
    shutil.copytree(category / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/ground_truth")
    record = judged(tmp_path, category / "native", tmp_path / "out")
    assert record["pixel_aupro"] is None and record["protocols"] == []
    assert 0 <= record["image_auroc_max"] <= 1
    for name in ("crack", "dent"):
        shutil.rmtree(tmp_path / "data/test" / name)
    record = judged(tmp_path, category / "native", tmp_path / "good")
    assert record["image_auroc_max"] is None
    assert record["threshold"]["test_false_positive_rate"] == 0
    assert "nan" not in capsys.readouterr().out


# --- refusals ---------------------------------------------------------------------------------

BAD = {
    "missing": "no map .tiff, .tif, .npy, .png for this image, as for 1 of 7 test images",
    "twice": "two maps of one image; remove one",
    "size": "a map of 9×9 pixels; its image has 24×20 pixels, and the size in the config is 16×16",
    "mixed": "save all maps at one size, or set --config.eval.native_size=True",
    "nan": "infinite values or NaN; replace them by numbers",
    "inf": "infinite values or NaN; replace them by numbers",
    "damaged": "cannot be read (",
    "colour": "an array of 20×24×3 values; a map has one value per pixel (h, w)",
    "complex": "values of type complex64; a map has real numbers",
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_map_is_one_line(category, tmp_path, capsys, case):
    maps = tmp_path / "maps"
    shutil.copytree(category / "native", maps)
    path = maps / OFFICIAL / "crack/001.tiff"
    values = tifffile.imread(path)
    if case == "missing":
        path.unlink()
    elif case == "twice":
        np.save(path.with_suffix(".npy"), values)
    elif case == "damaged":
        path.write_bytes(path.read_bytes()[:60])
    else:
        changed = {
            "size": np.zeros((9, 9), np.float32),
            "mixed": np.zeros((16, 16), np.float32),
            "nan": np.where(values == values.max(), np.nan, values),
            "inf": np.where(values == values.max(), np.inf, values),
            "colour": np.zeros((20, 24, 3), np.uint8),
            "complex": values.astype(np.complex64),
        }[case]
        tifffile.imwrite(path, changed)
    assert judge(category, maps, tmp_path / "out") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"pae judge: {path.with_suffix('')}") and BAD[case] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name,value\n", "scores.csv: needs the columns name and score, not name, value"),
        ("", "scores.csv: needs the columns name and score, not none"),
        ("name,score\ngood/000.png,high\n", "scores.csv: line 2: score 'high' is no finite"),
        ("name,score\ngood/000.png,nan\n", "scores.csv: line 2: score 'nan' is no finite"),
        ("name,score\na.png,1\na.png,1\n", "scores.csv: line 3: a.png stands there twice"),
        ("name,score\ngood/000.png,1\n", "scores.csv: no row for crack/000.png, as for 6 of 7"),
    ],
)
def test_bad_scores_are_one_line(category, tmp_path, capsys, text, line):
    shutil.copytree(category / "native", tmp_path / "maps")
    (tmp_path / "maps/data/scores.csv").write_text(text)
    assert judge(category, tmp_path / "maps") == 2
    assert line in capsys.readouterr().err.strip().splitlines()[-1]


def test_places(category, tmp_path, capsys):
    assert judge(category, tmp_path / "nowhere") == 2
    assert f"--maps={tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err
    assert judge(category, tmp_path / ("x" * 300)) == 2
    assert capsys.readouterr().err.strip().endswith("x: no such folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert judge(category, category / "native", tmp_path / "out") == 2
    assert "not empty; results are never overwritten" in capsys.readouterr().err
    assert judge(category, tmp_path, None, "data.sizes=3") == 2
    assert "data.sizes: no such key" in capsys.readouterr().err


def test_what_is_left_out_is_told(category, tmp_path, messages):
    shutil.copytree(category / "native", tmp_path / "maps")
    crack = tmp_path / "maps" / OFFICIAL / "crack"
    shutil.copy(crack / "000.tiff", crack / "999.tiff")
    for path in (tmp_path / "maps" / OFFICIAL / "dent").iterdir():
        levels = np.zeros((20, 24), np.uint8)
        path.unlink()
        Image.fromarray(levels).save(path.with_suffix(".png"))
    assert judge(category, tmp_path / "maps") == 0
    assert any("crack/999.tiff: no test image of this name" in line for line in messages)
    assert any("values of 8 bits, as in 2 of the maps" in line for line in messages)
