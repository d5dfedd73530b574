"""`pae pack`: a small folder without pickles that takes the place of the workdir."""

import json
import shutil
import zipfile

import jax
import numpy as np
import pytest

import bucket
import layouts
import runs
from data_pipelines.errors import BadInput
from pae_jax import evaluate, main, predict
from pae_jax.config import Config, DataConfig
from pae_jax.deployment import export, model_card, program
from pae_jax.deployment.pack import pack
from pae_jax.workdir import parameters, record, thresholds, trained_model
from pae_jax.workdir.checkpoint import Checkpoints

FILES = {
    "README.md",
    "config.json",
    "data.json",
    "eval/metrics.json",
    "parameters.npz",
    "provenance.json",
    "thresholds.json",
}
ODD = "a|b_`c"  # a type of defect that would break a table


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """A copy of the run with an evaluation, and a type of defect with an odd name."""
    run = runs.clone(trained, tmp_path_factory.mktemp("evaluated"))
    for part in ("test", "ground_truth"):
        shutil.copytree(run.root / f"data/{part}/dent", run.root / f"data/{part}/{ODD}")
    evaluate.evaluate(run.workdir)
    return run


@pytest.fixture(scope="module")
def packed(evaluated, tmp_path_factory):
    return pack(evaluated.workdir, tmp_path_factory.mktemp("packed") / "model")


def content(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def leaves(params):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def assert_equal_trees(tree, other):
    first, second = leaves(tree), leaves(other)
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name])


def test_the_folder_is_small_and_complete(packed):
    assert content(packed) == FILES
    assert sum(path.stat().st_size for path in packed.rglob("*")) < 10e6
    assert not [path.name for path in packed.parent.iterdir() if path != packed]


def test_the_parameters_are_plain_arrays_with_names(packed, evaluated):
    with zipfile.ZipFile(packed / "parameters.npz") as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        assert not [name for name in archive.namelist() if b"\x80\x04" in archive.read(name)[:2]]
    assert {"step", "params/encoder_0/Conv_0/kernel"} < names
    step, state = trained_model.restore(evaluated.workdir, record.read_config(evaluated.workdir))
    with np.load(packed / "parameters.npz", allow_pickle=False) as arrays:
        assert arrays["step"] == step == runs.STEPS
        kernel = state.eval_params["params"]["encoder_0"]["Conv_0"]["kernel"]
        np.testing.assert_array_equal(arrays["params/encoder_0/Conv_0/kernel"], kernel)
        assert len(arrays.files) == 1 + len(jax.tree.leaves(state.eval_params))


def test_a_packed_model_is_loaded_as_the_run_is(packed, evaluated):
    model, packed_model = (trained_model.load(path) for path in (evaluated.workdir, packed))
    assert_equal_trees(packed_model.params, model.params)
    assert packed_model._replace(params=None) == model._replace(params=None)
    changed = trained_model.load(packed, ["--config.eval.image_score=max"])
    assert changed.config.eval.image_score == "max"


def test_it_predicts_and_evaluates_as_the_run_does(packed, evaluated, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    images = tmp_path / "new"
    layouts.write(images / "a.png", np.random.default_rng(5).integers(0, 256, (20, 24), np.uint8))
    layouts.write(images / "b.png", np.zeros((16, 16), np.uint8))
    tables = [
        predict.predict(workdir, images, tmp_path / f"out{i}").read_bytes()
        for i, workdir in enumerate((evaluated.workdir, folder))
    ]
    assert tables[0] == tables[1]
    before = json.loads((folder / "eval/metrics.json").read_text())
    evaluate.evaluate(folder)
    after = json.loads((folder / "eval/metrics.json").read_text())
    assert before == after


def test_thresholds_need_no_images(packed, evaluated, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    values = json.loads((folder / "config.json").read_text())
    values["data"]["root"] = str(tmp_path / "nowhere")
    (folder / "config.json").write_text(json.dumps(values))
    expected, found = (
        trained_model.thresholds(path, trained_model.load(path))
        for path in (evaluated.workdir, folder)
    )
    assert expected == found


def test_thresholds_that_are_missing_are_computed(evaluated, tmp_path):
    run = runs.clone(evaluated, tmp_path)
    expected = (run.workdir / thresholds.NAME).read_text()
    (run.workdir / thresholds.NAME).unlink()
    folder = pack(run.workdir, tmp_path / "model")
    stored, before = (
        json.loads(text) for text in ((folder / thresholds.NAME).read_text(), expected)
    )
    assert stored["model"] == before["model"]
    assert stored["held_out"] == before["held_out"]
    assert not (run.workdir / thresholds.NAME).exists()


def test_the_moving_average_is_packed(trained, tmp_path):
    # A checkpoint as a run with an average writes it.
    workdir = runs.clone(trained, tmp_path).workdir
    values = json.loads((workdir / "config.json").read_text())
    step, state = trained_model.restore(workdir, record.read_config(workdir))
    values["optimizer"]["ema_decay"] = 0.9
    (workdir / "config.json").write_text(json.dumps(values))
    shutil.rmtree(workdir / "checkpoints")
    state = state.replace(ema=jax.tree.map(lambda leaf: 0.5 * leaf, state.params))
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(step, state)
    folder = pack(workdir, tmp_path / "model")
    params = trained_model.load(folder).params
    assert_equal_trees(params, state.ema)
    assert any((leaf != leaves(state.params)[name]).any() for name, leaf in leaves(params).items())
    assert content(folder) == FILES - {"eval/metrics.json"}
    assert "Not measured" in (folder / "README.md").read_text()


def test_the_card_states_data_metrics_threshold_and_limits(packed, evaluated):
    text = (packed / "README.md").read_text()
    metrics = json.loads((packed / "eval/metrics.json").read_text())
    low, high = metrics["intervals"]["image_auroc_sum"]
    row = f"| `image_auroc_sum` | {metrics['image_auroc_sum']:.4f} | [{low:.3f}, {high:.3f}] |"
    assert row in text.splitlines()
    assert f"exceeds {metrics['threshold']['score']:.6g}" in text
    counts = record.read_data_record(evaluated.workdir)
    assert f"{counts['training_images']} normal images for training" in text
    assert f"{len(counts['held_out_names'])} held out" in text
    assert f"| licence | {model_card.UNKNOWN_LICENCE.replace('_', chr(92) + '_')} |" in text
    assert str(evaluated.root) not in text
    for heading in ("Model", "Data", "Metrics", "Threshold", "Limits", "Origin"):
        assert f"\n## {heading}\n" in text
    # Every table has rows of one length, whatever names are in it.
    assert "a\\|b\\_\\`c" in text
    for table in text.split("\n\n"):
        rows = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (DataConfig(source="elpv"), "CC BY-NC-SA 4.0"),
        (DataConfig(source="tfds", category="mvtec_ad/screw"), "CC BY-NC-SA 4.0"),
        (DataConfig(source="tfds", category="visa/pcb1"), "CC BY 4.0"),
        (DataConfig(source="folder", root="x", category="mvtec_ad"), "not known"),
    ],
)
def test_licences(data, found):
    assert Config(data=data) and found in model_card.licence(data)


def test_metrics_of_another_step_are_left_out(evaluated, tmp_path, messages):
    run = runs.clone(evaluated, tmp_path)
    path = run.workdir / "eval/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["provenance"]["step"] -= 1
    path.write_text(json.dumps(metrics))
    folder = pack(run.workdir, tmp_path / "model")
    assert content(folder) == FILES - {"eval/metrics.json"}
    assert any("of another step or other settings" in line for line in messages)


def test_damaged_metrics_are_one_line(evaluated, tmp_path):
    run = runs.clone(evaluated, tmp_path)
    path = run.workdir / "eval/metrics.json"
    whole = json.loads(path.read_text())
    intervals = whole["intervals"] | {"image_auroc_sum": [{}]}
    for metrics in ({}, whole | {"intervals": intervals}, whole | {"images": 5}):
        path.write_text(json.dumps(metrics))
        with pytest.raises(BadInput, match=r"metrics.json: damaged; evaluate again"):
            pack(run.workdir, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def damage(path, change):
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda a: a.pop("step"), r"parameters.npz: lacks the array step"),
        (lambda a: a.update(extra=np.zeros(2)), r"parameters.npz: has the array extra"),
        (
            lambda a: a.update({"params/encoder_0/Conv_0/bias": np.zeros(5, np.float32)}),
            r"Conv_0/bias is float32\[5\], and by config.json float32\[4\]",
        ),
        (lambda a: a.update(extra=np.array([{}])), r"parameters.npz: cannot be read"),
    ],
)
def test_damaged_parameters_are_refused(change, line, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "model")
    damage(tmp_path / "model" / parameters.NAME, change)
    with pytest.raises(BadInput, match=line):
        trained_model.load(tmp_path / "model")


def test_a_cut_file_is_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "model")
    path = tmp_path / "model" / parameters.NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"parameters.npz: cannot be read"):
        trained_model.load(tmp_path / "model")


def test_a_packed_model_is_not_trained(packed, trained, capsys):
    before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    assert main.main(["train", *runs.words(trained.root), f"--workdir={packed}"]) == 2
    assert "holds a packed model, which has no state to train on" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_bucket_takes_and_gives_both(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with bucket.in_memory(monkeypatch):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model_card, "render", interrupt)
            pack(packed, f"{bucket.ROOT}/model")
        # Half of a model stands there now, and the same command writes it anew.
        assert f"/bucket/model/{parameters.NAME}" in bucket.MemoryBucket.store
        folder = pack(packed, f"{bucket.ROOT}/model")
        assert_equal_trees(trained_model.load(folder).params, trained_model.load(packed).params)
        monkeypatch.setattr(program, "deviation", lambda *_: program.Deviation(0.0, 0.0))
        export.export(str(folder), f"{bucket.ROOT}/program")
        names = {name.removeprefix("/bucket/") for name in bucket.MemoryBucket.store}
        assert names == {"program", "program.json", *(f"model/{name}" for name in FILES)}
        with pytest.raises(BadInput, match=r"gs://bucket/model: not empty"):
            pack(packed, f"{bucket.ROOT}/model")
    assert not list(tmp_path.iterdir())


def test_the_command_and_its_refusals(packed, tmp_path, capsys):
    words = ["pack", f"--workdir={packed}"]
    assert main.main([*words, f"--out={tmp_path / 'again'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'again'}\n"
    assert content(tmp_path / "again") == FILES
    for out, more, named in (
        (tmp_path / "again", [], "again: not empty; results are never overwritten"),
        (tmp_path / "again/README.md", [], "README.md: a file; results are never overwritten"),
        (tmp_path / "x", ["--config.eval.image_score=max"], "keeps the settings of the run"),
    ):
        assert main.main([*words, f"--out={out}", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("pae pack: ") and named in line
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
