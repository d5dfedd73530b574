"""The rules of a config: types, limits and lists, and names that keys and values had before.

config.json, metrics.json and the records of results carry `SCHEMA`. A file of an older schema is
read by `upgrade`; an old key on the command line or in a config file is refused by `renamed`.
"""

import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.errors import BadInput

SCHEMA = 2

# Schema 1, which had no number: old dotted key → new dotted key.
RENAMED = {
    "objective.weight": "objective.mask_weight",
    "data.crop": "data.crop_size",
    "data.holdout": "data.holdout_fraction",
    "data.groups": "data.holdout_groups",
    "data.images": "data.max_images",
    "data.cache": "data.cache_dir",
    "data.resident": "data.on_device",
    "data.workers": "data.num_threads",
    "corruption.clean": "corruption.clean_fraction",
    "model.stem": "model.patch_size",
    "model.convolutions": "model.convs_per_stage",
    "model.rates": "model.dilation_rates",
    "model.kernel": "model.dilated_kernel_size",
    "optimizer.clip": "optimizer.clip_norm",
    "optimizer.ema": "optimizer.ema_decay",
    "optimizer.warmup": "optimizer.warmup_steps",
    "train.accumulate": "train.grad_accumulation_steps",
    "train.keep": "train.keep_checkpoints",
    "sharding.wrapper": "sharding.transform",
    "sharding.data": "sharding.data_parallel",
    "sharding.model": "sharding.model_parallel",
    "sharding.members": "population.members_per_program",
    "sharding.population": "population.mapping",
    "eval.map": "eval.anomaly_map",
    "eval.score": "eval.image_score",
    "eval.tolerance": "eval.fixed_point_tolerance",
    "eval.bootstrap": "eval.bootstrap_resamples",
    "eval.seed": "eval.bootstrap_seed",
    "eval.smoothing_share": "eval.smoothing_fraction",
    "eval.topk_share": "eval.topk_fraction",
}

# (new dotted key, old value) → new value.
RENAMED_VALUES = {
    ("corruption.placement", "structure"): "edges",
    ("corruption.kind", "structural"): "mixed",
    ("model.output", "residual"): "residual_logit",
}

_SECTIONS = sorted({key.partition(".")[0] for key in (*RENAMED, *RENAMED.values())})

# Old diagnostics and log names → new ones, in metrics.json and metrics.jsonl.
RENAMED_METRICS = {
    "preserved": "error_outside_mask",
    "corrected": "error_inside_mask",
    "tangent_defect": "tangent_distortion",
    "corruption_defect": "corruption_suppression",
    "bias": "on_manifold_bias",
    "jacobian": "jacobian_identity",
}


def renamed(key: str, value: Any = None) -> str | None:
    """Returns the present name of an old dotted key or of its old value; None if it is not old."""
    if key in RENAMED:
        return RENAMED[key]
    if (key, value) in RENAMED_VALUES:
        return repr(RENAMED_VALUES[key, value])
    if key == "eval.iterations" and value in (0, "0"):
        return "eval.apply=fixed_point"
    return None


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested config of any schema, or some of its sections, in the present schema.

    The key "schema" is left out. Values are checked by `construct`.

    Raises:
      BadInput: the file that held it is damaged.
    """
    schema = config.get("schema", 1) if isinstance(config, Mapping) else None
    if not isinstance(schema, int):
        raise BadInput(f"schema: a number, not {schema!r}; the file is damaged")
    values = copy.deepcopy(dict(config))
    values.pop("schema", None)
    if schema >= SCHEMA:
        return values
    for section in _SECTIONS:
        if not isinstance(value := values.get(section, {}), dict):
            raise BadInput(f"{section}: a section of keys, not {value!r}; the file is damaged")
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            new_section, new_name = new.split(".")
            values.setdefault(new_section, {})[new_name] = values[section].pop(name)
    for (key, old_value), new_value in RENAMED_VALUES.items():
        section, name = key.split(".")
        if values.get(section, {}).get(name) == old_value:
            values[section][name] = new_value
    data, evaluation = values.get("data", {}), values.get("eval", {})
    if "size" in data:
        # A width of 0 stood for a square.
        data["height"] = data.pop("size")
        data["width"] = data.get("width") or data["height"]
    if isinstance(iterations := evaluation.get("iterations"), int):
        # The number of applications was the only key, and 0 stood for the fixed point.
        evaluation["apply"] = {0: "fixed_point", 1: "once"}.get(iterations, "iterate")
        evaluation["iterations"] = max(iterations, 1)
    return values


def unknown_key(key: str, section: Any) -> BadInput:
    """Returns the error for a key that is not in `section`.

    The message gives the new name of a renamed key, otherwise a key with a similar name, if any.
    """
    if new := renamed(key):
        return BadInput(f"{key}: renamed; use {new}")
    name = key.rpartition(".")[2]
    similar = difflib.get_close_matches(name, section, n=1) if isinstance(section, Mapping) else []
    suggestion = f"; did you mean {key.removesuffix(name)}{similar[0]}?" if similar else ""
    return BadInput(f"{key}: no such key{suggestion}")


def field(
    default: Any,
    *,
    at_least: int | float | None = None,
    at_most: int | float | None = None,
    above: int | float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Returns a dataclass field whose limits are checked by `check_field`."""
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=limits)


def check_section(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns a section's values with the types of `cls`, a dataclass."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + str(name)
        if name not in fields:
            raise unknown_key(key, fields)
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise BadInput(f"{key}: a section of keys, not {value!r}")
            checked[name] = check_section(typing.cast(type, hint), value, key + ".")
        elif value is None:
            # `derive` may still give the key a value; `construct` refuses a key without one.
            checked[name] = None
        else:
            checked[name] = check_field(key, convert(key, hint, value), fields[name].metadata)
    return checked


def construct(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Returns an instance of `cls`, a dataclass, from values that were checked."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        key = prefix + name
        if value is None:
            raise BadInput(f"{key}: not set")
        is_section = isinstance(value, dict)
        arguments[name] = construct(hints[name], value, key + ".") if is_section else value
    return cls(**arguments)


def convert(key: str, hint: Any, value: Any) -> Any:
    """Returns `value` with the type `hint`.

    Only lossless conversions are made: an integer to a float, a list to a tuple.
    """
    if isinstance(hint, types.GenericAlias):  # tuple[int, ...]
        (item, _) = typing.get_args(hint)
        if isinstance(value, list | tuple):
            return tuple(convert(key, item, v) for v in value)
        raise BadInput(f"{key}: a tuple of {item.__name__}, not {value!r}")
    # A bool is an int in Python, so True would become 1.0 here and pass `isinstance` below.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not hint:
        raise BadInput(f"{key}: expected {hint.__name__}, got {value!r}")
    # NaN would pass every check of a limit, because comparisons with it are false.
    if hint is float and not math.isfinite(value):
        raise BadInput(f"{key}: a finite number, not {value!r}")
    return value


def check_field(key: str, value: Any, limits: Mapping[str, Any]) -> Any:
    """Returns `value` if it lies within the limits of its field."""
    if new := renamed(key, value):
        raise BadInput(f"{key}: {value!r} is an old value; use {new}")
    choices, at_least = limits.get("choices"), limits.get("at_least")
    at_most, above = limits.get("at_most"), limits.get("above")
    if choices is not None and value not in choices:
        raise BadInput(f"{key}: one of {', '.join(choices)}, not {value!r}")
    if at_least is not None and value < at_least:
        raise BadInput(f"{key}: at least {at_least}, not {value}")
    if above is not None and value <= above:
        raise BadInput(f"{key}: above {above}, not {value}")
    if at_most is not None and value > at_most:
        raise BadInput(f"{key}: at most {at_most}, not {value}")
    return value


class MapPart(NamedTuple):
    """One of the maps that make up an anomaly map.

    Attributes:
      name: a key of `anomaly_map.MAPS`, or one of `LEARNED_MAPS`.
      width: the window of its smoothing, in multiples of `eval.smoothing_fraction`.
    """

    name: str
    width: float


# Maps that compare an image with its reconstruction, and those of the second network.
COMPARISONS = ("mse", "ssim", "gms", "msgms")
LEARNED_MAPS = ("learned", "logit")


def map_parts(text: str) -> tuple[MapPart, ...]:
    """Returns the maps that `eval.anomaly_map` names, as in "ssim+ssim@2+logit".

    Raises:
      BadInput: it is not a list of names with widths.
    """
    return tuple(_map_part(part, text) for part in text.split("+"))


def _map_part(part: str, whole: str) -> MapPart:
    name, at, width = part.partition("@")
    try:
        factor = float(width) if at else 1.0
    except ValueError:
        factor = math.nan
    if name not in COMPARISONS + LEARNED_MAPS or not 0 < factor < math.inf:
        raise BadInput(
            "eval.anomaly_map: names joined by +, each with @WIDTH or without, of "
            f"{', '.join(COMPARISONS + LEARNED_MAPS)}; not {whole!r}"
        )
    return MapPart(name, factor)


def check_maps(parts: Sequence[MapPart], method: str, calibration: str) -> None:
    """Checks that a method has the maps of `eval.anomaly_map`, and that they have a common scale.

    Raises:
      BadInput: it has not, or they have not.
    """
    for part in parts:
        if part.name in LEARNED_MAPS and method != "discrepancy":
            raise BadInput(f"eval.anomaly_map: {part.name} needs method=discrepancy")
    if len(parts) > 1 and calibration == "none":
        raise BadInput(
            "eval.anomaly_map: maps of different scales can be added only with "
            "eval.calibration=auto, all or position"
        )
