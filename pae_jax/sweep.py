"""`pae sweep`: trains and evaluates the members of a sweep and writes one table.

W/members/VARIANT-SEED/   the workdir of a member, as `pae train` and `pae evaluate` write it
W/sweep/results.csv       one row per member, also for one that diverged
W/sweep/results.md        one row per variant: mean ± standard deviation over the seeds
W/sweep/NAME.png          one chart per quantity
"""

import hashlib
import io
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from data_pipelines.errors import BadInput
from pae_jax import evaluate, methods, population, train
from pae_jax.config import Config
from pae_jax.config_file import load_sweep
from pae_jax.workdir import files, record
from pae_jax.workdir.paths import AnyPath, to_workdir

# Columns of the tables. Metrics and diagnostics are read from metrics.json, times from the log.
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
STEP_SECONDS = "step_seconds"
# The outcome of a member whose training has not begun.
WAITING = "waiting"
# Longer names of folders are cut, because many file systems allow 255 bytes.
MAX_NAME = 200


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
      variant: the name of the setting that is compared; its members differ in the seed.
      seed: the seed that the sweep gives to the member.
      config: the member's configuration.
    """

    variant: str
    seed: int
    config: Config


class SweepResult(NamedTuple):
    """The outcome of a sweep.

    Attributes:
      table: the path of results.md.
      outcomes: how each member ended, by the name of its folder: "finished", "diverged",
        "stopped" or "waiting".
    """

    table: AnyPath
    outcomes: dict[str, str]


def member_names(members: Sequence[Member]) -> list[str]:
    """Returns the name of each member's folder; all differ, also where letter case is ignored.

    A name is the variant's letters and digits and the seed. Where several variants have the same
    ones, the first keeps the name, and the others get a part of their variant's hash.

    Raises:
      BadInput: a variant has a seed twice.
    """
    twice = [pair for pair, n in Counter((m.variant, m.seed) for m in members).items() if n > 1]
    if twice:
        raise BadInput(f"the sweep: variant {twice[0][0]!r} has seed {twice[0][1]} twice")
    owners: dict[str, str] = {}
    names = []
    for variant, seed, _ in members:
        words = re.sub(r"[^a-z0-9]+", "_", variant.lower())
        name = f"{words}-{seed}"
        if owners.setdefault(name, variant) != variant or len(name) > MAX_NAME:
            digest = hashlib.sha256(variant.encode(errors="surrogatepass")).hexdigest()[:12]
            name = f"{words[: MAX_NAME - 50]}-{digest}-{seed}"
        names.append(name)
    return names


def sweep(
    config_file: str,
    workdir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Trains and evaluates every member that is not finished, then writes the tables.

    A sweep that was interrupted continues when it is started again: finished members are skipped,
    and an interrupted one resumes from its checkpoint. A member that diverges is a row without
    metrics, and the others go on.

    Args:
      config_file: a config file that defines a sweep, with an optional ":ARG".
      workdir: the folder of the sweep, local or gs://.
      overrides: `--config.KEY=VALUE` for all members.
      say: is called with a line of progress for each member.

    Returns:
      The path of the table, and how each member ended.

    Raises:
      BadInput: the sweep's file or the config of a member is unusable; no work has started.
    """
    members = [Member(*entry) for entry in load_sweep(config_file, overrides)]
    workdir, names = to_workdir(workdir), member_names(members)
    folders = [workdir / "members" / name for name in names]
    # All folders are checked before the first training, so that a mistake shows at once.
    for folder, member in zip(folders, members, strict=True):
        record.check_workdir(folder, member.config)
    outcomes = dict.fromkeys(names, WAITING)
    unfinished = []
    for i, member in enumerate(members):
        if _is_finished(folders[i], member):
            say(f"{i + 1}/{len(members)} {names[i]}: finished before")
            outcomes[names[i]] = train.FINISHED
        else:
            unfinished.append(i)
    for group in population.group_runs([members[i].config for i in unfinished]):
        indices = [unfinished[i] for i in group]
        for i in indices:
            say(f"{i + 1}/{len(members)} {names[i]}: training")
        results = population.train_population([(members[i].config, folders[i]) for i in indices])
        for i, result in zip(indices, results, strict=True):
            outcomes[names[i]] = result.outcome
            if result.outcome != train.FINISHED:
                say(f"{i + 1}/{len(members)} {names[i]}: {result.outcome} at step {result.step}")
        # A group is evaluated before the next one is trained, so that an interruption loses little.
        for i in indices:
            if outcomes[names[i]] == train.FINISHED:
                evaluate.evaluate(folders[i])
        # The signal that stopped one group also holds for those not yet started.
        if train.STOPPED in outcomes.values():
            break
    rows = [_row(folders[i], member, outcomes[names[i]]) for i, member in enumerate(members)]
    out = workdir / "sweep"
    files.write_csv(out / "results.csv", rows)
    files.write_atomically(out / "results.md", _markdown(rows))
    _write_charts(out, rows)
    return SweepResult(out / "results.md", outcomes)


def _is_finished(folder: AnyPath, member: Member) -> bool:
    """Returns whether the member was evaluated after its last step, with the same configuration."""
    path = folder / "eval" / "metrics.json"
    if not path.exists():
        return False
    provenance = files.read_json(path)["provenance"]
    same_config = provenance["config_hash"] == member.config.hash
    return same_config and provenance["step"] == methods.steps(member.config)


def _row(folder: AnyPath, member: Member, outcome: str) -> dict[str, Any]:
    """Returns a member's row of results.csv; without numbers if it has not finished."""
    metrics: dict[str, Any] = {"diagnostics": {}}
    lines: list[bytes] = []
    if outcome == train.FINISHED:
        metrics = files.read_json(folder / "eval" / "metrics.json")
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    times = [json.loads(line).get("speed/step_seconds") for line in lines]
    # The first interval includes the compilation.
    times = [time for time in times if time is not None][1:]
    return {
        "variant": member.variant,
        "seed": member.seed,
        **{name: metrics.get(name) for name in METRICS},
        # A method without a reconstruction has no diagnostics.
        **{name: metrics["diagnostics"].get(name) for name in DIAGNOSTICS},
        STEP_SECONDS: statistics.median(times) if times else None,
        "outcome": outcome,
    }


def _by_variant(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def _quantities(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the columns for which at least one row has a number."""
    names = (*METRICS, *DIAGNOSTICS, STEP_SECONDS)
    return [name for name in names if any(row[name] is not None for row in rows)]


def _mean_and_deviation(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Returns mean and sample standard deviation of the values that are not None.

    The deviation of a single value is 0. The result is None without any value.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the tables of results.md: metrics, then diagnostics and time."""
    groups, names = _by_variant(rows), _quantities(rows)
    counts = sorted({len(group) for group in groups.values()})
    seeds = " or ".join(map(str, counts))
    lines = ["One seed." if counts == [1] else f"Mean ± standard deviation over {seeds} seeds.", ""]
    for row in rows:
        if row["outcome"] != train.FINISHED:
            name = f"{_cell_text(row['variant'])}, seed {row['seed']}"
            lines += [f"{name}: {row['outcome']}, and left out of the numbers below.", ""]
    for table in (METRICS, (*DIAGNOSTICS, STEP_SECONDS)):
        columns = [name for name in names if name in table]
        if not columns:
            continue
        lines.append("| variant | " + " | ".join(columns) + " |")
        lines.append("| --- |" + " --- |" * len(columns))
        for variant, group in groups.items():
            cells = [_mean_and_deviation(row[name] for row in group) for name in columns]
            seeds = sum(row["outcome"] == train.FINISHED for row in group)
            texts = [_format_cell(cell, seeds) for cell in cells]
            lines.append(f"| {_cell_text(variant)} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell_text(text: str) -> str:
    """Returns text that does not end a cell or a line of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _format_cell(cell: tuple[float, float] | None, seeds: int) -> str:
    if cell is None:
        return ""
    return f"{cell[0]:.4f}" + (f" ± {cell[1]:.4f}" if seeds > 1 else "")


def _write_charts(out: AnyPath, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a chart per quantity: the values of each variant, their mean and deviation."""
    # Not pyplot, because it keeps every figure in memory and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _by_variant(rows)
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
        # The first variant stands at the top, as in the table.
        axes.invert_yaxis()
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.3)
        png = io.BytesIO()
        FigureCanvasAgg(figure).print_png(png)
        files.write_atomically(out / f"{name}.png", png.getvalue())
