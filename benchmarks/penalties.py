"""Times one training step with each penalty, relative to the step without penalties.

    python benchmarks/penalties.py [--size 128] [--batch 4] [--rounds 12] [--only plain noise]

The steps take turns, so that other processes slow all of them alike. The ratio is the median over
the rounds of time / time of the plain step in the same round, after a warm-up round. A step is
everything on the device: augmentation, corruption, the loss with its gradient, Adam. "FLOPs" is
XLA's estimate for the compiled step, relative to the plain step; "MiB" is its scratch memory.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from pae_jax.config import (
    Config,
    DataConfig,
    IdempotencyConfig,
    IdentityConfig,
    JacobianConfig,
    ModelConfig,
    ObjectiveConfig,
    TrainConfig,
)
from pae_jax.train_step import init_state, make_step
from pae_jax.workdir import provenance

PLAIN = "plain"
VARIANTS = {
    PLAIN: ObjectiveConfig(),
    "noise": ObjectiveConfig(noise=0.05),
    "Jacobian, 1 probe": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1)),
    "Jacobian, 4 probes": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1, probes=4)),
    "Jacobian at x": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1, at="clean")),
    "Jacobian, off step of every 2": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1, every=2)),
    "Jacobian, tangent": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1, directions="tangent")),
    "Jacobian, normal": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1, directions="normal")),
    "Jacobian, both": ObjectiveConfig(jacobian=JacobianConfig(weight=0.1, directions="both")),
    "idempotency, both": ObjectiveConfig(idempotency=IdempotencyConfig(weight=1.0)),
    "idempotency, outer": ObjectiveConfig(
        idempotency=IdempotencyConfig(weight=1.0, gradient="outer")
    ),
    "idempotency, inner": ObjectiveConfig(
        idempotency=IdempotencyConfig(weight=1.0, gradient="inner")
    ),
    "identity": ObjectiveConfig(identity=IdentityConfig(weight=1.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    names = list(dict.fromkeys([PLAIN, *options.only]))
    config = Config(
        data=DataConfig(height=options.size, width=options.size, texture_size=options.size),
        model=ModelConfig(
            widths=tuple(options.widths), branch_width=options.widths[0], dilation_rates=(1, 2, 4)
        ),
        train=TrainConfig(batch_size=options.batch),
    )
    print(provenance.line("jax"))
    print(f"{options.batch} images of {options.size}², widths {options.widths}", flush=True)

    random = np.random.default_rng(0)
    shape = (options.batch, options.size, options.size, 3)
    images, textures = random.integers(0, 256, (2, *shape), np.uint8)
    batch = {"image": images, "texture": textures}
    key = jax.random.key(0)
    # With `every` = 2 the Jacobian penalty is omitted in step 1.
    state = init_state(config, key).replace(step=jax.numpy.int32(1))

    steps, costs = {}, {}
    for name in names:
        step = make_step(dataclasses.replace(config, objective=VARIANTS[name]))
        start = time.perf_counter()
        steps[name] = jax.jit(step).lower(state, batch, key).compile()
        costs[name] = time.perf_counter() - start
        jax.block_until_ready(steps[name](state, batch, key))

    times = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready(steps[name](state, batch, key))
            times[name].append(time.perf_counter() - start)

    flops = {name: steps[name].cost_analysis()["flops"] for name in names}
    print(f"{'':32s}{'ms':>8s}{'ratio':>8s}{'FLOPs':>8s}{'MiB':>8s}{'compile s':>11s}")
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(times[name], times[PLAIN], strict=True))
        scratch = steps[name].memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"{name:32s}{1e3 * statistics.median(times[name]):8.0f}{ratio:8.2f}"
            f"{flops[name] / flops[PLAIN]:8.2f}{scratch:8.0f}{costs[name]:11.1f}"
        )


if __name__ == "__main__":
    main()
