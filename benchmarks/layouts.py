"""Times training steps with streamed and resident data, remat, accumulation and bfloat16.

    python benchmarks/layouts.py [--size 32] [--batch 8] [--widths 8 16 32] [--only streamed]

Streamed: the host gathers every batch and copies it to the device. Resident: images and textures
are kept on the device, and a batch is given by indices. "host" is the fraction of the time in
which the host prepares, copies and dispatches; the rest of the time it waits for the device. On a
CPU, host and device share the cores. Several steps per call run as a loop, in which XLA's
convolutions are slow on a CPU. "MiB" is the scratch memory of the compiled program.

The layouts take turns. A ratio is the median over the rounds of time / time of the first layout
in the same round, after a warm-up round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pae_jax import train, train_step
from pae_jax.config import Config, from_config_dict
from pae_jax.devices import sharding
from pae_jax.devices.batches import is_resident, open_batches, steps_per_call
from pae_jax.workdir import provenance

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "streamed": {"data": {"on_device": "no"}},
    "resident": {"data": {"on_device": "yes"}},
    "resident, 10 steps a call": {"data": {"on_device": "yes"}, "train": {"steps_per_call": 10}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "remat": {"model": {"remat": True}},
    "accumulate 4": {"train": {"grad_accumulation_steps": 4}},
}


def make_config(options: argparse.Namespace, layout: dict[str, dict[str, Any]]) -> Config:
    """Returns the configuration of one of `LAYOUTS`."""
    base = {
        "data": {"size": options.size, "texture_size": options.size},
        "model": {
            "widths": options.widths,
            "branch_width": options.widths[0],
            "dilation_rates": (1, 2),
            "dilated_kernel_size": 3,
        },
        "train": {"batch_size": options.batch},
        "sharding": {"data_parallel": 1},
    }
    return from_config_dict({key: values | layout.get(key, {}) for key, values in base.items()})


def prepare(config: Config, images: np.ndarray) -> tuple[Callable[[int], float], Any]:
    """Returns a function of a number of steps that returns the host's seconds, and the program."""
    mesh = sharding.make_mesh(config)
    key = jax.random.key(0)
    state = train.initial_state(config, key, mesh)
    on_device = is_resident(config, images, images)
    steps = steps_per_call(config, on_device=on_device)
    batches = open_batches(config, images, images, start=0, steps=steps, on_device=on_device)
    resident = sharding.to_global(batches.resident, sharding.replicated_sharding(mesh))
    step = sharding.compile_step(train_step.make_step(config), mesh, "jit", state, steps=steps)

    def run(count: int) -> float:
        nonlocal state
        host = 0.0
        for _ in range(count // steps):
            start = time.perf_counter()
            batch = sharding.to_global(next(batches.stream), sharding.batch_sharding(mesh))
            state, _ = step(state, resident, batch, key)
            host += time.perf_counter() - start
            jax.block_until_ready(state)
        return host

    return run, step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round; a multiple of ten")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options = parser.parse_args()
    print(provenance.line("jax", "grain"))
    print(
        f"batches of {options.batch} from {options.images} images of {options.size}², "
        f"widths {options.widths}",
        flush=True,
    )
    shape = (options.images, options.size, options.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    programs = {}
    for name in options.only:
        programs[name] = prepare(make_config(options, LAYOUTS[name]), images)
        programs[name][0](10)
    times: dict[str, list[float]] = {name: [] for name in programs}
    hosts: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(options.rounds):
        for name, (run, _) in programs.items():
            start = time.perf_counter()
            host = run(options.steps)
            times[name].append(time.perf_counter() - start)
            hosts[name].append(host / times[name][-1])
    first = next(iter(times.values()))
    print(f"{'':28s}{'ms/step':>9s}{'ratio':>8s}{'host':>8s}{'MiB':>8s}")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        milliseconds = 1e3 * statistics.median(seconds) / options.steps
        scratch = programs[name][1].memory().temp_size_in_bytes / 2**20
        host = statistics.median(hosts[name])
        print(f"{name:28s}{milliseconds:9.1f}{ratio:8.2f}{host:8.1%}{scratch:8.1f}")


if __name__ == "__main__":
    main()
