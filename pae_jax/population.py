"""Many runs of one architecture trained as one program: categories, seeds, penalty weights.

Every device trains some members of the population, and a step exchanges nothing between devices.
Each member has separate data, random streams, metrics, checkpoints and workdir, as if it were
trained alone. `pae evaluate` therefore works on any member, and any member can be resumed alone.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import BadInput
from data_pipelines.pipeline import source
from data_pipelines.rows import Stored
from pae_jax import train_step
from pae_jax.config import Config
from pae_jax.devices import batches, hardware, process, sharding
from pae_jax.objective import Hyperparameters
from pae_jax.train import SingleTrainer, initial_state, run_loop
from pae_jax.workdir.run import STOPPED, Run, TrainResult, open_run

# Members of one program may differ in these numbers, but not in which of them are 0.
TRACED_KEYS = (
    "objective.mask_weight",
    "objective.noise",
    "objective.ssim.weight",
    "objective.jacobian.weight",
    "objective.idempotency.weight",
    "objective.identity.weight",
    "optimizer.learning_rate",
)
# Members may also differ in these keys, which only the host reads. The values are the
# placeholders that `program_key` puts there.
PER_MEMBER_KEYS = {
    "train.seed": 0,
    "data.root": "any",
    "data.category": "any",
    "data.textures": "any",
    "data.holdout_groups": "any",
    "data.cache_dir": "any",
}

# The data of a run, with a key that tells whether two runs train on the same.
DATA: dict[str, Callable[[Run], tuple[Hashable, Stored]]] = {
    "image": lambda run: ((run.data.fingerprint, tuple(run.data.names)), run.data.images),
    "texture": lambda run: (run.textures.fingerprint, run.textures.train),
}


def _get(config: Any, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _replace(config: Any, key: str, value: Any) -> Any:
    """Returns a copy of a config, or of a section, with another value of one dotted key."""
    name, _, rest = key.partition(".")
    if rest:
        value = _replace(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


def program_key(config: Config) -> Config:
    """Returns a key; runs with equal keys can be compiled as one program.

    Per-member settings (seed, data) are replaced by placeholders. Scalar weights are reduced to
    zero or non-zero, because a zero weight removes its term from the program.
    """
    for key in TRACED_KEYS:
        config = _replace(config, key, float(_get(config, key) != 0))
    for key, placeholder in PER_MEMBER_KEYS.items():
        config = _replace(config, key, placeholder)
    return config


def group_runs(configs: Sequence[Config]) -> list[list[int]]:
    """Returns the indices of the configs that train together, one list per program.

    A program has at most `population.members_per_program` members, or one per local device if
    that is 0.
    """
    by_key: dict[Config, list[int]] = {}
    for i, config in enumerate(configs):
        by_key.setdefault(program_key(config), []).append(i)
    groups = []
    for indices in by_key.values():
        limit = configs[indices[0]].population.members_per_program or jax.local_device_count()
        groups += [indices[i : i + limit] for i in range(0, len(indices), limit)]
    return groups


def train_population(members: Sequence[tuple[Config, str | os.PathLike[str]]]) -> list[TrainResult]:
    """Trains several configs with one `program_key`, each in its workdir; resumes earlier runs.

    All members resume from the newest step of which every member has a checkpoint. Grey and
    coloured categories need separate programs. A member that is alone in its program is trained
    on the mesh of a single run.

    Args:
      members: a config and a workdir per member.

    Returns:
      The results, in the order of `members`.

    Raises:
      BadInput: see `train_and_evaluate`; or the members differ in other keys than they may, or
        several processes train together.
    """
    first_config, first_workdir = members[0]
    for config, workdir in members[1:]:
        if program_key(config) != program_key(first_config):
            allowed = ", ".join([*TRACED_KEYS, *PER_MEMBER_KEYS])
            raise BadInput(f"{workdir}: differs from {first_workdir} in more than {allowed}")
    if len(members) > 1 and jax.process_count() > 1:
        raise BadInput("a population is trained by one process; start one for each part of it")
    with process.fail_together():
        mesh = sharding.make_mesh(first_config)  # for members alone in their programs
    results: dict[int, TrainResult] = {}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(open_run(config, workdir)) for config, workdir in members]
        for indices in _same_shapes(runs):
            group = [runs[i] for i in indices]
            if any(result.outcome == STOPPED for result in results.values()):
                # The signal that stopped one program also holds for those not yet started.
                outcomes = [
                    TrainResult(STOPPED, max(run.checkpoints.steps, default=0), {}) for run in group
                ]
            elif len(group) > 1:
                group = _keep_or_stream(group)
                outcomes = run_loop(group, Population([run.config for run in group]))
            else:
                outcomes = run_loop(group, SingleTrainer(group[0].config, mesh))
            results.update(zip(indices, outcomes, strict=True))
    return [results[i] for i in range(len(runs))]


def _same_shapes(runs: Sequence[Run]) -> list[list[int]]:
    """Returns the indices of runs whose data have the same channels and place of storage."""
    groups: dict[Any, list[int]] = {}
    for i, run in enumerate(runs):
        shapes = (run.data.channels, run.textures.train.shape[-1], run.on_device)
        groups.setdefault(shapes, []).append(i)
    return list(groups.values())


def _keep_or_stream(runs: Sequence[Run]) -> Sequence[Run]:
    """Streams the data of all members if those of one device exceed its memory together."""
    config, (per_device, _) = runs[0].config, _division(len(runs))
    for i in range(0, len(runs), per_device):
        members = runs[i : i + per_device]
        arrays = [array for name in DATA for array in _distinct_data(members, name).values()]
        if runs[0].on_device and not batches.is_resident(config, *arrays):
            return [dataclasses.replace(run, on_device=False) for run in runs]
    return runs


def _distinct_data(runs: Sequence[Run], name: str) -> dict[Hashable, Stored]:
    """Returns the images or textures that runs train on, by their content; equal ones once."""
    return dict(DATA[name](run) for run in runs)


def _division(count: int) -> tuple[int, int]:
    """Returns how many members a device has, and how many devices have members."""
    per_device = -(-count // len(jax.local_devices()))
    return per_device, -(-count // per_device)


class Population:
    """The trainer of several runs, on a mesh with the axis "member".

    A device may have several members; `mapping` says how it computes them. Every device has the
    same number, so copies of the last member fill the last device. They are computed and thrown
    away.

    Attributes:
      mesh: the devices.
      device_of: the device of each member. `mesh` alone decides it, because its devices may be in
        another order than those of the process.
    """

    def __init__(self, configs: Sequence[Config]):
        self._configs = list(configs)
        count = len(configs)
        self._per_device, size = _division(count)
        self.mesh = sharding.ordered_mesh((size,), (sharding.MEMBER,), jax.local_devices()[:size])
        in_order = list(self.mesh.devices.flat)
        self.device_of = [in_order[i // self._per_device] for i in range(count)]

    def start(self, runs: Sequence[Run]) -> tuple[int, train_step.TrainState]:
        """Opens the data of the runs; see `train.Trainer`."""
        initial_states = [
            _initial_state_on(run, device) for run, device in zip(runs, self.device_of, strict=True)
        ]
        start, states = _common_start(runs, initial_states)
        self._streams = [run.open_batches(start).stream for run in runs]
        self._resident, self._offsets = {}, [{} for _ in runs]
        if runs[0].on_device:
            self._resident, self._offsets = self._place_data(runs)
        keys = self._fill([jax.random.key(config.train.seed) for config in self._configs])
        self._keys = jax.device_put(jnp.stack(keys), self._member_sharding())
        self._values = self._stack([traced_values(config) for config in self._configs])
        steps = runs[0].steps_per_call(start)
        self._step = sharding.CompiledOnce(
            jax.jit(make_call(self._configs[0], self.mesh, steps=steps), donate_argnums=0),
            hardware.compiler_options(deterministic=self._configs[0].train.deterministic),
        )
        return start, self._stack(states)

    def next_batch(self) -> dict[str, jax.Array]:
        """Returns the input of the next call, with a leading axis of members."""
        members = zip(self._streams, self._offsets, strict=True)
        return self._stack([_shift(next(stream), offsets) for stream, offsets in members])

    def run_steps(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Runs the steps of one call; returns the new state and the metrics."""
        return self._step(state, self._resident, batch, self._keys, self._values)

    def metrics(self, values: Any) -> list[dict[str, np.ndarray]]:
        """Returns the metrics of every member on the host, (steps,) each."""
        on_host = jax.device_get(values)
        return [
            {name: value[i] for name, value in on_host.items()} for i in range(len(self._configs))
        ]

    def state(self, state: Any, run: int) -> train_step.TrainState:
        """Returns the state of one member, to be saved."""
        device = self.device_of[run]

        def part_on_device(leaf: jax.Array) -> jax.Array:
            return {shard.device: shard.data for shard in leaf.addressable_shards}[device]

        row = jax.device_put(np.int32(run % self._per_device), device)
        return _take_row(jax.tree.map(part_on_device, state), row)

    def state_on_one_device(self, state: Any, run: int) -> train_step.TrainState:
        """Returns the state of one member, to be validated."""
        return self.state(state, run)

    def flops(self) -> float | None:
        """Returns the FLOP of one step of all members on one device; None before the first call."""
        config = self._configs[0]
        # XLA counts the body of a loop over members once.
        members = self._per_device if mapping(config) == "map" else 1
        program_flops = self._step.flops
        return train_step.step_flops(program_flops and program_flops * members, config)

    def _place_data(self, runs: Sequence[Run]) -> tuple[dict[str, jax.Array], list[dict[str, int]]]:
        """Copies the data of the runs to the devices of their members.

        Returns:
          Arrays (devices, rows, …) by name, in which the data of a device's members follow one
          another, equal data once; and by name the row at which each run's data begin.
        """
        groups = [runs[i : i + self._per_device] for i in range(0, len(runs), self._per_device)]
        resident: dict[str, jax.Array] = {}
        offsets: list[dict[str, int]] = [{} for _ in runs]
        for name, of_run in DATA.items():
            by_device = [_distinct_data(group, name) for group in groups]
            counts = [sum(map(len, data.values())) for data in by_device]
            for i, run in enumerate(runs):
                data = by_device[i // self._per_device]
                before = list(data).index(of_run(run)[0])
                offsets[i][name] = sum(map(len, list(data.values())[:before]))
            shards = []
            for data, count, device in zip(by_device, counts, self.mesh.devices.flat, strict=True):
                arrays = list(data.values())
                # The rows that fill up a device are never read.
                whole = np.zeros((1, max(counts), *arrays[0].shape[1:]), np.uint8)
                np.concatenate(arrays, out=whole[0, :count])
                shards.append(jax.device_put(whole, device))
            shape = (self.mesh.size, *shards[0].shape[1:])
            resident[name] = jax.make_array_from_single_device_arrays(
                shape, self._member_sharding(), shards
            )
        return resident, offsets

    def _member_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(sharding.MEMBER))

    def _fill(self, values: Sequence[Any]) -> list[Any]:
        """Repeats the last member's value until every device has the same number."""
        missing = self.mesh.size * self._per_device - len(values)
        return [*values, *[values[-1]] * missing]

    def _stack(self, trees: Sequence[Any]) -> Any:
        """Stacks one tree per member to one tree of arrays with a leading axis of members."""

        def stack(*leaves: Any) -> jax.Array:
            shards = []
            for i, device in enumerate(self.mesh.devices.flat):
                local = leaves[i * self._per_device : (i + 1) * self._per_device]
                # Arrays of the host go to their device directly, not by way of the first one.
                stacked = jnp.stack(local) if isinstance(local[0], jax.Array) else np.stack(local)
                shards.append(jax.device_put(stacked, device))
            shape = (len(leaves), *shards[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, self._member_sharding(), shards)

        return jax.tree.map(stack, *self._fill(trees))


@jax.jit
def _take_row(state: Any, row: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: leaf[row], state)


def _initial_state_on(run: Run, device: Any) -> train_step.TrainState:
    """Returns a member's state before the first step, on one device."""
    mesh = sharding.ordered_mesh((1, 1), (sharding.DATA, sharding.MODEL), [device])
    key = jax.random.key(run.config.train.seed)
    return initial_state(run.config, key, mesh, run.data.images)


def _common_start(
    runs: Sequence[Run], initial_states: Sequence[Any]
) -> tuple[int, list[train_step.TrainState]]:
    """Returns the newest step of which every run has a readable checkpoint, and the states."""
    until = None
    while True:
        restored = [
            run.checkpoints.restore(state, until=until) or (0, state)
            for run, state in zip(runs, initial_states, strict=True)
        ]
        until = min(step for step, _ in restored)
        # A checkpoint that cannot be read takes its run further back than the others.
        if all(step == until for step, _ in restored):
            return until, [state for _, state in restored]


def _shift(batch: Mapping[str, np.ndarray], offsets: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Adds to indices the row at which a member's data begin on its device."""
    return {
        name: x + np.int32(offsets[source(name)]) if source(name) in offsets else x
        for name, x in batch.items()
    }


def mapping(config: Config) -> str:
    """Returns how the members of one device are computed: "unroll", "map" or "vmap".

    On a CPU, XLA's convolutions are 7 times slower in a loop and twice as slow in a batch of
    networks (benchmarks/population.py), so "auto" unrolls there. An accelerator is only filled by
    many small networks at once, so "auto" batches them there.
    """
    if config.population.mapping != "auto":
        return config.population.mapping
    return "unroll" if hardware.platform() == "cpu" else "vmap"


def traced_values(config: Config) -> dict[str, np.float32]:
    """Returns a member's hyperparameters that are not 0, as arguments of the program."""
    values = Hyperparameters.from_config(config)._asdict()
    return {name: np.float32(value) for name, value in values.items() if value}


def make_call(config: Config, mesh: Mesh, *, steps: int) -> sharding.Step:
    """Returns a call of `steps` steps of all members.

    Args:
      config: the config of one member; the others have the same `program_key`.
      mesh: a mesh with the axis "member".
      steps: the number of steps per call.

    Returns:
      (states, resident, batches, keys, values) → (states, metrics), where every array has a
      leading axis of members, those of `resident` one of devices, and `values` holds those of
      `traced_values`. The members of one device are computed one after the other, written out
      ("unroll") or in a loop ("map"), or as one batched computation ("vmap").
    """
    step = train_step.make_step(config)
    constants = Hyperparameters.from_config(config)

    def train_members(
        states: Any, resident: Any, batches: Any, keys: jax.Array, values: Any
    ) -> Any:
        shared = jax.tree.map(lambda x: x.reshape(x.shape[1:]), resident)

        def train_member(state: Any, batches: Any, key: jax.Array, values: Any) -> Any:
            # A weight of 0 stays a Python constant, and its term stays out of the program.
            member_step = functools.partial(step, hyperparameters=constants._replace(**values))
            return sharding.scan_steps(member_step, steps)(state, shared, batches, key)

        members, count = (states, batches, keys, values), len(keys)
        if mapping(config) == "vmap" and count > 1:
            return jax.vmap(train_member)(*members)
        if mapping(config) == "map" and count > 1:
            return jax.lax.map(lambda member: train_member(*member), members)
        outputs = [train_member(*jax.tree.map(lambda x, i=i: x[i], members)) for i in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    spec = PartitionSpec(sharding.MEMBER)
    return jax.shard_map(
        train_members, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False
    )
