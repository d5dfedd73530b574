"""`pae compare` recomputed from the files of `pae evaluate`, and its refusals."""

import csv
import json
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

import runs
from data_pipelines.errors import BadInput, CannotWrite
from layouts import write
from pae_jax import evaluate, main, train
from pae_jax.comparison import compare, images
from pae_jax.metrics import bootstrap
from pae_jax.workdir import trained_model
from pages import Page

NATIVE = ["--config.eval.native_size=True"]


@pytest.fixture(scope="module")
def first(trained, tmp_path_factory) -> runs.Run:
    return runs.clone(trained, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> runs.Run:
    """PCA on the same images, with another size and another score that decides."""
    workdir = tmp_path_factory.mktemp("second") / "run"
    changes = {"method": "pca", "data__size": 12, "eval__image_score": "max"}
    config = runs.load_config(first.root, **changes, baseline__pca_components=2)
    assert train.train_and_evaluate(config, workdir).outcome == train.FINISHED
    return runs.Run(first.root, workdir)


@pytest.fixture(scope="module")
def compared(first, second, tmp_path_factory):
    """The folder of a comparison, what was printed, and the evaluations of the two runs."""
    out = tmp_path_factory.mktemp("compared") / "out"
    evaluations = []
    for run in (first, second):
        evaluations.append(evaluate.evaluate(run.workdir, overrides=NATIVE, save_maps=True))
    result = compare.compare([first.workdir, second.workdir], out / "page.html", overrides=NATIVE)
    assert result.page == out / "page.html"
    assert sorted(path.name for path in out.iterdir()) == ["page.csv", "page.html", "page.json"]
    return out, evaluations


def read_scores(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_values_and_intervals_are_those_of_the_evaluations(compared):
    out, evaluations = compared
    record = json.loads((out / "page.json").read_text())
    names = set(record["metrics"])
    assert {"image_auroc_sum", "image_ap_topk", "pixel_auroc", "pixel_ap", "pixel_aupro"} < names
    for k, evaluation in enumerate(evaluations):
        for name in names - {"test_true_positive_rate", "test_false_positive_rate"}:
            entry = record["metrics"][name][k]
            assert entry["value"] == pytest.approx(evaluation.metrics[name], abs=1e-12), name
            assert entry["interval"] == pytest.approx(evaluation.metrics["intervals"][name])
        for name in ("test_true_positive_rate", "test_false_positive_rate"):
            entry = record["metrics"][name][k]
            assert entry["value"] == evaluation.metrics["threshold"][name]
            assert entry["interval"][0] <= entry["value"] <= entry["interval"][1]
        threshold = record["runs"][k]["threshold"]
        assert threshold == {key: evaluation.metrics["threshold"][key] for key in threshold}


def test_differences_are_taken_draw_by_draw(compared, first):
    """The draws as weights of the images, in the metrics of scikit-learn."""
    out, evaluations = compared
    record = json.loads((out / "page.json").read_text())
    tables = [read_scores(e.report.parent / "scores.csv") for e in evaluations]
    names = [row["name"] for row in tables[0]]
    labels = np.array([int(row["label"]) for row in tables[0]])
    times = bootstrap._multiplicity(labels > 0, 20, np.random.default_rng(0))
    maps, masks = [], []
    for name in names:
        stem = name.removesuffix(".png")
        paths = [e.report.parent / f"maps/data/test/{stem}.tiff" for e in evaluations]
        maps.append([tifffile.imread(path) for path in paths])
        mask = first.root / f"data/ground_truth/{stem}_mask.png"
        shape = maps[-1][0].shape
        masks.append(np.asarray(Image.open(mask)) > 0 if mask.exists() else np.zeros(shape, bool))
    pixels, truth = np.array(maps), np.array(masks)  # (n, 2, h, w), (n, h, w)

    def interval(measure, *, of_pixels=False):
        differences = []
        for row in times:
            if of_pixels:
                weights = np.broadcast_to(row[:, None, None], truth.shape).ravel()
                values = [
                    measure(truth.ravel(), pixels[:, k].ravel(), sample_weight=weights)
                    for k in (0, 1)
                ]
            else:
                values = [measure(labels, s, sample_weight=row) for s in scores]
            differences.append(values[1] - values[0])
        return np.quantile(differences, [0.025, 0.975])

    for metric, measure in (("auroc", roc_auc_score), ("ap", average_precision_score)):
        for score in ("sum", "max"):
            scores = [[float(row[f"score_{score}"]) for row in rows] for rows in tables]
            entry = record["metrics"][f"image_{metric}_{score}"][1]
            np.testing.assert_allclose(entry["difference_interval"], interval(measure), atol=1e-9)
        entry = record["metrics"][f"pixel_{metric}"][1]
        expected = interval(measure, of_pixels=True)
        np.testing.assert_allclose(entry["difference_interval"], expected, atol=2e-4)
        values = [entry["value"] for entry in record["metrics"][f"pixel_{metric}"]]
        assert entry["difference"] == pytest.approx(values[1] - values[0])


def test_a_run_does_not_differ_from_its_copy(first, tmp_path):
    """Not even in the ends of the intervals, which the two runs have."""
    shutil.copytree(first.workdir, tmp_path / "copy")
    record = compare.compare([first.workdir, tmp_path / "copy"], tmp_path / "out.html").record
    for one, other in record["metrics"].values():
        assert one["interval"] == other["interval"] and other["difference"] == 0
        assert other["difference_interval"] == [0, 0]
    for counts in record["decisions"].values():
        assert counts["some"] == 0 and counts["called_by_this_run_only"] == [0, 0]


def test_decisions_follow_from_the_scores(compared):
    out, evaluations = compared
    record = json.loads((out / "page.json").read_text())
    rows = read_scores(out / "page.csv")
    for k, evaluation in enumerate(evaluations, 1):
        expected = read_scores(evaluation.report.parent / "scores.csv")
        score = ("sum", "max")[k - 1]
        for row, other in zip(rows, expected, strict=True):
            assert row["name"] == other["name"] and row["type"] == other["type"]
            assert float(row[f"score_{k}"]) == pytest.approx(float(other[f"score_{score}"]))
            assert row[f"defective_{k}"] == other["defective"]
    for truth, label in (("defective", "1"), ("good", "0")):
        pairs = [
            (int(row["defective_1"]), int(row["defective_2"]))
            for row in rows
            if row["label"] == label
        ]
        counts = record["decisions"][truth]
        assert counts["called_by_run"] == [sum(a for a, _ in pairs), sum(b for _, b in pairs)]
        assert counts["all"] == pairs.count((1, 1)) and counts["none"] == pairs.count((0, 0))
        only = counts["called_by_this_run_only"]
        assert only == [pairs.count((1, 0)), pairs.count((0, 1))]
        assert counts["some"] == sum(only)


def test_the_page_shows_disagreements_first(compared):
    out, _ = compared
    page = Page((out / "page.html").read_text())
    (gallery,) = page.find("table", id="images")
    (body,) = page.find("tbody", inside=gallery)
    shown = page.find("tr", inside=body)
    rows = {row["name"]: row for row in read_scores(out / "page.csv")}
    assert len(shown) == len(rows) == 7
    outcomes = [row["attrs"]["data-decision"] for row in shown]
    assert outcomes == sorted(outcomes, reverse=True)  # differ, then agree
    for element, outcome in zip(shown, outcomes, strict=True):
        (name,) = page.find("th", inside=element)
        row = rows[name["text"]]
        assert (row["defective_1"] != row["defective_2"]) == (outcome == "differ")
        pictures = [e["attrs"]["alt"] for e in page.find("img", inside=element)]
        pictures = [alt for alt in pictures if not alt.startswith("outlines")]
        mask = ["true mask"]
        assert pictures == ["input", *mask, "heat map of run 1", "heat map of run 2"]
    texts = [e["text"] for e in page.find("caption")]
    assert any("same draws for every run" in text for text in texts)


def test_the_command_prints_and_renews_its_own_folder(first, second, capsys):
    words = ["compare", str(first.workdir), str(second.workdir), *NATIVE]
    assert main.main(words) == 0
    *lines, path = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"1  {first.workdir}", f"2  {second.workdir}"]
    folder = (first.workdir / path).parent
    assert folder.parent == first.workdir and folder.name.startswith("compare-")
    record = json.loads((folder / "comparison.json").read_text())
    (line,) = (line for line in lines if line.startswith("image_auroc_sum "))
    one, other = record["metrics"]["image_auroc_sum"]
    assert f"  {one['value']:.4f} [" in line and f"{other['difference']:+.4f} [" in line
    assert main.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == path
    swapped = [words[0], words[2], words[1], *NATIVE]
    assert main.main(swapped) == 0
    assert str(second.workdir) in capsys.readouterr().out.splitlines()[-1]


def test_an_earlier_comparison_stays_whole_if_the_next_one_fails(first, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(first.workdir, copy)
    folder = compare.compare([copy, first.workdir]).page.parent
    (folder / "notes.txt").write_text("the user's")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 4
    evaluated = ["--config.eval.bootstrap_resamples=5"]

    def fail(path, _):
        raise CannotWrite(path, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch, pytest.raises(CannotWrite):
        patch.setattr(compare.page, "write_page", fail)
        compare.compare([copy, first.workdir], overrides=evaluated)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    compare.compare([copy, first.workdir], overrides=evaluated)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert after["comparison.json"] != before["comparison.json"]
    assert after["notes.txt"] == before["notes.txt"]


# ---- refusals: each function spoils the data of the second run ----


def removed(data) -> str:
    (data / "test/good/001.png").unlink()
    return "good/001.png is missing"


def added(data) -> str:
    shutil.copy(data / "test/good/001.png", data / "test/good/007.png")
    return "good/007.png is there as well"


def other_pixels(data) -> str:
    write(data / "test/dent/001.png", (np.arange(480) % 251).astype(np.uint8).reshape(20, 24))
    return "dent/001.png is another image"


def other_size(data) -> str:
    path = data / "test/good/001.png"
    Image.fromarray(np.asarray(Image.open(path)).repeat(2, 0).repeat(2, 1)).save(path)
    return "good/001.png is another image"


def other_mask(data) -> str:
    mask = np.zeros((20, 24), np.uint8)
    mask[15:, 15:] = 255
    write(data / "ground_truth/dent/001_mask.png", mask)
    return "dent/001.png has another mask"


def no_masks(data) -> str:
    shutil.rmtree(data / "ground_truth")
    return "they have no masks"


SPOILED = [removed, added, other_pixels, other_size, other_mask, no_masks]


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda function: function.__name__)
def test_other_test_images_are_refused(spoil, first, tmp_path, capsys):
    other = runs.clone(first, tmp_path)
    named = spoil(other.root / "data")
    out = tmp_path / "out"
    words = ["compare", str(first.workdir), str(other.workdir), f"--out={out}/page.html"]
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    expected = f"pae compare: {other.workdir}: its test images are not those of {first.workdir}: "
    assert line.startswith(f"{expected}{named}; ")
    assert not out.exists()


def test_other_bad_input(first, second, tmp_path, capsys):
    def refused(named, *words):
        assert main.main(["compare", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line

    link = tmp_path / "link"
    link.symlink_to(first.workdir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.csv").write_text("")
    both = first.workdir, second.workdir
    refused(f"{first.workdir}: name at least two workdirs", first.workdir)
    refused(f"{link}: named twice", first.workdir, link)
    refused(f"{tmp_path / 'none'}/config.json: not found", first.workdir, tmp_path / "none")
    page = tmp_path / "full/mine.html"
    refused(f"{page.with_suffix('.csv')}: exists; results are", *both, f"--out={page}")
    refused(f"{tmp_path / 'full'}: the page needs a name that", *both, f"--out={tmp_path / 'full'}")
    refused("maps of 12×12 pixels, and of 16×16 in", *both)
    refused("eval.bootstrap_resamples: 0 in", *both, "--config.eval.bootstrap_resamples=0")
    refused("after training, only --config.eval", *both, "--config.train.steps=3")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.csv"]


def test_images_in_another_order_are_matched(first):
    opened = images.open_run(first.workdir, trained_model.load(first.workdir))
    test, order = opened.test, np.array([3, 0, 6, 1, 2, 5, 4])
    shuffled = test._replace(
        names=[test.names[i] for i in order],
        types=[test.types[i] for i in order],
        images=test.images[order],
        labels=test.labels[order],
        masks=test.masks[order],
        native_shape=lambda i: test.native_shape(order[i]),
    )
    other = opened._replace(test=shuffled)
    found = images.match(opened, other)
    assert [shuffled.names[i] for i in found] == test.names
    renamed = shuffled._replace(types=["scratch", *shuffled.types[1:]])
    with pytest.raises(BadInput, match=r"is scratch, not (crack|dent|good)"):
        images.match(opened, opened._replace(test=renamed))
