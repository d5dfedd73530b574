"""`pae export`: one program for all platforms, equal to `detection`, that needs JAX alone."""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export

import runs
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax import detection, main, train_step
from pae_jax.config import METHODS, Config, DataConfig, EvalConfig, ModelConfig
from pae_jax.deployment import export, program, stablehlo
from pae_jax.devices import hardware
from pae_jax.workdir import files, trained_model

PAGE = Path(__file__).parents[1] / "docs/deployment.md"
# What `pip install jax flatbuffers` installs.
JAX_ALONE = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "flatbuffers")
NETWORK = ModelConfig(
    widths=(24,),  # wide enough for the forms of a CPU
    convs_per_stage=1,
    bottleneck_layers=1,
    branch_width=4,
    dilation_rates=(1,),
    dilated_kernel_size=3,
)
SHAPE = (16, 16, 3)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The program of the finished run."""
    return export.export(trained.workdir, tmp_path_factory.mktemp("exported") / "model.stablehlo")


def sidecar(path: Path) -> dict:
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def small(**changes: object) -> Config:
    config = Config(data=DataConfig(source="procedural", height=16, width=16), model=NETWORK)
    return program.settings(dataclasses.replace(config, **changes))


def draw(config: Config):
    """Returns parameters of a method, drawn without compiling anything; no image is fitted."""
    shapes = jax.eval_shape(lambda: train_step.init_state(config, jax.random.key(0)).eval_params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_the_program_gives_what_detection_gives(exported, trained, count):
    model = trained_model.load(trained.workdir)
    images = program.trial_images(count, (*model.config.data.shape, model.channels))
    if count > 1:  # black and white are among them
        assert images[0].max() == 0 and images[1].min() == 255
    outputs = stablehlo.load(exported.read_bytes())(images)
    expected = list(detection.detect_all(model.params, images, model.config))
    maps = np.stack([result.map for result in expected])
    np.testing.assert_allclose(outputs["map"], maps, rtol=0, atol=1e-5)
    for name in detection.REPORTED_SCORES:
        scores = [result.scores[name] for result in expected]
        np.testing.assert_allclose(outputs[f"score_{name}"], scores, rtol=1e-5, atol=1e-5)


def test_the_sidecar_describes_the_program(exported, trained):
    model = trained_model.load(trained.workdir)
    record, content = sidecar(exported), exported.read_bytes()
    assert record["file"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["input"]["shape"] == [*model.config.data.shape, model.channels]
    chosen = trained_model.thresholds(trained.workdir, model)
    assert record["thresholds"] | chosen._asdict() == record["thresholds"]
    assert record["thresholds"]["decides"] == "score_sum"
    assert record["readers"]["platforms"] == ["cpu", "cuda", "tpu"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["readers"]["stablehlo"])
    assert 0 <= record["deviation"]["map"] <= record["deviation"]["limit"] == 1e-5
    assert record["provenance"]["config"] == json.loads(files.to_json(model.config.to_dict()))


def link_packages(names: tuple[str, ...], folder: Path) -> None:
    """Links the files of installed packages into a folder."""
    for name in names:
        package = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(str(package.locate_file(top)))


def test_the_example_of_the_page_runs_with_jax_alone(exported, trained, tmp_path):
    code = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    packages, work = tmp_path / "packages", tmp_path / "work"
    packages.mkdir()
    work.mkdir()
    link_packages(JAX_ALONE, packages)
    model = trained_model.load(trained.workdir)
    images = program.trial_images(3, (*model.config.data.shape, model.channels))
    np.save(work / "images.npy", images)
    for file in (exported, exported.with_name(f"{exported.name}.json")):
        (work / file.name).write_bytes(file.read_bytes())
    # The interpreter of this environment without its packages.
    script = f"""
import sys
sys.path.append({str(packages)!r})
for name in ("flax", "orbax", "PIL", "pae_jax"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{{name}} is here")
{code}
result = detect(np.load("images.npy"))
np.savez("results.npz", **result)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The two lines that the example prints for two black images.
    black = detection.detect_all(model.params, np.zeros_like(images[:2]), model.config)
    chosen = trained_model.thresholds(trained.workdir, model)
    decisions, pixels = zip(
        *((r.scores["sum"] > chosen.score, (r.map > chosen.pixel).sum()) for r in black),
        strict=True,
    )
    assert done.stdout.splitlines() == [str(np.array(decisions)), str(np.array(pixels))]
    with np.load(work / "results.npz") as outputs:
        for i, result in enumerate(detection.detect_all(model.params, images, model.config)):
            np.testing.assert_allclose(outputs["map"][i], result.map, rtol=0, atol=1e-5)
            for name, value in result.scores.items():
                assert outputs[f"score_{name}"][i] == pytest.approx(value, rel=1e-5, abs=1e-5)


def count_operations(text: str) -> dict[str, int]:
    names = ("stablehlo.convolution", "stablehlo.reduce_window")
    return {name: len(re.findall(rf"\b{re.escape(name)}\b", text)) for name in names}


def test_every_platform_has_its_own_forms():
    config = small()
    params, images = draw(config), jax.ShapeDtypeStruct((2, *SHAPE), np.uint8)
    platforms = list(stablehlo.PLATFORMS)
    content = stablehlo.serialise(params, config, SHAPE)
    together = count_operations(jax_export.deserialize(bytearray(content)).mlir_module())
    alone = []
    for form in stablehlo.PLATFORMS.values():
        # Lowered for all platforms too, because some operations are written once for each of them.
        of_form = jax_export.export(jax.jit(program.make(config, form)), platforms=platforms)
        alone.append(count_operations(of_form(params, images).mlir_module()))
    assert len({tuple(counts.values()) for counts in alone}) == 3
    assert together == {name: sum(counts[name] for counts in alone) for name in together}
    # The platform of this process plays no part.
    with hardware.building_for("tpu"):
        elsewhere = stablehlo.serialise(params, config, SHAPE)
    assert count_operations(jax_export.deserialize(bytearray(elsewhere)).mlir_module()) == together


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exported_for_any_number_of_images(method):
    config = small(method=method)
    content = stablehlo.serialise(draw(config), config, SHAPE)
    called = jax_export.deserialize(bytearray(content))
    for count in (1, 5):
        outputs = jax.eval_shape(called.call, jax.ShapeDtypeStruct((count, *SHAPE), np.uint8))
        assert outputs["map"].shape == (count, 16, 16)
        assert {value.shape for name, value in outputs.items() if name != "map"} == {(count,)}


@pytest.mark.parametrize(
    "settings",
    [
        EvalConfig(apply="fixed_point", max_steps=3, anomaly_map="msgms"),
        EvalConfig(apply="tangent", anomaly_map="gms", smoothing="mean"),
    ],
    ids=lambda settings: f"{settings.apply}-{settings.anomaly_map}",
)
def test_other_settings_agree_too(settings):
    narrow = dataclasses.replace(NETWORK, widths=(4,), norm="none")  # compiles sooner
    config = small(eval=settings, model=narrow)
    params = draw(config)
    run = stablehlo.load(stablehlo.serialise(params, config, SHAPE))
    assert max(program.deviation(run, params, config, program.trial_images(3, SHAPE))) <= 1e-5


def test_a_deviation_is_the_largest_difference():
    config = small(method="pca")
    params, images = draw(config), program.trial_images(4, SHAPE)
    outputs = jax.device_get(jax.jit(program.make(config, "cpu"))(params, images))

    def run(change):
        changed = {name: value.copy() for name, value in outputs.items()}
        change(changed)
        return program.deviation(lambda _: changed, params, config, images)

    def move_pixel(values):
        values["map"][1, 2, 3] += 0.25

    def move_scores(values):
        values["score_sum"] = values["score_sum"] * 1.5

    def lose(values):
        values["score_max"][0] = np.nan

    assert run(lambda _: None) == pytest.approx((0, 0), abs=1e-6)
    assert run(move_pixel) == pytest.approx((0.25, 0), abs=1e-6)
    assert run(move_scores).score == pytest.approx(0.5, abs=1e-6)
    assert run(lose).score == np.inf


def test_a_program_that_deviates_is_not_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "deviation", lambda *_: program.Deviation(2e-5, 0.0))
    with pytest.raises(BadInput, match=r"model: not written, .* by 2e-05 \(map\)"):
        export.export(trained.workdir, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_no_sidecar_stays_without_its_program(exported, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "deviation", lambda *_: program.Deviation(0.0, 0.0))
    write = files.write_atomically

    def full(path, content):
        if path.name == "model":
            raise CannotWrite(path, OSError(28, "No space left on device"))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", full)
        with pytest.raises(CannotWrite, match="No space left"):
            export.export(trained.workdir, tmp_path / "model")
        assert not list(tmp_path.iterdir())
        # A process that is killed there removes nothing. The same command then ends.
        patch.setattr(files, "remove", lambda path: None)
        with pytest.raises(CannotWrite, match="No space left"):
            export.export(trained.workdir, tmp_path / "model")
    assert (tmp_path / "model.json").exists()
    path = export.export(trained.workdir, tmp_path / "model")
    assert sidecar(path)["file"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.json"}
    # The bytes do not depend on where the program was called, and tell no folder of this machine.
    assert path.read_bytes() == exported.read_bytes()
    assert b".py" not in path.read_bytes()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--out=taken"], "taken: exists; results are never overwritten"),
        (["--out=beside"], "beside.json: exists; results are never overwritten"),
        (["--out=m", "--format=tflite"], "--format=tflite: stablehlo or onnx"),
        (["--out=m.onnx"], "m.onnx: --format=stablehlo writes no ONNX; add --format=onnx"),
        (["--out=m.onnx", "--format=onnx"], "needs the package jax2onnx; install it in an env"),
        (["--out=m", "--config.train.steps=5"], "only --config.eval.KEY=VALUE can be set"),
    ],
)
def test_refusals(words, named, trained, tmp_path, monkeypatch, capsys):  # noqa: PLR0917
    monkeypatch.chdir(tmp_path)
    for name in ("taken", "beside.json"):
        Path(name).write_text("mine")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "jax2onnx" else find(name, *rest),
    )
    assert main.main(["export", f"--workdir={trained.workdir}", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pae export: ") and named in line
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "beside.json"}


def test_the_command_prints_the_path(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "deviation", lambda *_: program.Deviation(0.0, 0.0))
    out, run = tmp_path / "new/model", runs.clone(trained, tmp_path)  # thresholds are added to it
    words = ["--config.eval.image_score=max", "--config.eval.apply=iterate"]
    assert main.main(["export", f"--workdir={run.workdir}", f"--out={out}", *words]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sidecar(out)["thresholds"]["decides"] == "score_max"
