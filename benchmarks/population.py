"""Time of N members trained as one program against the same N runs one after the other.

    python benchmarks/population.py [--members 4] [--devices 1] [--size 32] [--widths 8 16 32]

One step of all members, on CPU devices made for the purpose or on what accelerators there are:
"alone" is N calls of the single run's compiled step; the others are the population's, its members
on one device in turn ("unroll", "map") or together ("vmap"); see `population.mapping`. The
contestants take turns; ratios are medians over the rounds of time / time of "alone" in the same
round. One round of warm-up is left out. Compiling counts once for a population and N times for
runs whose weights differ.
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
    parser.add_argument("--devices", type=int, default=1, help="of the CPU; accelerators: all")
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
    contestants |= {how: together(options, how) for how in ("unroll", "map", "vmap")}
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
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, times["alone"], strict=True))
        print(
            f"{name:8s}{1e3 * statistics.median(found):9.1f}{ratio:8.2f}{compiling[name]:11.1f}",
            flush=True,
        )


def make_config(options: argparse.Namespace, how: str = "auto") -> Any:
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
            "sharding": {"population": how, "data_parallel": 1},
        }
    )


def make_batch(options: argparse.Namespace, *leading: int) -> dict[str, Any]:
    import numpy as np

    random = np.random.default_rng(0)
    shape = (*leading, 1, options.batch, options.size, options.size, 3)
    names = ("image", "texture")
    return {name: random.integers(0, 256, shape, np.uint8) for name in names}


def alone(options: argparse.Namespace) -> Callable[[], Any]:
    """N single runs, each on one device, one after the other."""
    from pae_jax import train, train_step
    from pae_jax.devices import sharding

    config = make_config(options)
    mesh = sharding.make_mesh(config)
    keys = [jax.random.key(i) for i in range(options.members)]
    states = [train.initial_state(config, key, mesh) for key in keys]
    batch = sharding.to_global(make_batch(options), sharding.batch_sharding(mesh))
    step = sharding.compile_step(
        lambda *args, axis=None: train_step.train_step(*args, config=config, axis=axis),
        mesh,
        "jit",
        states[0],
    )

    def run() -> None:
        for i, key in enumerate(keys):
            states[i], _ = step(states[i], {}, batch, key)
        jax.block_until_ready(states)

    return run


def together(options: argparse.Namespace, how: str) -> Callable[[], Any]:
    """The same as one program."""
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from pae_jax import population, train_step
    from pae_jax.devices import sharding

    config = make_config(options, how)
    program = population.Population([config] * options.members)
    split = NamedSharding(program.mesh, PartitionSpec(sharding.MEMBER))
    keys = jax.device_put(jax.random.split(jax.random.key(0), options.members), split)
    state = jax.device_put(
        jax.jit(jax.vmap(lambda key: train_step.init_state(config, key)))(keys), split
    )
    batch = jax.device_put(make_batch(options, options.members), split)
    numbers = {"optimizer.learning_rate": jax.device_put(jnp.full(options.members, 1e-4), split)}
    call = jax.jit(population.call(config, program.mesh, steps=1), donate_argnums=0)
    step = sharding.CompiledOnce(call)

    def run() -> None:
        nonlocal state
        state, _ = step(state, {}, batch, keys, numbers)
        jax.block_until_ready(state)

    return run


if __name__ == "__main__":
    main()
