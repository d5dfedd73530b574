"""Every configuration file yields a valid Config; the paper's sizes; arguments are checked."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import BadInput
from pae_jax import config as configuration
from pae_jax import config_file, population
from pae_jax.augmentation import check_policy
from pae_jax.configs import baselines, mvtec, recipe, results, visa

CONFIGS = Path(__file__).parent.parent / "configs"
CATEGORIES = {"mvtec": mvtec.TEXTURES | mvtec.OBJECTS, "visa": visa.OBJECTS}
BASELINES = [name + recipe for name in baselines.CHANGES for recipe in ("", ",elpv")]


def load(name: str, *overrides: str) -> configuration.Config:
    file, _, argument = name.partition(":")
    return config_file.load(f"{CONFIGS / file}.py:{argument}", overrides)


def names() -> list[str]:
    """Every file with a get_config, with every argument if it needs one."""
    arguments = {**CATEGORIES, "baselines": BASELINES}
    arguments |= {"recipe": recipe.QUESTIONS, "results": results.CATEGORIES}
    found = []
    for path in sorted(CONFIGS.glob("*.py")):
        if "def get_config(" in path.read_text():
            found += [f"{path.stem}:{c}" for c in arguments.get(path.stem, [""])]
    return found


@pytest.mark.parametrize("name", names())
def test_a_configuration_is_valid(name):
    on_folder = name.startswith(("folder", "baselines", "recipe", "results"))
    overrides = ["--config.data.root=here"] if on_folder else []
    config = load(name, *overrides)
    check_policy(config.data.augmentation, config.data.shape)
    stride = config.model.patch_size * 2 ** len(config.model.widths)
    assert config.data.size % stride == 0
    # Of the outermost taps of the widest dilation, one at least falls on the map's other half.
    side = config.data.size // stride
    assert max(config.model.dilation_rates) * (config.model.dilated_kernel_size // 2) <= side // 2


def test_the_benchmarks_name_the_categories_of_their_datasets():
    # In another process: importing TensorFlow Datasets takes long and stays.
    code = (
        "from data_pipelines import mvtec_ad, visa\n"
        "print(*sorted(mvtec_ad.CATEGORIES), *sorted(visa.CATEGORIES))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    expected = sorted(CATEGORIES["mvtec"]) + sorted(CATEGORIES["visa"])
    assert printed.stdout.split() == expected


def test_textures_and_objects_have_the_papers_sizes():
    texture, thing, board = load("mvtec:carpet"), load("mvtec:screw"), load("visa:pcb1")
    assert (texture.data.shape, texture.model.dilated_kernel_size) == ((512, 512), 3)
    assert (thing.data.shape, thing.model.dilated_kernel_size) == ((256, 256), 5)
    assert (board.data.shape, board.model.dilated_kernel_size) == ((256, 256), 5)
    assert thing.optimizer.learning_rate == 1e-4
    assert thing.objective.mask_weight == 0.5
    assert thing.data.category == "mvtec_ad/screw"


def test_an_unknown_ablation():
    with pytest.raises(
        BadInput, match=r"ablation\.py:nonsense: one of elpv, brief, tile, smoke, not"
    ):
        load("ablation:nonsense")


@pytest.mark.parametrize("question", recipe.QUESTIONS)
def test_the_variants_of_a_question_are_distinct_and_valid(question):
    overrides = ["--config.data.root=here"]
    members = config_file.load_sweep(f"{CONFIGS}/recipe.py:{question}", overrides)
    assert len({config.hash for _, _, config in members}) == len(members) > 1


@pytest.mark.parametrize("name", ["mvtec:", "mvtec:screws", "visa:screw"])
def test_an_unknown_category_is_one_line_with_the_known_ones(name):
    with pytest.raises(BadInput, match=r"no category.*; \w+, \w+, ") as error:
        load(name)
    assert "\n" not in str(error.value)


def test_a_folder_must_be_named():
    with pytest.raises(BadInput, match=r"^data\.root: "):
        load("folder:")


def test_a_benchmark_can_be_read_from_its_extracted_folder():
    overrides = ["source=folder", "root=extracted", "category=screw"]
    config = load("mvtec:screw", *(f"--config.data.{word}" for word in overrides))
    assert config.data.spec[:3] == ("folder", "extracted", "screw")


def test_all_categories_are_runs_of_their_own():
    members = config_file.load_members(f"{CONFIGS}/mvtec.py:all", ["--config.train.seed=3"])
    assert set(members) == CATEGORIES["mvtec"].keys()
    for name, config in members.items():
        assert config == load(f"mvtec:{name}", "--config.train.seed=3")
    # Programs are shared by what is photographed alike and augmented alike.
    one_device = configuration.from_config_dict({"sharding": {"members": 15}})
    together = [
        dataclasses.replace(config, sharding=one_device.sharding) for config in members.values()
    ]
    names = list(members)
    shared = [{names[i] for i in chunk} for chunk in population.group_runs(together)]
    assert {"carpet", "leather", "tile"} in shared
    assert {"bottle", "metal_nut", "screw"} in shared
    assert list(config_file.load_members(f"{CONFIGS}/mvtec.py:screw")) == [""]
    with pytest.raises(BadInput, match="takes no argument, not 'all'"):
        config_file.load_members(f"{CONFIGS}/default.py:all")


def test_baselines_change_the_recipe_and_keep_its_budget():
    for base_recipe, side in (("folder", 256), ("elpv", 64)):
        words = ["--config.data.root=here"]
        base = load(f"{base_recipe}:", *words)
        members = config_file.load_members(f"{CONFIGS}/baselines.py:all,{base_recipe}", words)
        assert [name.partition(",")[0] for name in members] == list(baselines.CHANGES)
        for config in members.values():
            assert (config.data, config.train, config.optimizer) == (
                base.data,
                base.train,
                base.optimizer,
            )
        assert base.data.size == side
        # Autoencoder: what passes its bottleneck, and that there is no way around it.
        model = members[f"ae_ssim,{base_recipe}"].model
        assert (side // model.patch_size // 2 ** len(model.widths)) ** 2 * model.widths[-1] == 128
        assert (model.skip, model.bottleneck_layers) == ("none", 0)
        # One program each.
        chunks = population.group_runs(list(members.values()))
        assert chunks == [[i] for i in range(len(members))]


@pytest.mark.parametrize("name", ["baselines:", "baselines:padim", "baselines:draem,visa"])
def test_an_unknown_baseline_is_one_line_with_the_known_ones(name):
    with pytest.raises(BadInput, match=r"no (baseline|recipe) '\w*'; \w+, \w+") as error:
        load(name)
    assert "\n" not in str(error.value)
