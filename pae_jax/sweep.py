"""`pae sweep`: one training and evaluation for each member of a sweep, and one table.

W/members/VARIANT-SEED/   the workdir of a member, as `pae train` and `pae evaluate` leave it
W/sweep/results.csv       a row a member
W/sweep/results.md        a row a variant: mean ± standard deviation over the seeds
W/sweep/NAME.png          one picture a quantity
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pae_jax import evaluate, methods, population, train
from pae_jax.config import Config
from pae_jax.config_file import load_sweep
from pae_jax.workdir import files, record

# What the tables show of metrics.json, where it is there; the step's time comes from the log.
METRICS = (
    "image_auroc_sum",
    "image_auroc_max",
    "image_auroc_topk",
    "pixel_auroc",
    "pixel_ap",
    "pixel_aupro",
)
DIAGNOSTICS = (
    "on_manifold_bias",
    "idempotency",
    "error_outside_mask",
    "error_inside_mask",
    "contraction_1",
    "contraction_2",
    "jacobian_identity",
    "tangent_distortion",
    "corruption_suppression",
    "spectral_radius",
    "fixed_point_steps",
    "fixed_point_converged",
)


class Member(NamedTuple):
    """One run of a sweep."""

    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """A folder's name, distinct for distinct members."""
        return f"{re.sub(r'[^a-z0-9]+', '_', self.variant.lower())}-{self.seed}"


def sweep(
    config_file: str,
    workdir: str | Path,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = print,
) -> Path:
    """Trains and evaluates every member that is not finished, then writes the tables.

    Interrupted and repeated, it goes on where it was: finished members are skipped, an
    interrupted one resumes at its checkpoint.

    Returns:
      The path of results.md.

    Raises:
      BadInput: the sweep's file or a member's config is unusable, before any work starts.
      RuntimeError: a member diverged or was stopped; its name is in the message.
    """
    members = [Member(*entry) for entry in load_sweep(config_file, overrides)]
    workdir = Path(workdir)
    for member in members:
        record.check_workdir(workdir / "members" / member.name, member.config)
    folders = [workdir / "members" / member.name for member in members]
    waiting = []
    for i, member in enumerate(members):
        if _finished(folders[i], member):
            say(f"{i + 1}/{len(members)} {member.name}: finished before")
        else:
            waiting.append(i)
    for chunk in population.group_runs([members[i].config for i in waiting]):
        chosen = [waiting[i] for i in chunk]
        for i in chosen:
            say(f"{i + 1}/{len(members)} {members[i].name}: training")
        results = population.train_population([(members[i].config, folders[i]) for i in chosen])
        for i, result in zip(chosen, results, strict=True):
            if result.outcome != train.FINISHED:
                raise RuntimeError(f"{folders[i]}: {result.outcome} at step {result.step}")
        for i in chosen:
            evaluate.evaluate(folders[i])
    rows = [_row(folder, member) for folder, member in zip(folders, members, strict=True)]
    out = workdir / "sweep"
    files.write_csv(out / "results.csv", rows)
    files.write_atomically(out / "results.md", _markdown(rows))
    _plots(out, rows)
    return out / "results.md"


def _finished(folder: Path, member: Member) -> bool:
    path = folder / "eval" / "metrics.json"
    if not path.exists():
        return False
    provenance = files.read_json(path)["provenance"]
    finished = provenance["config_hash"] == member.config.hash
    return finished and provenance["step"] == methods.steps(member.config)


def _row(folder: Path, member: Member) -> dict[str, Any]:
    record = files.read_json(folder / "eval" / "metrics.json")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line).get("speed/step_seconds") for line in lines]
    # The first interval holds the compilation.
    times = [time for time in times if time is not None][1:]
    return {
        "variant": member.variant,
        "seed": member.seed,
        **{name: record[name] for name in METRICS},
        **{name: record["diagnostics"].get(name) for name in DIAGNOSTICS},
        "step_seconds": statistics.median(times) if times else None,
    }


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def _quantities(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns that some row has a number for."""
    names = (*METRICS, *DIAGNOSTICS, "step_seconds")
    return [name for name in names if any(row[name] is not None for row in rows)]


def _mean_and_deviation(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and sample standard deviation; the latter 0 for one value; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    groups, names = _groups(rows), _quantities(rows)
    counts = sorted({len(group) for group in groups.values()})
    seeds = " or ".join(map(str, counts))
    lines = ["One seed." if counts == [1] else f"Mean ± standard deviation over {seeds} seeds.", ""]
    for part in (METRICS, (*DIAGNOSTICS, "step_seconds")):
        columns = [name for name in names if name in part]
        if not columns:
            continue
        lines.append("| variant | " + " | ".join(columns) + " |")
        lines.append("| --- |" + " --- |" * len(columns))
        for variant, group in groups.items():
            cells = [_mean_and_deviation(row[name] for row in group) for name in columns]
            texts = [_text(cell, len(group)) for cell in cells]
            lines.append(f"| {variant} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def _text(cell: tuple[float, float] | None, seeds: int) -> str:
    if cell is None:
        return ""
    return f"{cell[0]:.4f}" + (f" ± {cell[1]:.4f}" if seeds > 1 else "")


def _plots(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _groups(rows)
    for name in _quantities(rows):
        figure = Figure(figsize=(7, 0.4 * len(groups) + 1.2), layout="constrained")
        axes = figure.subplots()
        for i, group in enumerate(groups.values()):
            values = [row[name] for row in group if row[name] is not None]
            axes.plot(values, [i] * len(values), "o", color="tab:blue", alpha=0.6)
            cell = _mean_and_deviation(values)
            if cell is not None:
                axes.errorbar(cell[0], i, xerr=cell[1], fmt="|", color="black", capsize=4)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.3)
        picture = io.BytesIO()
        FigureCanvasAgg(figure).print_png(picture)
        files.write_atomically(out / f"{name}.png", picture.getvalue())
