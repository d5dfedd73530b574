"""`train.deterministic`: an option of XLA's compiler on a GPU, no change of bits on a CPU."""

import jax
import jax.numpy as jnp
import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import config, population, train
from pae_jax.devices import hardware

pytestmark = pytest.mark.usefixtures("compilation_cache")


def test_this_version_of_xla_knows_the_option():
    with hardware.building_for("gpu"):
        options = hardware.compiler_options(deterministic=True)
        assert hardware.compiler_options(deterministic=False) is None
    assert options
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
    lowered.compile(compiler_options=options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={f"{next(iter(options))}_": True})
    for platform in ("cpu", "tpu"):
        with hardware.building_for(platform):
            assert hardware.compiler_options(deterministic=True) is None


@pytest.mark.parametrize("members", [1, 2])
def test_the_option_reaches_the_compiler_of_the_step(trained, tmp_path, members, monkeypatch):
    def unknown_option(*, deterministic):
        return {"xla_no_such_option": True} if deterministic else None

    monkeypatch.setattr(hardware, "compiler_options", unknown_option)
    settings = [
        runs.load_config(trained.root, train__deterministic=True, train__seed=seed)
        for seed in range(members)
    ]
    runs_to_train = [(member, tmp_path / str(i)) for i, member in enumerate(settings)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="'xla_no_such_option'"):
        population.train_population(runs_to_train)


def test_a_cpu_gives_the_same_bits_with_and_without(trained, tmp_path):
    settings = runs.load_config(trained.root, train__deterministic=True)
    train.train_and_evaluate(settings, tmp_path)
    runs.assert_same_state(tmp_path, trained.workdir)


def test_pmap_takes_no_options():
    sections = {"train": {"deterministic": True}, "sharding": {"transform": "pmap"}}
    with pytest.raises(BadInput, match=r"train\.deterministic: needs sharding\.transform=jit or"):
        config.from_config_dict(sections)
