"""A member of a population is trained as it would be alone."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, main, population, train, train_step
from pae_jax.workdir import logs
from pae_jax.workdir.run import Recorder

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
    """Returns the workdir of a member trained alone; trains it once."""
    workdirs = {}

    def workdir(settings: config.Config):
        if settings not in workdirs:
            workdirs[settings] = tmp_path_factory.mktemp("alone")
            assert train.train_and_evaluate(settings, workdirs[settings]).outcome == train.FINISHED
        return workdirs[settings]

    return workdir


def test_eight_members_on_eight_devices_without_communication(
    trained, alone, tmp_path, monkeypatch
):
    configs = [member(trained.root, seed) for seed in range(6)]
    configs += [member(trained.root, 0, objective__mask_weight=0.2, optimizer__learning_rate=3e-3)]
    configs += [member(trained.root, 1, objective__mask_weight=0.9)]
    programs = []
    start = population.Population.start

    def watched(self, members):
        programs.append(self)
        return start(self, members)

    monkeypatch.setattr(population.Population, "start", watched)
    members = [(settings, tmp_path / str(i)) for i, settings in enumerate(configs)]
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


@pytest.mark.parametrize("mapping", ["unroll", "map", "vmap"])
def test_more_members_than_devices_with_different_penalty_weights(
    trained, alone, tmp_path, monkeypatch, mapping
):
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    weights = (0.1, 0.2, 0.4, 0.8)
    configs = [member(trained.root, 0, objective__jacobian__weight=w) for w in weights]
    members = [
        (
            dataclasses.replace(
                settings, population=config.PopulationConfig(members_per_program=4, mapping=mapping)
            ),
            tmp_path / str(i),
        )
        for i, settings in enumerate(configs)
    ]
    assert population.group_runs([settings for settings, _ in members]) == [[0, 1, 2, 3]]
    population.train_population(members)
    for (_, workdir), settings in zip(members[::3], configs[::3], strict=True):
        assert_close(workdir, alone(settings))


def permuted(shape, names, types=None, *, devices):
    """Stands in for `jax.make_mesh`: the ring of a TPU v5e 2x2, another order of other counts."""
    order = [0, 1, 3, 2] if len(devices) == 4 else list(range(len(devices)))[::-1]
    return jax.sharding.Mesh(np.asarray(devices)[order].reshape(shape), names, axis_types=types)


def test_members_keep_their_states_on_a_permuted_mesh(monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", permuted)
    for count in range(1, 12):
        program = population.Population([config.Config()] * count)
        states = [
            train_step.TrainState(step=np.int32(i), params={}, opt_state=(), ema=None)
            for i in range(count)
        ]
        stacked = program._stack(states)
        for i in range(count):
            step = program.state(stacked, i).step
            assert int(step) == i
            assert step.devices() == {program.device_of[i]}
        assert len(set(program.device_of)) == program.mesh.size  # none has dummies only


@pytest.mark.parametrize("counts", [(4, 4, 4), (3, 2, 2), (5, 4, 3)])
def test_any_number_of_members_on_a_permuted_mesh(trained, alone, tmp_path, messages, counts):
    count, available, used = counts
    devices = jax.local_devices()[:available]
    configs = [member(trained.root, seed) for seed in range(count)]
    members = [(settings, tmp_path / str(i)) for i, settings in enumerate(configs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: devices)
        patch.setattr(jax, "make_mesh", permuted)
        results = population.train_population(members)
    assert [(r.outcome, r.step) for r in results] == [(train.FINISHED, 10)] * count
    assert messages[1] == f"devices: {used} of 8 cpu, mesh member={used}"
    for settings, workdir in members:
        assert_close(workdir, alone(settings))


def test_an_interrupted_population_resumes_from_a_common_step(
    trained, alone, tmp_path, monkeypatch
):
    configs = [member(trained.root, seed) for seed in (0, 1)]
    members = [(settings, tmp_path / str(i)) for i, settings in enumerate(configs)]
    save, first = Recorder.save, None
    with monkeypatch.context() as patch:

        def broken(self, step, state):
            nonlocal first
            first = first or self
            if self is not first and step == 10:
                raise KeyboardInterrupt
            save(self, step, state)

        patch.setattr(Recorder, "save", broken)
        with pytest.raises(KeyboardInterrupt):
            population.train_population(members)
    assert [runs.read_state(workdir)[0] for _, workdir in members] == [10, 5]
    population.train_population(members)
    for settings, workdir in members:
        assert_close(workdir, alone(settings))


def test_a_member_that_diverges_does_not_affect_the_others(trained, alone, tmp_path, monkeypatch):
    configs = [member(trained.root, 0), member(trained.root, 1, optimizer__learning_rate=1e30)]
    members = [(settings, tmp_path / str(i)) for i, settings in enumerate(configs)]
    results = population.train_population(members)
    assert [result.outcome for result in results] == [train.FINISHED, train.DIVERGED]
    assert results[1].step <= 3
    assert not list((tmp_path / "1/checkpoints").glob("[0-9]*"))
    assert_close(tmp_path / "0", alone(configs[0]))


def test_program_keys_and_groups(trained, tmp_path):
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
    assert all(
        population.program_key(settings) == population.program_key(plain) for settings in same
    )
    assert len({population.program_key(settings) for settings in [plain, *other]}) == 4
    both = [member(trained.root, 0, objective__noise=noise) for noise in (0.1, 0.2)]
    assert population.group_runs([plain, both[0], same[0], both[1]]) == [[0, 2], [1, 3]]
    narrow = [
        dataclasses.replace(plain, population=config.PopulationConfig(members_per_program=2))
    ] * 5
    assert population.group_runs(narrow) == [[0, 1], [2, 3], [4]]
    with pytest.raises(
        BadInput, match=r"/b: differs from .*/a in more than objective\.mask_weight, "
    ):
        population.train_population([(plain, tmp_path / "a"), (other[1], tmp_path / "b")])
    assert not list(tmp_path.iterdir())


def test_a_stop_also_holds_for_the_programs_not_yet_started(trained, tmp_path, monkeypatch):
    """Members with one program key may need two programs, here by where their data are kept."""
    on_device = iter((True, False))
    trained_together = []

    def run_loop(group, trainer):
        trained_together.append([run.workdir.name for run in group])
        return [train.TrainResult(train.STOPPED, 7, {}) for _ in group]

    monkeypatch.setattr("pae_jax.devices.batches.is_resident", lambda *_: next(on_device))
    monkeypatch.setattr(population, "run_loop", run_loop)
    members = [(member(trained.root, seed), tmp_path / str(seed)) for seed in (0, 1)]
    results = population.train_population(members)
    assert trained_together == [["0"]]
    assert [tuple(result[:2]) for result in results] == [(train.STOPPED, 7), (train.STOPPED, 0)]


@pytest.mark.parametrize("mapping", ["unroll", "vmap"])
def test_members_of_a_device_share_their_resident_data(
    trained, alone, tmp_path, monkeypatch, mapping
):
    """Members of two seeds, hence of two splits, by turns: two sets on one device, not four."""
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    configs = [member(trained.root, seed) for seed in (0, 1, 0, 0, 2)]
    how = config.PopulationConfig(members_per_program=5, mapping=mapping)
    members = [
        (
            dataclasses.replace(
                settings,
                population=how,
                data=dataclasses.replace(settings.data, on_device="yes"),
            ),
            tmp_path / str(i),
        )
        for i, settings in enumerate(configs)
    ]
    placed = []
    place = population.Population._place_data

    def watched(self, members):
        placed.append(place(self, members))
        return placed[-1]

    monkeypatch.setattr(population.Population, "_place_data", watched)
    population.train_population(members)
    ((resident, offsets),) = placed
    assert {name: x.shape[:2] for name, x in resident.items()} == {
        "image": (2, 16),
        "texture": (2, 10),
    }
    assert [(rows["image"], rows["texture"]) for rows in offsets] == [
        (0, 0),
        (8, 5),
        (0, 0),
        (0, 0),
        (8, 0),  # seeds 0 and 2 hold out the same texture
    ]
    for (_, workdir), settings in zip(members, configs, strict=True):
        assert_close(workdir, alone(settings))


def test_resident_data_are_counted_with_their_members(trained, tmp_path, monkeypatch):
    """Two members on each of two devices: the data of one fit, those of two seeds do not."""
    devices, kept = jax.local_devices()[:2], []
    monkeypatch.setattr(jax, "local_devices", lambda: devices)

    def run_loop(group, trainer):
        kept.append([run.on_device for run in group])
        return [train.TrainResult(train.FINISHED, 10, {}) for _ in group]

    monkeypatch.setattr(population, "run_loop", run_loop)

    def on_device(name, seeds, memory):
        monkeypatch.setattr("pae_jax.devices.batches._device_memory", lambda: memory)
        members = [
            (member(trained.root, seed), tmp_path / name / str(i)) for i, seed in enumerate(seeds)
        ]
        population.train_population(members)
        return kept.pop()

    images, textures = 8 * 16 * 16, 5 * 16 * 16 * 3  # grey images
    validation = 4 * 16 * 16 * 7 * 4
    one, two = (4 * (n * (images + textures) + validation) for n in (1, 2))
    assert on_device("a", (0, 1, 2, 3), two) == [True] * 4
    assert on_device("b", (0, 1, 2, 3), two - 4) == [False] * 4
    assert on_device("c", (0, 0, 2, 2), one) == [True] * 4  # equal data are kept once
    assert on_device("d", (0, 0, 2, 2), one - 4) == [False] * 4


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


def test_every_member_has_a_separate_log(trained, tmp_path, messages):
    members = [(member(trained.root, seed), tmp_path / str(seed)) for seed in (0, 1)]
    population.train_population(members)
    texts = [(workdir / "metrics.jsonl").read_text() for _, workdir in members]
    assert texts[0] != texts[1]
    _, leaves = runs.read_state(tmp_path / "0")
    # Parameters and the two moments of Adam, besides three counters of steps.
    size = (sum(leaf.size for leaf in leaves) - 3) // 3
    assert messages[:4] == [
        f"training: 2 runs as one program, {tmp_path / '0'} to {tmp_path / '1'}",
        "devices: 2 of 8 cpu, mesh member=2",
        f"devices without work: 6 ({', '.join(str(device) for device in jax.devices()[2:])})",
        f"parameters: {size:,}",
    ]
    assert logs._is_kept(texts[0].splitlines()[1], 10)
