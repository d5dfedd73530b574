"""`pae sweep`: its members, its table, and an interrupted sweep that continues."""

import csv
import statistics

import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import population, sweep
from pae_jax.config_file import load_sweep

FILE = """
from pae_jax.configs import smoke

def get_config(arg=None):
    config = smoke.get_config()
    config.data.size = config.data.texture_size = 16
    config.model.widths = (4,)
    config.model.dilation_rates = (1,)
    config.model.branch_width = 4
    config.train.steps = 4
    config.train.log_every = 1
    config.train.validate_every = config.train.checkpoint_every = 4
    config.train.validation_examples = 8
    config.train.tensorboard = False
    config.eval.bootstrap_resamples = 0
    config.eval.max_steps = 3
    config.population.members_per_program = 2
    return config

def sweep(add, arg=None):
    for seed in (0, 1):
        add("plain", seed, {"train.seed": seed})
    add("squared form", 0, {"objective.jacobian.weight": 0.1, "objective.jacobian.form": "squared"})
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    textures = runs.make_folder(tmp_path) / "textures"
    folders = {"textures": textures, "cache_dir": tmp_path / "cache"}
    return str(path), [f"--config.data.{key}={folder}" for key, folder in folders.items()]


def test_members_and_bad_files(config_file, tmp_path):
    path, words = config_file
    members = [sweep.Member(*entry) for entry in load_sweep(path, words)]
    assert [member.name for member in members] == ["plain-0", "plain-1", "squared_form-0"]
    assert members[1].config.train.seed == 1
    assert members[2].config.objective.jacobian.form == "squared"
    with pytest.raises(BadInput, match="defines no sweep"):
        load_sweep(str(runs.CONFIGS / "smoke.py"))
    wrong = tmp_path / "wrong.py"
    wrong.write_text(FILE.replace("objective.jacobian.weight", "objective.jacobian.wait"))
    with pytest.raises(BadInput, match=r"^objective\.jacobian\.wait: no such key; did you mean"):
        load_sweep(str(wrong))


def test_an_interrupted_sweep_continues_and_writes_its_table(config_file, tmp_path, monkeypatch):
    path, words = config_file
    trained: list[list[str]] = []
    original = population.train_population

    def interrupted(members):
        if trained:
            raise KeyboardInterrupt
        trained.append([workdir.name for _, workdir in members])
        return original(members)

    monkeypatch.setattr(population, "train_population", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(path, tmp_path / "w", words, say=lambda line: None)
    assert trained == [["plain-0", "plain-1"]]  # one program, on two of the devices
    assert not (tmp_path / "w/sweep").exists()

    said: list[str] = []
    monkeypatch.setattr(population, "train_population", original)
    table = sweep.sweep(path, tmp_path / "w", words, say=said.append)
    assert [line.split(": ")[1] for line in said] == ["finished before"] * 2 + ["training"]
    with (tmp_path / "w/sweep/results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["variant"] for row in rows] == ["plain", "plain", "squared form"]
    scores = [float(row["image_auroc_sum"]) for row in rows[:2]]
    expected = f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    assert expected in table.read_text()
    assert (tmp_path / "w/sweep/image_auroc_sum.png").read_bytes().startswith(b"\x89PNG")
