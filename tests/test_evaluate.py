"""`pae evaluate` and `pae predict` on a trained model, recomputed from the files they leave."""

import csv
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import runs
from data_pipelines.dataset import open_training
from data_pipelines.errors import BadInput
from layouts import write
from pae_jax import config, detection, evaluate, main, predict, train_step
from pae_jax.workdir import trained_model

PIXEL_KEYS = {"pixel_auroc", "pixel_ap", "pixel_aupro"}
KEYS = {"image_auroc_sum", "image_auroc_max", "image_auroc_topk"} | PIXEL_KEYS


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> runs.Run:
    """The trained run, evaluated at native size with maps and diagnostics."""
    run = runs.clone(trained, tmp_path_factory.mktemp("evaluated"))
    words = [f"--config.eval.{word}" for word in ("native_size=True", "diagnostics=True")]
    assert main.main(["evaluate", f"--workdir={run.workdir}", "--save_maps", *words]) == 0
    return run


def read_metrics(workdir: Path) -> dict:
    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((workdir / "eval/metrics.json").read_text(), parse_constant=refuse)


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def read_scores(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def checkpoint_files(workdir: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in (workdir / "checkpoints").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_metrics_hold_the_contract(evaluated):
    found = read_metrics(evaluated.workdir)
    assert found.keys() >= KEYS
    for name in KEYS:
        assert 0 <= found[name] <= 1, name
        low, high = found["intervals"][name]
        assert 0 <= low <= high <= 1, name
    provenance = found["provenance"]
    assert provenance.keys() >= {"config_hash", "commit", "versions", "device", "seeds"}
    assert provenance["versions"]["jax"] == jax.__version__
    assert provenance["seeds"]["train"] == 0
    assert provenance["step"] == runs.STEPS
    assert found["images"] == {"good": 3, "crack": 2, "dent": 2}
    assert found["per_type"].keys() == {"crack", "dent"}
    assert {"on_manifold_bias", "idempotency"} & found["diagnostics"].keys()


def test_image_metrics_follow_from_the_scores(evaluated):
    found, rows = (
        read_metrics(evaluated.workdir),
        read_scores(evaluated.workdir / "eval/scores.csv"),
    )
    images = (evaluated.root / "data/test").rglob("*.png")
    assert sorted(rows) == sorted(
        p.relative_to(evaluated.root / "data/test").as_posix() for p in images
    )
    labels = [int(row["label"]) for row in rows.values()]
    assert labels == [int(row["type"] != "good") for row in rows.values()]
    for kind in ("sum", "max", "topk"):
        scores = [float(row[f"score_{kind}"]) for row in rows.values()]
        assert found[f"image_auroc_{kind}"] == pytest.approx(roc_auc_score(labels, scores))
        assert found[f"image_ap_{kind}"] == pytest.approx(average_precision_score(labels, scores))
        for defect in ("crack", "dent"):
            chosen = [row["type"] in ("good", defect) for row in rows.values()]
            expected = roc_auc_score(np.array(labels)[chosen], np.array(scores)[chosen])
            assert found["per_type"][defect][f"image_auroc_{kind}"] == pytest.approx(expected)
    called = [float(row["score_sum"]) > found["threshold"]["score"] for row in rows.values()]
    assert called == [row["defective"] == "1" for row in rows.values()]


def test_pixel_metrics_follow_from_the_saved_maps(evaluated):
    """The official layout: CATEGORY/test/TYPE/NAME.tiff, float32, at the images' own size."""
    data, maps = evaluated.root / "data", evaluated.workdir / "eval/maps/data/test"
    values, truth = [], []
    for path in sorted((data / "test").rglob("*.png")):
        name = path.relative_to(data / "test").with_suffix("")
        values.append(tifffile.imread(maps / f"{name}.tiff"))
        assert values[-1].dtype == np.float32
        assert values[-1].shape == (20, 24)
        mask = data / "ground_truth" / f"{name}_mask.png"
        truth.append(read_image(mask) > 0 if mask.exists() else np.zeros((20, 24), bool))
    assert len(list(maps.rglob("*.tiff"))) == len(values)
    truth, values = np.ravel(truth), np.ravel(values)
    assert np.isfinite(values).all()
    found = read_metrics(evaluated.workdir)
    assert found["evaluated_at"] == {"size": "native", "network_shape": [16, 16]}
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values))
    assert found["pixel_ap"] == pytest.approx(average_precision_score(truth, values))


def test_the_report_stands_alone(evaluated):
    report = (evaluated.workdir / "eval/report.html").read_text()
    for name in read_scores(evaluated.workdir / "eval/scores.csv"):
        assert name in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report


def test_again_changes_nothing(evaluated):
    """Checkpoints least of all, nor one that another process may be writing."""
    workdir = evaluated.workdir
    writing = workdir / "checkpoints/40.orbax-checkpoint-tmp/state"
    writing.mkdir(parents=True)
    (writing / "part").write_bytes(b"half")
    before, first = checkpoint_files(workdir), read_metrics(workdir)
    scores = (workdir / "eval/scores.csv").read_bytes()
    words = ["--config.eval.native_size=True", "--config.eval.diagnostics=True"]
    evaluate.evaluate(workdir, overrides=words)
    assert read_metrics(workdir) == first
    assert (workdir / "eval/scores.csv").read_bytes() == scores
    assert checkpoint_files(workdir) == before
    shutil.rmtree(writing.parent)


def test_without_masks_pixel_metrics_are_null(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    shutil.rmtree(run.root / "data/ground_truth")
    assert main.main(["evaluate", f"--workdir={run.workdir}"]) == 0
    found = read_metrics(run.workdir)
    assert found.keys() >= KEYS
    assert all(found[name] is None for name in PIXEL_KEYS)
    assert all(found["per_type"]["dent"][name] is None for name in PIXEL_KEYS)
    assert 0 <= found["image_auroc_sum"] <= 1


@pytest.mark.parametrize("kinds", [["good"], ["crack", "dent"]])
def test_only_normal_or_only_defective_images(trained, tmp_path, kinds, capsys):
    run = runs.clone(trained, tmp_path)
    for folder in (run.root / "data/test").iterdir():
        if folder.name not in kinds:
            shutil.rmtree(folder)
    assert main.main(["evaluate", f"--workdir={run.workdir}"]) == 0
    assert "nan" not in capsys.readouterr().out
    found = read_metrics(run.workdir)
    assert found["image_auroc_sum"] is None
    assert "image_auroc_sum" in (run.workdir / "eval/report.html").read_text()


def test_two_images_whose_maps_would_share_a_name(trained, tmp_path, capsys):
    run = runs.clone(trained, tmp_path)
    good = run.root / "data/test/good"
    first = sorted(good.iterdir())[0]
    shutil.copy(first, first.with_suffix(".bmp"))
    assert main.main(["evaluate", f"--workdir={run.workdir}", "--save_maps"]) == 2
    line = capsys.readouterr().err
    assert f"good/{first.stem}.bmp, good/{first.name}: the map of both" in line
    assert not (run.workdir / "eval/metrics.json").exists()


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5])
def test_thresholds_come_from_the_held_out_images_alone(trained, tmp_path, rate):
    run = runs.clone(trained, tmp_path)
    for name in ("test", "ground_truth"):
        shutil.rmtree(run.root / "data" / name)
    model = trained_model.load(run.workdir, [f"--config.eval.false_positive_rate={rate}"])
    limits = trained_model.thresholds(run.workdir, model)
    data = model.config.data
    held_out = open_training(data.spec, holdout=data.holdout_fraction, seed=0).held_out
    found = list(detection.detect_all(model.params, held_out, model.config))
    assert limits.images == len(found) > 2
    for values, limit in (
        ([one.scores["sum"] for one in found], limits.score),
        ([one.map.max() for one in found], limits.pixel),
    ):
        assert np.mean(np.array(values) > limit) <= rate
        assert limit in np.float64(values)  # the smallest of the observed values that does it
        below = max((v for v in np.float64(values) if v < limit), default=None)
        assert below is None or np.mean(np.array(values) > below) > rate - 1 / len(found)
    assert trained_model.thresholds(run.workdir, model) == limits  # from the file
    (run.workdir / "thresholds.json").unlink()
    write(run.root / "data/train/good/000.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(BadInput, match="other training images"):
        trained_model.thresholds(run.workdir, model)


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("kind", ["mse", "ssim", "gms", "msgms"])
def test_constant_and_tiny_images_give_finite_maps(kind):
    settings = config.from_config_dict(
        {
            "data": {"size": 8},
            "model": {
                "widths": (2,),
                "branch_width": 2,
                "bottleneck_layers": 0,
                "convs_per_stage": 1,
            },
            "eval": {"map": kind},
        }
    )
    params = train_step.init_state(settings, jax.random.key(0)).params
    random = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1))
    images = np.concatenate([np.full((1, 8, 8, 1), v) for v in (0, 128, 255)] + [random])
    model = trained_model.Model(settings, params, 0, 1)
    for one in detection.detect_all(model.params, images[:, :, :7].astype(np.uint8), model.config):
        assert one.map.shape == (8, 7)
        assert one.map.min() >= 0
        assert one.map.max() <= 1
        assert np.isfinite([*one.scores.values()]).all()


def test_native_size_scales_maps_not_masks():
    ramp = jnp.linspace(0, 1, 8)[None, :] * jnp.ones((8, 1))
    scaled = evaluate.resize_map(np.asarray(ramp), (4, 16))
    assert scaled.shape == (4, 16)
    assert scaled.dtype == np.float32
    assert np.all(np.diff(scaled, axis=1) >= 0)
    assert scaled.min() >= 0
    assert scaled.max() <= 1


def test_predict_agrees_with_evaluate(evaluated, tmp_path):
    out = tmp_path / "out"
    test = evaluated.root / "data/test"
    words = ["--config.eval.batch_size=3", f"--images={test}", f"--out={out}"]
    assert main.main(["predict", f"--workdir={evaluated.workdir}", *words]) == 0
    predicted = read_scores(out / "scores.csv")
    expected = read_scores(evaluated.workdir / "eval/scores.csv")
    assert predicted.keys() == expected.keys()
    for name, row in predicted.items():
        for kind in ("score_sum", "score_max", "score_topk"):
            assert float(row[kind]) == pytest.approx(float(expected[name][kind]), rel=1e-5)
        assert row["defective"] == expected[name]["defective"]
        assert read_image(out / f"heatmaps/{name}.png").shape == (16, 16, 3)
        mask = read_image(out / f"masks/{name}.png")
        assert set(np.unique(mask)) <= {0, 255}


def test_predict_takes_any_folder(trained, tmp_path):
    """Nested, grey beside colour, two formats of one name; a mask is the map over its threshold."""
    images, out = tmp_path / "images", tmp_path / "out"
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (20, 24), dtype=np.uint8)
    write(images / "a.png", grey)
    write(images / "a.jpg", np.zeros((9, 9, 3), np.uint8))
    write(images / "deep/er/a.png", np.stack([grey] * 3, axis=-1))
    (images / "notes.txt").write_text("no image")
    words = ["--config.eval.false_positive_rate=0.5"]
    predict.predict(trained.workdir, images, out, overrides=words)
    rows = read_scores(out / "scores.csv")
    names = ["a.jpg", "a.png", "deep/er/a.png"]
    assert list(rows) == names
    assert rows["a.png"]["score_sum"] == rows["deep/er/a.png"]["score_sum"]
    assert rows["a.png"]["score_sum"] != rows["a.jpg"]["score_sum"]
    for folder in ("heatmaps", "masks"):
        pictures = [p.relative_to(out / folder) for p in (out / folder).rglob("*.png")]
        assert sorted(p.as_posix() for p in pictures) == [f"{name}.png" for name in names]

    model = trained_model.load(trained.workdir, words)
    pixels = np.asarray(Image.fromarray(grey).resize((16, 16), Image.Resampling.BILINEAR))
    (found,) = detection.detect_all(model.params, pixels[None, ..., None], model.config)
    expected = found.map > trained_model.thresholds(trained.workdir, model).pixel
    mask = read_image(out / "masks/a.png.png")
    np.testing.assert_array_equal(mask, 255 * expected)
