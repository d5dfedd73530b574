"""The number of the config's schema, and the names that keys and values had before.

config.json, metrics.json and the records of results carry `SCHEMA`. A file of an older schema is
read by `upgrade`; an old key on the command line or in a config file is refused by `renamed`.
"""

import copy
import difflib
from collections.abc import Mapping
from typing import Any

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

    The key "schema" is left out.
    """
    schema = config.get("schema", 1) if isinstance(config, Mapping) else None
    if not isinstance(schema, int):
        raise BadInput(f"schema: a number, not {schema!r}; the file is damaged")
    values = copy.deepcopy(dict(config))
    values.pop("schema", None)
    if schema >= SCHEMA:
        return values
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
    if "iterations" in evaluation:
        # The number of applications was the only key, and 0 stood for the fixed point.
        iterations = evaluation["iterations"]
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
