"""Every configuration file yields a valid Config; the paper's sizes; arguments are checked."""

import dataclasses
import subprocess
import sys

import pytest

from data_pipelines.errors import BadInput
from pae_jax import config as configuration
from pae_jax import config_file, population
from pae_jax.augmentation import check_policy
from pae_jax.configs import baselines, elpv, folder, mvtec, tpu_v5e, visa
from pae_jax.configs.experiments import recipe, results

CATEGORIES = {"mvtec": mvtec.TEXTURES | mvtec.OBJECTS, "visa": visa.OBJECTS}
BASELINES = [name + recipe for name in baselines.CHANGES for recipe in ("", ",elpv")]


def with_best(categories) -> list[str]:
    return [name + variant for name in categories for variant in ("", ",best")]


def load(name: str, *overrides: str) -> configuration.Config:
    return config_file.load(name, overrides)


def names() -> list[str]:
    """Every shipped config, with every argument if it needs one."""
    arguments = {
        **{name: with_best(categories) for name, categories in CATEGORIES.items()},
        "baselines": BASELINES,
        "tpu_v5e": ["", *with_best(CATEGORIES["mvtec"])],
        "experiments/recipe": recipe.QUESTIONS,
        "experiments/results": results.FACTS,
    }
    return [f"{name}:{arg}" for name in config_file.shipped() for arg in arguments.get(name, [""])]


@pytest.mark.parametrize("name", names())
def test_a_configuration_is_valid(name):
    on_folder = name.startswith(("folder", "baselines", "experiments"))
    overrides = ["--config.data.root=here"] if on_folder else []
    config = load(name, *overrides)
    check_policy(config.data.augmentation, config.data.shape)
    stride = config.model.patch_size * 2 ** len(config.model.widths)
    assert all(side % stride == 0 for side in config.data.shape)
    # At least one outermost tap of the widest dilation falls on the other half of the map.
    side = config.data.height // stride
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
        BadInput, match=r"^ablation:nonsense: one of elpv, full, brief, directions,"
    ):
        load("ablation:nonsense")


def test_the_full_ablation_has_every_penalty_at_two_weights_and_one_program_for_both():
    words = ["--config.population.members_per_program=6"]
    members = config_file.load_sweep("ablation:full", words)
    configs = [config for *_, config in members]
    assert len({config.hash for config in configs}) == len(configs) == 17 * 3
    groups = population.group_runs(configs)
    assert [len(group) for group in groups] == [3] + [6] * 8
    for group in groups[1:]:
        assert len({members[i][0] for i in group}) == 2  # variants
        assert len({members[i][1] for i in group}) == 3  # seeds
    # All of them are trained to the end, and differ from the demo in nothing but these settings.
    demo, none = load("elpv"), configs[0]
    assert none.train.steps == demo.train.steps
    assert (none.model, none.optimizer) == (demo.model, demo.optimizer)
    assert none.objective == configuration.ObjectiveConfig()
    for config in configs:
        assert (config.data, config.corruption) == (none.data, none.corruption)
        assert config.eval == none.eval


@pytest.mark.parametrize("question", recipe.QUESTIONS)
def test_the_variants_of_a_question_are_distinct_and_valid(question):
    overrides = ["--config.data.root=here"]
    members = config_file.load_sweep(f"experiments/recipe:{question}", overrides)
    assert len({config.hash for _, _, config in members}) == len(members) > 1


@pytest.mark.parametrize("selection", ["tile", "tile_full"])
def test_the_penalties_on_a_folder_are_those_of_the_projection_alone(selection):
    """A second network would be trained beside f, and its map would decide.

    The output differs: f may not start as the identity, where the Jacobian penalty is smallest.
    """
    words = ["--config.data.root=here"]
    values = folder.projection().to_dict() | {"data": {"root": "here"}}
    projection = configuration.from_config_dict(values)
    model = dataclasses.replace(projection.model, output="sigmoid")
    for _, _, config in config_file.load_sweep(f"ablation:{selection}", words):
        assert (config.method, config.model) == ("projection", model)
        assert config.train.steps == projection.train.steps
        assert config.eval.parts == projection.eval.parts


@pytest.mark.parametrize("name", ["mvtec:", "mvtec:screws", "visa:screw", "visa:,best"])
def test_an_unknown_category_is_one_line_with_the_known_ones(name):
    with pytest.raises(BadInput, match=r"no category.*; \w+, \w+, ") as error:
        load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mvtec:screw,", "mvtec:screw,worst", "visa:pcb1,best,best"])
def test_an_unknown_variant_is_one_line_with_the_known_ones(name):
    category = name.partition(":")[2].partition(",")[0]
    with pytest.raises(BadInput, match=f"{category} or {category},best, not {category},"):
        load(name)


def test_the_best_of_a_category_is_the_recipe_and_facts():
    """The recipe is one: what `folder.py` and the benchmarks share is equal."""
    recipe = ("method", "corruption", "head", "objective")
    newcomer = load("folder", "--config.data.root=here")
    for name in (*results.FACTS, "mvtec:bottle,best", "mvtec:carpet,best", "visa:pcb1,best"):
        words = [] if ":" in name else ["--config.data.root=here"]
        config = load(name if ":" in name else f"experiments/results:{name}", *words)
        for section in recipe:
            assert getattr(config, section) == getattr(newcomer, section)
        aligned = name in ("ball_screw", "mvtec:bottle,best")
        calibration = "position" if aligned else "auto"
        assert config.eval == dataclasses.replace(newcomer.eval, calibration=calibration)
    paper, best = load("mvtec:carpet"), load("mvtec:carpet,best")
    assert best.model == dataclasses.replace(paper.model, output=folder.RECIPE["model.output"])
    assert best.data.shape == paper.data.shape


def test_a_folder_must_be_named():
    with pytest.raises(BadInput, match=r"^data\.root: "):
        load("folder:")


def test_a_benchmark_can_be_read_from_its_extracted_folder():
    overrides = ["source=folder", "root=extracted", "category=screw"]
    config = load("mvtec:screw", *(f"--config.data.{word}" for word in overrides))
    assert config.data.spec[:3] == ("folder", "extracted", "screw")


def test_all_categories_are_runs_of_their_own():
    members = config_file.load_members("mvtec:all", ["--config.train.seed=3"])
    assert set(members) == CATEGORIES["mvtec"].keys()
    for name, config in members.items():
        assert config == load(f"mvtec:{name}", "--config.train.seed=3")
    # Categories with equal image sizes and augmentations share a program.
    population_of_15 = configuration.PopulationConfig(members_per_program=15)
    together = [
        dataclasses.replace(config, population=population_of_15) for config in members.values()
    ]
    names = list(members)
    shared = [{names[i] for i in chunk} for chunk in population.group_runs(together)]
    assert {"carpet", "leather", "tile"} in shared
    assert {"bottle", "metal_nut", "screw"} in shared
    best = config_file.load_members("mvtec:all,best")
    assert set(best) == {f"{name},best" for name in members}
    assert best["screw,best"] == load("mvtec:screw,best")
    assert list(config_file.load_members("mvtec:screw")) == [""]
    with pytest.raises(BadInput, match="takes no argument, not 'all'"):
        config_file.load_members("default:all")


def test_baselines_change_the_recipe_and_keep_its_budget():
    words = ["--config.data.root=here"]
    for base_recipe, base_config, side in (
        ("folder", folder.projection(), 256),
        ("elpv", elpv.get_config(), 64),
    ):
        base_config.data.root = "here"
        base = configuration.from_config_dict(base_config.to_dict())
        members = config_file.load_members(f"baselines:all,{base_recipe}", words)
        assert [name.partition(",")[0] for name in members] == list(baselines.CHANGES)
        for config in members.values():
            assert (config.data, config.train, config.optimizer) == (
                base.data,
                base.train,
                base.optimizer,
            )
        assert base.data.shape == (side, side)
        # The autoencoder's bottleneck has 128 values, and nothing passes around it.
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


@pytest.mark.parametrize("side", [8, 64, 128, 256, 512])
@pytest.mark.parametrize("recipe_name", ["folder", "elpv"])
def test_the_bottleneck_of_the_autoencoder_follows_from_the_size_on_the_command_line(
    recipe_name, side
):
    words = ["--config.data.root=here", f"--config.data.size={side}"]
    model = load(f"baselines:ae_ssim,{recipe_name}", *words).model
    assert side // model.patch_size // 2 ** len(model.widths) == 2
    assert model.widths[-1] == 32
    model = load(f"baselines:ae_ssim,{recipe_name}", *words, "--config.model.widths=(4,8)").model
    assert model.widths == (4, 8)


def test_values_that_follow_from_another_key_follow_from_the_command_line():
    assert load("mvtec:carpet").data.texture_size == 512
    for name in ("mvtec:carpet", "visa:pcb1", "tpu_v5e:carpet"):
        assert load(name, "--config.data.size=128").data.texture_size == 128
        sides = ("--config.data.height=64", "--config.data.width=96")
        assert load(name, *sides).data.texture_size == 96
        words = ("--config.data.size=128", "--config.data.texture_size=32")
        assert load(name, *words).data.texture_size == 32
    name = "experiments/results:elpv"
    assert load(name).train.validate_every == 1_000
    assert load(name, "--config.train.steps=500").train.validate_every == 50
    assert load(name, "--config.train.steps=5").train.validate_every == 1
    assert load(name, "--config.train.validate_every=7").train.validate_every == 7


def test_the_configuration_of_a_tpu_is_the_papers_in_bfloat16():
    for category in CATEGORIES["mvtec"]:
        paper, tpu = load(f"mvtec:{category}"), load(f"tpu_v5e:{category}")
        assert (tpu.model.dtype, tpu.train.batch_size) == ("bfloat16", 16)
        assert tpu.data.on_device == ("no" if category in mvtec.TEXTURES else "auto")
        model = dataclasses.replace(tpu.model, dtype=paper.model.dtype)
        data = dataclasses.replace(tpu.data, on_device=paper.data.on_device)
        train = dataclasses.replace(tpu.train, batch_size=paper.train.batch_size)
        assert dataclasses.replace(tpu, model=model, data=data, train=train) == paper
    assert load("tpu_v5e") == load(f"tpu_v5e:{tpu_v5e.CATEGORY}")
    with pytest.raises(BadInput, match=r"^tpu_v5e:pcb1: mvtec_ad: no category 'pcb1' after the"):
        load("tpu_v5e:pcb1")
