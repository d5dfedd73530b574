"""Ahead-of-time compilation for a TPU slice: bad input, costs, and a compiled program."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import runs
from data_pipelines.errors import BadInput
from pae_jax import aot, config_file, main
from pae_jax.config import Config
from pae_jax.devices import hardware, hlo, sharding

CHIP = hardware.CHIPS["TPU v5 lite"]
NEEDS = "needs libtpu: pip install -e '.[tpu]'"

HLO = """
ENTRY %main {
  %p = f32[8,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = (f32[8,32]{1,0:T(8,128)S(1)}, /*index=1*/bf16[3]{0}) all-reduce(%p, %q)
  %ar = pred[16]{0} all-reduce-start(%r), channel_id=3
  %ar.done = pred[16]{0} all-reduce-done(%ar)
  %ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(f32[2,4]{1,0} %s), dimensions={0}
  ROOT %cp = ((s8[5]{0}, u8[7]{0}), (s8[6]{0}, u8[8]{0}), u32[], u32[]) collective-permute-start(%t)
  %fusion = f32[4]{0} fusion(%all-reduce.1), kind=kLoop, calls=%all-reduce-like
  %scalar = f32[] all-reduce(%u)
}
"""


def tiny(*overrides: str) -> Config:
    words = [f"--config.{key}={value}" for key, value in runs.SETTINGS.items()]
    words += ["--config.data.source=procedural", "--config.sharding.data_parallel=-1", *overrides]
    return config_file.load(str(runs.CONFIGS / "default.py"), words)


def command(*words: str) -> list[str]:
    overrides = [f"--config.{key}={value}" for key, value in runs.SETTINGS.items()]
    overrides += ["--config.data.source=procedural", "--config.sharding.data_parallel=-1", *words]
    return ["compile", f"--config={runs.CONFIGS / 'default.py'}", *overrides]


@pytest.fixture
def started(monkeypatch):
    """Replaces `aot.start`, which would change this process."""
    monkeypatch.setattr(aot, "start", lambda: None)


# ---- bad input: one line, with or without libtpu ----


@pytest.mark.parametrize("topology", ["", "v5e", "2x2", "v5e:4", "v5e:2x2x2x2", "v5e:2×2"])
def test_a_topology_is_a_generation_and_a_shape(started, capsys, topology):
    assert main.main([*command(), f"--topology={topology}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (f"pae compile: --topology: GENERATION:SHAPE, such as v5e:2x2, not {topology!r}")


def test_without_libtpu_it_says_what_to_install(started, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    assert main.main([*command(), "--topology=v5e:2x2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pae compile: libtpu is missing: pip install ")
    assert ".[tpu]" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=12"], "train.batch_size: 12 is not divisible by 8, for the 8 chips"),
        (
            ["train.batch_size=16", "train.grad_accumulation_steps=4"],
            "train.batch_size: 4 is not divisible by 8",
        ),
        (
            ["train.batch_size=6", "sharding.model_parallel=2"],
            "train.batch_size: 6 is not divisible by 4, for the 8 chips",
        ),
        (
            ["train.batch_size=8", "sharding.data_parallel=4"],
            "sharding.data_parallel: 4 would leave chips",
        ),
        (["sharding.transform=pmap"], "sharding.transform: pmap cannot be compiled ahead"),
    ],
)
def test_every_chip_must_have_work(overrides, message):
    settings = tiny(*(f"--config.{word}" for word in overrides))
    with pytest.raises(BadInput, match=f"^{message}"):
        aot.slice_mesh(settings, jax.devices(), "v5e:2x4")


# ---- costs ----


def test_collectives_of_a_text():
    assert hlo.collectives(HLO) == {
        "all-reduce": hlo.Collective(3, (8 * 32 * 4 + 3 * 2) + 16 + 4),
        "all-gather": hlo.Collective(1, 8 * 4 * 4),
        "collective-permute": hlo.Collective(1, 6 + 8),
    }
    assert hlo.collectives("ENTRY %main { %p = f32[] parameter(0) }") == {}


def test_collectives_of_a_compiled_program():
    mesh = sharding.make_mesh(tiny("--config.train.batch_size=8"))
    mean = jax.shard_map(
        lambda x: jax.lax.pmean(x, sharding.DATA).sum(0),
        mesh=mesh,
        in_specs=PartitionSpec(sharding.DATA),
        out_specs=PartitionSpec(),
    )
    text = jax.jit(mean).lower(jnp.ones((8, 24))).compile().as_text()
    assert hlo.collectives(text) == {"all-reduce": hlo.Collective(1, 24 * 4)}


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    time = aot.roofline(197e9, 8.2e9, CHIP)
    np.testing.assert_allclose(time, (1e-3, 1e-2))
    assert time.step == time.traffic
    assert aot.roofline(197e12, 8.2e9, CHIP).step == pytest.approx(1.0)


def report(temporaries: int) -> aot.Report:
    memory = aot.Memory(200 * 2**20, 100 * 2**20, 100 * 2**20, temporaries, 24 * 2**20)
    collectives = {"all-reduce": hlo.Collective(2, 3 * 2**20)}
    return aot.Report("training", 16, CHIP, aot.Costs(memory, 197e9, 8.2e9, collectives))


def test_a_report():
    small = report(800 * 2**20)
    assert small.fits
    text = aot.format_report(small)
    for words in ("1.00 GiB of 16.00 GiB: fits", "all-reduce: 2 (3.0 MiB)", "1600 images/s"):
        assert words in text
    large = report(16 * 2**30)
    assert not large.fits
    assert "16.22 GiB of 16.00 GiB: does not fit" in aot.format_report(large)
    complaint = aot.Report("training", 16, CHIP, None, "Ran out of memory")
    assert not complaint.fits
    assert "of 16.00 GiB: does not fit; Ran out of memory" in aot.format_report(complaint)


def test_lowered_programs_take_the_state_and_streamed_batches():
    settings = tiny("--config.train.batch_size=8", "--config.train.steps_per_call=2")
    mesh = aot.slice_mesh(settings, jax.devices(), "of CPUs")
    lowered = aot.lower_training(settings, mesh)
    (state, resident, batches, _), _ = lowered.args_info
    assert batches["image"].shape == (2, 8, 16, 16, 3)
    assert batches["texture"].dtype == np.uint8
    assert resident == {}
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert hardware.platform() == jax.default_backend() == "cpu"
    (_, images), _ = aot.lower_prediction(settings, jax.devices()[0]).args_info
    assert images.shape == (4, 16, 16, 3)


def test_lowered_programs_have_the_form_for_a_tpu():
    """Parts of a batch are a loop on a TPU and are unrolled on a CPU (train_step.py)."""
    settings = tiny("--config.train.batch_size=16", "--config.train.grad_accumulation_steps=2")
    mesh = aot.slice_mesh(settings, jax.devices(), "of CPUs")
    text = aot.lower_training(settings, mesh).as_text()
    whole = tiny("--config.train.batch_size=8")
    without = aot.lower_training(whole, aot.slice_mesh(whole, jax.devices(), "of CPUs")).as_text()
    assert text.count("stablehlo.while") == without.count("stablehlo.while") + 1


@pytest.mark.parametrize("category", ["screw", "carpet"])
def test_the_config_of_a_slice_has_the_categories_of_the_paper(category):
    file = runs.CONFIGS / "tpu_v5e.py"
    settings = config_file.load(f"{file}:{category}")
    assert settings.data.category == f"mvtec_ad/{category}"
    assert settings.model.dtype == "bfloat16"
    assert settings.train.batch_size == 16
    with pytest.raises(BadInput, match="mvtec_ad: no category 'pcb1'"):
        config_file.load(f"{file}:pcb1")


# ---- compiled, with libtpu ----


def on_a_slice(topology: str, *words: str) -> subprocess.CompletedProcess:
    """Runs `pae compile` in a new process, which sets its platform before it touches a device."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "pae_jax.main", *command(*words), f"--topology={topology}"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_compiled_for_a_slice():
    pytest.importorskip("libtpu", reason=NEEDS)
    done = on_a_slice("v5e:2x2")
    assert (done.returncode, done.stderr) == (0, "")
    training, prediction = done.stdout.split("prediction: ")
    assert "4 × TPU v5 lite" in training
    assert training.count("GiB of 16.00 GiB: fits") == prediction.count(": fits") == 1
    # In data parallelism only gradients and metrics are exchanged.
    (line,) = (line for line in training.splitlines() if "collectives" in line)
    assert line.split()[1] == "all-reduce:"
    assert line.count("MiB") == 1
    assert "collectives     none" in prediction


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5e:3x3", "--topology: v5e:3x3: "),
        ("v9z:2x2", "--topology: v9z:2x2: "),
        ("v5e:4x4", "train.batch_size: 4 is not divisible by 16, for the 16 chips of v5e:4x4"),
    ],
)
def test_an_impossible_slice_is_refused(topology, message):
    pytest.importorskip("libtpu", reason=NEEDS)
    done = on_a_slice(topology)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pae compile: {message}")


def test_a_program_that_exceeds_the_memory_does_not_fit():
    pytest.importorskip("libtpu", reason=NEEDS)
    code = (
        "import json, jax, jax.numpy as jnp\n"
        "from pae_jax import aot\n"
        "from pae_jax.devices import hardware\n"
        "aot.start()\n"
        "device = aot.slice_devices('v5e:1x1')[0]\n"
        "placement = jax.sharding.SingleDeviceSharding(device)\n"
        "function = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0) @ x, in_shardings=placement)\n"
        "lowered = function.lower(jax.ShapeDtypeStruct((2**16, 2**10), jnp.float32))\n"
        "chip = hardware.chip(device.device_kind)\n"
        "report = aot.Report('matrix', 1, chip, *aot.measure(lowered))\n"
        "print(json.dumps([report.fits, aot.format_report(report)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fits, text = json.loads(done.stdout)
    assert not fits
    # Some versions of libtpu put an error code before the message.
    assert re.search("does not fit; .*Ran out of memory", text)
