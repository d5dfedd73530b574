"""Members of a population are what they would be alone."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, main, population, train
from pae_jax.workdir import logs
from pae_jax.workdir.run import Run

pytestmark = pytest.mark.usefixtures("compilation_cache")

# Adam turns the rounding errors of a gradient that a norm makes zero into full steps.
SHORT = {
    "model__norm": "none",
    "optimizer__learning_rate": 1e-3,
    "train__steps": 10,
    "train__validate_every": 10,
    "train__checkpoint_every": 5,
}
COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)\b")


def member(root, seed, **changes):
    return runs.load_config(root, **{**SHORT, "train__seed": seed, **changes})


def assert_close(workdir, other):
    (step, leaves), (other_step, others) = runs.read_state(workdir), runs.read_state(other)
    assert step == other_step
    for leaf, another in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, another, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """The workdir of a member trained by itself, made when first asked for."""
    made = {}

    def workdir(settings: config.Config):
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("alone")
            assert train.train_and_evaluate(settings, made[settings]).outcome == train.FINISHED
        return made[settings]

    return workdir


def test_eight_on_eight_devices_and_no_word_between_them(trained, alone, tmp_path, monkeypatch):
    configs = [member(trained.root, seed) for seed in range(6)]
    configs += [member(trained.root, 0, objective__mask_weight=0.2, optimizer__learning_rate=3e-3)]
    configs += [member(trained.root, 1, objective__mask_weight=0.9)]
    programs = []
    begin = population.Population.begin

    def watched(self, members):
        programs.append(self)
        return begin(self, members)

    monkeypatch.setattr(population.Population, "begin", watched)
    members = [(one, tmp_path / str(i)) for i, one in enumerate(configs)]
    results = population.train_population(members)
    assert [(r.outcome, r.step) for r in results] == [(train.FINISHED, 10)] * 8
    (program,) = programs
    assert program.mesh.size == 8
    assert len({run.validation["loss"] for run in results}) == 8
    text = program._step.hlo()
    assert "convolution" in text
    assert not COLLECTIVE.search(text)
    for settings, workdir in members:
        assert_close(workdir, alone(settings))
    assert (tmp_path / "3/metrics.jsonl").read_text().count('"train/loss"') == 10


@pytest.mark.parametrize("how", ["unroll", "map", "vmap"])
def test_more_members_than_devices_and_penalties_of_their_own(
    trained, alone, tmp_path, monkeypatch, how
):
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    weights = (0.1, 0.2, 0.4, 0.8)
    configs = [member(trained.root, 0, objective__jacobian__weight=w) for w in weights]
    members = [
        (
            dataclasses.replace(
                one, sharding=dataclasses.replace(one.sharding, population=how, members=4)
            ),
            tmp_path / str(i),
        )
        for i, one in enumerate(configs)
    ]
    assert population.group_runs([one for one, _ in members]) == [[0, 1, 2, 3]]
    population.train_population(members)
    for (_, workdir), settings in zip(members[::3], configs[::3], strict=True):
        assert_close(workdir, alone(settings))


def test_an_interrupted_population_goes_on_from_a_common_step(
    trained, alone, tmp_path, monkeypatch
):
    configs = [member(trained.root, seed) for seed in (0, 1)]
    members = [(one, tmp_path / str(i)) for i, one in enumerate(configs)]
    save = population.Run.save
    with monkeypatch.context() as patch:

        def broken(self, step, state):
            if self is not first and step == 10:
                raise KeyboardInterrupt
            save(self, step, state)

        first = None
        enter = Run.__enter__

        def entered(self):
            nonlocal first
            first = first or self
            return enter(self)

        patch.setattr(Run, "__enter__", entered)
        patch.setattr(Run, "save", broken)
        with pytest.raises(KeyboardInterrupt):
            population.train_population(members)
    assert [runs.read_state(workdir)[0] for _, workdir in members] == [10, 5]
    population.train_population(members)
    for settings, workdir in members:
        assert_close(workdir, alone(settings))


def test_one_that_diverges_leaves_the_others_alone(trained, alone, tmp_path, monkeypatch):
    configs = [member(trained.root, 0), member(trained.root, 1, optimizer__learning_rate=1e30)]
    members = [(one, tmp_path / str(i)) for i, one in enumerate(configs)]
    results = population.train_population(members)
    assert [result.outcome for result in results] == [train.FINISHED, train.DIVERGED]
    assert results[1].step <= 3
    assert not list((tmp_path / "1/checkpoints").glob("[0-9]*"))
    assert_close(tmp_path / "0", alone(configs[0]))


def test_what_can_share_a_program(trained, tmp_path):
    plain = member(trained.root, 0)
    same = [
        member(trained.root, 3, data__category="x", objective__mask_weight=0.1),
        member(trained.root, 0, optimizer__learning_rate=0.5),
    ]
    other = [
        member(trained.root, 0, objective__noise=0.1),  # a term that the others do not have
        member(trained.root, 0, data__size=32),
        member(trained.root, 0, data__augmentation="flips"),
    ]
    assert all(population.program_key(one) == population.program_key(plain) for one in same)
    assert len({population.program_key(one) for one in [plain, *other]}) == 4
    both = [member(trained.root, 0, objective__noise=noise) for noise in (0.1, 0.2)]
    assert population.group_runs([plain, both[0], same[0], both[1]]) == [[0, 2], [1, 3]]
    narrow = [dataclasses.replace(plain, sharding=config.ShardingConfig(members=2))] * 5
    assert population.group_runs(narrow) == [[0, 1], [2, 3], [4]]
    with pytest.raises(BadInput, match=r"/b: differs from .*/a in more than objective\.weight, "):
        population.train_population([(plain, tmp_path / "a"), (other[1], tmp_path / "b")])
    assert not list(tmp_path.iterdir())


def test_a_stop_holds_for_the_programs_to_come(trained, tmp_path, monkeypatch):
    """Members of one kind may need two programs, here with and without data on the device."""
    places = iter((True, False))
    driven = []

    def drive(group, program):
        driven.append([run.workdir.name for run in group])
        for run in group:
            run.end(train.STOPPED, 7)

    monkeypatch.setattr("pae_jax.workdir.run.is_resident", lambda *_: next(places))
    monkeypatch.setattr(population, "drive", drive)
    members = [(member(trained.root, seed), tmp_path / str(seed)) for seed in (0, 1)]
    results = population.train_population(members)
    assert driven == [["0"]]
    assert [tuple(result[:2]) for result in results] == [(train.STOPPED, 7), (train.STOPPED, 0)]


CATEGORIES = """
from pae_jax.configs import default

def get_config(arg=None):
    if arg not in ("one", "two"):
        raise ValueError(f"one or two, not {arg!r}")
    config = default.get_config()
    config.data.category = {"one": "data", "two": "other"}[arg]
    return config

def members(arg):
    return ["one", "two"] if arg == "all" else None
"""


def test_all_categories_of_a_config_by_one_command(trained, alone, tmp_path, capsys):
    root = tmp_path / "images"
    shutil.copytree(trained.root, root)
    shutil.copytree(root / "data", root / "other")
    (root / "other/train/good/000.png").unlink()
    file, workdir = tmp_path / "two.py", tmp_path / "w"
    file.write_text(CATEGORIES)
    _, *words = runs.words(root, **SHORT, data__root=root)
    assert main.main(["train", f"--config={file}:all", *words, f"--workdir={workdir}"]) == 0
    printed = capsys.readouterr().out
    for name in ("one", "two"):
        assert f"{workdir / name}: finished at step 10" in printed
    assert_close(workdir / "one", alone(member(trained.root, 0)))
    counts = [
        json.loads((workdir / name / "data.json").read_text())["training_images"]
        for name in ("one", "two")
    ]
    assert counts[0] == counts[1] + 1
    assert main.main(["train", f"--config={file}:three", *words, f"--workdir={workdir}"]) == 2
    assert "one or two, not 'three'" in capsys.readouterr().err


def test_the_log_of_a_member_is_its_own(trained, tmp_path):
    members = [(member(trained.root, seed), tmp_path / str(seed)) for seed in (0, 1)]
    population.train_population(members)
    texts = [(workdir / "metrics.jsonl").read_text() for _, workdir in members]
    assert texts[0] != texts[1]
    assert logs._lasts(texts[0].splitlines()[1], 10)
