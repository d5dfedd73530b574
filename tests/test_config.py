import dataclasses
import json
import re

import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, config_file

FILES = sorted(p for p in runs.CONFIGS.glob("*.py") if "def get_config" in p.read_text())
DEFAULT = str(runs.CONFIGS / "default.py")
# Files that take an argument, or need a key that has no default.
ARGUMENTS = {
    "baselines": ("draem", "pca,elpv"),
    "mvtec": ("screw", "carpet"),
    "recipe": ("rate",),
    "results": ("mvtec_screw", "ball_screw"),
    "visa": ("candle",),
    "smoke": ("", "weave"),
}
ON_FOLDERS = ("folder", "baselines", "recipe", "results")
NEEDED = {name: ["--config.data.root=here"] for name in ON_FOLDERS}


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load(*words):
    return config_file.load(DEFAULT, words)


def test_the_default_file_is_the_dataclasses_key_by_key():
    from pae_jax.configs import default

    assert dict(flat(default.get_config().to_dict())) == dict(flat(config.Config().to_dict()))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_loads(path):
    for argument in ARGUMENTS.get(path.stem, ("",)):
        file = f"{path}:{argument}" if argument else str(path)
        loaded = config_file.load(file, NEEDED.get(path.stem, []))
        assert config.from_config_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded


STRICT = [
    path
    for path in FILES
    if path.stem in ("default", "baselines", "mvtec", "recipe", "results", "visa")
]


@pytest.mark.parametrize("path", STRICT, ids=lambda p: p.stem)
def test_an_argument_that_the_file_does_not_know(path):
    with pytest.raises(BadInput, match=rf"^{re.escape(str(path))}:nonsense: .*'nonsense'"):
        config_file.load(f"{path}:nonsense")


def test_overrides():
    changed = load(
        "--config.model.widths=(8,16)",
        "--config.model.dilation_rates=[1, 2, 3]",
        "--config.model.remat=true",
        "--config.train.tensorboard=False",
        "--config.optimizer.clip_norm=1",
        "--config.optimizer.learning_rate=3e-4",
        "--config.data.category=007",
        "--config.data.root=a=b (c)",
        "--config.objective.jacobian.weight=0.5",
    )
    assert changed.model.widths == (8, 16)
    assert changed.model.dilation_rates == (1, 2, 3)
    assert changed.model.remat is True
    assert changed.train.tensorboard is False
    assert (changed.optimizer.clip_norm, type(changed.optimizer.clip_norm)) == (1.0, float)
    assert changed.optimizer.learning_rate == 3e-4
    assert changed.data.category == "007"
    assert changed.data.root == "a=b (c)"
    assert changed.objective.jacobian.weight == 0.5


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("--config.train.stepz=3", r"train\.stepz: no such key; did you mean train\.steps\?"),
        ("--config.tran.steps=3", r"tran\.steps: no such key"),
        ("--config.train.steps.more=3", r"train\.steps\.more: no such key"),
        ("--config.train=3", r"train: is a section; set one of "),
        ("--config.train.steps", r"--config\.train\.steps: expected --config\.key=value"),
        ("train.steps=3", r"train\.steps=3: expected --config\.key=value"),
        ("--train.steps=3", r"--train\.steps=3: expected"),
        ("--config.=3", r": no such key"),
        ("--config.train.steps=1.5", r"train\.steps: expected int, got 1\.5"),
        ("--config.train.steps=many", r"train\.steps: expected int, got 'many'"),
        ("--config.train.steps=", r"train\.steps: expected int, got ''"),
        ("--config.train.steps=True", r"train\.steps: expected int, got True"),
        ("--config.train.steps=__import__('os')", r"train\.steps: expected int"),
        ("--config.optimizer.clip_norm=True", r"optimizer\.clip: expected float, got True"),
        ("--config.optimizer.clip_norm=1e999", r"optimizer\.clip: a finite number"),
        ("--config.model.remat=1", r"model\.remat: expected bool, got 1"),
        ("--config.model.widths=8", r"model\.widths: a tuple of int, not 8"),
        ("--config.model.widths=(8,1.5)", r"model\.widths: expected int, got 1\.5"),
        ("--config.model.widths=()", r"model\.widths: at least one"),
        ("--config.model.dilation_rates=(0,)", r"model\.rates: at least one positive"),
        ("--config.model.dilated_kernel_size=4", r"model\.kernel: an odd size, not 4"),
        ("--config.data.size=0", r"data\.size: at least 1, not 0"),
        ("--config.data.max_images=-1", r"data\.images: at least 0, not -1"),
        ("--config.data.holdout_fraction=0", r"data\.holdout: above 0\.0, not 0\.0"),
        ("--config.data.holdout_fraction=0.6", r"data\.holdout: at most 0\.5, not 0\.6"),
        ("--config.train.seed=-1", r"train\.seed: at least 0, not -1"),
        ("--config.eval.anomaly_map=ssmi", r"eval\.map: one of mse, ssim, gms, msgms, not 'ssmi'"),
        ("--config.data.source=folder", r"data\.root: "),
        ("--config.corruption.min_blobs=5", r"corruption\.min_blobs: 5 exceeds max_blobs 4"),
        ("--config.corruption.min_axis=0.5", r"corruption\.min_axis: 0\.5 exceeds"),
    ],
)
def test_a_bad_word_is_one_line_that_begins_with_the_key(word, line):
    with pytest.raises(BadInput) as error:
        load(word)
    assert re.match(line, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such config file"),
        ("x = 1\n", "defines no get_config"),
        ("def get_config(:\n", "cannot be read"),
        ("import no_such_package_anywhere\n", "no_such_package_anywhere"),
        ("def get_config(arg=None):\n    raise ValueError('three only')\n", "three only"),
    ],
)
def test_a_bad_file_is_one_line_that_begins_with_it(tmp_path, content, reason):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as error:
        config_file.load(str(path))
    assert re.match(f"{re.escape(str(path))}: .*{reason}", str(error.value))
    assert "\n" not in str(error.value)


def test_mistakes_inside_a_file_keep_their_traceback(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(arg=None):\n    return {}['missing']\n")
    with pytest.raises(KeyError, match="missing"):
        config_file.load(str(path))


@pytest.mark.parametrize("values", [{"train": 3}, {"data": None}, {"nothing": {}}])
def test_sections_are_checked_too(values):
    with pytest.raises(BadInput, match=next(iter(values))):
        config.from_config_dict(values)


def test_the_hash_names_every_value():
    assert config.Config().hash == load().hash
    names = {load().hash}
    for field in dataclasses.fields(config.EvalConfig):
        value = getattr(config.Config().eval, field.name)
        if isinstance(value, bool):
            names.add(load(f"--config.eval.{field.name}={not value}").hash)
        elif isinstance(value, int):
            names.add(load(f"--config.eval.{field.name}={value + 1}").hash)
    assert len(names) == 1 + sum(
        isinstance(getattr(config.Config().eval, f.name), int)
        for f in dataclasses.fields(config.EvalConfig)
    )
