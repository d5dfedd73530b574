"""`pae export --format=onnx`, where jax2onnx is installed; it has an environment of its own."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.errors import BadInput
from pae_jax import train_step
from pae_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from pae_jax.deployment import onnx, program

pytest.importorskip("jax2onnx", reason="needs an environment of its own (docs/deployment.md)")

SHAPE = (16, 16, 1)
CONFIG = program.settings(
    Config(
        data=DataConfig(source="procedural", height=16, width=16, augmentation="flips"),
        model=ModelConfig(widths=(24,), branch_width=8, dilation_rates=(1, 2)),
    )
)


def draw(config: Config):
    """Returns parameters of a method, drawn without compiling anything; no image is fitted."""
    shapes = jax.eval_shape(lambda: train_step.init_state(config, jax.random.key(0)).eval_params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)


@pytest.fixture(scope="module")
def content():
    return onnx.serialise(draw(CONFIG), CONFIG, SHAPE)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_the_model_gives_what_detection_gives(content, count, capsys):
    images = program.trial_images(count, SHAPE)
    found = program.deviation(onnx.load(content), draw(CONFIG), CONFIG, images)
    with capsys.disabled():
        print(f"\n| onnx | {count} | {found.map:.1e} | {found.score:.1e} |")
    assert max(found) <= onnx.TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"eval": EvalConfig(symmetries=True)},
        {"eval": EvalConfig(apply="tangent", anomaly_map="gms")},
        {"eval": EvalConfig(anomaly_map="mse", smoothing="mean")},
        {"method": "inpainting"},
    ],
    ids=["symmetries", "tangent", "mse", "inpainting"],
)
def test_other_settings(changes):
    config = dataclasses.replace(CONFIG, **changes)
    run = onnx.load(onnx.serialise(draw(config), config, SHAPE))
    images = program.trial_images(3, SHAPE)
    assert max(program.deviation(run, draw(config), config, images)) <= onnx.TOLERANCE


def test_a_model_that_the_runtime_refuses_is_one_line(content):
    cut = content[:-100]
    with pytest.raises(BadInput, match=r"^--format=onnx: onnxruntime cannot run the translation"):
        onnx.load(cut)(program.trial_images(1, SHAPE))


def test_the_sidecar_names_versions(content):
    versions = onnx.requirements(content)
    assert versions["packages"] == ["onnxruntime"]
    assert versions["opsets"]["ai.onnx"] >= 13


def test_an_operation_without_translation_is_one_line():
    # The loop of the fixed point writes its trace by a scatter.
    config = dataclasses.replace(CONFIG, eval=EvalConfig(apply="fixed_point"))
    line = r"^--format=onnx: the method projection with eval.apply=fixed_point .*\(scatter .*\)"
    with pytest.raises(BadInput, match=line):
        onnx.serialise(draw(config), config, SHAPE)
