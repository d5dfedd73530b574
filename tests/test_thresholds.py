"""The thresholds in the workdir: what they are chosen from, and when that is used again."""

import json
import shutil
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
import pytest

import runs
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax import main, predict, train
from pae_jax.anomaly_map import Calibration
from pae_jax.config import EvalConfig
from pae_jax.config_schema import RENAMED
from pae_jax.detection import HeldOut, choose_thresholds
from pae_jax.workdir import calibration, files, thresholds, trained_model

# Settings that no score depends on, or by which a threshold is chosen when it is read.
FREE = (
    *("batch_size=2", "bootstrap_seed=5", "bootstrap_resamples=0", "native_size=True"),
    *("diagnostics=True", "aupro_limit=0.1", "false_positive_rate=0.4", "image_score=max"),
    *("max_steps=9", "solver=anderson", "fixed_point_tolerance=0.1"),
)
NEEDED = (
    *("anomaly_map=mse", "smoothing=none", "smoothing_fraction=0.2", "topk_fraction=0.3"),
    "apply=iterate",
)


def load(workdir: Path, *words: str) -> trained_model.Model:
    return trained_model.load(workdir, [f"--config.eval.{word}" for word in words])


def without_images() -> NoReturn:
    raise BadInput("the training images are needed")


@pytest.mark.parametrize("word", FREE)
def test_what_has_no_part_in_the_scores_needs_no_images(trained, word):
    before = (trained.workdir / "thresholds.json").read_bytes()
    model = load(trained.workdir, word)
    found = trained_model.thresholds(trained.workdir, model, without_images)
    assert found.false_positive_rate == model.config.eval.false_positive_rate
    assert (trained.workdir / "thresholds.json").read_bytes() == before


@pytest.mark.parametrize("word", NEEDED)
def test_what_the_scores_depend_on_needs_the_images_once(trained, tmp_path, word):
    workdir = runs.clone(trained, tmp_path).workdir
    with pytest.raises(BadInput, match=r"are needed; .* --config\.data\.root=DIR names"):
        trained_model.thresholds(workdir, load(workdir, word), without_images)
    first = trained_model.thresholds(workdir, load(workdir, word))
    assert trained_model.thresholds(workdir, load(workdir, word), without_images) == first
    # Those of the run's own settings are still there.
    trained_model.thresholds(workdir, load(workdir), without_images)


def test_the_settings_of_the_chosen_application_count():
    settings = runs.load_config(Path("x")).eval
    for apply, keys in {
        "once": set(),
        "iterate": {"iterations"},
        "fixed_point": {"solver", "fixed_point_tolerance", "max_steps"},
    }.items():
        object.__setattr__(settings, "apply", apply)
        own = set(thresholds.dependencies(settings)) - set(thresholds._ALWAYS)
        assert own == keys


def test_what_is_stored_of_a_map_before_it_changed_is_not_used(tmp_path):
    """Statistics of other values would judge the maps of this version without a word."""
    settings = EvalConfig(anomaly_map="ssim+logit@0.5", calibration="all")
    scores = {name: [1.0, 2.0, 3.0] for name in ("sum", "max", "topk")}
    held_out = HeldOut(scores, [1.0, 2.0, 3.0])
    calibrated = Calibration(*np.ones((2, 4, 4, 2), np.float32))
    params, step = {"w": np.ones(2)}, 3
    thresholds.write(tmp_path, params, step, settings, held_out)
    calibration.write(tmp_path, params, step, settings, calibrated, images=3)
    assert thresholds.read(tmp_path, params, step, settings)
    assert calibration.read(tmp_path, params, step, settings, (4, 4))

    revisions = thresholds._REVISIONS
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(revisions, "logit", revisions["logit"] + 1)
        assert thresholds.read(tmp_path, params, step, settings) is None
        assert calibration.read(tmp_path, params, step, settings, (4, 4)) is None
        # The file stays valid when another map changes.
        patch.setitem(revisions, "logit", revisions["logit"] - 1)
        patch.setitem(revisions, "mse", 5)
        assert thresholds.read(tmp_path, params, step, settings)


def test_training_ends_with_the_thresholds_of_the_evaluation(trained, tmp_path):
    workdir = runs.clone(trained, tmp_path).workdir
    stored = files.read_json(workdir / "thresholds.json")
    (workdir / "thresholds.json").unlink()
    trained_model.thresholds(workdir, load(workdir))
    assert files.read_json(workdir / "thresholds.json") == stored
    (entry,) = stored["held_out"]
    held_out = files.read_json(workdir / "data.json")["held_out_names"]
    assert len(entry["maxima"]) == len(entry["scores"]["sum"]) == len(held_out)


def test_another_model_never_uses_them(trained, tmp_path):
    """In the same folder, trained again or further, or with other parameters at the same step."""
    run = runs.clone(trained, tmp_path)
    before = files.read_json(run.workdir / "thresholds.json")
    model = load(run.workdir)
    other = model._replace(params=jax.tree.map(lambda leaf: leaf * 1.01, model.params))
    for changed in (other, model._replace(step=model.step + 1)):
        with pytest.raises(BadInput, match="are needed"):
            trained_model.thresholds(run.workdir, changed, without_images)
    config = runs.load_config(run.root, train__steps=40)
    assert train.train_and_evaluate(config, run.workdir).step == 40
    further = files.read_json(run.workdir / "thresholds.json")
    assert further["model"]["step"] == 40
    assert further["held_out"] != before["held_out"]

    # An earlier training that ended before the file was written again.
    shutil.rmtree(run.workdir / "checkpoints")
    config = runs.load_config(run.root, train__seed=1, train__steps=10)
    files.write_json(run.workdir / "thresholds.json", {**further, "schema": 1})
    train.train_and_evaluate(config, run.workdir)
    again = files.read_json(run.workdir / "thresholds.json")
    assert again["model"]["step"] == 10
    assert len(again["held_out"]) == 1


def test_predicting_needs_the_workdir_alone(trained, tmp_path, monkeypatch):
    """Neither the training images nor a place to write."""
    run = runs.clone(trained, tmp_path)
    shutil.move(run.root / "data/test/good", tmp_path / "new")
    shutil.rmtree(run.root)
    write = thresholds.write_json

    def write_json(path, value):
        if path.is_relative_to(run.workdir):
            raise CannotWrite(path, OSError(30, "Read-only file system"))
        write(path, value)

    monkeypatch.setattr(thresholds, "write_json", write_json)
    for i, words in enumerate(
        ([], ["--config.eval.false_positive_rate=0.2"], ["--config.eval.batch_size=2"])
    ):
        scores = predict.predict(run.workdir, tmp_path / "new", tmp_path / f"{i}", overrides=words)
        assert scores.is_file()


def test_a_read_only_workdir_can_be_asked_for_other_maps(trained, tmp_path, monkeypatch, messages):
    def write_json(path, _):
        raise CannotWrite(path, OSError(30, "Read-only file system"))

    model = load(trained.workdir, "anomaly_map=mse")
    monkeypatch.setattr(thresholds, "write_json", write_json)
    found = trained_model.thresholds(trained.workdir, model)
    assert np.isfinite(found.score)
    (line,) = [line for line in messages if "thresholds" in line]
    assert "Read-only file system" in line


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        '{"schema": 2}',
        '{"schema": 2, "model": null, "held_out": [1]}',
        '{"schema": "x"}',
    ],
)
def test_a_damaged_file_is_named_and_replaced_by_training(trained, tmp_path, content, capsys):
    run = runs.clone(trained, tmp_path)
    path = run.workdir / "thresholds.json"
    model = load(run.workdir)
    if '"model": null' in content:
        content = content.replace("null", json.dumps(thresholds.identify(model.params, model.step)))
    path.write_text(content)
    if content == '{"schema": 2}':  # those of no model
        assert trained_model.thresholds(run.workdir, model)
        return
    words = ["predict", f"--workdir={run.workdir}", f"--images={run.root / 'data/test'}"]
    assert main.main([*words, f"--out={tmp_path / 'out'}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"pae predict: {path}: ")
    train.train_and_evaluate(runs.load_config(run.root), run.workdir)
    assert "model" in files.read_json(path)


def test_those_of_an_older_schema_are_read(trained, tmp_path):
    """The file of schema 1 has the old names of the settings, and no key "schema"."""
    run = runs.clone(trained, tmp_path)
    model = load(run.workdir)
    path = run.workdir / "thresholds.json"
    limits = trained_model.thresholds(run.workdir, model)._replace(score=123.0)
    settings = model.config.to_dict()["eval"]
    del settings["apply"]  # "once" is said by iterations = 1
    for old, new in RENAMED.items():
        if old.startswith("eval."):
            settings[old.removeprefix("eval.")] = settings.pop(new.removeprefix("eval."))
    record = {"eval": settings, "step": model.step, "thresholds": limits._asdict()}
    files.write_json(path, record)
    assert trained_model.thresholds(run.workdir, model) == limits
    settings["score"] = "max"
    files.write_json(path, record)
    assert trained_model.thresholds(run.workdir, model) != limits
    assert "model" in files.read_json(path)


def test_the_rule():
    settings = runs.load_config(
        Path("x"), eval__false_positive_rate=0.25, eval__image_score="max"
    ).eval
    scores = {"sum": [0.0] * 5, "max": [5.0, 1.0, 4.0, 2.0, 3.0], "topk": [0.0] * 5}
    found = choose_thresholds(HeldOut(scores, [0.1, 0.5, 0.2, 0.3, 0.4]), settings)
    # One of five may exceed them: the next observed value, not an interpolated one.
    assert found == (4.0, 0.4, 5, 0.25)
