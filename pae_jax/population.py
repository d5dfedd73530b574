"""Many runs of one architecture as one program: categories, seeds, weights of penalties.

Every device trains its own members; nothing passes between them in the step. Each member has
its own data, randomness, metrics, checkpoints and workdir, as if it ran alone, so that
`pae evaluate` works on any of them, and any of them goes on alone.
"""

import contextlib
import copy
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import BadInput
from pae_jax import train_step
from pae_jax.config import Config
from pae_jax.devices import sharding
from pae_jax.train import SingleTrainer, Trainer, initial_state, run_loop
from pae_jax.workdir.run import STOPPED, Run, TrainResult

# In these keys the members of one program may differ.
TRACED_KEYS = (
    "objective.mask_weight",
    "objective.noise",
    "objective.ssim.weight",
    "objective.jacobian.weight",
    "objective.idempotency.weight",
    "objective.identity.weight",
    "optimizer.learning_rate",
)
PER_MEMBER_KEYS = (
    "train.seed",
    "data.root",
    "data.category",
    "data.textures",
    "data.holdout_groups",
    "data.cache_dir",
)


def _get(tree: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), tree)


def _replace(config: Any, key: str, value: Any) -> Any:
    """A copy with another value of any type: it may be traced."""
    name, _, rest = key.partition(".")
    changed = copy.copy(config)
    value = _replace(getattr(config, name), rest, value) if rest else value
    object.__setattr__(changed, name, value)  # frozen, and checked when it was made
    return changed


def program_key(config: Config) -> Config:
    """Members whose kinds are equal can share a program.

    The kind is the config without what is a member's own, its numbers replaced by 0 or 1: a
    penalty of weight 0 is not in the program at all.
    """
    for key in TRACED_KEYS:
        config = _replace(config, key, float(_get(config, key) != 0))
    for key in PER_MEMBER_KEYS:
        config = _replace(config, key, None)
    return config


def group_runs(configs: Sequence[Config]) -> list[list[int]]:
    """Indices of configs that train together: of one kind, at most `population.members_per_program` of them."""
    found: dict[Config, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(program_key(config), []).append(i)
    result = []
    for group in found.values():
        size = configs[group[0]].population.members_per_program or jax.local_device_count()
        result += [group[i : i + size] for i in range(0, len(group), size)]
    return result


def train_population(members: Sequence[tuple[Config, str | Path]]) -> list[TrainResult]:
    """Trains configs of one kind, each in its workdir; resumes what it finds there.

    All go on from the newest step of which every member has a checkpoint. Grey and coloured
    categories make separate programs; a member that is alone in its program has the mesh of a
    single run.

    Raises:
      BadInput: as `train_and_evaluate`; or the members differ in more than they may.
    """
    first = members[0]
    for config, workdir in members[1:]:
        if program_key(config) != program_key(first[0]):
            allowed = ", ".join(TRACED_KEYS + PER_MEMBER_KEYS)
            raise BadInput(f"{workdir}: differs from {first[1]} in more than {allowed}")
    if len(members) > 1 and jax.process_count() > 1:
        raise BadInput("a population is trained by one process; start one for each part of it")
    mesh = sharding.make_mesh(first[0])  # for members alone in their programs
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(Run(config, workdir)) for config, workdir in members]
        together: dict[Any, list[Run]] = {}
        for run in runs:
            what = (run.data.channels, run.textures.train.shape[-1], run.on_device)
            together.setdefault(what, []).append(run)
        for group in together.values():
            configs = [run.config for run in group]
            if any(run.result and run.result.outcome == STOPPED for run in runs):
                for run in group:
                    run.finish(STOPPED, max(run.checkpoints.steps, default=0))
                continue
            run_loop(
                group, Population(configs) if len(group) > 1 else SingleTrainer(configs[0], mesh)
            )
    return [run.result for run in runs if run.result is not None]


class Population(Trainer):
    """Members on a mesh of the axis "member"; several on a device in turn, or together."""

    def __init__(self, configs: Sequence[Config]):
        self._configs = list(configs)
        count, devices = len(configs), jax.local_devices()
        size = max(n for n in range(1, len(devices) + 1) if count % n == 0)
        kinds = (AxisType.Auto,)
        self.mesh = jax.make_mesh((size,), (sharding.MEMBER,), kinds, devices=devices[:size])
        self.device_of = [devices[i * size // count] for i in range(count)]

    def start(self, runs: Sequence[Run]) -> tuple[int, train_step.TrainState]:
        first = [self._alone(run, place) for run, place in zip(runs, self.device_of, strict=True)]
        start, states = _common_start(runs, first)
        inputs = [run.begin(start) for run in runs]
        self._batches = [one.stream for one in inputs]
        self._store = self._stack([_padded(one.resident, inputs) for one in inputs])
        keys = [jax.random.key(config.train.seed) for config in self._configs]
        self._keys = jax.device_put(jnp.stack(keys), self._split())
        numbers = [
            {key: np.float32(_get(config, key)) for key in TRACED_KEYS if _get(config, key)}
            for config in self._configs
        ]
        self._numbers = self._stack(numbers)
        self._step = sharding.CompiledOnce(
            jax.jit(
                call(self._configs[0], self.mesh, steps=runs[0].steps_per_call), donate_argnums=0
            )
        )
        return start, self._stack(states)

    def run_steps(self, state: Any) -> tuple[Any, Any, float]:
        began = time.perf_counter()
        batches = self._stack([next(stream) for stream in self._batches])
        waited = time.perf_counter() - began
        state, values = self._step(state, self._store, batches, self._keys, self._numbers)
        return state, values, waited

    def metrics(self, values: Any) -> list[dict[str, np.ndarray]]:
        found = jax.device_get(values)
        return [{name: of[i] for name, of in found.items()} for i in range(len(self._configs))]

    def state(self, state: Any, run: int) -> train_step.TrainState:
        place = run % (len(self._configs) // self.mesh.size)

        def own(leaf: jax.Array) -> jax.Array:
            shards = {shard.device: shard.data for shard in leaf.addressable_shards}
            return shards[self.device_of[run]][place]

        return jax.tree.map(own, state)

    def state_on_one_device(self, state: Any, run: int) -> train_step.TrainState:
        return self.state(state, run)

    @property
    def flops(self) -> float | None:
        config = self._configs[0]
        # In a loop over members one of them is counted.
        members = len(self._configs) // self.mesh.size if mapping(config) == "map" else 1
        counted = self._step.flops
        return train_step.step_flops(counted and counted * members, config)

    def _alone(self, run: Run, device: Any) -> train_step.TrainState:
        """The member's first state, on its device."""
        axes, kinds = (sharding.DATA, sharding.MODEL), (AxisType.Auto, AxisType.Auto)
        mesh = jax.make_mesh((1, 1), axes, kinds, devices=[device])
        key = jax.random.key(run.config.train.seed)
        return initial_state(run.config, key, mesh, run.data.images)

    def _split(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(sharding.MEMBER))

    def _stack(self, trees: Sequence[Any]) -> Any:
        """One tree a member → one tree of arrays with a leading axis of members."""
        devices = list(self.mesh.devices.flat)
        each = len(trees) // len(devices)

        def stack(*leaves: Any) -> jax.Array:
            shards = []
            for i, device in enumerate(devices):
                own = leaves[i * each : (i + 1) * each]
                on_device = isinstance(own[0], jax.Array)
                whole = jnp.stack(own) if on_device else np.stack(own)
                shards.append(jax.device_put(whole, device))
            shape = (len(leaves), *shards[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self._split(), shards)

        return jax.tree.map(stack, *trees)


def _common_start(runs: Sequence[Run], first: Sequence[Any]) -> tuple[int, list[Any]]:
    """The newest step of which every member has a readable checkpoint, and the states there."""
    until = None
    while True:
        found = [
            run.checkpoints.restore(state, until=until) or (0, state)
            for run, state in zip(runs, first, strict=True)
        ]
        until = min(step for step, _ in found)
        if all(step == until for step, _ in found):
            return until, [state for _, state in found]


def mapping(config: Config) -> str:
    if config.population.mapping != "auto":
        return config.population.mapping
    return "unroll" if jax.default_backend() == "cpu" else "vmap"


def call(config: Config, mesh: Mesh, *, steps: int) -> sharding.Step:
    """(states, stores, batches, keys, numbers) → (states, metrics), each with an axis of members.

    `numbers` holds the members' values of `NUMBERS`, those that are not 0. Members on one device
    take turns, written out one after the other ("unroll") or as a loop ("map"), or are one
    batched computation ("vmap"). On a CPU, XLA's convolutions are 7 times slower in a loop and
    twice as slow in a batch of networks (benchmarks/population.py), so there "auto" unrolls; an
    accelerator is filled by many small networks at once, so there it takes "vmap".
    """
    how = mapping(config)

    def member(state: Any, store: Any, batches: Any, key: jax.Array, numbers: Any) -> Any:
        own = config
        for name, value in numbers.items():
            own = _replace(own, name, value)
        step = functools.partial(train_step.train_step, config=own)
        return sharding.scan_steps(step, steps)(state, store, batches, key)

    def members(*args: Any) -> Any:
        count = args[3].shape[0]
        if how == "vmap" and count > 1:
            return jax.vmap(member)(*args)
        if how == "map" and count > 1:
            return jax.lax.map(lambda one: member(*one), args)
        found = [member(*jax.tree.map(lambda x, i=i: x[i], args)) for i in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    spec = PartitionSpec(sharding.MEMBER)
    return jax.shard_map(members, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False)


def _padded(store: Mapping[str, np.ndarray], inputs: Sequence[Any]) -> dict[str, np.ndarray]:
    """Resident arrays of unequal length, filled up; the filling is never drawn."""

    def pad(name: str, values: np.ndarray) -> np.ndarray:
        longest = max(len(one.resident[name]) for one in inputs)
        return np.pad(values, [(0, longest - len(values)), *[(0, 0)] * (values.ndim - 1)])

    return {name: pad(name, values) for name, values in store.items()}
