"""What may change between two starts of a run: the one table, the refusals, and moved data."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import runs
from data_pipelines import decode
from data_pipelines.errors import BadInput
from layouts import write
from pae_jax import config as configuration
from pae_jax import main, train
from pae_jax.workdir import changes, files, record

# The sections and keys whose values are a part of the outcome: every key is in one of the tables.
FIXED = {
    *("method", "corruption", "head", "objective", "optimizer", "baseline"),
    *("data.source", "data.category", "data.height", "data.width", "data.crop_size"),
    *("data.texture_size", "data.holdout_fraction", "data.holdout_groups", "data.max_images"),
    *("data.augmentation", "data.value_range"),
    *("model.name", "model.patch_size", "model.widths", "model.convs_per_stage"),
    *("model.bottleneck_layers", "model.branch_width", "model.dilation_rates"),
    *("model.dilated_kernel_size", "model.norm", "model.skip", "model.output", "model.dtype"),
    *("model.input", "model.grey", "model.precision", "train.seed", "train.batch_size"),
}
CHANGES = {
    "data__num_threads": 2,
    "train__log_every": 7,
    "train__panel_every": 9,
    "train__keep_checkpoints": 3,
    "train__validation_examples": 4,
    "train__tensorboard": True,
    "eval__anomaly_map": "mse",
}
ROUNDING = {
    "data__on_device": "yes",
    "train__steps_per_call": 5,
    "train__validate_every": 5,
    "train__checkpoint_every": 5,
    "profile": (25, 30),
    "model__remat": True,
    "train__grad_accumulation_steps": 2,
    "sharding__data_parallel": 2,
    "sharding__transform": "shard_map",
    "population__mapping": "vmap",
    "train__deterministic": True,
}


def test_every_key_is_in_one_of_the_tables():
    names = set()
    for field in dataclasses.fields(configuration.Config):
        section = getattr(configuration.Config(), field.name)
        inner = dataclasses.fields(section) if dataclasses.is_dataclass(section) else ()
        keys = {f"{field.name}.{key.name}" for key in inner} or {field.name}
        names |= {field.name} if field.name in (FIXED | set(changes.FREE)) else keys
    assert names == FIXED | set(changes.FREE) | {"train.steps"}
    assert not FIXED & set(changes.FREE)


@pytest.fixture
def half(trained, tmp_path) -> runs.Run:
    """A run that stopped at step 20 of 30."""
    run = runs.clone(trained, tmp_path)
    shutil.rmtree(run.workdir / "checkpoints/30")
    return run


def name(key: str) -> str:
    return key.replace("__", ".")


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_of_this_key_keeps_the_bits(trained, half, key, messages):
    assert changes.FREE.get(name(key), changes.FREE.get(name(key).split(".")[0])) == changes.SAME
    config = runs.load_config(half.root, **{key: CHANGES[key]})
    assert train.train_and_evaluate(config, half.workdir).outcome == train.FINISHED
    runs.assert_same_state(half.workdir, trained.workdir)
    assert record.read_config(half.workdir) == config
    assert any(line.startswith(f"{half.workdir}: {name(key)}: ") for line in messages)
    assert not any("last bits" in line for line in messages)


def losses(workdir) -> list[float]:
    """Returns the losses of the steps after step 20."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if line["step"] > 20 and "train/loss" in line]


def test_changes_of_the_last_bits(trained, half, messages):
    config = runs.load_config(half.root, **ROUNDING)
    assert train.train_and_evaluate(config, half.workdir).outcome == train.FINISHED
    # The first steps, because Adam makes much of the last bits of a gradient near 0.
    first, expected = (losses(workdir)[:3] for workdir in (half.workdir, trained.workdir))
    assert len(first) == 3
    np.testing.assert_allclose(first, expected, rtol=1e-4)
    for key, value in ROUNDING.items():
        (line,) = [line for line in messages if f" {name(key)}: " in line]
        assert line.endswith(f", {value!r} now (the last bits may differ)")


def test_a_finished_run_goes_on_for_more_steps(trained, tmp_path, messages):
    """With a constant learning rate it is the longer run, bit for bit."""
    run = runs.clone(trained, tmp_path)
    config = runs.load_config(run.root, train__steps=40)
    assert train.train_and_evaluate(config, run.workdir).step == 40
    line = f"{run.workdir}: train.steps: 30 before, 40 now; the learning rate stays constant"
    assert line in messages
    train.train_and_evaluate(config, tmp_path / "long")
    runs.assert_same_state(run.workdir, tmp_path / "long")


def test_a_schedule_is_computed_anew_for_more_steps(trained, tmp_path, messages):
    changed = {"optimizer__schedule": "cosine", "train__log_every": 5}
    for steps in (10, 20):
        config = runs.load_config(trained.root, train__steps=steps, **changed)
        train.train_and_evaluate(config, tmp_path)
    (line,) = [line for line in messages if "train.steps: " in line]
    assert "the cosine schedule is computed anew for this length" in line
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    key = "train/learning_rate"
    rates = {line["step"]: line[key] for line in lines if key in line}
    assert rates[15] > rates[10]


def test_fewer_steps(half, capsys):
    """Down to the newest checkpoint, which is of step 20."""
    words = [*runs.words(half.root, train__steps=10), f"--workdir={half.workdir}"]
    before = (half.workdir / "config.json").read_bytes()
    assert main.main(["train", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "train.steps is 30 there and 10 now, fewer than the 20 of its newest checkpoint" in line
    assert "choose another --workdir, or repeat" in line
    assert (half.workdir / "config.json").read_bytes() == before
    config = runs.load_config(half.root, train__steps=20)
    assert train.train_and_evaluate(config, half.workdir).step == 20


def test_all_keys_that_differ_are_named(half, capsys):
    changed = {
        "train__seed": 1,
        "train__steps": 10,
        "optimizer__learning_rate": 0.5,
        "model__widths": (6,),
    }
    words = runs.words(half.root, train__log_every=9, **changed)
    assert main.main(["train", *words, f"--workdir={half.workdir}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for text in (
        "train.seed is 0 there and 1 now",
        "train.steps is 30 there and 10 now, fewer than the 20",
        "optimizer.learning_rate is 0.01 there and 0.5 now",
        "model.widths is (4,) there and (6,) now",
        "choose another --workdir, or repeat the values there",
    ):
        assert text in line
    assert "log_every" not in line


def test_other_data_are_named_in_full(half, capsys):
    write(half.root / "data/train/good/new.png", np.zeros((20, 24), np.uint8))
    (half.root / "textures/0.png").unlink()
    assert main.main(["train", *runs.words(half.root), f"--workdir={half.workdir}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    for key in ("fingerprint", "textures_fingerprint", "training_images"):
        assert f"{key} is " in line
    assert "name the data of the run by --config.data.root" in line


def test_moved_data_are_named_to_every_verb_alike(half, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    half.root.rename(moved)
    places = [
        f"--config.data.root={moved / 'data'}",
        f"--config.data.textures={moved / 'textures'}",
        f"--config.data.cache_dir={tmp_path / 'new cache'}",
    ]
    workdir = f"--workdir={half.workdir}"
    evaluation = ["evaluate", workdir, "--config.eval.diagnostics=True"]
    assert main.main(["evaluate", workdir]) == 2
    assert main.main([*evaluation, *places]) == 0
    new = [f"--images={moved / 'data/test'}", "--config.eval.smoothing=none"]
    # Neither thresholds nor images.
    assert main.main(["predict", workdir, *new, f"--out={tmp_path / 'no'}"]) == 2
    assert "--config.data.root=DIR names their folder" in capsys.readouterr().err
    assert main.main(["predict", workdir, *new, f"--out={tmp_path / 'yes'}", *places]) == 0
    assert main.main(["train", *runs.words(moved), workdir]) == 0
    assert record.read_config(half.workdir).data.root == str(moved / "data")
    # From now on the run knows the place.
    assert main.main(["evaluate", workdir]) == 0


def test_other_data_at_the_new_place_are_refused(trained, tmp_path, capsys):
    run = runs.clone(trained, tmp_path)
    shutil.copytree(run.root, tmp_path / "other")
    write(tmp_path / "other/data/train/good/000.png", np.zeros((20, 24), np.uint8))
    write(tmp_path / "other/textures/0.png", np.zeros((20, 24), np.uint8))
    workdir = f"--workdir={run.workdir}"
    words = [f"--config.data.root={tmp_path / 'other/data'}"]
    assert main.main(["evaluate", workdir, *words]) == 2
    assert "other training images than those of the run" in capsys.readouterr().err
    words = [f"--config.data.textures={tmp_path / 'other/textures'}"]
    assert main.main(["evaluate", workdir, *words, "--config.eval.diagnostics=True"]) == 2
    assert "other textures than those of the run" in capsys.readouterr().err
    assert not list(run.workdir.glob("*eval*"))


@pytest.mark.parametrize("source", ["folder", "procedural"])
def test_another_pillow_is_not_other_data(trained, tmp_path, monkeypatch, source):
    """It may decode and encode otherwise; the files and the drawings are the same."""
    words = {"data__source": source, "train__steps": 10}
    if source == "procedural":
        words["data__textures"] = "builtin"
    config = runs.load_config(trained.root, **words)
    train.train_and_evaluate(config, tmp_path)
    save = Image.Image.save
    monkeypatch.setattr(decode, "VERSION", "1-pillow99")
    monkeypatch.setattr(
        Image.Image, "save", lambda *args, **options: save(*args, **options, compress_level=1)
    )
    from data_pipelines import procedural

    procedural._png.cache_clear()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=20))
    assert train.train_and_evaluate(longer, tmp_path).step == 20
    procedural._png.cache_clear()


def test_a_record_of_an_earlier_version_is_read(trained, half):
    """Its fingerprints count the version of Pillow."""
    from pae_jax.workdir import run as run_module

    config = runs.load_config(half.root)
    present, earlier = run_module._data_records(*run_module.open_data(config))
    assert present != earlier
    path = half.workdir / "data.json"
    assert files.read_json(path) == present
    files.write_json(path, earlier)
    train.train_and_evaluate(config, half.workdir)
    runs.assert_same_state(half.workdir, trained.workdir)
    assert files.read_json(path) == present
    files.write_json(path, {**earlier, "textures_fingerprint": "0" * 32})
    with pytest.raises(BadInput, match="other data: textures_fingerprint is '000"):
        train.train_and_evaluate(config, half.workdir)
