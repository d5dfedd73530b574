"""The benchmarks' smallest runs, and the equality of what benchmarks/step.py compares."""

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
from pae_jax.workdir import trained_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: the extra bench"
)
TINY = ("--widths", "4", "--rounds", "1")


def run(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    environment = runs.environment() | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def numbers(process: subprocess.CompletedProcess, pattern: str) -> list[float]:
    """What the pattern's one group found on stdout."""
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
    found = numbers(process, r"^jax +float32 +([\d.]+)")
    assert len(found) == 2
    assert min(found) > 0


def test_step_refuses_sizes_that_the_twin_cannot_pool():
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
    assert re.findall(r"^\| (\d+) \|", without, re.MULTILINE) == ["1", "2"]
    assert re.search(r"^\| 1 \|", files, re.MULTILINE)


# A run of the experiment small enough: 16 × 16 pixels, four steps.
OVERFITTING = (
    f"--config={runs.CONFIGS / 'smoke.py'}",
    *(
        f"--config.{key}={value}"
        for key, value in runs.SETTINGS.items()
        if key.startswith(("model.", "sharding.", "data.size", "data.texture_size"))
    ),
    "--config.data.augmentation=none",  # little to compile
    "--config.corruption.mask=boxes",
    "--config.train.validation_examples=8",
    "--config.train.tensorboard=False",
    "--images=5",
    "--steps=4",
)


@pytest.fixture
def overfitting(monkeypatch, tmp_path):
    """The experiment in this process, on tmp_path: words → exit code."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("overfitting")
    monkeypatch.setattr(module.compilation, "start", lambda: None)
    monkeypatch.setattr(module.checkpoint, "leave_out_echoes", lambda: None)

    def call(*words: str) -> int:
        command = ["overfitting.py", *OVERFITTING, f"--workdir={tmp_path}", *words]
        monkeypatch.setattr("sys.argv", command)
        return module.main()

    return call


def test_overfitting_end_to_end(overfitting, tmp_path, capsys, compilation_cache):
    assert overfitting("--points", "2", "4") == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "overfitting.json").read_text())
    assert [(row["method"], row["step"]) for row in record["rows"]] == [
        (method, step) for method in ("projection", "segmentation") for step in (2, 4)
    ]
    for row in record["rows"]:
        for name in ("training", "held_out", "unseen", "real"):
            assert 0 < row[f"pixel_ap_{name}"] <= 1
        assert all(0 <= row[f"image_auroc_{kind}_real"] <= 1 for kind in ("sum", "max", "topk"))
        assert (row["bias_held_out"] is not None) == (row["method"] == "projection")
    assert record["counts"]["training_images"] == 5

    # The last point is the run's end: what validation and `pae evaluate` say of it.
    for method, row in zip(("projection", "segmentation"), record["rows"][1::2], strict=True):
        workdir = tmp_path / method
        *_, last = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        for name in ("loss", "pixel_ap"):
            assert row[f"{name}_held_out"] == pytest.approx(last[f"validation/{name}"], rel=1e-4)
        without = ("--config.eval.bootstrap_resamples=0", "--config.eval.diagnostics=False")
        found = evaluate.evaluate(workdir, overrides=without).metrics
        for name in ("image_auroc_sum", "image_auroc_max", "image_auroc_topk", "pixel_ap"):
            assert row[f"{name}_real"] == pytest.approx(found[name], abs=1e-3)
        # What was trained on is what is opened again.
        assert len(trained_model.open_split(workdir, record.read_config(workdir)).images) == 5
    first, second = (record.read_config(tmp_path / m) for m in ("projection", "segmentation"))
    assert dataclasses.replace(first, method="segmentation") == second
    assert second.optimizer.schedule == "constant"  # smoke.py says cosine

    text = (tmp_path / "overfitting.md").read_text()
    for written in (text, (tmp_path / "overfitting.json").read_text()):
        assert str(tmp_path) not in written
        assert str(BENCHMARKS.parent) not in written
    assert text in printed
    assert text.count("\n| 2 |") == text.count("\n| 4 |") == 2
    assert (tmp_path / "overfitting.png").read_bytes().startswith(b"\x89PNG")

    # Again, with other points of the same runs: nothing is trained anew.
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/*")}
    assert overfitting("--points", "2") == 0
    rows = json.loads((tmp_path / "overfitting.json").read_text())["rows"]
    assert rows == record["rows"][::2]
    found = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/checkpoints/*/*")}
    assert len(trained) >= 4
    assert found == trained
    # Other settings have no business there.
    assert overfitting("--points", "2", "4", "--images=6") == 2
    assert "data.max_images is 5 there and 6 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--points", "2", "3"), "--points: multiples of the first one, not 2 3"),
        (("--points", "2", "8"), "--points: ascending, from 1 to --steps=4, not 2 8"),
        ((), "--points: name them"),
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


def test_overfitting_tells_no_folder(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
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
def test_the_twin_takes_the_same_step(monkeypatch, changes):
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
    found = step.differences(config, params, batch)
    assert found.keys() == step.TOLERANCES.keys()
    for name, limit in step.TOLERANCES.items():
        assert found[name] <= limit, (name, found)


@WITH_TORCH
def test_a_changed_twin_is_noticed(monkeypatch):
    """The comparison can fail: one kernel of the twin is scaled by a thousandth more."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    step, twin = importlib.import_module("step"), importlib.import_module("step_torch")
    config = ModelConfig(widths=(4,), branch_width=4, dilation_rates=(1,), dilated_kernel_size=3)
    batch = step.make_batch(8, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    load = twin.load

    def spoil(module, variables):
        load(module, variables)
        module.Conv_0.weight.data *= 1.001

    monkeypatch.setattr(twin, "load", spoil)
    found = step.differences(config, params, batch)
    assert found["output"] > step.TOLERANCES["output"]


@WITH_TORCH
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_layouts_hold_the_same_numbers(monkeypatch, layout):
    monkeypatch.syspath_prepend(BENCHMARKS)
    step, twin = importlib.import_module("step"), importlib.import_module("step_torch")
    config = ModelConfig(
        widths=(4, 8), branch_width=4, dilation_rates=(1, 2), dilated_kernel_size=3
    )
    batch = step.make_batch(16, 2)
    params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
    _, take = twin.make_step(config, params, batch, layout=layout)
    np.testing.assert_allclose(take(), step.loss(params, batch, config), rtol=1e-5)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("recipe")
    monkeypatch.setattr(module.compilation, "start", lambda: None)
    monkeypatch.setattr(module.checkpoint, "leave_out_echoes", lambda: None)
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


def test_recipe_judges_the_identity_as_chance(recipe, tmp_path, monkeypatch):
    config = runs.load_config(runs.make_folder(tmp_path))
    held_out = recipe.open_held_out(config, unseen="")
    assert len(held_out.corrupted["cutpaste"].images) == recipe.COPIES * len(held_out.clean)
    monkeypatch.setattr(recipe.unet, "bind", lambda model, params: lambda x: x)
    (row,) = recipe.judge(config, None, held_out, [dataclasses.replace(config.eval, map="mse")])
    assert row["bias"] == 0
    assert row["auroc"] == row["image sum"] == row["image max"] == 0.5
    for kind, (_, wrong) in held_out.corrupted.items():
        assert row[kind] == pytest.approx(wrong.mean())
