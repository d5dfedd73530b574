"""The floor: PCA beside a run is the method pca on the same images, and costs nothing but time."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from sklearn.decomposition import PCA

import runs
from pae_jax import config, evaluate, main, methods, train
from pae_jax.methods import floor
from pae_jax.report import statements, table

WORDS = ["--config.eval.floor=True"]
NAMES = ("image_auroc_sum", "image_auroc_max", "image_auroc_topk", "image_ap_sum")
PIXEL_NAMES = ("pixel_auroc", "pixel_ap", "pixel_aupro")


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> runs.Run:
    return runs.clone(trained, tmp_path_factory.mktemp("floor"))


def test_it_is_the_method_pca(run, tmp_path, capsys):
    """Every number of the floor is that of a run with method=pca on the same images."""
    assert main.main(["evaluate", f"--workdir={run.workdir}", *WORDS]) == 0
    printed = capsys.readouterr().out
    record = json.loads((run.workdir / "eval_floor=True/metrics.json").read_text())
    settings = runs.load_config(run.root, method="pca", eval__anomaly_map="mse", eval__floor=True)
    assert train.train_and_evaluate(settings, tmp_path).outcome == train.FINISHED
    expected = evaluate.evaluate(tmp_path).metrics
    measured = record["floor"]
    assert (measured["method"], measured["components"]) == ("pca", 32)
    assert measured["training_images"] == 8  # of 12, four are held out
    for name in (*NAMES, *PIXEL_NAMES, "image_f1_max_sum", "pixel_aupimo"):
        assert measured[name] == pytest.approx(expected[name], abs=1e-12), name
        assert f"{name:24s}{record[name]:.4f}" in printed
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert line.endswith(f"   floor {measured[name]:.4f}")
    assert "floor                   PCA with 32 components of 8 training images" in printed
    assert expected["floor"] == {}  # a run that is PCA has no floor
    assert "floor" not in table.format_table(expected)
    report = (run.workdir / "eval_floor=True/report.html").read_text()
    assert "floor (PCA)" in report and f">{measured['image_auroc_sum']:.4f}<" in report
    assert statements.floor(measured) in report


def test_the_other_numbers_stay_as_they_are(run):
    """The floor is a section of its own."""
    first = evaluate.evaluate(run.workdir).metrics
    second = evaluate.evaluate(run.workdir, overrides=WORDS).metrics
    assert first["floor"] == {} and second["floor"]
    for record in (first, second):
        del record["floor"], record["provenance"]
    assert first == second


@pytest.mark.parametrize("colour", [False, True])
def test_it_is_fitted_to_evenly_spaced_images(colour, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (23, 6, 8, 3 if colour else 1), np.uint8)
    settings = config.from_config_dict(
        {"data": {"height": 6, "width": 8, "crop_size": 4}, "baseline": {"pca_components": 3}}
    )
    monkeypatch.setattr(floor, "MAX_IMAGES", 12)
    fitted = floor.fit(settings, images)
    assert fitted.images == 12
    taken = images[::2]
    pixels = np.broadcast_to(taken, (12, 6, 8, 3)).reshape(12, -1) / 255
    oracle = PCA(3).fit(pixels)
    np.testing.assert_allclose(fitted.params["mean"], oracle.mean_, atol=1e-6)
    ours = fitted.params["components"]
    np.testing.assert_allclose(ours @ ours.T, oracle.components_.T @ oracle.components_, atol=1e-5)
    monkeypatch.setattr(floor, "MAX_IMAGES", 23)
    assert floor.fit(settings, images).images == 23


def test_its_config_is_valid_for_every_run():
    """Settings of a run that PCA cannot take, such as a learned map, do not reach the floor."""
    odd = config.from_config_dict(
        {
            "method": "discrepancy",
            "data": {"size": 16, "crop_size": 8},
            "eval": {"anomaly_map": "learned", "apply": "iterate", "iterations": 3},
        }
    )
    simple = floor.fit(odd, np.zeros((2, 16, 16, 1), np.uint8)).config
    methods.check(simple)
    assert config.from_config_dict(simple.to_dict()) == simple
    kept = dataclasses.replace(
        odd.eval, anomaly_map=simple.eval.anomaly_map, apply="once", iterations=1
    )
    assert simple.eval == kept


def test_without_training_images_it_is_left_out(run, tmp_path, capsys):
    copy = runs.clone(run, tmp_path)
    shutil.rmtree(copy.root / "data/train")
    capsys.readouterr()
    assert main.main(["evaluate", f"--workdir={copy.workdir}", *WORDS]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "floor" in line]
    assert str(copy.root / "data/train") in line and "the floor is left out" in line
    assert "floor" not in out.replace("eval_floor", "")
    record = json.loads((copy.workdir / "eval_floor=True/metrics.json").read_text())
    assert record["floor"] == {} and record["image_auroc_sum"] is not None
