"""experiments/choose.py: ranks, ties and the choice without a category, by hand."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from pae_jax.config_schema import SCHEMA
from pae_jax.workdir import files

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def choose(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "experiments")
    return importlib.import_module("choose")


def test_ranks_and_ties(choose):
    entries = [
        choose.Measured(*pair) for pair in [(0.9, 0.01), (0.5, 0.0), (0.895, 0.0), (0.7, 0.1)]
    ]
    # The first and the third are within the noise of the first. The second is within no noise but
    # that of the fourth, from which it is 0.2 away.
    np.testing.assert_array_equal(choose.ranks(entries), [1.5, 4, 1.5, 3])


def test_equal_entries_share_the_middle(choose):
    np.testing.assert_array_equal(choose.ranks([choose.Measured(0.5, 0.0)] * 3), [2, 2, 2])


def test_the_choice_and_what_it_is_without_a_category(choose):
    def recipe(first, second):
        return {("a", "pixel_ap"): choose.Measured(first, 0.0)} | {
            ("b", name): choose.Measured(second, 0.0) for name in ("pixel_ap", "pixel_auroc")
        }

    choice = choose.choose([recipe(0.9, 0.1), recipe(0.5, 0.2)])
    np.testing.assert_allclose(choice.means, [(1 + 2 + 2) / 3, (2 + 1 + 1) / 3])
    assert choice.without == {"a": 1, "b": 0}


def record(value, seed=0, width=0.02):
    names = ("pixel_auroc", "pixel_ap", "pixel_aupro", "image_auroc_sum")
    metrics = dict.fromkeys(names, value)
    intervals = {name: [value - width / 2, value + width / 2] for name in names}
    return {
        "schema": SCHEMA,
        "metrics": {**metrics, "intervals": intervals},
        "config": {"train": {"seed": seed}, "eval": {"image_score": "sum"}},
        **dict.fromkeys(("config_hash", "commit", "training", "machine", "cases")),
        "data": {"fingerprint": "f"},
    }


def write(root, name, content):
    files.write_json(root / "docs/results" / name / "record.json", content)


def test_the_command(choose, tmp_path, capsys):
    for category in choose.CATEGORIES:
        write(tmp_path, f"{category}--good", record(0.8))
        write(tmp_path, f"{category}--good--seed1", record(0.9, seed=1))
        write(tmp_path, f"{category}--bad", record(0.6))
    write(tmp_path, "elpv--half", record(1.0))  # not measured everywhere
    write(tmp_path, "other--bad", record(1.0))  # not a development category
    assert choose.main([], tmp_path) == 0
    *_, good, bad, others = capsys.readouterr().out.splitlines()
    assert good.startswith("| good | 1.00 | 0.850 (1) |") and bad.startswith("| bad | 2.00 |")
    assert others.count("0.850 [good]") == 4 * len(choose.CATEGORIES)
    assert choose.main(["half"], tmp_path) == 2
    assert "no run mvtec_screw--half" in capsys.readouterr().err


def test_the_reported_recipe_has_a_name(choose, tmp_path, capsys):
    for category in choose.CATEGORIES:
        write(tmp_path, f"{category}--good", record(0.8))
    assert choose.main(["reported", "good"], tmp_path) == 2
    assert "no run mvtec_screw, magnetic_tile," in capsys.readouterr().err
    for category in choose.CATEGORIES:
        write(tmp_path, category, record(0.7))
        write(tmp_path, f"{category}--third", record(0.9))
    assert choose.main(["reported", "good"], tmp_path) == 0
    table = capsys.readouterr().out
    assert "| reported | 2.00 |" in table and "third" not in table


def test_the_spread_of_the_seeds_is_noise(choose, tmp_path):
    for category in choose.CATEGORIES:
        for seed, value in enumerate((0.5, 0.7)):
            write(tmp_path, f"{category}--a--seed{seed}", record(value, seed))
    ((entries),) = choose.read_recipes(tmp_path / "docs/results").values()
    # Half the interval is 0.01; the standard deviation of two values 0.2 apart is 0.2/√2.
    assert entries["elpv", "pixel_ap"].noise == pytest.approx(0.2 / 2**0.5)


def test_without_intervals_one_line_says_what_to_do(choose, tmp_path, capsys):
    for category in choose.CATEGORIES:
        content = record(0.5)
        content["metrics"]["intervals"] = {}
        write(tmp_path, f"{category}--a", content)
    assert choose.main([], tmp_path) == 2
    assert "no interval of pixel_auroc; evaluate with" in capsys.readouterr().err


def test_runs_of_several_configs_name_the_key(choose, tmp_path, capsys):
    for category in choose.CATEGORIES:
        write(tmp_path, f"{category}--a", record(0.5))
    other = record(0.6, seed=1)
    other["config"]["eval"]["symmetries"] = True
    write(tmp_path, "elpv--a--seed1", other)
    assert choose.main(["a"], tmp_path) == 2
    error = capsys.readouterr().err
    assert "elpv--a and elpv--a--seed1" in error and "differ in eval.symmetries;" in error
