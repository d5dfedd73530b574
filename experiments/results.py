"""RESULTS.md and the records it is made of, from finished runs.

    python benchmarks/results.py [--pictures | --no_pictures] [--machine TEXT] [[NAME=]WORKDIR …]

Takes up each WORKDIR that `pae train` and `pae evaluate` finished, as docs/results/NAME/record.json
(NAME is the folder's, if it is not given), then writes RESULTS.md from all records there, from
docs/results/peers.json and from docs/results/remarks.md; other *.md files in docs/results are put
at its end. Without a WORKDIR it writes RESULTS.md alone, byte for byte the same. A record of the
same name is replaced. Records hold no paths.

NAME is CATEGORY or CATEGORY--seedN for runs of the method, CATEGORY--BASELINE[--seedN] for what it
is compared with.

Pictures of the best, median and worst detections (benchmarks/results_cases.py says how they are
chosen) go to WORKDIR/eval/cases.png and stay there, since they show images of the data set. With
--pictures they are also put beside the record and shown: only where the data's licence allows it.
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
from pae_jax.devices import process
from pae_jax.workdir import files, record

ROOT = Path(__file__).parents[1]


def make_record(workdir: Path, machine: str | None = None) -> dict[str, Any]:
    """What a finished run's files say, without paths; "cases" is None.

    Args:
      workdir: of a run that was trained and evaluated.
      machine: where it was trained; by default the evaluation's accelerator, or this CPU.

    Raises:
      BadInput: one line that names the file or the command that is missing.
    """
    config = record.read_config(workdir)
    if not (workdir / "eval/metrics.json").exists():
        raise BadInput(f"{workdir}: not evaluated; run `pae evaluate --workdir={workdir}`")
    metrics = files.read_json(workdir / "eval/metrics.json")
    provenance = metrics.pop("provenance")
    steps = methods.steps(config)
    if provenance["step"] != steps:
        raise BadInput(
            f"{workdir}: evaluated at step {provenance['step']} of {steps}; finish `pae train`, "
            f"then run `pae evaluate --workdir={workdir}`"
        )
    data = record.read_data_record(workdir)
    return {
        "metrics": metrics,
        # That of the evaluation: the training's, with the overrides of the section eval.
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
    data = {key: value for key, value in config["data"].items() if key != "cache"}
    for key in ("root", "textures"):
        kind = "tfds:" if data[key].startswith("tfds:") else ""
        data[key] = kind + Path(data[key].removeprefix(kind)).name
    return {**config, "data": data}


def _minutes(path: Path, steps: int) -> float | None:
    """The steps' time, each of the log's means counted for the steps since the one before.

    Waiting for a resumption is not counted, nor is validation. None without a mean in the log.
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
    """Accelerators by the evaluation's record; of a CPU it knows no more than the architecture."""
    if device["platform"] != "cpu":
        return f"{device['count']} × {device['kind']}"
    if device["machine"] != platform.machine():
        raise BadInput(f"{workdir}: evaluated on {device['machine']}; name it with --machine")
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _named(words: Sequence[str]) -> dict[str, Path]:
    """NAME=WORKDIR, or WORKDIR by its last component."""
    found: dict[str, Path] = {}
    for word in words:
        given = re.fullmatch(r"([\w.-]+)=(.+)", word)
        workdir = Path(given[2] if given else word)
        name = given[1] if given else workdir.name or workdir.resolve().name
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise BadInput(f"{word}: {name!r} is no name for a record; NAME=WORKDIR gives another")
        if name in found:
            raise BadInput(
                f"{found[name]}, {workdir}: both would be {name}; name them NAME=WORKDIR"
            )
        found[name] = workdir
    return found


def make_page(docs: Path, new: dict[str, dict[str, Any]]) -> str:
    """RESULTS.md with the records in `docs` and the new ones."""
    old = {path.parent.name: path for path in docs.glob("*/record.json")}
    records = {name: files.read_json(path) for name, path in old.items() if name not in new}
    texts = {path.name: path.read_text() for path in sorted(docs.glob("*.md"))}
    remarks = texts.pop("remarks.md", "")
    peers = docs / "peers.json"
    references = files.read_json(peers) if peers.exists() else {}
    # As JSON gives them back, so that the page is the same when it is made again.
    records |= json.loads(files.to_json(new, sort_keys=True))
    return results_page.render(records, references, remarks, list(texts.values()))


def results(options: argparse.Namespace, root: Path = ROOT) -> list[Path]:
    """Takes up the workdirs and writes the page; returns the files written."""
    docs, workdirs = root / "docs/results", _named(options.workdirs)
    records = {name: make_record(path, options.machine) for name, path in workdirs.items()}
    pictures: dict[Path, bytes] = {}
    page = make_page(docs, records)  # refuses what does not fit together before the slow part
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
    for name, record in records.items():
        beside = docs / name / "cases.png"
        if beside not in pictures:
            beside.unlink(missing_ok=True)  # it was the replaced record's
        files.write_json(docs / name / "record.json", record)
        written.append(docs / name / "record.json")
    files.write_atomically(root / "RESULTS.md", page)
    return [*written, root / "RESULTS.md"]


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns 0; 2 on bad input, before anything is written; 1 where a file cannot be written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="*", metavar="[NAME=]WORKDIR", help="a finished run")
    drawn = parser.add_mutually_exclusive_group()
    drawn.add_argument("--pictures", action="store_true", help="put them beside the record, too")
    drawn.add_argument("--no_pictures", action="store_true", help="do not draw; needs no images")
    parser.add_argument("--machine", metavar="TEXT", help="where the runs were trained")
    options = parser.parse_args(argv)
    if options.workdirs and not options.no_pictures:
        process.use_cache()
    try:
        for path in results(options, root):
            print(path)
    except (BadInput, CannotWrite) as error:
        print(f"results.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
