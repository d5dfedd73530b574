"""`pae sweep`: its members, its table, and an interrupted sweep that continues."""

import csv
import statistics

import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, main, population, sweep, train
from pae_jax.config_file import load_sweep

FILE = (
    runs.SWEEP_FILE
    + """\
    config.eval.max_steps = 3
    config.population.members_per_program = 2
    return config

def sweep(add, arg=None):
    for seed in (0, 1):
        add("plain", seed, {"train.seed": seed})
    add("squared form", 0, {"objective.jacobian.weight": 0.1, "objective.jacobian.form": "squared"})
"""
)


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
    assert sweep.member_names(members) == ["plain-0", "plain-1", "squared_form-0"]
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
    result = sweep.sweep(path, tmp_path / "w", words, say=said.append)
    assert [line.split(": ")[1] for line in said] == ["finished before"] * 2 + ["training"]
    with (tmp_path / "w/sweep/results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["variant"] for row in rows] == ["plain", "plain", "squared form"]
    scores = [float(row["image_auroc_sum"]) for row in rows[:2]]
    expected = f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    assert expected in result.table.read_text()
    assert set(result.outcomes.values()) == {"finished"}
    assert (tmp_path / "w/sweep/image_auroc_sum.png").read_bytes().startswith(b"\x89PNG")


def members(*variants, seed=0):
    return [sweep.Member(variant, seed, config.Config()) for variant in variants]


@pytest.mark.parametrize(
    "variants",
    [
        ("λ", "σ", "", "_", "∂/∂x"),
        ("x=-1", "x=1", "x 1", "X=1"),
        ("SSIM", "ssim", "Ssim"),
        ("weight .2", "weight 2", "weight 0.2", "weight 0 2"),
        ("a" * 300, "a" * 300 + "b", "a" * 199),
        ("é", "e\u0301", "\udce9"),
        ("x/../y", "x y", "..", "con", "a\nb", "a b"),
    ],
)
def test_every_variant_has_its_folder(variants, tmp_path):
    first = sweep.member_names(members(*variants))
    names = first + sweep.member_names(members(*variants, seed=-1))
    assert len({name.casefold() for name in names}) == len(names)
    # A variant that is added at the end changes no name before it.
    for n in range(len(variants)):
        assert sweep.member_names(members(*variants[:n])) == first[:n]
    for name in names:
        (tmp_path / name).mkdir()


def test_ordinary_variants_keep_the_names_of_earlier_versions():
    from pae_jax.configs.ablation import VARIANTS

    names = sweep.member_names(members(*VARIANTS, seed=2))
    assert names[:3] == ["none-2", "jacobian-2", "jacobian_squared-2"]
    assert {"jacobian_idempotency-2", "jacobian_x10-2"} < set(names)
    assert all(name.count("-") == 1 for name in names)


def test_names_are_checked_before_the_first_training(config_file, tmp_path):
    _, words = config_file
    twice = tmp_path / "twice.py"
    twice.write_text(FILE + '    add("plain", 1, {})\n')
    with pytest.raises(BadInput, match=r"^the sweep: variant 'plain' has seed 1 twice$"):
        sweep.sweep(str(twice), tmp_path / "w", words)
    assert not (tmp_path / "w").exists()


def test_a_member_that_diverges_is_a_row(config_file, tmp_path, capsys):
    _, words = config_file
    diverging = tmp_path / "diverging.py"
    diverging.write_text(
        FILE.replace(
            '    add("squared form", 0, {"objective.jacobian.weight": 0.1, '
            '"objective.jacobian.form": "squared"})',
            '    add("rate | 1e30", 0, {"optimizer.learning_rate": 1e30})',
        ).replace("in (0, 1)", "in (0,)")
        + '    add("last", 1, {"train.seed": 3})\n'
    )
    flags = [f"--config={diverging}", f"--workdir={tmp_path / 'w'}", *words]
    assert main.main(["sweep", *flags]) == 1
    said = capsys.readouterr().out
    assert "2/3 rate_1e30-0: diverged at step " in said
    with (tmp_path / "w/sweep/results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["outcome"] for row in rows] == ["finished", "diverged", "finished"]
    assert [bool(row["image_auroc_sum"]) for row in rows] == [True, False, True]
    table = (tmp_path / "w/sweep/results.md").read_text()
    assert "rate \\| 1e30, seed 0: diverged, and left out of the numbers below." in table
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count("\\|") for line in lines[:5]}) == 1
    # Started again: the two that finished are not trained again.
    assert main.main(["sweep", *flags]) == 1
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_stopped_sweep_says_so(config_file, tmp_path, monkeypatch):
    path, words = config_file
    stopped = train.TrainResult(train.STOPPED, 2, {})
    monkeypatch.setattr(population, "train_population", lambda runs: [stopped for _ in runs])
    said: list[str] = []
    result = sweep.sweep(path, tmp_path / "w", words, say=said.append)
    assert list(result.outcomes.values()) == ["stopped", "stopped", "waiting"]
    assert "1/3 plain-0: stopped at step 2" in said
