"""The tables of experiments/penalties.py: differences, iteration, rank correlations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from penalties_members import APPLICATIONS, Member
from penalties_statistics import (
    Correlation,
    Mean,
    column,
    correlate,
    mean_and_error,
    paired_difference,
)

from pae_jax import sweep
from pae_jax.detection import REPORTED_SCORES

# The diagnostics of the scatter: the properties of f, not those of the corruptions.
DIAGNOSTICS = (
    "on_manifold_bias",
    "idempotency",
    "error_outside_mask",
    "error_inside_mask",
    "contraction_1",
    "tangent_distortion",
    "corruption_suppression",
    "jacobian_identity",
    "spectral_radius",
    "fixed_point_steps",
    "fixed_point_converged",
    "fixed_point_error",
)


def differences(members: Sequence[Member], reference: str) -> dict[str, dict[str, Mean]]:
    """Returns the differences to the reference within each seed, by variant and quantity.

    Args:
      members: those of one sweep.
      reference: the variant that the others are compared to; its own entry has its means.
    """
    table = _by_variant(members)
    return {
        variant: {
            quantity: mean_and_error(list(values.values()))
            if variant == reference
            else paired_difference(values, table[reference][quantity])
            for quantity, values in quantities.items()
        }
        for variant, quantities in table.items()
    }


def iteration_differences(members: Sequence[Member]) -> dict[str, dict[str, dict[str, Mean]]]:
    """Returns image AUROCs by variant, score and application, as differences to one application.

    The entry of one application is the mean itself. The differences are taken within each member.
    """
    first, *others = APPLICATIONS
    found: dict[str, dict[str, dict[str, Mean]]] = {}
    for variant in dict.fromkeys(member.variant for member in members):
        group = [member.detection for member in members if member.variant == variant]
        found[variant] = {
            score: {
                first: mean_and_error([d[first][score] for d in group]),
                **{
                    n: mean_and_error([d[n][score] - d[first][score] for d in group])
                    for n in others
                },
            }
            for score in REPORTED_SCORES
        }
    return found


def correlations(members: Sequence[Member], metric: str) -> dict[str, dict[str, Correlation]]:
    """Returns the rank correlation of each diagnostic with a metric, over all and within seeds."""
    y = column([member.metrics[metric] for member in members])
    settings = [member.setting for member in members]
    strata = [(member.sweep, member.seed) for member in members]
    found = {}
    for name in DIAGNOSTICS:
        x = column([member.diagnostics.get(name) for member in members])
        found[name] = {
            "all": correlate(x, y, settings),
            "within": correlate(x, y, settings, strata),
        }
    return found


def _by_variant(members: Sequence[Member]) -> dict[str, dict[str, dict[int, float]]]:
    """Returns the values of each variant by quantity and seed, in the order of the members."""
    quantities = [*sweep.METRICS, *DIAGNOSTICS]
    table: dict[str, dict[str, dict[int, float]]] = {}
    for member in members:
        row = table.setdefault(member.variant, {quantity: {} for quantity in quantities})
        values = member.metrics | member.diagnostics
        for quantity in quantities:
            value = values.get(quantity)
            row[quantity][member.seed] = math.nan if value is None else value
    return table


def tables(content: Mapping[str, Any], reference: str, metric: str) -> str:
    """Returns penalties.md.

    Args:
      content: that of penalties.json.
      reference: the variant that the others are compared to.
      metric: the one of the correlations that is shown.
    """
    parts = []
    for name, found in content["differences"].items():
        steps = sorted({m["steps"] for m in content["members"] if m["sweep"] == name})
        parts.append(f"## {name}, {' or '.join(map(str, steps))} steps\n")
        parts.append(
            f"Mean of {reference}; below it the difference to {reference} within each seed, "
            "± standard error.\n"
        )
        for quantities in (sweep.METRICS, DIAGNOSTICS[:6], DIAGNOSTICS[6:]):
            shown = [q for q in quantities if found[reference][q].seeds]
            if shown:
                rows = {
                    variant: [_cell(row[q], signed=variant != reference) for q in shown]
                    for variant, row in found.items()
                }
                parts.append(_table("variant", shown, rows))
    for name, found in content["iteration"].items():
        parts.append(f"## {name}: iteration\n")
        for score in REPORTED_SCORES:
            parts.append(
                f"Image AUROC by the score {score}: with one application of f; after it the "
                "difference within each model, ± standard error over the seeds.\n"
            )
            rows = {
                variant: [_cell(cell, signed=i > 0) for i, cell in enumerate(row[score].values())]
                for variant, row in found.items()
            }
            parts.append(_table("variant", list(APPLICATIONS), rows))
    parts.append(f"## Rank correlation with {metric}\n")
    rows = {
        name: [_interval(found["all"]), _interval(found["within"])]
        for name, found in content["correlations"][metric].items()
    }
    parts.append(_table("diagnostic", ["over all models", "within sweep and seed"], rows))
    return "\n".join(parts)


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(cell: Mean, *, signed: bool) -> str:
    if not cell.seeds:
        return ""
    # An ordinary number has the sign that a reader of the tables knows.
    text = f"{cell.mean:{'+' if signed else ''}.4f}".replace("-", "−")
    return text if math.isnan(cell.error) else f"{text} ± {cell.error:.4f}"


def _interval(found: Correlation) -> str:
    if math.isnan(found.value):
        return ""
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")
