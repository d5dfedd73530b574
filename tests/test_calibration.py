"""The calibration of anomaly maps: the statistics, and a calibrated run from training to export."""

import csv
import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import scipy.ndimage
import tifffile

import runs
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax import anomaly_map, aot, detection, evaluate, main, predict, train, train_step
from pae_jax.anomaly_map import Calibration
from pae_jax.comparison.compare import compare
from pae_jax.config import EvalConfig
from pae_jax.deployment import export, program, stablehlo
from pae_jax.deployment.pack import pack
from pae_jax.devices import sharding
from pae_jax.workdir import calibration, files, thresholds, trained_model

SHAPE = (9, 13)
SETTINGS = EvalConfig(smoothing_fraction=0.2, calibration="position")


def brute_force(maps, settings):
    """Mean and deviation of maps as they are defined, in float64."""
    if settings.calibration == "all":
        return maps.mean(dtype=np.float64), maps.std(dtype=np.float64)
    sample = np.std(maps, axis=0, ddof=1, dtype=np.float64)
    width = 2 * settings.smoothing_fraction * min(sample.shape)
    kernel = anomaly_map.SMOOTHINGS["gaussian"](width)
    smoothed = sample
    for axis in (0, 1):
        smoothed = scipy.ndimage.correlate1d(smoothed, kernel, axis, mode="reflect")
    return maps.mean(0, dtype=np.float64), smoothed + 0.2 * np.sqrt(np.mean(sample**2))


def brute_force_without(maps, i, settings):
    mean, deviation = brute_force(np.delete(maps, i, axis=0), settings)
    return (maps[i] - mean) / deviation


def draw_maps(count, seed=0):
    """Maps whose mean and spread differ between positions."""
    rng = np.random.default_rng(seed)
    scale = np.linspace(0.01, 0.2, SHAPE[1]) * np.linspace(0.2, 1, SHAPE[0])[:, None]
    return (0.3 + scale * (1 + rng.normal(size=(count, *SHAPE)))).astype(np.float32)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("calibration", ["all", "position"])
def test_the_statistics_are_those_of_numpy(count, calibration):
    maps, settings = draw_maps(count), dataclasses.replace(SETTINGS, calibration=calibration)
    found, (mean, deviation) = (
        anomaly_map.calibration_of(maps, settings),
        brute_force(maps, settings),
    )
    assert found.mean.dtype == found.deviation.dtype == np.float32
    assert found.mean.shape == found.deviation.shape == SHAPE
    np.testing.assert_allclose(found.mean, np.broadcast_to(mean, SHAPE), rtol=1e-6)
    np.testing.assert_allclose(found.deviation, np.broadcast_to(deviation, SHAPE), rtol=1e-6)
    values = anomaly_map.standardise(maps, found)
    np.testing.assert_allclose(values, (maps - mean) / deviation, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("calibration", ["all", "position"])
def test_every_map_is_standardised_by_the_others(count, calibration):
    maps, settings = draw_maps(count), dataclasses.replace(SETTINGS, calibration=calibration)
    maps[0] += 0.5  # most of the sum of squares, which the closed form subtracts again
    found = list(anomaly_map.leave_one_out(maps, settings))
    assert len(found) == count
    for i, values in enumerate(found):
        assert values.dtype == np.float32
        expected = brute_force_without(maps, i, settings)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    # Statistics that contain the map hide it.
    inside = anomaly_map.standardise(maps, anomaly_map.calibration_of(maps, settings))
    assert found[0].max() > 2 * inside[0].max()


@pytest.mark.parametrize("calibration", ["all", "position"])
def test_several_maps_are_standardised_one_by_one_and_added(calibration):
    maps = np.stack([draw_maps(6), 5 - 40 * draw_maps(6, seed=1)], axis=-1)
    together = EvalConfig(
        smoothing_fraction=0.1, calibration=calibration, anomaly_map="ssim+logit@2"
    )
    alone = [
        dataclasses.replace(together, anomaly_map="ssim"),
        dataclasses.replace(together, anomaly_map="logit@2"),
    ]
    statistics = anomaly_map.calibration_of(maps, together)
    assert statistics.mean.shape == (*SHAPE, 2)
    parts = [anomaly_map.calibration_of(maps[..., k], alone[k]) for k in (0, 1)]
    for k, part in enumerate(parts):
        np.testing.assert_array_equal(statistics.mean[..., k], part.mean)
        np.testing.assert_allclose(statistics.deviation[..., k], part.deviation, rtol=1e-6)
    far = maps.copy()
    far[0, 3, 4] = [1.0, -1e6]  # the second map is sure that nothing changed there
    expected = [anomaly_map.standardise(far[..., k], parts[k]) for k in (0, 1)]
    found = anomaly_map.standardise(far, statistics)
    np.testing.assert_allclose(found, sum(np.maximum(z, -3) for z in expected), rtol=1e-5)
    assert found[0, 3, 4] == pytest.approx(expected[0][0, 3, 4] - 3)
    others = zip(*(anomaly_map.leave_one_out(maps[..., k], alone[k]) for k in (0, 1)), strict=True)
    for values, pair in zip(anomaly_map.leave_one_out(maps, together), others, strict=True):
        np.testing.assert_allclose(
            values, sum(np.maximum(z, -3) for z in pair), rtol=1e-4, atol=1e-4
        )


def test_equal_maps_stay_finite():
    maps = np.full((4, *SHAPE), 0.25, np.float32)
    for values in anomaly_map.leave_one_out(maps, SETTINGS):
        np.testing.assert_array_equal(values, 0)
    maps[0, 2, 3] = 0.5  # the others are equal
    first, second, *_ = anomaly_map.leave_one_out(maps, SETTINGS)
    assert np.isfinite(first).all() and first[2, 3] == first.max() > 1e6
    assert np.isfinite(second).all()


def test_thresholds_from_maps_inside_their_own_statistics_would_be_too_low():
    """The largest of n scores should be exceeded by a further normal image once in n + 1 times."""
    count, alarms = 10, {"others": 0, "all": 0}
    trials = 300
    for seed in range(trials):
        maps = draw_maps(count + 1, seed)
        known, new = maps[:-1], maps[-1:]
        statistics = anomaly_map.calibration_of(known, SETTINGS)
        score = anomaly_map.standardise(new, statistics).max()
        inside = anomaly_map.standardise(known, statistics)
        outside = list(anomaly_map.leave_one_out(known, SETTINGS))
        alarms["all"] += score > inside.max()
        alarms["others"] += score > np.max(outside)
    assert alarms["others"] / trials == pytest.approx(1 / (count + 1), abs=0.05)
    assert alarms["all"] / trials > 2 / (count + 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, compilation_cache) -> runs.Run:
    """A calibrated run with its evaluation; tests that change it use a copy."""
    root = runs.make_folder(tmp_path_factory.mktemp("images"))
    workdir = tmp_path_factory.mktemp("calibrated") / "run"
    config = runs.load_config(root, eval__calibration="position", eval__floor=True)
    assert train.train_and_evaluate(config, workdir).outcome == train.FINISHED
    shutil.copytree(workdir, workdir.with_name("trained"))
    evaluate.evaluate(workdir, save_maps=True)
    return runs.Run(root, workdir)


@pytest.fixture(scope="module")
def held_out(run) -> np.ndarray:
    """The smoothed maps of the held-out images, from the plain parameters."""
    model = trained_model.load(run.workdir, ["--config.eval.calibration=none"])
    assert model.detector is model.params
    split = trained_model.open_split(run.workdir, model.config)
    return np.stack(
        [d.map for d in detection.detect_all(model.params, split.held_out, model.config)]
    )


def stored_file(workdir):
    (path,) = (workdir / "calibration").iterdir()
    return path


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_ends_with_statistics_and_thresholds(run, held_out):
    workdir = run.workdir.with_name("trained")
    model = trained_model.load(workdir)
    settings = model.config.eval
    with np.load(stored_file(workdir), allow_pickle=False) as file:
        mean, deviation = brute_force(held_out, settings)
        np.testing.assert_allclose(file["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(file["deviation"], deviation, rtol=1e-4)
        assert file["images"] == len(held_out) >= 3
        identity = {"step": int(file["step"]), "digest": str(file["digest"])}
    content = files.read_json(workdir / "thresholds.json")
    assert content["model"] == identity
    (entry,) = content["held_out"]
    assert entry["settings"]["calibration"] == "position"
    for i in range(len(held_out)):
        values = brute_force_without(held_out, i, settings)
        assert entry["maxima"][i] == pytest.approx(values.max(), rel=1e-3)
        assert entry["scores"]["max"][i] == pytest.approx(values.max(), rel=1e-3)
        assert entry["scores"]["sum"][i] == pytest.approx(values.sum(), rel=1e-3, abs=0.1)


@pytest.mark.parametrize(("noise", "choice"), [(10, "position"), (10_000, "all")])
def test_auto_is_by_position_where_normal_images_look_alike(run, noise, choice):
    model, rng = trained_model.load(run.workdir), np.random.default_rng(0)
    motif = rng.integers(40, 216, (*model.config.data.shape, model.channels))
    images = np.clip(motif + rng.normal(0, noise, (6, *motif.shape)), 0, 255).astype(np.uint8)

    def measure(calibration):
        settings = dataclasses.replace(model.config.eval, calibration=calibration)
        config = dataclasses.replace(model.config, eval=settings)
        return detection.measure_held_out(model.params, images, config)

    found = measure("auto")
    assert found[1].by_position is (choice == "position")
    for a, b in zip(*map(jax.tree.leaves, (found, measure(choice))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_plain_parameters_are_not_calibrated_as_in_the_validation_of_a_training(run):
    model = trained_model.load(run.workdir)
    plain = dataclasses.replace(
        model.config, eval=dataclasses.replace(model.config.eval, calibration="none")
    )
    images = program.trial_images(4, (*model.config.data.shape, model.channels))

    def detect(params, config):
        config = detection.inference_config(config)
        return jax.device_get(detection.start_batch(params, images, config))

    results = detect(model.params, model.config), detect(model.params, plain)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)
    calibrated = detect(model.detector, model.config)
    mean, deviation = map(np.asarray, model.calibration)
    values = (results[0].map - mean) / deviation
    np.testing.assert_allclose(calibrated.map, values, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(calibrated.scores["max"], values.max((1, 2)), rtol=1e-4)
    np.testing.assert_allclose(calibrated.scores["sum"], values.sum((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(calibrated.reconstruction, results[0].reconstruction, atol=1e-6)


def test_the_evaluation_is_calibrated_and_its_floor_is_not(run, tmp_path, capsys):
    copy = runs.clone(run, tmp_path)
    words = ["--config.eval.calibration=none"]
    assert main.main(["evaluate", f"--workdir={copy.workdir}", "--save_maps", *words]) == 0
    folders = copy.workdir / "eval", copy.workdir / "eval_calibration=none"
    records = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert records[0]["floor"] == records[1]["floor"] != {}
    assert records[0]["pixel_ap"] != records[1]["pixel_ap"]
    standardised = [
        "Maps are standardised" in (folder / "report.html").read_text() for folder in folders
    ]
    assert standardised == [True, False]
    name = "maps/data/test/crack/000.tiff"
    z, plain = (tifffile.imread(folder / name) for folder in folders)
    assert z.shape == plain.shape and z.min() < 0 <= plain.min()
    assert np.abs(z).max() > 1 >= plain.max()
    assert np.corrcoef(z.ravel(), plain.ravel())[0, 1] > 0.3
    approximate = [
        "probability is an approximation" in (folder / "report.html").read_text()
        for folder in folders
    ]
    assert approximate == [True, False]
    decided = records[0]["threshold"]["score"]
    for row in read_csv(folders[0] / "scores.csv"):
        assert row["defective"] == str(int(float(row["score_sum"]) > decided))


def test_a_comparison_uses_the_statistics_of_each_run(run, tmp_path):
    plain = shutil.copytree(run.workdir, tmp_path / "plain")
    runs.set_eval(plain, calibration="none")
    evaluate.evaluate(plain)
    record = compare([run.workdir, plain], tmp_path / "compared.html").record
    for k, workdir in enumerate((run.workdir, plain)):
        evaluated = files.read_json(workdir / "eval/metrics.json")
        for name in ("pixel_ap", "pixel_aupro", "image_auroc_max"):
            value = record["metrics"][name][k]["value"]
            assert value == pytest.approx(evaluated[name], rel=1e-6), name
    assert "have another unit: run 1." in (tmp_path / "compared.html").read_text()


def test_predicting_needs_the_workdir_alone(run, held_out, tmp_path):
    copy = runs.clone(run, tmp_path)
    images = tmp_path / "new"
    shutil.move(copy.root / "data/test/good", images)
    shutil.rmtree(copy.root)
    before = stored_file(copy.workdir).read_bytes()
    scores = predict.predict(copy.workdir, images, tmp_path / "out", save_maps=True)
    expected = {row["name"].rpartition("/")[2]: row for row in read_scores(run)}
    rows = read_csv(scores)
    assert len(rows) == 3
    for row in rows:
        for key in ("score_sum", "score_max", "defective"):
            assert float(row[key]) == pytest.approx(float(expected[row["name"]][key]), rel=1e-5)
    assert tifffile.imread(next((tmp_path / "out/maps").iterdir())).min() < 0
    assert stored_file(copy.workdir).read_bytes() == before

    # Statistics of other maps need the images, and so do these without the file.
    with pytest.raises(BadInput, match=r"need the training images, .*--config\.data\.root=DIR"):
        trained_model.load(copy.workdir, ["--config.eval.smoothing=none"])
    stored_file(copy.workdir).unlink()
    words = ["predict", f"--workdir={copy.workdir}", f"--images={images}"]
    assert main.main([*words, f"--out={tmp_path / 'again'}"]) == 2
    assert not (tmp_path / "again").exists()


def read_scores(run):
    return [r for r in read_csv(run.workdir / "eval/scores.csv") if r["type"] == "good"]


def test_missing_statistics_are_computed_again(run, tmp_path, monkeypatch, messages):
    workdir = runs.clone(run, tmp_path).workdir
    path = stored_file(workdir)
    before = path.read_bytes()
    path.unlink()
    write = calibration.write_atomically

    def refuse(path, _):
        raise CannotWrite(path, OSError(30, "Read-only file system"))

    monkeypatch.setattr(calibration, "write_atomically", refuse)
    first = trained_model.load(workdir)
    assert not path.exists()
    assert any("Read-only file system" in line for line in messages)
    monkeypatch.setattr(calibration, "write_atomically", write)
    second = trained_model.load(workdir)
    for a, b in zip(first.calibration, second.calibration, strict=True):
        np.testing.assert_array_equal(a, b)
    assert path.read_bytes() == before  # numpy writes no time

    # Other settings have a file of their own.
    other = trained_model.load(workdir, ["--config.eval.smoothing=none"])
    assert (np.asarray(other.calibration.mean) != np.asarray(second.calibration.mean)).any()
    assert len(list(path.parent.iterdir())) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), ""),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: alter(path, mean=np.zeros((3, 4), np.float32)), r"float32\[3, 4\], not"),
        (lambda path: alter(path, deviation=np.zeros((16, 16), np.float32)), "is not positive"),
        (lambda path: alter(path, mean=np.full((16, 16), np.nan, np.float32)), "is not finite"),
        (lambda path: alter(path, digest=np.array([{}])), "allow_pickle"),
    ],
)
def test_a_damaged_file_is_named(run, tmp_path, change, reason):
    workdir = tmp_path / "run"
    shutil.copytree(run.workdir, workdir)
    path = stored_file(workdir)
    change(path)
    with pytest.raises(BadInput, match=rf"{path.name}: damaged; remove it \(.*{reason}") as error:
        trained_model.load(workdir)
    assert str(error.value).startswith(str(path))


def alter(path, **changes):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, **changes})


def test_another_model_never_uses_them(run, tmp_path):
    """Training further replaces the file of the same settings, a damaged one as well."""
    copy = runs.clone(run, tmp_path)
    model = trained_model.load(copy.workdir)
    settings, shape = model.config.eval, model.config.data.shape
    assert calibration.read(copy.workdir, model.params, model.step, settings, shape) is not None
    other = jax.tree.map(lambda leaf: leaf * 1.01, model.params)
    assert calibration.read(copy.workdir, other, model.step, settings, shape) is None
    assert calibration.read(copy.workdir, model.params, model.step + 1, settings, shape) is None
    stored_file(copy.workdir).write_bytes(b"")
    config = runs.load_config(copy.root, train__steps=40, eval__calibration="position")
    assert train.train_and_evaluate(config, copy.workdir).step == 40
    with np.load(stored_file(copy.workdir)) as file:
        assert file["step"] == 40
    assert trained_model.load(copy.workdir).calibration is not None


def test_a_packed_model_has_them(run, tmp_path):
    folder = pack(run.workdir, tmp_path / "model")
    assert stored_file(folder).name == stored_file(run.workdir).name
    for a, b in zip(
        trained_model.load(folder).calibration,
        trained_model.load(run.workdir).calibration,
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    card = (folder / "README.md").read_text()
    assert "standard deviations of the held-out" in card and "is an approximation" in card
    images = run.root / "data/test/crack"
    tables = [
        predict.predict(workdir, images, tmp_path / f"out{i}").read_bytes()
        for i, workdir in enumerate((run.workdir, folder))
    ]
    assert tables[0] == tables[1]


def test_an_exported_program_contains_them(run, tmp_path):
    path = export.export(run.workdir, tmp_path / "model")
    record = json.loads((tmp_path / "model.json").read_text())
    assert "standard deviations" in record["outputs"]["map"]["unit"]
    assert record["thresholds"]["rule"].endswith("this probability is an approximation.")
    assert record["model"] == files.read_json(run.workdir / "thresholds.json")["model"]
    assert 0 <= max(record["deviation"][key] for key in ("map", "score")) <= 1e-5
    model = trained_model.load(run.workdir)
    images = program.trial_images(export.TRIAL_IMAGES, (*model.config.data.shape, model.channels))
    outputs = stablehlo.load(path.read_bytes())(images)
    results = list(detection.detect_all(model.detector, images, model.config))
    for i, result in enumerate(results):
        np.testing.assert_allclose(outputs["map"][i], result.map, rtol=1e-4, atol=1e-3)
        for name in detection.REPORTED_SCORES:
            expected = result.scores[name]
            assert outputs[f"score_{name}"][i] == pytest.approx(expected, rel=1e-3, abs=1e-2)
    # One that leaves them out is told.
    config = program.settings(model.config)
    plain = functools.partial(jax.jit(program.make(config, "cpu")), model.params)
    assert program.deviation(plain, model.detector, config, images).map > 1e-2


def test_the_key_stands_only_where_it_has_a_part():
    """So that files of earlier versions are still used."""
    assert "calibration" not in thresholds.dependencies(EvalConfig())
    assert thresholds.dependencies(EvalConfig(calibration="position"))["calibration"] == "position"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"method": "deep_svdd"},
            "eval.calibration: position needs maps, and the method deep_svdd scores whole images",
        ),
        (
            {"data.holdout_fraction": 0.1},
            "eval.calibration: position needs at least 3 held-out images, and there are 2; raise "
            "data.holdout_fraction (another training), or set it to none",
        ),
        (
            {"eval.calibration": "pixel"},
            "eval.calibration: one of none, all, position, auto, not 'pixel'",
        ),
    ],
)
def test_what_is_refused_before_training(run, tmp_path, changes, line, capsys):
    words = runs.words(run.root, **({"eval.calibration": "position"} | changes))
    assert main.main(["train", *words, f"--workdir={tmp_path / 'new'}"]) == 2
    assert f"pae train: {line}" in capsys.readouterr().err
    assert not (tmp_path / "new/config.json").exists()


def test_a_run_without_them_can_be_asked_for_them(run, tmp_path):
    """And is refused if it has too few held-out images."""
    copy = runs.clone(run, tmp_path)
    shutil.rmtree(copy.workdir / "calibration")
    runs.set_eval(copy.workdir, calibration="none")
    assert trained_model.load(copy.workdir).calibration is None
    words = ["--config.eval.calibration=position"]
    found = trained_model.load(copy.workdir, words).calibration
    expected = trained_model.load(run.workdir).calibration
    assert isinstance(found, Calibration)
    np.testing.assert_array_equal(found.deviation, expected.deviation)
    record = files.read_json(copy.workdir / "data.json")
    record["held_out_names"] = record["held_out_names"][:2]
    files.write_json(copy.workdir / "data.json", record)
    with pytest.raises(BadInput, match="at least 3 held-out images, and there are 2"):
        trained_model.load(copy.workdir, words)


def test_the_other_uses_of_parameters_keep_the_plain_ones(run):
    model = trained_model.load(run.workdir)
    _, state = trained_model.restore(run.workdir, model.config)
    shapes = jax.eval_shape(lambda: train_step.init_state(model.config, jax.random.key(0)))
    assert jax.tree.structure(model.params) == jax.tree.structure(shapes.eval_params)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(state.eval_params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert isinstance(model.detector, detection.Calibrated)


def test_the_program_that_is_compiled_ahead_of_time_has_them_as_arguments(tmp_path):
    counts = []
    for name in ("none", "position"):
        config = runs.load_config(tmp_path, **{"eval.calibration": name})
        mesh = sharding.make_mesh(config, jax.devices()[:1])
        lowered = aot._prediction(config).lower(mesh)
        counts.append(len(jax.tree.leaves(lowered.args_info)))
    assert counts[1] == counts[0] + 2


def test_several_maps_from_training_to_export(tmp_path, compilation_cache):
    root, names = runs.make_folder(tmp_path), ("ssim", "ssim@2", "logit")
    together = {"method": "discrepancy", "head__widths": (4,), "head__dilation_rates": (1,)}
    together |= {"eval__anomaly_map": "+".join(names), "eval__calibration": "all"}
    workdir = tmp_path / "run"
    config = runs.load_config(root, train__steps=10, **together)
    assert train.train_and_evaluate(config, workdir).outcome == train.FINISHED
    evaluate.evaluate(workdir, save_maps=True)
    model = trained_model.load(workdir)
    images = trained_model.open_split(workdir, model.config).images[:3]

    # The sum is that of the maps alone, each standardised by the same held-out images.
    alone = []
    for name in names:
        words = [f"--config.eval.anomaly_map={name}", "--config.eval.calibration=all"]
        one = trained_model.load(workdir, words)
        alone.append([d.map for d in detection.detect_all(one.detector, images, one.config)])
    found = [d.map for d in detection.detect_all(model.detector, images, model.config)]
    expected = sum(np.maximum(np.stack(maps), -3) for maps in alone)
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-4, atol=1e-4)

    # Without a calibration, as in the validation of a training, it is the first map.
    first = [d.map for d in detection.detect_all(model.params, images, model.config)]
    words = ["--config.eval.anomaly_map=ssim", "--config.eval.calibration=none"]
    plain = trained_model.load(workdir, words)
    for a, b in zip(first, detection.detect_all(plain.params, images, plain.config), strict=True):
        np.testing.assert_allclose(a, b.map, atol=1e-6)

    predict.predict(workdir, root / "data/test/crack", tmp_path / "out", save_maps=True)
    export.export(workdir, tmp_path / "model.stablehlo")
