"""Writes RESULTS.md and the records it is made of, from finished runs.

    python experiments/results.py [--pictures | --no_pictures] [--machine TEXT] [[NAME=]WORKDIR …]

Each WORKDIR that `pae train` and `pae evaluate` finished becomes docs/results/NAME/record.json;
NAME is the folder's name if it is not given. RESULTS.md is then written from all records there,
from docs/results/peers.json and from docs/results/remarks.md; other *.md files in docs/results are
appended. Without a WORKDIR the command only writes RESULTS.md, byte for byte the same. A record of
the same name is replaced. Records hold no paths. A record of another schema is refused.

NAME is CATEGORY or CATEGORY--seedN for the reported recipe, and CATEGORY--BASELINE[--seedN] for
another method or an earlier recipe.

Pictures of the best, median and worst detections (experiments/results_cases.py selects them) go to
WORKDIR/eval/cases.png and stay there, because they show images of the data set. With --pictures
they are also put beside the record and shown; use it only where the data's licence allows it.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_cases
import results_page

from data_pipelines.errors import BadInput, CannotWrite
from pae_jax import methods
from pae_jax.config_schema import SCHEMA
from pae_jax.devices import process
from pae_jax.workdir import files, record

ROOT = Path(__file__).parents[1]


def make_record(workdir: Path, machine: str | None = None) -> dict[str, Any]:
    """Returns the record of a finished run, without paths; "cases" is None.

    Args:
      workdir: the workdir of a run that was trained and evaluated.
      machine: the machine it was trained on; by default the evaluation's accelerator, or this CPU.

    Raises:
      BadInput: one line that names the file or the command that is missing.
    """
    config = record.read_config(workdir)
    if not (workdir / "eval/metrics.json").exists():
        raise BadInput(f"{workdir}: not evaluated; run `pae evaluate --workdir={workdir}`")
    metrics = files.read_json(workdir / "eval/metrics.json")
    if metrics.pop("schema", 1) != SCHEMA:
        raise BadInput(
            f"{workdir}: evaluated by another version; run `pae evaluate --workdir={workdir}`"
        )
    provenance = metrics.pop("provenance")
    steps = methods.steps(config)
    if provenance["step"] != steps:
        raise BadInput(
            f"{workdir}: evaluated at step {provenance['step']} of {steps}; finish `pae train`, "
            f"then run `pae evaluate --workdir={workdir}`"
        )
    data = record.read_data_record(workdir)
    return {
        "schema": SCHEMA,
        "metrics": metrics,
        # The config of the evaluation: that of the training with overrides of the section eval.
        "config": _without_paths(provenance.pop("config")),
        "data": {
            "training_images": data["training_images"],
            "held_out_images": len(data["held_out_names"]),
            "channels": data["channels"],
            "fingerprint": data["fingerprint"],
        },
        "training": {"steps": steps, "minutes": _minutes(workdir / "metrics.jsonl", steps)},
        "machine": machine or _machine(workdir, provenance["device"]),
        **{key: value for key, value in provenance.items() if key != "step"},
        "cases": None,
    }


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose paths are cut to their last component, without the cache's."""
    data = {key: value for key, value in config["data"].items() if key != "cache_dir"}
    for key in ("root", "textures"):
        prefix = "tfds:" if data[key].startswith("tfds:") else ""
        data[key] = prefix + Path(data[key].removeprefix(prefix)).name
    return {**config, "data": data}


def _minutes(path: Path, steps: int) -> float | None:
    """Returns the minutes that the training steps took; None if the log has no mean.

    Each mean of the log counts for the steps since the one before. Validation and the time until a
    resumption are not counted.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        means = [
            (line["step"], line["speed/step_seconds"])
            for line in lines
            if "speed/step_seconds" in line
        ]
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    if not means:
        return None
    seconds, last = 0.0, 0
    for step, mean in means:
        seconds, last = seconds + (step - last) * mean, step
    seconds += (steps - last) * statistics.median(mean for _, mean in means)
    return seconds / 60


def _machine(workdir: Path, device: dict[str, Any]) -> str:
    """Returns the accelerators of the evaluation's record, or this machine's CPU.

    The record of a CPU holds only the architecture, so another architecture is refused.
    """
    if device["platform"] != "cpu":
        return f"{device['count']} × {device['kind']}"
    if device["machine"] != platform.machine():
        raise BadInput(f"{workdir}: evaluated on {device['machine']}; name it with --machine")
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _named(words: Sequence[str]) -> dict[str, Path]:
    """Returns workdirs by name, from words NAME=WORKDIR or WORKDIR, whose folder is the name."""
    workdirs: dict[str, Path] = {}
    for word in words:
        given = re.fullmatch(r"([\w.-]+)=(.+)", word)
        workdir = Path(given[2] if given else word)
        name = given[1] if given else workdir.name or workdir.resolve().name
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise BadInput(f"{word}: {name!r} is no name for a record; NAME=WORKDIR gives another")
        if name in workdirs:
            raise BadInput(
                f"{workdirs[name]}, {workdir}: both would be {name}; name them NAME=WORKDIR"
            )
        workdirs[name] = workdir
    return workdirs


def make_page(docs: Path, new: dict[str, dict[str, Any]]) -> str:
    """Returns RESULTS.md, made of the records in `docs` and the new ones."""
    old = {path.parent.name: path for path in docs.glob("*/record.json")}
    records = {name: files.read_json(path) for name, path in old.items() if name not in new}
    texts = {path.name: path.read_text() for path in sorted(docs.glob("*.md"))}
    remarks = texts.pop("remarks.md", "")
    peers = docs / "peers.json"
    references = files.read_json(peers) if peers.exists() else {}
    # Through JSON, so that the page is the same when it is made again from the files.
    records |= json.loads(files.to_json(new, sort_keys=True))
    return results_page.render(records, references, remarks, list(texts.values()))


def results(options: argparse.Namespace, root: Path = ROOT) -> list[Path]:
    """Writes the records of the workdirs and the page; returns the files written."""
    docs, workdirs = root / "docs/results", _named(options.workdirs)
    records = {name: make_record(path, options.machine) for name, path in workdirs.items()}
    pictures: dict[Path, bytes] = {}
    page = make_page(
        docs, records
    )  # refuses records that do not fit together, before the slow part
    if not options.no_pictures:
        for name, workdir in workdirs.items():
            cases = results_cases.find(workdir)
            records[name]["cases"] = {**cases.record, "picture": options.pictures}
            pictures[workdir / "eval/cases.png"] = cases.picture
            if options.pictures:
                pictures[docs / name / "cases.png"] = cases.picture
        page = make_page(docs, records)
    for path, content in pictures.items():
        files.write_atomically(path, content)
    written = list(pictures)
    for name, new in records.items():
        picture = docs / name / "cases.png"
        if picture not in pictures:
            picture.unlink(missing_ok=True)  # it belonged to the replaced record
        files.write_json(docs / name / "record.json", new)
        written.append(docs / name / "record.json")
    files.write_atomically(root / "RESULTS.md", page)
    return [*written, root / "RESULTS.md"]


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the command.

    Returns:
      0; 2 on bad input, before anything is written; 1 if a file cannot be written.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="*", metavar="[NAME=]WORKDIR", help="a finished run")
    drawing = parser.add_mutually_exclusive_group()
    drawing.add_argument("--pictures", action="store_true", help="put them beside the record, too")
    drawing.add_argument("--no_pictures", action="store_true", help="draw none; needs no images")
    parser.add_argument("--machine", metavar="TEXT", help="the machine that trained the runs")
    options = parser.parse_args(argv)
    if options.workdirs and not options.no_pictures:
        process.use_compilation_cache()
    try:
        for path in results(options, root):
            print(path)
    except (BadInput, CannotWrite) as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
