"""Times N members trained as one program against the same N runs one after the other.

    python benchmarks/population.py [--members 4] [--devices 1] [--size 32] [--widths 8 16 32]

The figures are for one step of all members, on --devices of the CPU or on all accelerators. "alone"
is N calls of the compiled step of a single run. The others are one call of the population's step,
which computes the members of a device in turn ("unroll", "map") or together ("vmap"); see
`population.mapping`. The contestants take turns. A ratio is the median over the rounds of time /
time of "alone" in the same round, after a warm-up round. A population compiles once, and runs with
different weights compile N times.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1, help="number of CPU devices")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)

    from pae_jax.workdir import provenance

    print(provenance.line("jax"))
    print(
        f"{options.members} members on {jax.local_device_count()} devices, batches of "
        f"{options.batch} images of {options.size}², widths {options.widths}",
        flush=True,
    )
    contestants = {"alone": alone(options)}
    contestants |= {name: together(options, name) for name in ("unroll", "map", "vmap")}
    compiling, times = {}, {name: [] for name in contestants}
    for name, run in contestants.items():
        start = time.perf_counter()
        run()
        compiling[name] = time.perf_counter() - start
    for _ in range(options.rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(f"{'':8s}{'ms':>9s}{'ratio':>8s}{'compile s':>11s}")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["alone"], strict=True))
        print(
            f"{name:8s}{1e3 * statistics.median(seconds):9.1f}{ratio:8.2f}{compiling[name]:11.1f}",
            flush=True,
        )


def make_config(options: argparse.Namespace, mapping: str = "auto") -> Any:
    """Returns the configuration of every member."""
    from pae_jax.config import from_config_dict

    return from_config_dict(
        {
            "data": {"size": options.size, "texture_size": options.size},
            "model": {
                "widths": options.widths,
                "branch_width": options.widths[0],
                "dilation_rates": (1, 2),
                "dilated_kernel_size": 3,
            },
            "train": {"batch_size": options.batch},
            "sharding": {"data_parallel": 1},
            "population": {"mapping": mapping},
        }
    )


def make_batch(options: argparse.Namespace, *leading: int) -> dict[str, Any]:
    """Returns random images and textures with the axes (*leading, 1 step, batch, h, w, 3)."""
    import numpy as np

    random = np.random.default_rng(0)
    shape = (*leading, 1, options.batch, options.size, options.size, 3)
    names = ("image", "texture")
    return {name: random.integers(0, 256, shape, np.uint8) for name in names}


def alone(options: argparse.Namespace) -> Callable[[], Any]:
    """Returns a function that takes one step of N single runs, one after the other."""
    from pae_jax import train, train_step
    from pae_jax.devices import sharding

    config = make_config(options)
    mesh = sharding.make_mesh(config)
    keys = [jax.random.key(i) for i in range(options.members)]
    states = [train.initial_state(config, key, mesh) for key in keys]
    batch = sharding.to_global(make_batch(options), sharding.batch_sharding(mesh))
    step = sharding.compile_step(train_step.make_step(config), mesh, "jit", states[0])

    def run() -> None:
        for i, key in enumerate(keys):
            states[i], _ = step(states[i], {}, batch, key)
        jax.block_until_ready(states)

    return run


def together(options: argparse.Namespace, mapping: str) -> Callable[[], Any]:
    """Returns a function that takes one step of N members as one program."""
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from pae_jax import population, train_step
    from pae_jax.devices import sharding

    config = make_config(options, mapping)
    program = population.Population([config] * options.members)
    by_member = NamedSharding(program.mesh, PartitionSpec(sharding.MEMBER))
    keys = jax.device_put(jax.random.split(jax.random.key(0), options.members), by_member)
    state = jax.device_put(
        jax.jit(jax.vmap(lambda key: train_step.init_state(config, key)))(keys), by_member
    )
    batch = jax.device_put(make_batch(options, options.members), by_member)
    values = {
        name: jax.device_put(jnp.full(options.members, value), by_member)
        for name, value in population.traced_values(config).items()
    }
    call = population.make_call(config, program.mesh, steps=1)
    step = sharding.CompiledOnce(jax.jit(call, donate_argnums=0))

    def run() -> None:
        nonlocal state
        state, _ = step(state, {}, batch, keys, values)
        jax.block_until_ready(state)

    return run


if __name__ == "__main__":
    main()
