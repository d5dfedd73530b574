"""README.md, RESULTS.md and docs/: links, commands and keys exist, and the examples run."""

import re
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from data_pipelines import dataset
from data_pipelines.spec import DatasetSpec
from layouts import write
from pae_jax import config, config_file, corruption, masks, objective, unet
from pae_jax.configs import default
from sampling import KEY, uniform

PROJECT = Path(__file__).parents[1]
PAGES = [
    *(PROJECT / name for name in ("README.md", "RESULTS.md", "CHANGELOG.md")),
    *sorted((PROJECT / "docs").rglob("*.md")),
]
for_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def example(section: str, **names: Any) -> dict[str, Any]:
    """Runs the example of a section of docs/extending.md; returns the names it defines."""
    text = (PROJECT / "docs/extending.md").read_text().partition(f"\n## {section}\n")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    exec(compile(code, f"docs/extending.md, {section}", "exec"), names)
    return names


@for_every_page
def test_links_lead_to_files(page):
    # The files in docs/results are parts of RESULTS.md.
    base = PROJECT if page.parent.name == "results" else page.parent
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (base / link).exists()]


@for_every_page
def test_commands_name_existing_configs_and_keys(page, monkeypatch):
    monkeypatch.chdir(PROJECT)
    values = default.get_config().to_dict()
    text = page.read_text().replace("--config=NAME", "").replace("--config.eval.KEY=", "")
    for name in re.findall(r"--config=([\w/.:]+)", text):
        config_file.locate(name.rstrip(".:"))
    for key in re.findall(r"--config\.([a-z_.]+)=", text):
        config_file.override(values, [f"--config.{key}=1"])


def test_example_of_a_corruption():
    kinds = dict(corruption.KINDS)  # a copy, so that other tests do not see the example
    example("A corruption", **{**vars(corruption), "KINDS": kinds})
    image = jnp.asarray(uniform(1, 20, 30, 3))
    y, mask = kinds["blackout"](KEY, image, image, config.CorruptionConfig())
    assert not y.any() and mask.shape == (20, 30) and mask.max() > 0


def test_example_of_a_mask():
    families = dict(masks.MASKS)
    example("A mask", **{**vars(masks), "MASKS": families})
    mask = families["stripe"](KEY, jnp.asarray(uniform(1, 20, 30, 3)), config.CorruptionConfig())
    assert mask.shape == (20, 30) and 0 < mask.max() <= 1
    assert (mask == mask[:, :1]).all()


def test_example_of_a_penalty():
    penalties: dict[str, Any] = {}
    images = jnp.asarray(uniform(2, 4, 20, 30, 3))
    example(
        "A penalty",
        **{**vars(config), **vars(objective)},
        config=types.SimpleNamespace(sparsity=types.SimpleNamespace(weight=1.0)),
        penalties=penalties,
        corrupted=images + 0.5,
        fx=images,
    )
    assert penalties["sparsity"].tolist() == pytest.approx([0.5] * 4)


def test_example_of_a_backbone():
    backbones = dict(unet.BACKBONES)
    example("A backbone", **{**vars(unet), "BACKBONES": backbones})
    images = jnp.asarray(uniform(2, 4, 20, 30, 3))
    network = backbones["shallow"](config.ModelConfig(widths=(4,)))
    output, _ = network.init_with_output(KEY, images)
    assert output.shape == images.shape


def test_example_of_a_method():
    method = example("A method")["METHOD"]
    settings = config.Config(data=config.DataConfig(height=4, width=5))
    stored = (255 * uniform(3, 6, 4, 5, 1)).astype("uint8")
    params = method.fit(method.init(settings, KEY), stored, settings)
    images = jnp.asarray(uniform(4, 2, 4, 5, 3))
    reconstruction, maps = method.anomaly_map(params, images, settings)
    assert reconstruction[1, 2, 3].tolist() == pytest.approx([stored[:, 2, 3].mean() / 255] * 3)
    assert maps.shape == (2, 4, 5)


def test_example_of_a_data_source(tmp_path, monkeypatch):
    module = types.ModuleType("example_source")
    vars(module).update(example("A data source"))
    monkeypatch.setitem(sys.modules, "example_source", module)
    monkeypatch.setitem(dataset.SOURCES, "example", "example_source")
    for name in ("ok/a", "ok/b", "ok/c", "ok/test_a", "nok/a"):
        write(tmp_path / f"images/{name}.png", (255 * uniform(0, 8, 9)).astype("uint8"))
    root, cache = str(tmp_path / "images"), str(tmp_path / "cache")
    spec = DatasetSpec("example", root, "", (8, 9), "none", cache)
    split = dataset.open_training(spec, holdout_fraction=0.3, seed=0)
    assert sorted([*split.names, *split.held_out_names]) == ["ok/a.png", "ok/b.png", "ok/c.png"]
    test = dataset.open_test(spec, channels=split.channels)
    assert dict(zip(test.names, test.types, strict=True)) == {
        "ok/test_a.png": "good",
        "nok/a.png": "nok",
    }
