"""Times one training step in JAX and in PyTorch: the same network, loss, batch and optimiser.

    python benchmarks/step.py [--sizes 64 128 256] [--batch 4] [--widths 32 64 128] [--rounds 5]
                              [--norm group none] [--only jax "torch eager"] [--threads 2]

A step is the U-Net on a prepared corrupted batch, eq. 1, its gradient and Adam, without corruption
and loading. PyTorch (the extra `bench`) runs the same network, step_torch.py, eagerly and by
torch.compile, with images in both memory layouts. --only selects the contestants whose names begin
with its words. Before the timing, the PyTorch network gets our parameters, and output, loss,
gradient and one update must agree in full precision.

Both sides use the same cores. The contestants take turns. One untimed step precedes each timed
one, so that caches and thread pools are those of the contestant. The table has the median and the
least time over the rounds, because PyTorch's threads wait for each other at every operation, so
that other processes on the same cores slow it far more than JAX. Everything runs in float32, on a
GPU also in bfloat16. On Linux the memory of both sides is on huge pages, unless GLIBC_TUNABLES is
set. A compilation by torch.compile takes about a minute on a few cores; its result is kept on disk.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Beside PyTorch on one GPU, JAX must not take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pae_jax import objective, train_step, unet
from pae_jax.config import Config, ModelConfig
from pae_jax.devices.process import restart_with_huge_pages
from pae_jax.workdir import provenance

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]
# Relative, in float32. Gradients differ by more than rounding errors, because among millions of
# ReLUs some have inputs so close to 0 that they are active on one side only.
TOLERANCES = {"output": 1e-4, "loss": 1e-5, "gradient": 1e-3, "update": 1e-4}
TORCH = {
    f"torch {mode} {layout}": {"compiled": mode == "compile", "layout": layout}
    for mode in ("eager", "compile")
    for layout in ("contiguous", "channels_last")
}


def make_batch(size: int, count: int) -> Arrays:
    """Returns random x̂, x (count, size, size, 3) and M (count, size, size, 1)."""
    rng = np.random.default_rng(0)
    clean, texture = rng.random((2, count, size, size, 3), np.float32)
    mask = np.maximum(rng.random((count, size, size, 1), np.float32) - 0.5, 0)
    return mask * texture + (1 - mask) * clean, clean, mask


def loss(params: Any, batch: Arrays, config: ModelConfig) -> jax.Array:
    """Returns eq. 1, averaged over the batch."""
    corrupted, clean, mask = map(jnp.asarray, batch)
    reconstruction = unet.bind(config, params)(corrupted)
    return objective.reconstruction_loss(reconstruction, clean, mask).mean()


def update(params: Any, state: Any, batch: Arrays, *, config: ModelConfig) -> tuple[Any, Any, Any]:
    """Takes one step of Adam; returns parameters, optimiser state and loss."""
    value, gradient = jax.value_and_grad(loss)(params, batch, config)
    changes, state = train_step.optimizer(Config(model=config)).update(gradient, state, params)
    return optax.apply_updates(params, changes), state, value


def make_jax(config: ModelConfig, params: Any, batch: Arrays) -> Callable[[], jax.Array]:
    """Returns a function that takes one step on the batch and waits for it."""
    step = jax.jit(functools.partial(update, config=config), donate_argnums=(0, 1))
    placed = jax.device_put(batch)
    params = jax.tree.map(jnp.copy, params)  # because the step overwrites its arguments
    state = train_step.optimizer(Config(model=config)).init(params)

    def run() -> jax.Array:
        nonlocal params, state
        params, state, value = step(params, state, placed)
        return value.block_until_ready()

    return run


def differences(config: ModelConfig, params: Any, batch: Arrays) -> dict[str, float]:
    """Returns the differences between the PyTorch network and ours, on the CPU in float32.

    Those of output and loss are relative to the largest value, that of the gradient is relative
    to the norm of the whole gradient, and that of the update to the learning rate. Adam's first
    update is the sign of the gradient, so updates are compared only where the gradient is well
    above the difference of the gradients.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from step_torch import make_step, to_torch

    def relative(ours: Any, theirs: Any) -> float:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))

    rate = Config().optimizer.learning_rate
    settings = train_step.optimizer(Config(model=config))
    with jax.default_matmul_precision("highest"):
        output = unet.bind(config, params)(jnp.asarray(batch[0]))
        value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)(params, batch, config)
        changes, _ = settings.update(gradient, settings.init(params), params)

    module, step = make_step(config, params, batch, learning_rate=rate)
    before = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    with torch.no_grad():
        images = torch.tensor(batch[0].transpose(0, 3, 1, 2).copy())
        result = {"output": relative(output, module(images).permute(0, 2, 3, 1))}
    result["loss"] = relative(value, step())
    ours, moved = to_torch(gradient), to_torch(changes)
    # One scale for all gradients, because that of a bias before a norm is only rounding error.
    scale = max(float(leaf.abs().max()) for leaf in ours.values())
    result |= {"gradient": 0.0, "update": 0.0}
    squares, rounding = 0.0, float(np.finfo(np.float32).eps)
    for name, leaf in module.named_parameters():
        assert leaf.grad is not None
        error = float((leaf.grad - ours[name]).abs().max())
        squares += float(((leaf.grad - ours[name]) ** 2).sum())
        clear = ours[name].abs() > 1e5 * rounding * scale + 100 * error
        # The rounding error of the parameters themselves is part of the difference.
        gap = ((leaf.detach() - before[name]) - moved[name]).abs() / rate
        gap = (gap - before[name].abs() * (rounding / rate)).clamp(min=0)
        if clear.any():
            result["update"] = max(result["update"], float(gap[clear].max()))
    result["gradient"] = math.sqrt(squares) / float(optax.tree.norm(gradient))
    return result


def contestants(
    config: ModelConfig, params: Any, batch: Arrays, only: list[str]
) -> dict[str, Callable[[], Any]]:
    """Returns, by name, functions that take one step and wait for it."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    runs: dict[str, Callable[[], Any]] = {}
    if wanted("jax", only):
        runs["jax"] = make_jax(config, params, batch)
    for name, options in TORCH.items():
        if wanted(name, only):
            from step_torch import make_step

            _, step = make_step(config, params, batch, device=device, **options)
            runs[name] = functools.partial(lambda step: step().item(), step)  # waits for a GPU
    for name, run in list(runs.items()):
        try:
            start = time.perf_counter()
            run()
            took = time.perf_counter() - start
            if took > 30:
                print(f"{name}: first step after {took:.0f} s", flush=True)
        except Exception as error:
            if "compile" not in name:
                raise
            # A machine may lack the C++ compiler or Triton that torch.compile needs.
            print(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0]}")
            del runs[name]
    return runs


def wanted(name: str, only: list[str]) -> bool:
    """Returns whether --only selects the contestant."""
    return not only or any(name.startswith(word) for word in only)


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of a step by contestant and round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], pick: Callable[[list[float]], float]) -> str:
    """Formats the time of JAX relative to the fastest PyTorch; `pick` reduces the rounds."""
    picked = {name: pick(values) for name, values in times.items()}
    ours = picked.pop("jax", None)
    if not picked or ours is None:
        return ""
    best = min(picked, key=picked.__getitem__)
    return f"jax / {best}: {ours / picked[best]:.2f}"


def parse() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ModelConfig()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--branch_width", type=int, help="the first width, unless given")
    rates = default.dilation_rates
    parser.add_argument("--dilation_rates", type=int, nargs="+", default=rates)
    parser.add_argument("--dilated_kernel_size", type=int, default=default.dilated_kernel_size)
    parser.add_argument("--patch_size", type=int, default=default.patch_size)
    parser.add_argument("--norm", nargs="+", default=["group", "none"])
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of contestants' names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores, help="cores for either side")
    options = parser.parse_args()
    for size in options.sizes:
        if size % (options.patch_size * 2 ** len(options.widths)):
            parser.error(f"--sizes {size}: not divisible by the patch size and all poolings")
    if importlib.util.find_spec("torch") is None and options.only != ["jax"]:
        parser.error("PyTorch is missing: pip install -e '.[bench]', or --only jax")
    return options


def main() -> None:
    options = parse()
    packages = ["jax", "jaxlib", "flax"]
    if hasattr(os, "sched_setaffinity"):  # before either side starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if any(wanted(name, options.only) for name in TORCH):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(options.threads)
        # On a GPU, XLA also computes float32 products in TensorFloat-32.
        torch.set_float32_matmul_precision("high")
        packages.append("torch")
    print(provenance.line(*packages))
    print(
        f"{options.threads} threads, batch {options.batch}, widths {options.widths}, "
        f"patch size {options.patch_size}, dilated kernel {options.dilated_kernel_size}, "
        f"rates {list(options.dilation_rates)}, {options.rounds} rounds",
        flush=True,
    )
    dtypes = ["float32"] if jax.default_backend() == "cpu" else ["float32", "bfloat16"]
    for norm in options.norm:
        for size in options.sizes:
            config = ModelConfig(
                patch_size=options.patch_size,
                widths=tuple(options.widths),
                branch_width=options.branch_width or options.widths[0],
                dilation_rates=tuple(options.dilation_rates),
                dilated_kernel_size=options.dilated_kernel_size,
                norm=norm,
            )
            batch = make_batch(size, options.batch)
            params = unet.UNet(config).init(jax.random.key(0), jnp.asarray(batch[0][:1]))
            print(f"\nnorm {norm}, {size}², {unet.parameter_count(params):,} parameters")
            if "torch" in packages:
                errors = differences(config, params, batch)
                text = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
                print(f"relative differences: {text}", flush=True)
                if any(errors[name] > limit for name, limit in TOLERANCES.items()):
                    sys.exit("the two networks differ; nothing was timed")
            for dtype in dtypes:
                typed = dataclasses.replace(config, dtype=dtype)
                runs = contestants(typed, params, batch, options.only)
                times = measure(runs, options.rounds)
                print(f"{'':39s}{'ms/step':>9s}{'ms/image':>10s}{'least':>9s}")
                for name, values in times.items():
                    median, least = 1e3 * statistics.median(values), 1e3 * min(values)
                    per_image = median / options.batch
                    print(f"{name:30s}{dtype:9s}{median:9.1f}{per_image:10.1f}{least:9.1f}")
                if text := ratio(times, statistics.median):
                    print(f"{text}; by the least times, {ratio(times, min)}", flush=True)


if __name__ == "__main__":
    restart_with_huge_pages(__file__)  # for both sides, as `pae` does
    main()
