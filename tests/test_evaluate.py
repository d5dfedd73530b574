"""`pae evaluate` and `pae predict` on a trained model, recomputed from the files they leave."""

import csv
import json
import math
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
from pae_jax import config, detection, evaluate, main, predict, train, train_step
from pae_jax.config_schema import SCHEMA
from pae_jax.metrics import measure
from pae_jax.report import table
from pae_jax.workdir import files, trained_model

PIXEL_KEYS = {"pixel_auroc", "pixel_ap", "pixel_aupro"}
KEYS = {"image_auroc_sum", "image_auroc_max", "image_auroc_topk"} | PIXEL_KEYS


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> runs.Run:
    """Returns the trained run, evaluated at native size with maps and diagnostics."""
    run = runs.clone(trained, tmp_path_factory.mktemp("evaluated"))
    runs.set_eval(run.workdir, native_size=True, diagnostics=True)
    assert main.main(["evaluate", f"--workdir={run.workdir}", "--save_maps"]) == 0
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
    paths = [path for path in (workdir / "checkpoints").rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_metrics_hold_the_contract(evaluated):
    record = read_metrics(evaluated.workdir)
    assert record.keys() >= KEYS
    for name in KEYS:
        assert 0 <= record[name] <= 1, name
        low, high = record["intervals"][name]
        assert 0 <= low <= high <= 1, name
    assert record["schema"] == SCHEMA
    provenance = record["provenance"]
    assert provenance.keys() >= {"config_hash", "commit", "versions", "device", "seeds"}
    assert provenance["versions"]["jax"] == jax.__version__
    assert provenance["seeds"]["train"] == 0
    assert provenance["step"] == runs.STEPS
    assert record["images"] == {"good": 3, "crack": 2, "dent": 2}
    assert record["per_type"].keys() == {"crack", "dent"}
    assert {"on_manifold_bias", "idempotency"} & record["diagnostics"].keys()


def test_image_metrics_follow_from_the_scores(evaluated):
    record = read_metrics(evaluated.workdir)
    rows = read_scores(evaluated.workdir / "eval/scores.csv")
    images = (evaluated.root / "data/test").rglob("*.png")
    assert sorted(rows) == sorted(
        p.relative_to(evaluated.root / "data/test").as_posix() for p in images
    )
    labels = [int(row["label"]) for row in rows.values()]
    assert labels == [int(row["type"] != "good") for row in rows.values()]
    for name in ("sum", "max", "topk"):
        scores = [float(row[f"score_{name}"]) for row in rows.values()]
        assert record[f"image_auroc_{name}"] == pytest.approx(roc_auc_score(labels, scores))
        assert record[f"image_ap_{name}"] == pytest.approx(average_precision_score(labels, scores))
        for defect in ("crack", "dent"):
            selected = [row["type"] in ("good", defect) for row in rows.values()]
            expected = roc_auc_score(np.array(labels)[selected], np.array(scores)[selected])
            assert record["per_type"][defect][f"image_auroc_{name}"] == pytest.approx(expected)
    decisions = [float(row["score_sum"]) > record["threshold"]["score"] for row in rows.values()]
    assert decisions == [row["defective"] == "1" for row in rows.values()]


def test_pixel_metrics_follow_from_the_saved_maps(evaluated):
    """The layout is the official one: CATEGORY/test/TYPE/NAME.tiff, float32, at native size."""
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
    record = read_metrics(evaluated.workdir)
    assert record["evaluated_at"] == {
        "size": "native",
        "network_shape": [16, 16],
        "images_without_pixel_labels": 0,
    }
    assert record["pixel_auroc"] == pytest.approx(roc_auc_score(truth, values))
    assert record["pixel_ap"] == pytest.approx(average_precision_score(truth, values))


def test_the_report_stands_alone(evaluated):
    report = (evaluated.workdir / "eval/report.html").read_text()
    for name in read_scores(evaluated.workdir / "eval/scores.csv"):
        assert name in report
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report


def test_a_second_evaluation_changes_nothing(evaluated):
    """Checkpoints stay as they are, even one that another process may be writing."""
    workdir = evaluated.workdir
    writing = workdir / "checkpoints/40.orbax-checkpoint-tmp/state"
    writing.mkdir(parents=True)
    (writing / "part").write_bytes(b"half")
    before, first = checkpoint_files(workdir), read_metrics(workdir)
    scores = (workdir / "eval/scores.csv").read_bytes()
    evaluate.evaluate(workdir, save_maps=True)
    assert read_metrics(workdir) == first
    assert (workdir / "eval/scores.csv").read_bytes() == scores
    assert checkpoint_files(workdir) == before
    shutil.rmtree(writing.parent)


@pytest.fixture
def compiled():
    """The programs that XLA compiled, or read from the cache on disk, since the test began."""
    events = []

    def listen(event: str, *_, **__) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.clear_event_listeners()


def test_another_model_of_the_same_shape_compiles_nothing(trained, tmp_path, compiled):
    """Neither in the same process nor, with the cache on disk, in another one."""
    # Another seed and other weights of the objective: settings that no evaluation reads.
    changes = {"train__seed": 1, "train__steps": 10, "objective__mask_weight": 0.3}
    settings = runs.load_config(trained.root, eval__diagnostics=True, **changes)
    assert train.train_and_evaluate(settings, tmp_path / "other").outcome == train.FINISHED
    first = runs.clone(trained, tmp_path)
    words = ["--config.eval.diagnostics=True"]
    jax.clear_caches()
    compiled.clear()
    result = evaluate.evaluate(first.workdir, overrides=words)
    assert len(compiled) > 10
    compiled.clear()
    other = evaluate.evaluate(tmp_path / "other")
    assert compiled == []
    name = "jacobian_identity"
    assert other.metrics["diagnostics"][name] != result.metrics["diagnostics"][name]

    programs = sorted(Path(jax.config.jax_compilation_cache_dir).glob("*-cache"))
    assert programs
    jax.clear_caches()  # as a new process
    shutil.rmtree(tmp_path / "other/eval")
    (tmp_path / "other/thresholds.json").unlink()
    again = evaluate.evaluate(tmp_path / "other")
    assert sorted(Path(jax.config.jax_compilation_cache_dir).glob("*-cache")) == programs
    assert again.metrics["diagnostics"] == other.metrics["diagnostics"]


def test_printed_table_shows_metrics_and_decisions(evaluated):
    record = read_metrics(evaluated.workdir)
    printed = table.format_table(record)
    lines = printed.splitlines()
    rows = read_scores(evaluated.workdir / "eval/scores.csv").values()
    alarms = sum(row["defective"] == "1" for row in rows if row["type"] == "good")
    detected = sum(row["defective"] == "1" for row in rows if row["type"] != "good")
    assert f"{'false alarms':24s}{alarms} of 3 good images" in lines
    assert f"{'detected':24s}{detected} of 4 defective images" in lines
    assert f"image score sum > {record['threshold']['score']:.6g}" in printed
    # What four held-out images support: the threshold is the largest of their scores.
    odds = "at most 1 in 5 (20 %), 5 % asked for; the threshold is the largest score of 4 held-out"
    assert f"{'expected false alarms':24s}{odds} normal images" in lines
    report = (evaluated.workdir / "eval/report.html").read_text()
    assert "The threshold is the largest score of the 4 normal images held out" in report
    assert "at most 1 in 5 (20 %)" in report and "false_positive_rate asks for 5 %" in report
    (line,) = (line for line in lines if line.startswith("image_auroc_max "))
    low, high = record["intervals"]["image_auroc_max"]
    assert line.split(maxsplit=1)[1] == f"{record['image_auroc_max']:.4f}   [{low:.3f}, {high:.3f}]"
    (line,) = (line for line in lines if line.startswith("idempotency "))
    assert line.split()[1] == f"{record['diagnostics']['idempotency']:.4f}"
    (head,) = (line for line in lines if line.startswith("defect type"))
    names = head.split()[2:]
    assert names[0] == "images" and set(names[1:]) == KEYS
    for defect in ("crack", "dent"):
        (line,) = (line for line in lines if line.startswith(f"{defect} "))
        values = [record["per_type"][defect][name] for name in names[1:]]
        assert line.split() == [defect, "2", *(f"{value:.4f}" for value in values)]


def test_printed_table_leaves_out_undefined_metrics(evaluated):
    """A metric is undefined as None, from the file, or as NaN, from `evaluate`."""
    record = read_metrics(evaluated.workdir)
    for name in PIXEL_KEYS:
        record[name] = math.nan
        record["per_type"]["crack"][name] = record["per_type"]["dent"][name] = None
    record["per_type"]["crack"]["image_auroc_max"] = None
    record["intervals"]["image_ap_sum"] = [math.nan, math.nan]
    record["diagnostics"]["normal_dominance"] = math.nan
    record["images"] = {"good": 3}
    record["threshold"]["test_true_positive_rate"] = math.nan
    printed = table.format_table(record)
    assert not any(name in printed for name in (*PIXEL_KEYS, "nan", "None", "normal_dominance"))
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    assert lines["image_ap_sum"] == [f"{record['image_ap_sum']:.4f}"]
    # The column stays, since the other type has a value.
    column = lines["defect"].index("image_auroc_max") - 1
    assert lines["crack"][column] == "–"
    assert lines["dent"][column] == f"{record['per_type']['dent']['image_auroc_max']:.4f}"
    assert "false" in lines and "detected" not in lines
    record["per_type"] = {}
    assert "defect type" not in table.format_table(record)


def test_without_masks_pixel_metrics_are_null(trained, tmp_path, capsys):
    run = runs.clone(trained, tmp_path)
    shutil.rmtree(run.root / "data/ground_truth")
    assert main.main(["evaluate", f"--workdir={run.workdir}"]) == 0
    record = read_metrics(run.workdir)
    assert record.keys() >= KEYS
    assert all(record[name] is None for name in PIXEL_KEYS)
    assert all(record["per_type"]["dent"][name] is None for name in PIXEL_KEYS)
    assert 0 <= record["image_auroc_sum"] <= 1
    printed = capsys.readouterr().out
    assert not any(name in printed for name in measure.PIXEL_METRICS)
    report = (run.workdir / "eval/report.html").read_text()
    # Their names stand in one sentence, not in a table.
    assert "Undefined for these test images: pixel_auroc, pixel_ap" in report
    assert ">pixel_" not in report


@pytest.mark.parametrize("types", [["good"], ["crack", "dent"]])
def test_only_normal_or_only_defective_images(trained, tmp_path, types, capsys):
    run = runs.clone(trained, tmp_path)
    for folder in (run.root / "data/test").iterdir():
        if folder.name not in types:
            shutil.rmtree(folder)
    assert main.main(["evaluate", f"--workdir={run.workdir}"]) == 0
    assert "nan" not in capsys.readouterr().out
    record = read_metrics(run.workdir)
    assert record["image_auroc_sum"] is None
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
    held_out = open_training(data.spec, holdout_fraction=data.holdout_fraction, seed=0).held_out
    detections = list(detection.detect_all(model.params, held_out, model.config))
    assert limits.images == len(detections) > 2
    for values, limit in (
        ([result.scores["sum"] for result in detections], limits.score),
        ([result.map.max() for result in detections], limits.pixel),
    ):
        assert np.mean(np.array(values) > limit) <= rate
        assert limit in np.float64(values)  # the smallest of the observed values that does it
        below = max((v for v in np.float64(values) if v < limit), default=None)
        assert below is None or np.mean(np.array(values) > below) > rate - 1 / len(detections)
    (run.workdir / "thresholds.json").unlink()
    assert trained_model.thresholds(run.workdir, model) == limits  # those of training's end
    (run.workdir / "thresholds.json").unlink()
    write(run.root / "data/train/good/000.png", np.zeros((20, 24), np.uint8))
    with pytest.raises(BadInput, match="other training images"):
        trained_model.thresholds(run.workdir, model)


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("anomaly_map", ["mse", "ssim", "gms", "msgms"])
def test_constant_and_tiny_images_give_finite_maps(anomaly_map):
    settings = config.from_config_dict(
        {
            "data": {"size": 8},
            "model": {
                "widths": (2,),
                "branch_width": 2,
                "bottleneck_layers": 0,
                "convs_per_stage": 1,
            },
            "eval": {"anomaly_map": anomaly_map},
        }
    )
    params = train_step.init_state(settings, jax.random.key(0)).params
    random = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1))
    images = np.concatenate([np.full((1, 8, 8, 1), v) for v in (0, 128, 255)] + [random])
    model = trained_model.Model(settings, params, 0, 1)
    cropped = images[:, :, :7].astype(np.uint8)
    for result in detection.detect_all(model.params, cropped, model.config):
        assert result.map.shape == (8, 7)
        assert result.map.min() >= 0
        assert result.map.max() <= 1
        assert np.isfinite([*result.scores.values()]).all()


def test_scores_of_a_name_that_is_not_valid_text_are_written(tmp_path):
    files.write_csv(tmp_path / "scores.csv", [{"name": "b\udcff.png", "score": 1.0}])
    assert read_scores(tmp_path / "scores.csv") == {
        "b\\udcff.png": {"name": "b\\udcff.png", "score": "1.0"}
    }


def test_native_size_scales_maps_not_masks():
    ramp = jnp.linspace(0, 1, 8)[None, :] * jnp.ones((8, 1))
    scaled = measure.resize_map(np.asarray(ramp), (4, 16))
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
        for key in ("score_sum", "score_max", "score_topk"):
            assert float(row[key]) == pytest.approx(float(expected[name][key]), rel=1e-5)
        assert row["defective"] == expected[name]["defective"]
        assert read_image(out / f"heatmaps/{name}.png").shape == (20, 24, 3)
        mask = read_image(out / f"masks/{name}.png")
        assert set(np.unique(mask)) <= {0, 255}


def test_predict_takes_any_folder(trained, tmp_path):
    """Folders may be nested, hold grey and colour images, and two formats of the same name."""
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
    (result,) = detection.detect_all(model.params, pixels[None, ..., None], model.config)
    own = measure.resize_map(result.map, grey.shape)
    expected = own > trained_model.thresholds(trained.workdir, model).pixel
    mask = read_image(out / "masks/a.png.png")
    np.testing.assert_array_equal(mask, 255 * expected)
