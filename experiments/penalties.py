"""Compares the members of finished sweeps of penalties: differences, correlations, iteration.

    python experiments/penalties.py [NAME=]SWEEP … --out=DIR [--no_iteration] [--batch 64]
        [--reference none] [--without VARIANT …] [--config.data.root=DIR]

Each SWEEP is the workdir of a finished `pae sweep`, for example --config=ablation:full. Several of
them may differ in their steps or in their data. A SWEEP may also be the penalties.json of an
earlier call. Its members join those of the sweeps of the same names, so that a sweep can be trained
in parts, on several machines. The command writes, and replaces,

    DIR/penalties.json       all numbers: members, differences, correlations
    DIR/penalties.md         the same as tables
    DIR/scatter.png          every diagnostic against the image AUROC of every member
    DIR/iteration_NAME.png   the image AUROC against the number of applications of f

Differences to the variant --reference are taken within each seed, whose members share held-out
images and initialisation, and are means ± standard errors over the seeds. Correlations are
Spearman's, over all members and within the seeds of a sweep, with 95 % of the draws of a bootstrap
that resamples variants. The iteration compares a test image x with fⁿ(x) and with the fixed point;
it needs the test images, and --no_iteration leaves it out. The variants named after --without are
left out, for example to see how far a correlation rests on them.
"""

import argparse
import functools
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import penalties_charts as charts
from penalties_members import (
    Member,
    Sweep,
    join,
    leave_out,
    measure_iteration,
    read_part,
    read_sweep,
)
from penalties_statistics import Correlation, Mean
from penalties_tables import correlations, differences, iteration_differences, tables

from data_pipelines.dataset import open_test
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.config import EvalConfig
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import REPORTED_SCORES
from pae_jax.devices import process
from pae_jax.workdir import files, record

# The image score of the pictures and of the correlations in penalties.md.
SCORE = "topk"
DIGITS = 6


def compare(
    sweeps: Mapping[str, Path],
    *,
    earlier: Sequence[Path] = (),
    reference: str = "none",
    without: Sequence[str] = (),
    iteration: bool = True,
    overrides: Sequence[str] = (),
    batch_size: int = 64,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Returns the content of penalties.json.

    Args:
      sweeps: the workdirs of the sweeps by name.
      earlier: files penalties.json, whose members join those of the same sweeps.
      reference: the variant that the others are compared to.
      without: the variants that are left out.
      iteration: applies f several times to the test images, too.
      overrides: where the data are now, --config.data.root=DIR.
      batch_size: see `measure_iteration`.
      say: is called with a line of progress for each member.

    Raises:
      BadInput: see `read_sweep`, `read_part` and `join`; a sweep lacks the reference, or all
        sweeps lack a variant of `without`.
    """
    parts = {name: [read_sweep(name, path)] for name, path in sweeps.items()}
    for path in earlier:
        for name, part in read_part(path).items():
            if iteration and not all(member.detection for member in part.members):
                raise BadInput(f"{path}: {name} is without the iteration; give --no_iteration")
            parts.setdefault(name, []).append(part)
    opened = {name: join(name, of_name) for name, of_name in parts.items()}
    known = {member.variant for part in opened.values() for member in part.members}
    for variant in without:
        if variant not in known:
            raise BadInput(f"--without: no member of the variant {variant!r}")
    opened = {name: leave_out(part, without) for name, part in opened.items()}
    for name, part in opened.items():
        if all(member.variant != reference for member in part.members):
            raise BadInput(
                f"{sweeps.get(name, name)}: no finished member of the variant {reference!r}; "
                "--reference names another one"
            )
    left_out = [entry for part in opened.values() for entry in part.left_out]
    for entry in left_out:
        say(str(entry))
    if iteration:
        opened = _with_iteration(opened, overrides, batch_size, say)
    members = [member for part in opened.values() for member in part.members]
    return {
        "schema": SCHEMA,
        "reference": reference,
        "origins": {name: part.origins for name, part in opened.items()},
        "left_out": [entry._asdict() for entry in left_out],
        "members": [member._asdict() for member in members],
        "differences": {
            name: differences(part.members, reference) for name, part in opened.items()
        },
        "iteration": {
            name: iteration_differences(part.members)
            for name, part in opened.items()
            if all(member.detection for member in part.members)
        },
        "correlations": {
            metric: correlations(members, metric)
            for metric in (f"image_auroc_{score}" for score in REPORTED_SCORES)
        },
    }


def _with_iteration(
    opened: Mapping[str, Sweep],
    overrides: Sequence[str],
    batch_size: int,
    say: Callable[[str], None],
) -> dict[str, Sweep]:
    """Returns the sweeps with `Member.detection`; says how far it is from the evaluations."""
    # The members of a sweep have the same test images.
    open_images = functools.cache(open_test)
    complete, departures = {}, []
    for name, part in opened.items():
        members = []
        for i, (member, workdir) in enumerate(zip(part.members, part.workdirs, strict=True)):
            if workdir is None:
                members.append(member)
                continue
            start = time.perf_counter()
            found = measure_iteration(workdir, overrides, batch_size, open_images)
            members.append(member._replace(detection=found))
            departures.append(_departure(members[-1], record.read_config(workdir).eval))
            seconds = time.perf_counter() - start
            say(f"{name} {i + 1}/{len(part.members)} {workdir.name}: {seconds:.1f} s")
        complete[name] = part._replace(members=members)
    if departures:
        say(f"one application: image AUROC within {max(departures):.2g} of the evaluations")
    return complete


def _departure(member: Member, settings: EvalConfig) -> float:
    """Returns the largest difference of an image AUROC at one application to the evaluation."""
    if settings.apply != "once" or settings.calibration != "none":
        return 0.0
    values = member.detection["1"]
    return max(
        abs(value - (member.metrics[f"image_auroc_{score}"] or 0.0))
        for score, value in values.items()
    )


def _rounded(value: Any) -> Any:
    """Returns JSON-ready values with few digits; a NamedTuple becomes an object."""
    if isinstance(value, Mean | Correlation):
        return _rounded(value._asdict())
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _json(content: Mapping[str, Any]) -> str:
    """Returns penalties.json; each member is one line, so that the file is small and readable."""
    rounded = _rounded(dict(content))
    members = ",\n".join("  " + files.to_json(member) for member in rounded.pop("members"))
    rest = files.to_json(rounded, indent=1)
    return f'{{\n"members": [\n{members}\n],{rest[1:]}\n'


def write(out: Path, content: Mapping[str, Any]) -> list[Path]:
    """Writes all files of the comparison; returns their paths."""
    members, reference = content["members"], content["reference"]
    metric = f"image_auroc_{SCORE}"
    pictures = {"scatter.png": charts.scatter(members, content["correlations"][metric], metric)}
    for name in content["iteration"]:
        of_sweep = [member for member in members if member["sweep"] == name]
        pictures[f"iteration_{name}.png"] = charts.iteration(of_sweep, SCORE, reference)
    written = {"penalties.json": _json(content), "penalties.md": tables(content, reference, metric)}
    for name, data in (pictures | written).items():
        files.write_atomically(out / name, data)
    return [out / name for name in (*pictures, *written)]


def _named(words: Sequence[str]) -> tuple[dict[str, Path], list[Path]]:
    """Returns sweeps by name, from words NAME=SWEEP or SWEEP, whose folder is the name; and files.

    A word that ends with .json is the file of an earlier call.
    """
    sweeps: dict[str, Path] = {}
    earlier: list[Path] = []
    for word in words:
        if word.endswith(".json"):
            earlier.append(Path(word))
            continue
        given = re.fullmatch(r"([\w.-]+)=(.+)", word)
        path = Path(given[2] if given else word)
        name = given[1] if given else path.resolve().name
        if name in sweeps:
            raise BadInput(f"{sweeps[name]}, {path}: both would be {name}; name them NAME=SWEEP")
        sweeps[name] = path
    return sweeps, earlier


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      0; 2 on bad input, before anything is written; 1 if a file cannot be written.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sweeps",
        nargs="+",
        metavar="[NAME=]SWEEP",
        help="a finished sweep, or an earlier penalties.json",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--reference", default="none", help="the variant to compare to")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="VARIANT", help="variants to leave out"
    )
    parser.add_argument("--no_iteration", action="store_true", help="needs no test images")
    parser.add_argument("--batch", type=int, default=64, help="images that are computed at once")
    options, overrides = parser.parse_known_args(argv)
    process.use_compilation_cache()
    try:
        if options.batch < 1:
            raise BadInput(f"--batch: at least 1, not {options.batch}")
        files.check_writable(options.out)
        sweeps, earlier = _named(options.sweeps)
        kept = options.out / "penalties.json"
        if options.without and kept.resolve() in [path.resolve() for path in earlier]:
            raise BadInput(f"{kept}: --without would drop its members; choose another --out")
        content = compare(
            sweeps,
            earlier=earlier,
            reference=options.reference,
            without=options.without,
            iteration=not options.no_iteration,
            overrides=overrides,
            batch_size=options.batch,
        )
        for path in write(options.out, content):
            print(path)
    except (BadInput, CannotWrite) as error:
        print(f"penalties.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
