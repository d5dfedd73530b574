"""A workdir that version 0.1.0 wrote, with the keys of schema 1, is still evaluated and resumed.

It was made by `pae train --config=configs/smoke.py` with the keys of its config.json, and by
`pae evaluate`; its report, its panels and the lock were deleted.
"""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from data_pipelines import procedural
from data_pipelines.dataset import open_training
from pae_jax import config_file, evaluate, main, unet
from pae_jax.config_schema import RENAMED_METRICS, SCHEMA
from pae_jax.workdir import record

OLD = Path(__file__).parent / "data/workdir_schema_1"
# SHA-256 of the first training image as the PNG file that Pillow wrote then.
PNG = "897993f07fe4ac28af1aa3d60d2c583411dbffc4882f2806903b53bc0371e14c"
# The present names and values of the keys in the old config.json.
SETTINGS = {
    "data.size": 16,
    "data.texture_size": 16,
    "data.crop_size": 12,
    "data.holdout_fraction": 0.1,
    "data.holdout_groups": "none",
    "data.num_threads": 2,
    "corruption.kind": "mixed",
    "corruption.placement": "edges",
    "corruption.clean_fraction": 0.2,
    "model.widths": (4,),
    "model.convs_per_stage": 1,
    "model.branch_width": 4,
    "model.dilation_rates": (1,),
    "model.output": "residual_logit",
    "objective.mask_weight": 0.25,
    "optimizer.learning_rate": 0.05,
    "optimizer.clip_norm": 1.0,
    "optimizer.ema_decay": 0.5,
    "train.steps": 3,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.validate_every": 3,
    "train.checkpoint_every": 3,
    "train.panel_every": 3,
    "train.keep_checkpoints": 1,
    "train.validation_examples": 4,
    "train.tensorboard": False,
    "sharding.data_parallel": 1,
    "eval.anomaly_map": "mse",
    "eval.smoothing_fraction": 0.125,
    "eval.image_score": "topk",
    "eval.topk_fraction": 0.05,
    "eval.apply": "iterate",
    "eval.iterations": 2,
    "eval.fixed_point_tolerance": 0.002,
    "eval.max_steps": 8,
    "eval.bootstrap_resamples": 20,
    "eval.bootstrap_seed": 1,
}
# Diagnostics (old names) of the crops of normal images, which have a random stream of their own
# since 0.2.0.
REDRAWN = ("tangent_defect", "normal_dominance")
WORDS = [f"--config.{key}={value}" for key, value in SETTINGS.items()]

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture
def workdir(tmp_path) -> Path:
    workdir = tmp_path / "run"
    shutil.copytree(OLD, workdir)
    png = procedural.training_items("", "weave")[0].image()
    if hashlib.sha256(png).hexdigest() != PNG:
        # Another Pillow compresses the same pixels into other bytes, and the fingerprint is over
        # the bytes.
        spec = record.read_config(workdir).data.spec
        data = json.loads((workdir / "data.json").read_text())
        data["fingerprint"] = open_training(spec, holdout_fraction=0.1, seed=0).fingerprint
        (workdir / "data.json").write_text(json.dumps(data))
    return workdir


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture
def old_output(monkeypatch):
    """The residual output of 0.1.0, which clipped the image and had no derivative at 0 and 255."""

    def residual_logit(y, x):
        return nn.sigmoid(y + jax.scipy.special.logit(jnp.clip(x, unet.EDGE, 1 - unet.EDGE)))

    monkeypatch.setitem(unet.OUTPUTS, "residual_logit", residual_logit)
    # Programs that were traced with the present output are not used, nor kept for later.
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_the_old_configuration_reads_as_the_present_one():
    assert record.read_config(OLD) == config_file.load("smoke", WORDS)


def test_evaluate(workdir, old_output, monkeypatch):
    def open_test(*arguments, **options):
        # The old version took the pixels of two defects that vanish at 16×16 for normal ones.
        test = evaluate_open_test(*arguments, **options)
        assert np.sum(~test.has_pixel_labels) == 2
        return test._replace(has_pixel_labels=np.ones(len(test.names), bool))

    evaluate_open_test = evaluate.open_test
    monkeypatch.setattr(evaluate, "open_test", open_test)
    assert main.main(["evaluate", f"--workdir={workdir}"]) == 0
    old, new = read(OLD / "eval/metrics.json"), read(workdir / "eval/metrics.json")
    assert new["schema"] == SCHEMA
    assert new["provenance"]["config"] == json.loads(json.dumps(record.read_config(OLD).to_dict()))
    # Other versions of JAX and NumPy round differently, which may swap neighbours in a ranking.
    compared = 0
    for key, value in old.items():
        if isinstance(value, float):
            assert new[key] == pytest.approx(value, abs=1e-5), key
            compared += 1
    assert compared >= 14
    for name, value in old["diagnostics"].items():
        if name in REDRAWN:
            assert new["diagnostics"][RENAMED_METRICS.get(name, name)] > 0
            continue
        new_value = new["diagnostics"][RENAMED_METRICS.get(name, name)]
        assert new_value == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for kind, values in old["per_type"].items():
        assert new["per_type"][kind] == pytest.approx(values, abs=1e-5)
    for name in ("score", "pixel"):
        assert new["threshold"][name] == pytest.approx(old["threshold"][name], rel=1e-4)
    scores = rows(workdir / "eval/scores.csv")
    for name, row in rows(OLD / "eval/scores.csv").items():
        for score in ("score_sum", "score_max", "score_topk"):
            assert float(scores[name][score]) == pytest.approx(float(row[score]), rel=1e-3)


def test_predict(workdir, old_output, tmp_path):
    names = {"good/000.png", "cut/001.png", "spot/003.png"}
    for item in procedural.test_items("", "weave"):
        if item.name in names:
            path = tmp_path / "images" / item.name
            path.parent.mkdir(parents=True)
            path.write_bytes(item.image())
    before = (workdir / "thresholds.json").read_bytes()
    words = [f"--images={tmp_path / 'images'}", f"--out={tmp_path / 'out'}"]
    assert main.main(["predict", f"--workdir={workdir}", *words]) == 0
    # The thresholds are those that the old version chose with the same settings.
    assert (workdir / "thresholds.json").read_bytes() == before
    old, new = rows(OLD / "eval/scores.csv"), rows(tmp_path / "out/scores.csv")
    assert set(new) == names
    for name, row in new.items():
        assert float(row["score_topk"]) == pytest.approx(float(old[name]["score_topk"]), rel=1e-3)
        assert row["defective"] == old[name]["defective"]


def test_training_is_resumed_with_the_same_configuration_only(workdir, capsys):
    words = ["train", "--config=smoke", f"--workdir={workdir}", *WORDS]
    assert main.main([*words, "--config.objective.mask_weight=0.5"]) == 2
    assert "objective.mask_weight is 0.25 there and 0.5 now" in capsys.readouterr().err
    assert main.main(words) == 0
    assert "finished at step 3" in capsys.readouterr().out
    assert read(workdir / "config.json")["schema"] == SCHEMA
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
