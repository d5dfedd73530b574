"""experiments/results.py and results_cases.py: the record of an evaluated run, and its page."""

import importlib
import io
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

import runs
from data_pipelines.dataset import open_test
from data_pipelines.errors import BadInput
from pae_jax import detection, main
from pae_jax.config_schema import SCHEMA
from pae_jax.workdir import files, trained_model

PROJECT = Path(__file__).parents[1]


class Modules(NamedTuple):
    results: ModuleType
    cases: ModuleType


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROJECT / "experiments")
        names = ("results", "results_cases")
        yield Modules(*(importlib.import_module(name) for name in names))


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory) -> runs.Run:
    """The trained run, evaluated with other settings than those it was trained with."""
    run = runs.clone(trained, tmp_path_factory.mktemp("evaluated"))
    runs.set_eval(run.workdir, image_score="topk", smoothing_fraction=0.2)
    assert main.main(["evaluate", f"--workdir={run.workdir}"]) == 0
    return run


@pytest.fixture
def taken_up(modules, evaluated, tmp_path) -> Path:
    """A project with the evaluated run's record under the name tile."""
    assert modules.results.main([f"tile={evaluated.workdir}"], tmp_path) == 0
    return tmp_path


def read(path: Path):
    return json.loads(path.read_text())


def strings(value):
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def test_a_record_holds_the_numbers_of_the_run(taken_up, evaluated):
    record = read(taken_up / "docs/results/tile/record.json")
    metrics = read(evaluated.workdir / "eval/metrics.json")
    provenance = metrics.pop("provenance")
    assert record["schema"] == metrics.pop("schema") == SCHEMA
    assert record["metrics"] == metrics
    assert record["config"]["eval"] == provenance["config"]["eval"]
    assert record["config"]["eval"]["image_score"] == "topk"
    assert record["config"]["data"]["root"] == "data"
    assert record["config"]["data"]["textures"] == "textures"
    for key in ("commit", "versions", "seeds", "config_hash", "device"):
        assert record[key] == provenance[key]
    data = read(evaluated.workdir / "data.json")
    assert record["data"]["training_images"] == data["training_images"]
    assert record["data"]["held_out_images"] == len(data["held_out_names"])
    assert record["training"]["steps"] == runs.STEPS
    lines = map(json.loads, (evaluated.workdir / "metrics.jsonl").read_text().splitlines())
    seconds = [line["speed/step_seconds"] for line in lines if "train/loss" in line]
    assert len(seconds) == runs.STEPS
    assert record["training"]["minutes"] == pytest.approx(sum(seconds) / 60)
    assert re.fullmatch(r".+, \d+ cores", record["machine"])


def test_records_hold_no_paths(taken_up, evaluated):
    record = read(taken_up / "docs/results/tile/record.json")
    assert not [text for text in strings(record) if Path(text).is_absolute()]
    assert "cache_dir" not in record["config"]["data"]
    for path in (taken_up / "docs/results/tile/record.json", taken_up / "RESULTS.md"):
        text = path.read_text()
        for part in (*evaluated.root.parts[1:-1], *taken_up.parts[1:]):
            assert f"/{part}" not in text and f"{part}/" not in text, part


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/home/me/dtd/", "dtd"),
        ("../shared/a:b/c", "c"),
        ("tfds:/data/TFDS", "tfds:TFDS"),
        ("builtin", "builtin"),
        ("", ""),
    ],
)
def test_paths_are_cut_to_their_last_part(modules, path, kept):
    data = {"root": path, "textures": path, "cache_dir": path, "height": 1}
    shortened = modules.results._without_paths({"data": data, "train": {}})
    assert shortened == {"data": {"root": kept, "textures": kept, "height": 1}, "train": {}}


def test_the_page_is_made_again_byte_for_byte(modules, taken_up, capsys):
    page = taken_up / "RESULTS.md"
    before = page.read_bytes()
    page.unlink()
    capsys.readouterr()
    assert modules.results.main([], taken_up) == 0
    assert page.read_bytes() == before
    assert capsys.readouterr().out.split() == [str(page)]


def test_cases_are_sorted_by_average_precision_within_the_image(taken_up, evaluated):
    cases = read(taken_up / "docs/results/tile/record.json")["cases"]
    model = trained_model.load(
        evaluated.workdir,
        ["--config.eval.image_score=topk", "--config.eval.smoothing_fraction=0.2"],
    )
    test = open_test(model.config.data.spec, channels=model.channels)
    detections = list(detection.detect_all(model.params, test.images, model.config))
    precision = {
        name: average_precision_score(test.masks[i].ravel(), detections[i].map.ravel())
        for i, name in enumerate(test.names)
        if test.labels[i]
    }
    order = sorted(precision, key=precision.__getitem__, reverse=True)
    scores = {
        name: float(detected.scores["topk"])
        for name, detected, label in zip(test.names, detections, test.labels, strict=True)
        if not label
    }
    top = max(scores, key=scores.__getitem__)
    assert [image["name"] for image in cases["images"]] == [*order, top]
    assert [image["case"] for image in cases["images"]] == [*["best"] * 2, *["worst"] * 2, "normal"]
    for image in cases["images"][:-1]:
        assert image["figure"] == pytest.approx(precision[image["name"]], abs=1e-6)
    assert cases["images"][-1]["figure"] is None
    assert cases["images"][-1]["score"] == pytest.approx(scores[top])

    with Image.open(evaluated.workdir / "eval/cases.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (4 * 20 - 4, 5 * 20 - 4, 3)  # tiles of 16, gaps of 4
    best = test.names.index(order[0])
    np.testing.assert_array_equal(pixels[:16, :16], np.repeat(test.images[best], 3, axis=-1))
    np.testing.assert_array_equal(pixels[60:, :16, 0] > 127, test.masks[best])


def test_selected_cases_agree_with_those_by_hand(modules):
    figures = np.array([0.1, np.nan, 0.9, 0.5, 0.5, 0.3, 0.8, np.nan, 0.2, 0.7])
    scores = np.array([0, 9, 0, 1, 2, 0, 0, 4, 0, 0.0])
    labels = ~np.isnan(figures)
    labels[1] = True  # defective, with an empty mask
    cases = modules.cases.choose(figures, scores, labels)
    # By figure: 2 6 9 4 3 5 8 0, equal figures by score.
    assert [(case.name, case.index) for case in cases] == [
        ("best", 2),
        ("best", 6),
        ("median", 4),
        ("median", 3),
        ("worst", 8),
        ("worst", 0),
        ("normal", 7),
    ]


def test_without_masks_cases_are_sorted_by_rank_among_normal_images(modules, evaluated, tmp_path):
    run = runs.clone(evaluated, tmp_path)
    shutil.rmtree(run.root / "data/ground_truth")
    assert main.main(["evaluate", f"--workdir={run.workdir}"]) == 0
    assert modules.results.main([f"tile={run.workdir}"], tmp_path) == 0
    cases = read(tmp_path / "docs/results/tile/record.json")["cases"]
    rows = [line.split(",") for line in (run.workdir / "eval/scores.csv").read_text().split()]
    column = rows[0].index("score_topk")
    normal = [float(row[column]) for row in rows[1:] if row[1] == "good"]
    assert cases["figure"] == "rank"
    for image in cases["images"][:-1]:
        assert image["figure"] == np.mean([score < image["score"] for score in normal])
    with Image.open(run.workdir / "eval/cases.png") as picture:
        assert picture.size == (5 * 20 - 4, 3 * 20 - 4)
    assert "| crack | 2 |" in (tmp_path / "RESULTS.md").read_text()


def test_a_method_without_reconstructions_gets_no_row_for_them(modules, evaluated, monkeypatch):
    rows = modules.cases.find(evaluated.workdir).record["rows"]
    assert rows == ["image", "reconstruction", "anomaly map over the image", "mask"]
    detect_all = detection.detect_all
    monkeypatch.setattr(
        detection,
        "detect_all",
        lambda *args: (result._replace(reconstruction=None) for result in detect_all(*args)),
    )
    cases = modules.cases.find(evaluated.workdir)
    assert cases.record["rows"] == [rows[0], *rows[2:]]
    with Image.open(io.BytesIO(cases.picture)) as picture:
        assert picture.size == (5 * 20 - 4, 3 * 20 - 4)


def test_a_large_picture_has_smaller_tiles(modules, evaluated, monkeypatch):
    whole = modules.cases.find(evaluated.workdir).picture
    monkeypatch.setattr(modules.cases, "SIDES", (16, 12, 8))
    monkeypatch.setattr(modules.cases, "LARGEST", len(whole) - 1)
    with Image.open(io.BytesIO(modules.cases.find(evaluated.workdir).picture)) as picture:
        assert picture.size == (5 * 16 - 4, 4 * 16 - 4)


def test_pictures_are_copied_into_the_project_only_on_request(modules, taken_up, evaluated):
    beside, page = taken_up / "docs/results/tile/cases.png", taken_up / "RESULTS.md"
    assert not beside.exists() and "![" not in page.read_text()
    word = f"tile={evaluated.workdir}"
    assert modules.results.main(["--pictures", word], taken_up) == 0
    assert beside.read_bytes() == (evaluated.workdir / "eval/cases.png").read_bytes()
    assert "![Cases of tile](docs/results/tile/cases.png)" in page.read_text()
    assert modules.results.main([word], taken_up) == 0
    assert not beside.exists() and "![" not in page.read_text()


def test_no_pictures_needs_no_image(modules, evaluated, tmp_path):
    run = runs.clone(evaluated, tmp_path)
    shutil.rmtree(run.root)
    (run.workdir / "eval/cases.png").unlink(missing_ok=True)
    words = ["--no_pictures", "--machine=two cores", f"tile={run.workdir}"]
    assert modules.results.main(words, tmp_path) == 0
    record = read(tmp_path / "docs/results/tile/record.json")
    assert record["cases"] is None and record["machine"] == "two cores"
    assert not (run.workdir / "eval/cases.png").exists()


def test_other_records_are_kept_and_the_same_name_is_replaced(modules, taken_up, evaluated):
    path = taken_up / "docs/results/tile/record.json"
    other = taken_up / "docs/results/tile--draem/record.json"
    other.parent.mkdir()
    text = path.read_text().replace('"kind": "texture"', '"kind": "draem"')
    other.write_text(text)
    path.write_text("{}")
    assert modules.results.main(["--no_pictures", f"tile={evaluated.workdir}"], taken_up) == 0
    assert other.read_text() == text
    assert read(path)["metrics"] == read(other)["metrics"]
    page = (taken_up / "RESULTS.md").read_text()
    methods = page.partition("## Methods")[2].partition("\n## ")[0]
    assert re.search(r"^\| \*\*tile\*\* \| projection \| texture \|", methods, re.MULTILINE)
    assert re.search(r"^\| draem \| projection \| draem \|", methods, re.MULTILINE)


def assert_refused(modules, capsys, project: Path, words: list[str], *parts: str) -> None:
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert modules.results.main(words, project) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in parts:
        assert part in line, line
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


def test_bad_workdirs_are_refused_before_any_writing(modules, trained, evaluated, tmp_path, capsys):
    good, bad = f"tile={evaluated.workdir}", trained.workdir
    picture = evaluated.workdir / "eval/cases.png"
    picture.unlink(missing_ok=True)
    command = f"run `pae evaluate --workdir={bad}`"
    project = tmp_path / "project"
    assert_refused(modules, capsys, project, [good, f"tile--seed1={bad}"], str(bad), command)
    assert_refused(modules, capsys, project, [good, good], "both would be tile")
    assert_refused(modules, capsys, project, [good, "none"], "none/config.json", "not found")
    assert_refused(modules, capsys, project, [good, f"{bad}/.."], "no name for a record")
    assert_refused(modules, capsys, project, [good, f"tile--seed1={evaluated.workdir}"], "one seed")
    assert not project.exists() and not picture.exists()


def test_a_run_that_is_unfinished_old_or_from_elsewhere_is_refused(
    modules, evaluated, tmp_path, capsys
):
    run = runs.clone(evaluated, tmp_path)
    path = run.workdir / "eval/metrics.json"
    metrics = read(path)
    metrics["provenance"]["step"] = 10
    path.write_text(json.dumps(metrics))
    assert_refused(modules, capsys, tmp_path, [f"tile={run.workdir}"], "step 10 of 30")
    metrics["provenance"]["step"] = 30
    metrics["provenance"]["device"]["machine"] = "another"
    path.write_text(json.dumps(metrics))
    assert_refused(modules, capsys, tmp_path, [f"tile={run.workdir}"], "another", "--machine")
    del metrics["schema"]
    path.write_text(json.dumps(metrics))
    assert_refused(modules, capsys, tmp_path, [f"tile={run.workdir}"], "another version")


def test_test_images_that_changed_since_are_refused(modules, evaluated, tmp_path, capsys):
    run = runs.clone(evaluated, tmp_path)
    (run.root / "data/test/good/000.png").unlink()
    trained_model.thresholds(  # written before, so that the command itself writes nothing
        run.workdir, trained_model.load(run.workdir, ["--config.eval.image_score=topk"])
    )
    words = [f"tile={run.workdir}"]
    capsys.readouterr()
    assert modules.results.main(words, tmp_path / "project") == 2
    assert "other test images" in capsys.readouterr().err
    assert not (tmp_path / "project").exists()


def test_minutes_count_each_mean_for_its_steps(modules, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 0, "validation/loss": 1.0},
        {"step": 50, "speed/step_seconds": 0.1},
        {"step": 100, "speed/step_seconds": 0.2},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Steps after the last mean count with the median of the means.
    assert modules.results._minutes(path, 120) == pytest.approx((5 + 10 + 3) / 60)
    path.write_text(json.dumps(lines[0]) + "\n")
    assert modules.results._minutes(path, 120) is None
    path.write_text("{")
    with pytest.raises(BadInput, match=re.escape(str(path))):
        modules.results._minutes(path, 120)


def test_a_broken_or_old_record_is_named(modules, tmp_path, capsys):
    path = tmp_path / "docs/results/tile/record.json"
    files.write_json(path, {"metrics": {}})
    assert_refused(modules, capsys, tmp_path, [], "docs/results/tile/record.json", "config")
    path.write_text("{")
    assert_refused(modules, capsys, tmp_path, [], str(path), "cannot be read")
    record = dict.fromkeys(modules.results.results_page.REQUIRED)
    path.write_text(json.dumps(record))
    assert_refused(modules, capsys, tmp_path, [], "docs/results/tile/record.json", "schema 1")
    path.write_text(json.dumps({**record, "schema": SCHEMA + 1}))
    assert_refused(modules, capsys, tmp_path, [], f"schema {SCHEMA + 1}, needed is {SCHEMA}")
