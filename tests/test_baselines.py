"""Every recipe of configs/baselines.py, from images to metrics.json."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runs
from pae_jax import config_file, main, methods
from pae_jax.configs import baselines
from pae_jax.workdir import trained_model

FILE = runs.CONFIGS / "baselines.py"
DIAGNOSED = ("draem", "pca", "segmentation")
PIXELS = {"pixel_auroc", "pixel_ap", "pixel_aupro", "pixel_f1_max", "pixel_aupimo"}
IMAGES = {f"image_auroc_{kind}" for kind in ("sum", "max", "topk")}


def words(root: Path, name: str, **changes: object) -> list[str]:
    """Returns command-line words for the recipe on the small images of `runs`."""
    overrides = {
        "data__source": "folder",
        "model__patch_size": 1,
        "model__widths": (4, 4),
        "train__steps": 3,
        "train__validate_every": 2,
        "train__checkpoint_every": 2,
        # Methods with an f, trained and in closed form, and one without.
        "eval__diagnostics": name in DIAGNOSED,
        "eval__max_steps": 2,
        "baseline__svm_side": 4,
        "baseline__pca_components": 3,
        **changes,
    }
    _, *words = runs.words(root, **overrides)
    return [f"--config={FILE}:{name}", *words]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return runs.make_folder(tmp_path_factory.mktemp("images"))


def read(workdir: Path, name: str = "eval/metrics.json") -> dict:
    return json.loads((workdir / name).read_text())


pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.mark.parametrize("name", baselines.CHANGES)
def test_from_images_to_metrics(name, root, tmp_path, capsys):
    command = ["train", *words(root, name), f"--workdir={tmp_path}"]
    assert main.main(command) == 0
    config = config_file.load(f"{FILE}:{name}", words(root, name)[1:])
    assert f"finished at step {methods.steps(config)}" in capsys.readouterr().out
    method = methods.METHODS[config.method]
    assert main.main(["evaluate", f"--workdir={tmp_path}", "--save_maps"]) == 0

    metrics = read(tmp_path)
    for key in IMAGES:
        assert 0 <= metrics[key] <= 1
    for key in PIXELS:
        assert (metrics[key] is not None) == method.localises, key
        assert (metrics["per_type"]["crack"][key] is not None) == method.localises
    assert ("pixel_auroc" in metrics["intervals"]) == method.localises
    assert bool(metrics["diagnostics"]) == (name in ("draem", "pca"))
    assert metrics["provenance"]["step"] == methods.steps(config)
    if not method.localises:
        assert (
            metrics["image_auroc_sum"] == metrics["image_auroc_max"] == metrics["image_auroc_topk"]
        )
    page = (tmp_path / "eval/report.html").read_text()
    makes_pictures = method.reconstruct is not None or name == "riad"
    assert ('alt="reconstruction"' in page) == makes_pictures

    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in log if "validation/loss" in line]
    assert [line["step"] for line in validated] == sorted(
        {0, *range(0, methods.steps(config), 2), methods.steps(config)}
    )
    # The loss of a support vector machine is a slack, which may be 0.
    assert all(line["validation/loss"] > 0 or name == "one_class_svm" for line in validated)
    assert any((tmp_path / "panels").iterdir())

    out = tmp_path / "out"
    images = root / "data/test/crack"
    assert (
        main.main(["predict", f"--workdir={tmp_path}", f"--images={images}", f"--out={out}"]) == 0
    )
    with Image.open(out / "masks/000.png.png") as mask:
        assert mask.size == (24, 20)


@pytest.mark.parametrize("name", ["pca", "one_class_svm", "deep_svdd"])
def test_a_finished_run_stays_as_it_is(name, root, tmp_path):
    command = ["train", *words(root, name), f"--workdir={tmp_path}"]
    assert main.main(command) == 0
    step, leaves = runs.read_state(tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    assert main.main(command) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    again, others = runs.read_state(tmp_path)
    assert (step, len(leaves)) == (again, len(others))
    assert sum(float(np.abs(leaf).sum()) for leaf in leaves) > 0


def test_a_resumed_run_keeps_its_centre(root, tmp_path):
    """Half of the steps and the rest, against all at once."""
    long, short = tmp_path / "long", tmp_path / "short"
    assert main.main(["train", *words(root, "deep_svdd"), f"--workdir={long}"]) == 0
    assert main.main(["train", *words(root, "deep_svdd"), f"--workdir={short}"]) == 0
    last = short / "checkpoints/3"
    assert last.is_dir()
    last.rename(tmp_path / "taken away")
    assert runs.read_state(short)[0] == 2
    assert main.main(["train", *words(root, "deep_svdd"), f"--workdir={short}"]) == 0
    runs.assert_same_state(long, short)


def test_all_trains_every_method_in_its_workdir(root, tmp_path, capsys):
    assert main.main(["train", *words(root, "all"), f"--workdir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for name in baselines.CHANGES:
        assert f"{tmp_path / name}: finished at step" in printed
        model = trained_model.load(tmp_path / name)
        assert model.step == methods.steps(model.config)


def test_an_unknown_method_is_one_line(root, tmp_path, capsys):
    command = ["train", *words(root, "pca", method="padim"), f"--workdir={tmp_path}"]
    assert main.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pae train: method: one of projection, ")


@pytest.mark.parametrize("name", ["pca", "deep_svdd"])
def test_members_of_a_population_equal_single_runs(name, root, tmp_path):
    from pae_jax import population, train

    configs = [
        config_file.load(f"{FILE}:{name}", words(root, name, train__seed=i)[1:]) for i in (0, 1)
    ]
    folders = [tmp_path / str(i) for i in (0, 1)]
    results = population.train_population(list(zip(configs, folders, strict=True)))
    assert [(result.outcome, result.step) for result in results] == [
        ("finished", methods.steps(configs[0]))
    ] * 2
    train.train_and_evaluate(configs[1], tmp_path / "alone")
    (_, together), (_, alone) = (runs.read_state(tmp_path / name) for name in ("1", "alone"))
    for leaf, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-5)
    # A member whose checkpoint is gone is fitted again, although the other has one.
    if name == "pca":
        (folders[1] / "checkpoints/0").rename(tmp_path / "taken away")
        population.train_population(list(zip(configs, folders, strict=True)))
        assert trained_model.load(folders[1]).step == 0
