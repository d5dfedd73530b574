"""The changes of a config with which a run may be resumed.

`FREE` is the one table of keys without a part in the outcome, which is the sequence of states that
are trained. The other keys must keep their values, apart from `train.steps`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from data_pipelines.errors import BadInput
from pae_jax import methods
from pae_jax.config import Config

SAME, ROUNDING, PLACE = "same bits", "other rounding", "place"

# Keys, or sections, and what a change does: the states keep their bits; or the same sums are taken
# in another order, so that their last bits may change; or the key names a place of the data, whose
# content is compared by fingerprints.
FREE = {
    "data.root": PLACE,
    "data.textures": PLACE,
    "data.cache_dir": PLACE,
    "data.foreground": PLACE,
    "data.num_threads": SAME,
    "model.remat": ROUNDING,
    "train.grad_accumulation_steps": ROUNDING,
    "train.log_every": SAME,
    "train.panel_every": SAME,
    "train.keep_checkpoints": SAME,
    "train.validation_examples": SAME,
    "train.tensorboard": SAME,
    "train.deterministic": ROUNDING,
    "sharding": ROUNDING,
    "population": ROUNDING,
    "eval": SAME,
    "foreground": SAME,
    # These set the number of steps in one compiled call, and XLA compiles a loop of several steps
    # otherwise than one step.
    "data.on_device": ROUNDING,
    "train.steps_per_call": ROUNDING,
    "train.validate_every": ROUNDING,
    "train.checkpoint_every": ROUNDING,
    "profile": ROUNDING,
}
PLACES = tuple(key for key, effect in FREE.items() if effect == PLACE)
_STEPS = "train.steps"


class Difference(NamedTuple):
    """A dotted key with the values that two records have for it."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """Returns the words of a refusal."""
        return f"{self.key} is {self.old!r} there and {self.new!r} now"


def differences(old: Any, new: Any, key: str = "") -> Iterator[Difference]:
    """Yields the dotted keys in which two nested dicts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            full_key = f"{key}.{name}" if key else name
            yield from differences(old.get(name), new.get(name), full_key)
    elif old != new:
        yield Difference(key, old, new)


def without_places(config: Config) -> dict[str, Any]:
    """Returns the config without the places of its data, which may differ between hosts."""
    values = config.to_dict()
    for key in PLACES:
        section, name = key.split(".")
        del values[section][name]
    return values


def check(workdir: object, old: Config, new: Config, step: int) -> list[str]:
    """Checks that a run can be resumed with another config.

    Args:
      workdir: for messages.
      old: the config of the run.
      new: the config with which it is to be resumed.
      step: that of the newest checkpoint.

    Returns:
      A line for each change that a user should know.

    Raises:
      BadInput: one line with every key that must not change, and with a number of steps that
        the run has passed.
    """
    steps, before = methods.steps(new), methods.steps(old)
    changed = [d for d in differences(old.to_dict(), new.to_dict()) if d.key != _STEPS]
    refused = [str(change) for change in changed if not _effect(change)]
    if steps < step:
        change = Difference(_STEPS, before, steps)
        refused.append(f"{change}, fewer than the {step} of its newest checkpoint")
    if refused:
        raise BadInput(
            f"{workdir}: holds a run of another config: {'; '.join(refused)}; choose another "
            "--workdir, or repeat the values there"
        )
    lines = [
        f"{change.key}: {change.old!r} before, {change.new!r} now"
        + (" (the last bits may differ)" if _effect(change) == ROUNDING else "")
        for change in changed
    ]
    if steps != before:
        lines.append(f"{_STEPS}: {before} before, {steps} now; {_schedule(new)}")
    return lines


def _effect(change: Difference) -> str | None:
    section = change.key.partition(".")[0]
    return FREE.get(change.key) or FREE.get(section)


def _schedule(config: Config) -> str:
    if config.optimizer.schedule == "constant":
        return "the learning rate stays constant"
    return (
        f"the {config.optimizer.schedule} schedule is computed anew for this length, so that the "
        "learning rate jumps where the run goes on"
    )


def compare_data(workdir: object, stored: Mapping[str, Any], *records: Mapping[str, Any]) -> None:
    """Checks that a run had the same data.

    Args:
      workdir: for messages.
      stored: the contents of data.json.
      *records: what it would be now, in its present form and in earlier ones; one must be equal.

    Raises:
      BadInput: none is; one line with every key that differs from the first.
    """
    if all(dict(record) != dict(stored) for record in records):
        changed = differences(dict(stored), dict(records[0]))
        raise BadInput(
            f"{workdir}: holds a run on other data: {'; '.join(map(str, changed))}; choose "
            "another --workdir, or name the data of the run by --config.data.root and "
            "--config.data.textures"
        )
