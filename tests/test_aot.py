"""Ahead-of-time compilation for absent accelerators: bad input, costs, compiled programs."""

import importlib.util
import json
import math
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
from pae_jax.devices import costs, hardware, hlo, sharding, topology

CHIP = hardware.CHIPS["TPU v5 lite"]
NEEDS = "needs libtpu: pip install -e '.[tpu]'"
NEEDS_CUDA = "needs JAX's CUDA plugin: pip install -e '.[cuda]'"

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


@pytest.mark.parametrize(
    "topology", ["", "v5e", "2x2", "v5e:4", "v5e:2x2x2x2", "v5e:2×2", "h100:", "h100:0", "h"]
)
def test_a_topology_is_a_slice_or_gpus(started, capsys, topology):
    assert main.main([*command(), f"--topology={topology}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pae compile: --topology: a TPU slice or GPUs (a100, h100, h200)")
    assert line.endswith(f"not {topology!r}")


MISSING = {
    "v5e:2x2": "libtpu is missing: pip install -c constraints.txt -e '.[tpu]'",
    "h100": "JAX's CUDA plugin is missing: pip install -c constraints.txt -e '.[cuda]'",
}


@pytest.mark.parametrize("name", MISSING)
def test_without_the_compiler_it_says_what_to_install(started, capsys, monkeypatch, name):
    find = importlib.util.find_spec
    absent = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a)
    )
    assert main.main([*command(), f"--topology={name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pae compile: {MISSING[name]}")


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
    assert text is not None
    assert hlo.collectives(text) == {"all-reduce": hlo.Collective(1, 24 * 4)}


def some_costs(temporaries: int = 0, traffic: float | None = 8.2e9) -> costs.Costs:
    memory = costs.Memory(200 * 2**20, 110 * 2**20, 100 * 2**20, temporaries, 24 * 2**20)
    return costs.Costs(memory, 197e9, traffic, {"all-reduce": hlo.Collective(2, 3 * 2**20)})


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    time = costs.roofline(some_costs(), CHIP)
    np.testing.assert_allclose(time, (1e-3, 1e-2))
    assert time.step == time.traffic
    assert costs.roofline(some_costs(traffic=None), CHIP) == (time.arithmetic, 0)


def report(temporaries: int, **changes) -> costs.Report:
    program = costs.Program(
        "training", lambda mesh: None, {"parameters": 150 * 2**20}, {"state": 40 * 2**20}, images=16
    )
    return costs.Report(program, CHIP, some_costs(temporaries, **changes))


def test_a_report_counts_everything_on_the_chip():
    small = report(750 * 2**20)
    assert {name: size / 2**20 for name, size in small.sizes.items()} == {
        "parameters": 150,
        "state": 40,
        "padding, keys": 50,
        "results": 10,
        "temporaries": 750,
        "code": 24,
    }
    assert small.fits
    text = costs.format_report(small)
    for words in ("1.00 GiB of 16.00 GiB: fits", "all-reduce: 2 (3.0 MiB)", "1600 images/s"):
        assert words in text
    assert re.search(r"^    temporaries +750\.0 MiB$", text, re.M)
    large = report(16 * 2**30)
    assert not large.fits
    assert "16.27 GiB of 16.00 GiB: does not fit" in costs.format_report(large)
    assert "memory traffic not counted" in costs.format_report(report(0, traffic=None))
    complaint = costs.Report(small.program, CHIP, None, "Ran out of memory")
    assert not complaint.fits
    assert "of 16.00 GiB: does not fit; Ran out of memory" in costs.format_report(complaint)


# ---- programs, lowered for the CPUs of this process ----


def programs(*overrides: str, devices: int = 8, count: int = 1):
    """Returns the mesh and the programs in the form for a TPU, by the first word of their title."""
    settings = [tiny(*overrides, f"--config.train.seed={seed}") for seed in range(count)]
    with hardware.building_for("tpu"):
        mesh, found = aot.make_programs(settings, jax.devices()[:devices], "of CPUs", CHIP)
        lowered = {program.title.split(":")[0]: program.lower(mesh) for program in found}
    return mesh, {program.title.split(":")[0]: program for program in found}, lowered


@pytest.mark.parametrize("on_device", ["yes", "no"])
def test_reserved_images_are_a_part_of_the_batches(on_device):
    words = (
        "method=discrepancy",
        "head.reserved_fraction=0.4",
        "train.batch_size=8",
        f"data.on_device={on_device}",
    )
    _, found, lowered = programs(*(f"--config.{word}" for word in words))
    (_, resident, batches, _), _ = lowered[next(iter(found))].args_info
    assert set(batches) == {"image", "texture", "reserved"}
    assert batches["reserved"].shape == batches["image"].shape
    assert set(resident) == ({"image", "texture"} if on_device == "yes" else set())


def test_the_programs_are_those_of_a_run():
    batch, diagnostics = "--config.train.batch_size=8", "--config.eval.diagnostics=True"
    _, found, lowered = programs(batch, diagnostics, "--config.data.on_device=yes")
    training, *_ = names = list(found)
    assert [name.split(",")[0] for name in names] == [
        "training",
        "validation",
        "evaluation",
        "prediction",
    ]
    (state, resident, batches, _), _ = lowered[training].args_info
    assert resident["image"].shape == (96, 16, 16, 3)
    assert batches["image"].shape[1:] == (8,)
    assert batches["image"].dtype == np.int32
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    sizes = found[training].sizes
    assert sizes["images"] == 96 * 16 * 16 * 3
    assert sizes["textures"] == resident["texture"].shape[0] * 16 * 16 * 3
    assert sizes["parameters"] == sum(
        4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)
    )
    assert sizes["optimizer state"] == sum(
        4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(state.opt_state)
    )
    # Validation runs while the training state and the data are on the chip.
    beside = found["validation"].beside
    assert {"optimizer state", "images", "textures"} <= set(beside)
    assert hardware.platform() == jax.default_backend() == "cpu"


def test_streamed_batches():
    _, found, lowered = programs(
        "--config.train.batch_size=8",
        "--config.train.steps_per_call=2",
        "--config.data.on_device=no",
    )
    (_, resident, batches, _), _ = lowered["training"].args_info
    assert resident == {}
    assert batches["image"].shape == (2, 8, 16, 16, 3)
    assert batches["texture"].dtype == np.uint8
    # Each of the eight chips has an eighth of them.
    assert found["training"].sizes["batches"] == 2 * 2 * 16 * 16 * 3


def test_resident_data_of_a_population():
    overrides = (
        "--config.data.on_device=yes",
        "--config.population.members_per_program=4",
    )
    _, alone, _ = programs(*overrides, devices=1)
    mesh, found, lowered = programs(*overrides, devices=2, count=4)
    assert mesh.size == 2
    one, two = alone["training"].sizes, found["training"].sizes
    # Two members on each chip; their seeds differ, and so do their splits.
    for name in ("parameters", "optimizer state", "images", "textures"):
        assert two[name] == 2 * one[name]
    states, resident, _, keys, _ = lowered["training"].args_info[0]
    assert keys.shape == (4,)
    assert resident["image"].shape == (2, 2 * 96, 16, 16, 3)
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(states))


def test_data_that_are_not_here():
    known = ("--config.data.source=tfds", "--config.data.category=mvtec_ad/hazelnut")
    known += ("--config.data.root=/nowhere", "--config.data.on_device=auto")
    _, found, _ = programs(*known, devices=1)
    assert found["training"].sizes["images"] == 391 * 16 * 16 * 3
    _, found, _ = programs(*known, "--config.data.textures=/nowhere", devices=1)
    assert "images" not in found["training"].sizes
    assert "their number is not known" in found["training"].title


def test_lowered_programs_have_the_form_for_a_tpu():
    """Parts of a batch are a loop on a TPU and are unrolled on a CPU (train_step.py)."""

    def loops(*overrides: str) -> int:
        return programs(*overrides)[2]["training"].as_text().count("stablehlo.while")

    whole = loops("--config.train.batch_size=8")
    assert (
        loops("--config.train.batch_size=16", "--config.train.grad_accumulation_steps=2")
        == whole + 1
    )


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


def check_output(done: subprocess.CompletedProcess, device: str) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    training, validation, evaluation, prediction = re.split(
        r"^(?=validation|evaluation|prediction)", done.stdout, flags=re.M
    )
    assert device in training
    assert "steps per call: 10" in training
    for text in (training, validation, evaluation, prediction):
        assert text.count(": fits") == 1
        assert re.search(r"^    temporaries +[\d.]+ MiB$", text, re.M)
    # In data parallelism only gradients and metrics are exchanged.
    (line,) = (line for line in training.splitlines() if "collectives" in line)
    assert line.split()[1] == "all-reduce:"
    assert line.count("MiB") == 1
    assert "collectives     none" in prediction


WORDS = ("--config.data.on_device=yes", "--config.train.steps=10", "--config.eval.diagnostics=True")
WORDS += ("--config.train.validate_every=10", "--config.train.checkpoint_every=10")


def test_compiled_for_a_slice():
    pytest.importorskip("libtpu", reason=NEEDS)
    check_output(on_a_slice("v5e:2x2", *WORDS), "4 × TPU v5 lite")


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, topology.CUDA_PLUGINS)), reason=NEEDS_CUDA
)
@pytest.mark.parametrize(
    ("name", "device"),
    [("h100:4", "4 × NVIDIA H100"), ("a100:2", "2 × NVIDIA A100"), ("h200:2", "2 × NVIDIA H200")],
)
def test_compiled_for_gpus(name, device):
    done = on_a_slice(name, *WORDS)
    check_output(done, device)
    work = re.findall(r"work a chip +([\d.]+) GFLOP, memory traffic not counted", done.stdout)
    assert len(work) == 4
    assert min(map(float, work)) > 0


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
        "from pae_jax.devices import costs, hardware, topology\n"
        "aot.start()\n"
        "device = topology.devices('v5e:1x1')[0]\n"
        "placement = jax.sharding.SingleDeviceSharding(device)\n"
        "function = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0) @ x, in_shardings=placement)\n"
        "lowered = function.lower(jax.ShapeDtypeStruct((2**16, 2**10), jnp.float32))\n"
        "chip = hardware.chip(device.device_kind)\n"
        "program = costs.Program('matrix', lambda mesh: lowered, {})\n"
        "report = costs.Report(program, chip, *costs.measure(lowered))\n"
        "print(json.dumps([report.fits, costs.format_report(report)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fits, text = json.loads(done.stdout)
    assert not fits
    # Some versions of libtpu put an error code before the message.
    assert re.search("does not fit; .*Ran out of memory", text)
