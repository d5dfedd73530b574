"""experiments/results_page.py: the page of records whose numbers are known by hand."""

import copy
import importlib
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from pae_jax.config_schema import SCHEMA
from pae_jax.workdir import files

PROJECT = Path(__file__).parents[1]
NAMES = ("image_auroc_sum", "image_auroc_max", "image_auroc_topk")
PIXELS = ("pixel_auroc", "pixel_ap", "pixel_aupro")


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "experiments")
    return importlib.import_module("results")


@pytest.fixture
def results_page(results):
    return results.results_page


def synthetic(value: float, *, seed: int = 0, pixels: bool = True, rate: float = 1e-3) -> dict:
    """Returns a record whose metrics are all `value`, with intervals of ± 0.1."""
    values = dict.fromkeys((*NAMES, *PIXELS), value)
    intervals = {name: [value - 0.1, value + 0.1] for name in values}
    if not pixels:
        values |= dict.fromkeys(PIXELS)
        intervals = {name: intervals[name] for name in NAMES}
    return {
        "schema": SCHEMA,
        "metrics": {
            **values,
            "intervals": intervals,
            "per_type": {"dent": {**values, "images": 7}},
            "diagnostics": {"on_manifold_bias": value / 10} if pixels else {},
            "evaluated_at": {"size": "network"},
        },
        "config": {
            "data": {"height": 128, "width": 128, "root": "tile"},
            "corruption": {"kind": "texture"},
            "optimizer": {"learning_rate": rate},
            "train": {"seed": seed, "steps": 2500},
            "eval": {"image_score": "max"},
        },
        "config_hash": f"{seed:012d}",
        "commit": "0123456789abcdef+",
        "data": {"training_images": 1000, "held_out_images": 50, "fingerprint": "f"},
        "training": {"steps": 2500, "minutes": 10.0 + seed},
        "machine": "two cores",
        "cases": None,
    }


def row(page: str, label: str, section: str = "Data sets") -> list[str]:
    """Returns the cells after `label` in the first row of a section that begins with it."""
    lines = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    return next(cells[1:] for cells in rows if cells[0] == label)


def test_runs_that_differ_by_the_seed_share_a_row(results_page):
    records = {
        "tile": synthetic(0.8),
        "tile--seed1": synthetic(0.9, seed=1),
        "tile--seed2": synthetic(0.7, seed=2),
    }
    page = results_page.render(records, {})
    # The standard deviation of 0.7, 0.8, 0.9 with two degrees of freedom is 0.1.
    assert row(page, "**tile**, 3 seeds") == ["0.800 ± 0.100 [0.700, 0.900]"] * 6
    assert row(page, "dent", "tile") == ["7", *["0.800 ± 0.100"] * 6]
    cells = row(page, "tile", "Runs")
    assert cells[:6] == ["3", "0, 1, 2", "1,000 + 50", "128²", "2,500", "11 ± 1"]
    assert cells[6] == "two cores" and cells[8] == "0123456+"
    assert cells[7].count("record.json") == 3
    assert [row(page, name, "Diagnostics") for name in records] == [["0.08"], ["0.09"], ["0.07"]]
    # The page does not depend on the order of keys in records and configs.
    shuffled = {name: dict(reversed(records[name].items())) for name in reversed(records)}
    assert results_page.render(shuffled, {}) == page


def test_runs_of_other_configurations_have_their_own_rows(results_page):
    records = {
        "tile": synthetic(0.8),
        "tile--seed1": synthetic(0.9, seed=1),
        "tile--seed2": synthetic(0.7, seed=2, rate=1e-2),
    }
    page = results_page.render(records, {})
    assert row(page, "**tile (tile, tile--seed1)**, 2 seeds")[0] == "0.850 ± 0.071 [0.750, 0.950]"
    assert row(page, "**tile (tile--seed2)**")[0] == "0.700 [0.600, 0.800]"
    records["tile--seed2"] = copy.deepcopy(records["tile"])
    with pytest.raises(BadInput, match=r"tile, tile--seed2: .* one seed"):
        results_page.render(records, {})
    records["tile--seed2"]["data"]["fingerprint"] = "other images"
    assert "**tile (tile--seed2)**" in results_page.render(records, {})


def test_a_key_that_is_newer_than_a_run_has_its_default_there(results_page):
    """Else the seeds of one recipe would be two recipes as soon as the config grows by a key."""
    records = {"tile": synthetic(0.8), "tile--seed1": synthetic(0.9, seed=1)}
    records["tile--seed1"]["config"]["head"] = {"reserved_fraction": 0.0}
    assert "**tile**, 2 seeds" in results_page.render(records, {})
    records["tile--seed1"]["config"]["head"]["reserved_fraction"] = 0.3
    assert "**tile (tile--seed1)**" in results_page.render(records, {})


def test_missed_goals_are_marked(results_page):
    goals = {"image_auroc": 0.85, "pixel_auroc": 0.8, "pixel_ap": 0.9}
    peers = {"PCA": {"image_auroc_max": 0.642, "pixel_ap": 0.098}}
    references = {"categories": {"tile": {"goals": goals, "peers": peers, "caveat": "Beware."}}}
    records = {"tile": synthetic(0.8), "tile--seed1": synthetic(0.82, seed=1)}
    page = results_page.render(records, references)
    # The image AUROC is that of the configured score; the mean counts, not the best run.
    cells = ["", "≥ 0.850: **missed**", "", "≥ 0.800: met", "≥ 0.900: **missed**", ""]
    assert row(page, "goal") == cells
    assert row(page, "PCA") == ["–", "0.642", "–", "–", "0.098", "–"]
    met = page.partition("Goals met:")[2].partition("Goals missed:")[0]
    assert met.split("\n- ")[1:] == ["tile: pixel AUROC 0.810 ± 0.014, goal 0.800\n\n"]
    missed = page.partition("Goals missed:")[2].partition("To be read")[0]
    assert missed.split("\n- ")[1:] == [
        "tile: image AUROC max 0.810 ± 0.014, goal 0.850",
        "tile: pixel AP 0.810 ± 0.014, goal 0.900\n\n",
    ]
    assert "- **tile.** Beware." in page
    page = results_page.render({"tile": synthetic(0.99, pixels=False)}, references)
    assert row(page, "goal")[1:5] == [
        "≥ 0.850: met",
        "",
        "≥ 0.800: not measured",
        "≥ 0.900: not measured",
    ]
    assert "Goals missed" not in page and "No goal" not in page
    page = results_page.render({"tile": synthetic(0.5)}, references)
    assert "Goals met" not in page and "No goal of this table was met." in page
    assert row(results_page.render({}, references), "**tile**: no run yet") == ["–"] * 6


def test_methods_are_compared_and_nulls_are_dashes(results_page):
    records = {
        "tile": synthetic(0.8),
        "tile--deep_svdd": synthetic(0.6, pixels=False),
        "tile--deep_svdd--seed1": synthetic(0.7, seed=1, pixels=False),
        "screw": synthetic(0.5),
    }
    for name in records:
        records[name]["config"]["method"] = "deep_svdd" if "svdd" in name else "projection"
    page = results_page.render(records, {})
    image = "0.650 ± 0.071 [0.550, 0.750]"
    cells = row(page, "deep_svdd", "Methods")
    assert cells == ["deep_svdd", "texture", *[image] * 3, *["–"] * 3, "2", "10 ± 1"]
    assert row(page, "**tile**", "Methods")[:2] == ["projection", "texture"]
    assert row(page, "tile: deep_svdd", "Runs")[:2] == ["2", "0, 1"]
    assert "### tile" in page and "### screw" not in page
    assert "svdd" not in page.partition("\n## Data sets\n")[2].partition("\n## ")[0]
    assert "None" not in page and "nan" not in page
    assert "## Methods" not in results_page.render({"screw": records["screw"]}, {})


def test_remarks_and_other_pages_survive(results, tmp_path):
    docs = tmp_path / "docs/results"
    for name, record in {"tile": synthetic(0.8), "screw": synthetic(0.7)}.items():
        files.write_json(docs / name / "record.json", record)
    remarks = "for writers\n\n## tile\nWhy it was missed.\n\n## Diagnostics\n\nOf a few images.\n"
    remarks += "\n## Protocol\nOne seed.\n"
    (docs / "remarks.md").write_text(remarks)
    (docs / "b.md").write_text("## Last\n\n  as it is\n")
    (docs / "a.md").write_text("## Overfitting\n\ntext\n")
    assert results.main([], tmp_path) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert "\n## tile\n\nWhy it was missed.\n\n| defect type" in page
    assert "\n## Diagnostics\n\nOf a few images.\n\n" in page
    assert "\n## Protocol\n\nOne seed.\n" in page
    assert page.endswith("\n\n## Overfitting\n\ntext\n\n## Last\n\n  as it is\n")
    assert "for writers" not in page
    (docs / "remarks.md").write_text("## tiles\nlost\n")
    with pytest.raises(BadInput, match="tiles: no such heading"):
        results.make_page(docs, {})


def test_results_md_is_the_page_of_the_records(results):
    page = results.make_page(PROJECT / "docs/results", {})
    assert page == (PROJECT / "RESULTS.md").read_text(), "run: python experiments/results.py"
