"""The smallest runs of the benchmarks and experiments; equality of the networks of step.py."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from pae_jax import evaluate, unet
from pae_jax.config import ModelConfig
from pae_jax.workdir import record, trained_model

ROOT = Path(__file__).parents[1]
BENCHMARKS, EXPERIMENTS = ROOT / "benchmarks", ROOT / "experiments"
WITH_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: the extra bench"
)
TINY = ("--widths", "4", "--rounds", "1")


def run(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    environment = runs.environment() | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def numbers(process: subprocess.CompletedProcess, pattern: str) -> list[float]:
    """Returns what the pattern's only group matches on stdout."""
    assert process.returncode == 0, process.stderr
    return [float(text) for text in re.findall(pattern, process.stdout, re.MULTILINE)]


@pytest.mark.parametrize("name", ["step", "pipeline", "predict"])
def test_help_names_every_option_of_the_usage_line(name):
    process = run(name, "--help")
    assert process.returncode == 0, process.stderr
    shown = process.stdout.split("usage:")[1]
    usage, options = shown.split("\noptions:\n")
    named = set(re.findall(r"\[(--\w+)", usage))
    assert {"--rounds", "--widths", "--batch" + "es" * (name == "predict")} <= named
    assert all(option in options for option in named)


def test_step_times_jax_alone():
    process = run("step", "--only", "jax", "--sizes", "8", "16", "--norm", "none", *TINY)
    milliseconds = numbers(process, r"^jax +float32 +([\d.]+)")
    assert len(milliseconds) == 2
    assert min(milliseconds) > 0


def test_step_refuses_sizes_that_the_poolings_do_not_divide():
    process = run("step", "--only", "jax", "--sizes", "10", "--widths", "4", "4")
    assert process.returncode == 2
    assert "--sizes 10" in process.stderr


@WITH_TORCH
def test_step_compares_and_gives_a_ratio():
    words = ("--only", "jax", "torch eager", "--sizes", "8", "--norm", "none")
    process = run("step", *words, *TINY, "--threads", "1")
    assert numbers(process, r"^jax / torch eager \w+: ([\d.]+)")[0] > 0


def test_pipeline_measures_batches_and_steps():
    small = ("--images", "6", "--textures", "3", "--png", "24", "--size", "8")
    process = run("pipeline", *small, "--batch", "2", "--steps", "2", *TINY)
    assert numbers(process, r"^warm: batches/s +([\d.]+)")[0] > 0
    assert numbers(process, r"^step alone: steps/s +([\d.]+)")[0] > 0
    assert 0 <= numbers(process, r"^waiting.* ([\d.]+)$")[0] <= 1


def test_predict_measures_with_and_without_files(compilation_cache):
    small = ("--images", "8", "--png", "24", "--size", "8", "--batches", "1", "2")
    process = run("predict", *small, *TINY)
    without, _, files = process.stdout.partition("with files")
    assert process.returncode == 0, process.stderr
    assert re.findall(r"^\| (\d+) \| jax \|", without, re.MULTILINE) == ["1", "2"]
    assert re.search(r"^\| 1 \| jax \|", files, re.MULTILINE)
    assert re.findall(r"^\| jax, (\w+) \| [\d.]+ \|", files, re.MULTILINE) == ["cold", "warm"]


def test_layouts_time_resident_data():
    small = ("--size", "8", "--batch", "2", "--images", "4", "--only", "resident")
    process = run("layouts", *small, *TINY)
    assert numbers(process, r"^resident +([\d.]+)")[0] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_metrics_agree_with_the_transcription():
    process = run("metrics", "--images", "4", "--sizes", "32", "--kinds", "smooth")
    seconds_memory_ratio = r"(?:[\d.]+ +){3}"
    ours, exact = (
        numbers(process, rf"^32 +smooth +{name} +{seconds_memory_ratio}([\d.]+)")
        for name in ("ours", "float64")
    )
    assert len(ours) == 1
    assert ours == pytest.approx(exact, abs=1e-6)


# A small run of the experiment: 16 × 16 pixels, four steps.
OVERFITTING = (
    f"--config={runs.CONFIGS / 'smoke.py'}",
    *(
        f"--config.{key}={value}"
        for key, value in runs.SETTINGS.items()
        if key.startswith(("model.", "sharding.", "data.size", "data.texture_size"))
    ),
    "--config.data.augmentation=none",  # because it compiles fast
    "--config.corruption.mask=boxes",
    "--config.train.validation_examples=8",
    "--config.train.tensorboard=False",
    "--images=5",
    "--steps=4",
)


@pytest.fixture
def overfitting(monkeypatch, tmp_path):
    """A function that runs the experiment in this process: words → exit code."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    module = importlib.import_module("overfitting")
    monkeypatch.setattr(module.process, "start", lambda: None)
    monkeypatch.setattr(module.checkpoint, "silence_background_errors", lambda: None)

    def call(*words: str) -> int:
        command = ["overfitting.py", *OVERFITTING, f"--workdir={tmp_path}", *words]
        monkeypatch.setattr("sys.argv", command)
        return module.main()

    return call


def test_overfitting_end_to_end(overfitting, tmp_path, capsys, compilation_cache):
    assert overfitting("--points", "2", "4") == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "overfitting.json").read_text())
    assert [(row["method"], row["step"]) for row in results["rows"]] == [
        (method, step) for method in ("projection", "segmentation") for step in (2, 4)
    ]
    for row in results["rows"]:
        for name in ("training", "held_out", "unseen", "real"):
            assert 0 < row[f"pixel_ap_{name}"] <= 1
        assert all(0 <= row[f"image_auroc_{kind}_real"] <= 1 for kind in ("sum", "max", "topk"))
        assert (row["on_manifold_bias_held_out"] is not None) == (row["method"] == "projection")
    assert results["counts"]["training_images"] == 5

    # The last point is the end of the run, so it must agree with validation and `pae evaluate`.
    for method, row in zip(("projection", "segmentation"), results["rows"][1::2], strict=True):
        workdir = tmp_path / method
        *_, last = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        for name in ("loss", "pixel_ap"):
            assert row[f"{name}_held_out"] == pytest.approx(last[f"validation/{name}"], rel=1e-4)
        without = ("--config.eval.bootstrap_resamples=0", "--config.eval.diagnostics=False")
        measured = evaluate.evaluate(workdir, overrides=without).metrics
        for name in ("image_auroc_sum", "image_auroc_max", "image_auroc_topk", "pixel_ap"):
            assert row[f"{name}_real"] == pytest.approx(measured[name], abs=1e-3)
        # The split is opened again with the same number of images.
        assert len(trained_model.open_split(workdir, record.read_config(workdir)).images) == 5
    first, second = (record.read_config(tmp_path / m) for m in ("projection", "segmentation"))
    assert dataclasses.replace(first, method="segmentation") == second
    assert second.optimizer.schedule == "constant"  # smoke.py says cosine

    text = (tmp_path / "overfitting.md").read_text()
    for written in (text, (tmp_path / "overfitting.json").read_text()):
        assert str(tmp_path) not in written
        assert str(ROOT) not in written
    assert text in printed
    assert text.count("\n| 2 |") == text.count("\n| 4 |") == 2
    assert (tmp_path / "overfitting.png").read_bytes().startswith(b"\x89PNG")

    # With other points of the same runs nothing is trained again.
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/*")}
    assert overfitting("--points", "2") == 0
    rows = json.loads((tmp_path / "overfitting.json").read_text())["rows"]
    assert rows == results["rows"][::2]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/*")}
    assert len(trained) >= 4
    assert times == trained
    # Other settings are refused in this folder.
    assert overfitting("--points", "2", "4", "--images=6") == 2
    assert "data.max_images is 5 there and 6 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--points", "2", "3"), "--points: multiples of the first one, not 2 3"),
        (("--points", "2", "8"), "--points: ascending, from 1 to --steps=4, not 2 8"),
        ((), "--points: required, because 32 does not divide --steps=4"),
        (
            ("--points", "2", "--config.train.keep_checkpoints=1"),
            "train.keep_checkpoints: set by the experiment",
        ),
        (("--points", "2", "--config.corruption.kind=cutpaste"), "corruption.kind: cutpaste"),
        (("--points", "2", "--images=-1"), "data.max_images: at least 0"),
    ],
    ids=str,
)
def test_overfitting_refuses_before_any_work(overfitting, tmp_path, capsys, words, line):
    assert overfitting(*words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"overfitting.py: {line}")
    assert not [*tmp_path.iterdir()]


def test_overfitting_shortens_absolute_paths(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    shorten = importlib.import_module("overfitting").without_folders
    assert shorten("--config.data.root=/home/me/tile") == "--config.data.root=tile"
    assert shorten("/home/me/tile/") == "tile/"
    assert shorten("tfds:~/data/dtd") == "tfds:dtd"
    same = ["builtin", "", "--config=configs/mvtec.py:screw", "--config.data.root=here/tile"]
    assert [shorten(text) for text in same] == same


@WITH_TORCH
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "none"},
        {"norm": "instance", "patch_size": 2},
        {"norm": "layer", "dilated_kernel_size": 5},
    ],
    ids=str,
)
def test_the_pytorch_network_takes_the_same_step(monkeypatch, changes):
    monkeypatch.syspath_prepend(BENCHMARKS)
    step = importlib.import_module("step")
    settings = {
        "widths": (8, 16),
        "branch_width": 8,
        "dilation_rates": (1, 2),
        "dilated_kernel_size": 3,
        **changes,
    }
    config = ModelConfig(**settings)
    batch = step.make_batch(16, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    errors = step.differences(config, params, batch)
    assert errors.keys() == step.TOLERANCES.keys()
    for name, limit in step.TOLERANCES.items():
        assert errors[name] <= limit, (name, errors)


@WITH_TORCH
def test_a_changed_pytorch_network_is_noticed(monkeypatch):
    """The comparison fails if one kernel is larger by a thousandth."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    step, step_torch = importlib.import_module("step"), importlib.import_module("step_torch")
    config = ModelConfig(widths=(4,), branch_width=4, dilation_rates=(1,), dilated_kernel_size=3)
    batch = step.make_batch(8, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    load = step_torch.load

    def spoil(module, variables):
        load(module, variables)
        module.Conv_0.weight.data *= 1.001

    monkeypatch.setattr(step_torch, "load", spoil)
    errors = step.differences(config, params, batch)
    assert errors["output"] > step.TOLERANCES["output"]


@WITH_TORCH
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_memory_layouts_give_the_same_loss(monkeypatch, layout):
    monkeypatch.syspath_prepend(BENCHMARKS)
    step, step_torch = importlib.import_module("step"), importlib.import_module("step_torch")
    config = ModelConfig(
        widths=(4, 8), branch_width=4, dilation_rates=(1, 2), dilated_kernel_size=3
    )
    batch = step.make_batch(16, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    _, take = step_torch.make_step(config, params, batch, layout=layout)
    np.testing.assert_allclose(take(), step.loss(params, batch, config), rtol=1e-5)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    module = importlib.import_module("recipe")
    monkeypatch.setattr(module.process, "start", lambda: None)
    monkeypatch.setattr(module.checkpoint, "silence_background_errors", lambda: None)
    few = {kind: module.KINDS[kind] for kind in ("ellipses", "cutpaste")}
    monkeypatch.setattr(module, "KINDS", few)
    module._draw.cache_clear()
    return module


def test_recipe_trains_each_variant_once_and_draws_once(
    recipe, tmp_path, monkeypatch, capsys, compilation_cache
):
    root = runs.make_folder(tmp_path)
    file, *overrides = runs.words(root, train__steps=10, train__panel_every=10)
    sweep = tmp_path / "sweep.py"
    source = Path(file.removeprefix("--config=")).read_text()
    source += """

def sweep(add, arg=None):
    add("plain", 0, {})
    add("flipped", 0, {"data.augmentation": "flips", "train.batch_size": 2})
"""
    sweep.write_text(source)
    command = ["recipe.py", f"--config={sweep}", f"--workdir={tmp_path / 'W'}", *overrides]
    monkeypatch.setattr("sys.argv", [*command, "--maps", "mse", "ssim", "--smoothing", ".1"])
    recipe.main()
    first = capsys.readouterr().out
    assert recipe._draw.cache_info().misses == 1
    for name in ("plain", "flipped"):
        assert f"\n{name}, seed 0: 10 steps" in first
    rows = [line for line in first.splitlines() if line.startswith("  ")]
    assert [row.split()[0] for row in rows] == ["mse", "ssim"] * 2
    for row in rows:
        for name in ("ellipses", "cutpaste", "mean", "auroc", "aupro", "image sum"):
            assert 0 < float(re.findall(rf"{name} ([\d.]+)", row)[0]) <= 1

    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("W/*/checkpoints/*/*")}
    recipe.main()
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("  ")] == rows
    assert trained == {p: p.stat().st_mtime_ns for p in tmp_path.glob("W/*/checkpoints/*/*")}


def test_recipe_finds_the_identity_at_chance(recipe, tmp_path, monkeypatch):
    config = runs.load_config(runs.make_folder(tmp_path))
    held_out = recipe.open_held_out(config, unseen="")
    assert len(held_out.corrupted["cutpaste"].images) == recipe.COPIES * len(held_out.clean)
    monkeypatch.setattr(recipe.unet, "bind", lambda model, params: lambda x: x)
    settings = [dataclasses.replace(config.eval, anomaly_map="mse")]
    (row,) = recipe.evaluate(config, None, held_out, settings)
    assert row["on_manifold_bias"] == 0
    assert row["auroc"] == row["image sum"] == row["image max"] == 0.5
    for kind, (_, defects) in held_out.corrupted.items():
        assert row[kind] == pytest.approx(defects.mean())


def test_prediction_measures_each_number_of_images():
    words = ["--images", "3", "6", "--size", "16", "--widths", "4"]
    process = subprocess.run(
        [sys.executable, "-m", "experiments.prediction", *words],
        cwd=ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    rows = re.findall(
        r"^\| (\d+) \| (\d+) \| ([\d.]+) \| (\S+) % \|$", process.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["3", "6"], process.stderr
    first, last = ([float(cell) for cell in row] for row in rows)
    assert min(first[1], first[2], last[2]) > 0
    assert process.returncode == (last[1] > 1.1 * first[1])
