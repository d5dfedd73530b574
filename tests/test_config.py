import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, config_file
from pae_jax.config_schema import RENAMED, RENAMED_VALUES, SCHEMA, upgrade

FILES = sorted(p for p in runs.CONFIGS.glob("**/*.py") if "def get_config" in p.read_text())
DEFAULT = str(runs.CONFIGS / "default.py")
# Files that take an argument, or need a key that has no default.
ARGUMENTS = {
    "baselines": ("draem", "pca,elpv"),
    "mvtec": ("screw", "carpet"),
    "recipe": ("rate",),
    "results": ("mvtec_screw", "ball_screw"),
    "tpu_v5e": ("", "screw", "carpet"),
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


def sections(*pairs):
    """Nested dictionaries with the values of (dotted key, value) pairs."""
    nested = {}
    for key, value in pairs:
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def test_the_default_file_is_the_dataclasses_key_by_key():
    from pae_jax.configs import default

    keys = dict(flat(default.get_config().to_dict()))
    assert keys.pop("data.size") == config.DataConfig().height
    assert keys.keys() == dict(flat(config.Config().to_dict())).keys()
    assert load() == config.Config()


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
        ("--config.optimizer.clip_norm=True", r"optimizer\.clip_norm: expected float, got True"),
        ("--config.optimizer.clip_norm=1e999", r"optimizer\.clip_norm: a finite number"),
        ("--config.model.remat=1", r"model\.remat: expected bool, got 1"),
        ("--config.model.widths=8", r"model\.widths: a tuple of int, not 8"),
        ("--config.model.widths=(8,1.5)", r"model\.widths: expected int, got 1\.5"),
        ("--config.model.widths=()", r"model\.widths: at least one"),
        ("--config.model.dilation_rates=(0,)", r"model\.dilation_rates: at least one positive"),
        ("--config.model.dilated_kernel_size=4", r"model\.dilated_kernel_size: an odd size, not 4"),
        ("--config.data.size=0", r"data\.size: at least 1, not 0"),
        ("--config.data.size=many", r"data\.size: expected int, got 'many'"),
        ("--config.data.width=0", r"data\.width: at least 1, not 0"),
        ("--config.train.steps=None", r"train\.steps: not set$"),
        ("--config.data.max_images=-1", r"data\.max_images: at least 0, not -1"),
        ("--config.data.holdout_fraction=0", r"data\.holdout_fraction: above 0\.0, not 0\.0"),
        ("--config.data.holdout_fraction=0.6", r"data\.holdout_fraction: at most 0\.5, not 0\.6"),
        ("--config.data.size=1000000", r"data\.size: at most 16384, not 1000000"),
        (
            f"--config.optimizer.learning_rate={10**400}",
            r"optimizer\.learning_rate: a finite number, not",
        ),
        ("--config.train.seed=-1", r"train\.seed: at least 0, not -1"),
        (
            "--config.eval.anomaly_map=ssmi",
            r"eval\.anomaly_map: names joined by \+, .* of mse, ssim, gms, .*; not 'ssmi'",
        ),
        ("--config.data.source=folder", r"data\.root: "),
        ("--config.corruption.min_blobs=5", r"corruption\.min_blobs: 5 exceeds max_blobs 4"),
        ("--config.corruption.min_axis=0.5", r"corruption\.min_axis: 0\.5 exceeds"),
        ("--config.corruption.max_axis=0.005", r"corruption\.min_axis: 0\.01 exceeds max_axis"),
        ("--config.eval.iterations=3", r"eval\.iterations: 3 needs eval\.apply=iterate"),
        ("--config.eval.iterations=0", r"eval\.iterations: 0 is .*; use eval\.apply=fixed_point"),
    ],
)
def test_a_bad_word_is_one_line_that_begins_with_the_key(word, line):
    with pytest.raises(BadInput) as error:
        load(word)
    assert re.match(line, str(error.value))
    assert "\n" not in str(error.value)


OLD_WORDS = [
    *((key, 1, f"{key}: renamed; use {new}") for key, new in RENAMED.items()),
    *(
        (key, value, f"{key}: {value!r} is an old value; use {new!r}")
        for (key, value), new in RENAMED_VALUES.items()
    ),
    ("eval.iterations", 0, "eval.iterations: 0 is an old value; use eval.apply=fixed_point"),
]


@pytest.mark.parametrize(("key", "value", "line"), OLD_WORDS, ids=str)
def test_an_old_key_or_value_is_one_line_that_names_the_new_one(key, value, line, tmp_path):
    with pytest.raises(BadInput) as error:
        load(f"--config.{key}={value}")
    assert str(error.value) == line

    path = tmp_path / "mine.py"
    path.write_text(
        "from pae_jax.configs import default\n"
        "def get_config(arg=None):\n"
        "    config = default.get_config()\n"
        f"    config.{key} = {value!r}\n"
        "    return config\n"
    )
    with pytest.raises(BadInput) as error:
        config_file.load(str(path))
    assert str(error.value) == line


def test_an_old_config_is_upgraded_key_by_key():
    old = sections(*((key, f"value of {key}") for key in RENAMED))
    assert upgrade(old) == sections(*((RENAMED[key], f"value of {key}") for key in RENAMED))
    assert upgrade({"schema": SCHEMA, "train": {"keep": 3}}) == {"train": {"keep": 3}}
    for (key, value), new in RENAMED_VALUES.items():
        assert upgrade(sections((key, value))) == sections((key, new))
        assert upgrade(sections((key, "another"))) == sections((key, "another"))
    for size, width, shape in ((64, 0, (64, 64)), (64, 96, (64, 96))):
        data = upgrade({"data": {"size": size, "width": width}})["data"]
        assert (data["height"], data["width"]) == shape
    for old, new in ((0, ("fixed_point", 1)), (1, ("once", 1)), (3, ("iterate", 3))):
        section = upgrade({"eval": {"iterations": old}})["eval"]
        assert (section["apply"], section["iterations"]) == new
        config.from_config_dict({"eval": section})


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ((), (192, 448)),
        (("size=128",), (128, 128)),
        (("width=128",), (192, 128)),
        (("size=128", "width=64"), (128, 64)),
        (("width=64", "size=128"), (128, 64)),
    ],
)
def test_size_sets_both_sides_and_width_alone_one(words, shape):
    words = ["--config.data.root=here", *(f"--config.data.{word}" for word in words)]
    assert config_file.load("experiments/results:ball_screw", words).data.shape == shape


def test_a_file_is_located_by_its_path_or_the_name_of_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = runs.CONFIGS
    for word, expected in {
        "folder": (directory / "folder.py", None),
        "mvtec:screw": (directory / "mvtec.py", "screw"),
        "mvtec:": (directory / "mvtec.py", None),
        "experiments/results:mvtec_screw": (directory / "experiments/results.py", "mvtec_screw"),
        f"{DEFAULT}:a:b": (directory / "default.py", "a:b"),
    }.items():
        assert config_file.locate(word) == expected
    path = tmp_path / "at 12:30/mine.py"
    path.parent.mkdir()
    path.write_text("")
    assert config_file.locate(str(path)) == (path, None)
    assert config_file.locate(f"{path}:arg") == (path, "arg")
    for word in ("foldr", "foldr:arg", "experiments", ""):
        with pytest.raises(BadInput, match=f"^{word.removesuffix(':arg')}: no such config file"):
            config_file.locate(word)


SETS = """from pae_jax.configs import default
def get_config(arg=None):
    config = default.get_config()
    config.{}
    return config
"""


@pytest.mark.parametrize("name", ["runs:3/my.py", "a:b:c.py", "C:\\x.py", ":", "smoke:1"])
def test_a_path_with_colons_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    text = f"import runpy\nbase = runpy.run_path({DEFAULT!r})\n"
    text += "def get_config(arg=None):\n    config = base['get_config']()\n"
    text += "    config.train.seed = len(arg or '')\n    return config\n"
    text += "def members(arg):\n    return ['x', 'yy'] if arg == 'all' else None\n"
    Path(name).write_text(text)
    assert config_file.load(name).train.seed == 0
    assert config_file.load(f"{name}:abc").train.seed == 3
    # A member's argument is no part of a path, also if there is such a file.
    Path(f"{name}:x").write_text("")
    members = config_file.load_members(f"{name}:all")
    assert {key: member.train.seed for key, member in members.items()} == {"x": 1, "yy": 2}


@pytest.mark.parametrize("word", ["runs:3/my.py", "C:\\x.py:arg", "/nowhere/a.py"])
def test_a_missing_path_is_named_as_a_whole(word):
    with pytest.raises(BadInput, match=f"^{re.escape(word)}: no such config file"):
        config_file.locate(word)


@pytest.mark.parametrize("word", ["a\0b", "x" * 5000, "\udcff", "a/" * 3000])
def test_a_name_that_no_file_can_have(word):
    with pytest.raises(BadInput, match="no such config file"):
        config_file.locate(word)


@pytest.mark.parametrize("values", [{"schema": None}, {"schema": "x"}])
def test_a_damaged_config_json(values):
    with pytest.raises(BadInput, match="schema: a number, not"):
        upgrade(values)


@pytest.mark.parametrize("damage", [None, 5, "x", [], [{}], 1.5])
def test_a_damaged_section_or_value_of_an_old_config_json(damage):
    """Whatever stands in place of a section or a value is taken or refused in one line."""
    old = json.loads((Path(__file__).parent / "data/workdir_schema_1/config.json").read_text())
    for section, values in old.items():
        if not isinstance(values, dict):
            continue
        with pytest.raises(BadInput, match=f"^{section}: a section of keys, not"):
            config.from_config_dict(upgrade(old | {section: damage}))
        for key in values:
            with contextlib.suppress(BadInput):
                config.from_config_dict(upgrade(old | {section: values | {key: damage}}))


def test_every_shipped_config_has_a_name_and_a_sentence():
    summaries = config_file.shipped()
    assert {config_file.locate(name)[0] for name in summaries} == set(FILES)
    assert all(re.match(r"[A-Z].{10,85}\.$", summary) for summary in summaries.values())


DERIVING = """
from pae_jax.configs import default

def get_config(arg=None):
    config = default.get_config()
    config.train.validate_every = None
    return config

def derive(config, arg=None):
    if config.train.validate_every is None and arg != "lazy":
        config.train.validate_every = config.train.steps // 5 + config.data.width
"""


def test_derive_runs_after_the_overrides_with_checked_values(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DERIVING)
    words = ["--config.train.steps=50", "--config.data.size=32"]
    assert config_file.load(str(path), words).train.validate_every == 42
    words.append("--config.train.validate_every=7")
    assert config_file.load(str(path), words).train.validate_every == 7
    with pytest.raises(BadInput, match=r"^train\.validate_every: not set$"):
        config_file.load(f"{path}:lazy")
    with pytest.raises(BadInput, match=r"^train\.steps: expected int, got 'many'$"):
        config_file.load(str(path), ["--config.train.steps=many"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such config file"),
        ("x = 1\n", "defines no get_config"),
        ("def get_config(:\n", "cannot be read"),
        ("import no_such_package_anywhere\n", "no_such_package_anywhere"),
        ("def get_config(arg=None):\n    raise ValueError('three only')\n", "three only"),
        (SETS.format("train.steps = 'many'"), "line 4: Could not override field 'steps'"),
        (SETS.format("train = 3"), "line 4: .*train"),
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
    iterate = "--config.eval.apply=iterate"  # so that eval.iterations may be 2
    names = {load(iterate).hash}
    for field in dataclasses.fields(config.EvalConfig):
        value = getattr(config.Config().eval, field.name)
        if isinstance(value, bool):
            names.add(load(iterate, f"--config.eval.{field.name}={not value}").hash)
        elif isinstance(value, int):
            names.add(load(iterate, f"--config.eval.{field.name}={value + 1}").hash)
    assert len(names) == 1 + sum(
        isinstance(getattr(config.Config().eval, f.name), int)
        for f in dataclasses.fields(config.EvalConfig)
    )
