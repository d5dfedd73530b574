"""The members of the sweeps that experiments/penalties.py compares, and their iteration."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.dataset import TestSplit
from data_pipelines.errors import BadInput
from pae_jax import detection, methods, metrics, sweep, train
from pae_jax.config import Config, ObjectiveConfig
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import REPORTED_SCORES
from pae_jax.workdir import files, record, suppression, trained_model

# The applications of f that the iteration compares: label → settings of the section eval.
APPLICATIONS: dict[str, dict[str, Any]] = {
    "1": {"apply": "once", "iterations": 1},
    **{str(n): {"apply": "iterate", "iterations": n} for n in (2, 4, 8)},
    "fixed point": {"apply": "fixed_point", "iterations": 1},
}


class Member(NamedTuple):
    """A trained and evaluated member of a sweep.

    Attributes:
      sweep: the name of the sweep.
      variant: the name of its setting.
      seed: its seed.
      kind: the penalty, see `penalty`.
      weight: the weight of the penalty; None for none or several.
      setting: kind and weight, the same in all sweeps; the variant where there is no one weight.
      steps: the number of updates.
      data: the name of the data set.
      metrics: image and pixel metrics; None where undefined.
      diagnostics: the properties of f as a projection; None where undefined.
      detection: image AUROC by application and score; empty without the iteration.
    """

    sweep: str
    variant: str
    seed: int
    kind: str
    weight: float | None
    setting: str
    steps: int
    data: str
    metrics: dict[str, float | None]
    diagnostics: dict[str, float | None]
    detection: dict[str, dict[str, float]]


class LeftOut(NamedTuple):
    """A member without numbers, and how its training ended or what left it out."""

    sweep: str
    variant: str
    seed: int
    outcome: str

    def __str__(self) -> str:
        return f"{self.sweep}: {self.variant}, seed {self.seed}: {self.outcome}, left out"


class Sweep(NamedTuple):
    """A finished sweep, or the parts of one.

    Attributes:
      members: those that were trained to the end.
      workdirs: the folder of each of them; None for a member of an earlier penalties.json.
      left_out: the other members.
      origins: commit, versions and device of the evaluations, one of each kind.
    """

    members: list[Member]
    workdirs: list[Path | None]
    left_out: list[LeftOut]
    origins: list[dict[str, Any]]


def penalty(objective: ObjectiveConfig) -> tuple[str, float | None]:
    """Returns kind and weight of the penalties of an objective; "none" and None without one.

    The kind of the Jacobian penalty is its directions, that of the idempotency penalty names what
    its gradient trains. Several penalties are joined by " + " and have no common weight.
    """
    jacobian = objective.jacobian
    form = " squared" if jacobian.form == "squared" else ""
    place = " at x" if jacobian.at == "clean" else ""
    weights = {
        f"{jacobian.directions}{form}{place}": jacobian.weight,
        f"idempotency {objective.idempotency.gradient}": objective.idempotency.weight,
        "identity": objective.identity.weight,
        "ssim": objective.ssim.weight,
        "noise": objective.noise,
    }
    used = {kind: weight for kind, weight in weights.items() if weight}
    return " + ".join(used) or "none", next(iter(used.values())) if len(used) == 1 else None


def read_sweep(name: str, workdir: Path) -> Sweep:
    """Reads the table of a finished sweep and the evaluations of its members.

    Raises:
      BadInput: the sweep has no table yet, or no member that was trained to the end; or an
        evaluation is missing, of an earlier step or of another version.
    """
    table = workdir / "sweep/results.csv"
    if not table.exists():
        raise BadInput(f"{table}: not found; finish `pae sweep --workdir={workdir}` first")
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    named = [sweep.Member(row["variant"], int(row["seed"]), Config()) for row in rows]
    members, workdirs, left_out, origins = [], [], [], []
    for row, folder in zip(rows, sweep.member_names(named), strict=True):
        if row["outcome"] != train.FINISHED:
            left_out.append(LeftOut(name, row["variant"], int(row["seed"]), row["outcome"]))
            continue
        path = workdir / "members" / folder
        found = _read_metrics(path)
        config = record.read_config(path)
        kind, weight = penalty(config.objective)
        members.append(
            Member(
                sweep=name,
                variant=row["variant"],
                seed=int(row["seed"]),
                kind=kind,
                weight=weight,
                setting=row["variant"] if weight is None else f"{kind} {weight:g}",
                steps=found["provenance"]["step"],
                data=_data_name(config),
                metrics={key: found.get(key) for key in sweep.METRICS},
                diagnostics=found["diagnostics"],
                detection={},
            )
        )
        workdirs.append(path)
        origins.append({key: found["provenance"][key] for key in ("commit", "versions", "device")})
    if not members:
        raise BadInput(f"{table}: no member was trained to the end")
    return Sweep(members, workdirs, left_out, _distinct(origins))


def read_part(path: Path) -> dict[str, Sweep]:
    """Reads the members of an earlier penalties.json, by the names of their sweeps.

    Raises:
      BadInput: the file is not one of this version.
    """
    content = files.read_json(path)
    try:
        if content["schema"] != SCHEMA:
            raise BadInput(f"{path}: of another version; compare its sweeps again")
        members = [Member(**entry) for entry in content["members"]]
        left_out = [LeftOut(**entry) for entry in content["left_out"]]
        parts = {}
        for name, origins in content["origins"].items():
            own = [member for member in members if member.sweep == name]
            others = [entry for entry in left_out if entry.sweep == name]
            parts[name] = Sweep(own, [None] * len(own), others, origins)
        return parts
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a penalties.json of this command ({error!r})") from None


def join(name: str, parts: Sequence[Sweep]) -> Sweep:
    """Returns one sweep of several parts of it; a member that any part has is not left out.

    Members are ordered by seed and penalty, none first, so that the order of the parts has no
    effect.

    Raises:
      BadInput: a member is in two parts.
    """
    found = [pair for part in parts for pair in zip(part.members, part.workdirs, strict=True)]
    found.sort(key=lambda pair: _order(pair[0]))
    counts = Counter((member.variant, member.seed) for member, _ in found)
    for (variant, seed), count in counts.items():
        if count > 1:
            raise BadInput(
                f"{name}: {variant}, seed {seed} is in {count} parts; leave out all but one"
            )
    return Sweep(
        [member for member, _ in found],
        [workdir for _, workdir in found],
        [e for part in parts for e in part.left_out if (e.variant, e.seed) not in counts],
        _distinct([origin for part in parts for origin in part.origins]),
    )


def leave_out(part: Sweep, variants: Sequence[str]) -> Sweep:
    """Returns the sweep with the members of these variants left out."""
    kept = [
        pair
        for pair in zip(part.members, part.workdirs, strict=True)
        if pair[0].variant not in variants
    ]
    others = [
        LeftOut(member.sweep, member.variant, member.seed, "--without")
        for member in part.members
        if member.variant in variants
    ]
    return part._replace(
        members=[member for member, _ in kept],
        workdirs=[workdir for _, workdir in kept],
        left_out=part.left_out + others,
    )


def _order(member: Member) -> tuple[Any, ...]:
    penalised = member.kind != "none"
    return member.seed, penalised, member.kind, member.weight or 0.0, member.variant


def _distinct(origins: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [origin for i, origin in enumerate(origins) if origin not in origins[:i]]


def _read_metrics(workdir: Path) -> dict[str, Any]:
    """Returns metrics.json of a member's evaluation."""
    path = workdir / "eval/metrics.json"
    found = files.read_json(path)
    if found.get("schema", 1) != SCHEMA:
        raise BadInput(f"{path}: of another version; run `pae evaluate --workdir={workdir}`")
    if found["provenance"]["step"] != methods.steps(record.read_config(workdir)):
        raise BadInput(f"{path}: of an unfinished training; run `pae sweep` again")
    if not found["diagnostics"]:
        raise BadInput(
            f"{path}: has no diagnostics; run `pae sweep` again with --config.eval.diagnostics=True"
        )
    return found


def _data_name(config: Config) -> str:
    """Returns the name of the data set, without its path."""
    data = config.data
    words = [data.source, Path(data.root).name, data.category, f"{data.height}x{data.width}"]
    return " ".join(filter(None, words))


def measure_iteration(
    workdir: Path, overrides: Sequence[str], batch_size: int, open_images: Callable[..., TestSplit]
) -> dict[str, dict[str, float]]:
    """Returns the image AUROCs of a member by application and image score.

    All members of one architecture share the compiled programs, because parameters are arguments.

    Args:
      workdir: the member's folder.
      overrides: where the data are now, --config.data.root=DIR.
      batch_size: the images that are computed at once.
      open_images: see `open_test`.
    """
    model = trained_model.load(workdir, overrides)
    config, data = model.config, model.config.data
    test = open_images(data.spec, channels=model.channels, value_range=model.value_range)
    images = suppression.suppress_all(
        test.images, model.foreground, cache_dir=data.cache_dir, part="test"
    )
    found = {}
    for label, changes in APPLICATIONS.items():
        settings = dataclasses.replace(config.eval, **changes, calibration="none")
        scores = image_scores(
            model.params, images, dataclasses.replace(config, eval=settings), batch_size
        )
        found[label] = {name: metrics.auroc(values, test.labels) for name, values in scores.items()}
    return found


def image_scores(
    params: Any, images: np.ndarray, config: Config, batch_size: int
) -> dict[str, np.ndarray]:
    """Returns the image scores (n,) by name; reconstructions and maps stay on the device."""
    config, size = detection.inference_config(config), min(batch_size, len(images))
    batches = []
    for start in range(0, len(images), size):
        # The last batch is padded with the last image, so that one compiled program serves all.
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        batches.append(detection.start_batch(params, images[rows], config).scores)
    batches = jax.device_get(batches)
    return {
        name: np.concatenate([batch[name] for batch in batches])[: len(images)]
        for name in REPORTED_SCORES
    }
