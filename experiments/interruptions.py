"""Kills each verb that writes files at random moments; the repetition must end as without.

    python -m experiments.interruptions [--moments=40] [--seed=0] [--verbs=train,evaluate]

Each verb runs once undisturbed. For each moment it starts in a new process on a fresh copy and is
ended by SIGKILL. Half of the moments are uniform in the duration of the undisturbed run. The other
half follow the k-th change of a file by up to 20 ms, because most of so short a run is imports.

Then every file must be whole: JSON, CSV and archives complete, programs, pictures and HTML readable
to their end, every listed checkpoint restorable, except an old one that was being removed. What had
not yet been renamed may remain, is counted as a leftover, and is recognised by its name only: a dot
at the beginning, or Orbax's mark.

The same command is then repeated to its end, also where a verb never overwrites results. Its files
must be those of the undisturbed run: the same names, the state of the training bit for bit, all
other content but times. Leftovers of the kill need not be gone. Exit code 1 if a file is
half-written, or the repetition differs or fails. Do not commit or edit the checkout meanwhile,
because results name the commit.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import jax.export
import numpy as np
from PIL import Image

from experiments import kill_and_resume, small_runs
from pae_jax.workdir import record, trained_model

# How long after a change of a file a kill follows at most, in seconds.
DELAY = 0.02
TIMEOUT = 600
# Hidden files that are not temporary.
LOCKS = (".lock", ".owner")
# The columns and pictures of durations.
TIMES = "step_seconds"


class Kill(NamedTuple):
    """The moment of a kill: seconds after the k-th change of a file; k = 0 is the start."""

    change: int
    seconds: float


class Undisturbed(NamedTuple):
    """A complete run: its folder, duration, and the number of changes of its files."""

    folder: Path
    seconds: float
    changes: int


class Result(NamedTuple):
    """The files that stood after a kill, and the outcome of the repetition."""

    kill: Kill
    killed: bool
    whole: int
    leftovers: int
    broken: list[str]
    difference: str | None


def is_leftover(path: Path) -> bool:
    """Returns whether a file, or a folder above it, has a temporary name."""
    return any(
        (part.startswith(".") and part not in LOCKS) or "orbax-checkpoint-tmp" in part
        for part in path.parts
    )


def files(folder: Path) -> list[Path]:
    """Returns the paths of all files below a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


# ---- are the files whole ----


class _Closing(HTMLParser):
    ended = False

    def handle_endtag(self, tag: str) -> None:
        self.ended = tag == "html"


def fault(path: Path) -> str | None:
    """Returns what is wrong with a file that should be whole, or None."""
    if (check := _CHECKS.get(path.suffix)) is None:
        return None
    try:
        return check(path, path.read_bytes())
    except Exception as error:  # the readers raise many types
        return f"{type(error).__name__}: {error}"[:200]


def _check_json(path: Path, data: bytes) -> None:
    json.loads(data)


def _check_lines(path: Path, data: bytes) -> None:
    # A log that grows: each line that has ended is complete.
    for line in data.split(b"\n")[:-1]:
        json.loads(line)


def _check_table(path: Path, data: bytes) -> str | None:
    if (path.parent / ".unfinished").exists():
        # A table that grows: each line that has ended is complete.
        data = data[: data.rfind(b"\n") + 1]
    if not data.endswith(b"\n"):
        return "its last line has no end"
    lengths = {len(row) for row in csv.reader(io.StringIO(data.decode()))}
    return "its rows have several lengths" if len(lengths) != 1 else None


def _check_picture(path: Path, data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def _check_page(path: Path, data: bytes) -> str | None:
    parser = _Closing()
    parser.feed(data.decode())
    return None if parser.ended else "it has no end"


def _check_text(path: Path, data: bytes) -> str | None:
    return None if data else "it is empty"


def _check_arrays(path: Path, data: bytes) -> None:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if path.suffix == ".npz":
        dict(loaded)  # reads every array and its checksum


def _check_program(path: Path, data: bytes) -> None:
    jax.export.deserialize(bytearray(data))


_CHECKS: dict[str, Callable[[Path, bytes], str | None]] = {
    ".json": _check_json,
    ".jsonl": _check_lines,
    ".csv": _check_table,
    ".png": _check_picture,
    ".tiff": _check_picture,
    ".html": _check_page,
    ".md": _check_text,
    ".npy": _check_arrays,
    ".npz": _check_arrays,
    ".stablehlo": _check_program,
}


def broken(folder: Path) -> list[str]:
    """Returns a line for each file and each checkpoint that is not whole."""
    lines = []
    for path in files(folder):
        # The parts of a checkpoint are read by restoring it.
        if not is_leftover(path) and "checkpoints" not in path.parts:
            reason = fault(folder / path)
            lines += [f"{path}: {reason}"] if reason else []
    for checkpoints in folder.rglob("checkpoints"):
        lines += broken_checkpoints(checkpoints)
    return lines


def broken_checkpoints(folder: Path) -> list[str]:
    """Returns a line for each checkpoint that cannot be restored and is not being removed."""
    lines, whole = [], 0
    config = record.read_config(folder.parent)
    for step in sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())[::-1]:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                # An unreadable one is passed over, and the one before it is restored.
                restored, _ = trained_model.restore(folder.parent, config, until=step)
            reason = None if restored == step else "unreadable"
        except Exception as error:  # Orbax raises many types
            reason = str(error)[:300]
        whole += reason is None
        # A part of an old checkpoint that is being removed may remain.
        if reason and whole < config.train.keep_checkpoints:
            lines.append(f"{folder}/{step}: {reason}")
    return lines


# ---- are the results equal ----


def without_times(path: Path) -> Any:
    """Returns the content of a file without durations."""
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        return kill_and_resume.numbers(path.parent)
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(data.decode()))
        return [{key: value for key, value in row.items() if key != TIMES} for row in rows]
    if path.suffix == ".md":
        # The durations are the last column of the last table.
        before, _, after = data.decode().partition(TIMES)
        return before, re.sub(r"[^|\n]*\|$", "", after, flags=re.MULTILINE)
    return data


def same(path: Path, folder: Path, other: Path) -> bool:
    """Returns whether the file of this relative path is equal in two folders, but for times."""
    return path.stem == TIMES or without_times(folder / path) == without_times(other / path)


def difference(folder: Path, other: Path) -> str | None:
    """Describes the first difference between the results in two folders; None if they are equal."""

    def results(folder: Path) -> list[Path]:
        # Names of TensorBoard's files hold a time; a run that resumes begins another one. A lock
        # may stay where the disk did not let it be removed, and does not lock.
        return [
            path
            for path in files(folder)
            if not is_leftover(path)
            and path.name not in LOCKS
            and not {"checkpoints", "tensorboard"} & {*path.parts}
        ]

    ours, theirs = results(folder), results(other)
    if ours != theirs:
        return f"files on one side only: {', '.join(map(str, sorted({*ours} ^ {*theirs})))}"
    for path in ours:
        if not same(path, folder, other):
            return f"{path} differs"
    for checkpoints in sorted(folder.rglob("checkpoints")):
        workdir = checkpoints.parent
        text = kill_and_resume.difference(workdir, other / workdir.relative_to(folder))
        if text:
            return text
    return None


# ---- runs ----


class Runner:
    """Starts `pae` on copies of one folder, always at the same path.

    Attributes:
      folder: the place of everything.
      workdir: the place of the workdir of every start.
    """

    def __init__(self, folder: Path):
        self.folder, self.workdir = folder, folder / "run"
        self.images = folder / "images"
        small_runs.make_images(self.images)

    def start(self, verb: str, kill: Kill | None = None) -> tuple[int, float, int, str]:
        """Runs a verb; returns its exit code, its duration, the changes of files, its stderr."""
        settings = small_runs.VERBS[verb]
        cache = (self.workdir if settings.clears else self.folder) / "cache"
        errors = self.folder / "stderr"
        with errors.open("w") as stderr:
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "pae_jax.main", *settings.words(self.images, self.workdir)],
                cwd=small_runs.ROOT,
                env=small_runs.environment(cache),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            try:
                changes = self._watch(process, began, kill)
            finally:
                process.kill()
                process.wait()
        seconds = time.monotonic() - began
        return process.returncode, seconds, changes, errors.read_text(errors="replace")

    def _watch(self, process: subprocess.Popen, began: float, kill: Kill | None) -> int:
        """Waits for the end of a process, or for the moment to kill it; returns the changes."""
        known, changes, since = self._snapshot(), 0, began
        while process.poll() is None:
            now = time.monotonic()
            if now - began > TIMEOUT:
                raise TimeoutError(f"{process.args}: not finished after {TIMEOUT} seconds")
            if kill and changes >= kill.change and now - since >= kill.seconds:
                break
            current = self._snapshot()
            if current != known:
                known, changes = current, changes + 1
                if kill and changes == kill.change:
                    since = time.monotonic()
            time.sleep(0.001)
        return changes

    def _snapshot(self) -> set[tuple[str, int]]:
        entries = set()
        for parent, folders, names in os.walk(self.workdir):
            for name in (*folders, *names):
                path = os.path.join(parent, name)
                with contextlib.suppress(OSError):  # renamed or removed just now
                    entries.add((path, os.lstat(path).st_mtime_ns))
        return entries

    def prepare(self, verb: str, source: Path | None) -> None:
        """Puts a copy of `source`, or nothing, at the place of the workdir of a verb."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        if source:
            shutil.copytree(source, self.workdir)
        if write := small_runs.VERBS[verb].prepare:
            write(self.workdir)

    def undisturbed(self, verb: str, source: Path | None) -> Undisturbed:
        """Runs a verb to its end and keeps its files."""
        for _ in range(2):  # the first one compiles
            self.prepare(verb, source)
            code, seconds, changes, errors = self.start(verb)
            if code:
                raise SystemExit(f"{verb}: exit code {code}: {errors}")
        kept = self.folder / "undisturbed" / verb  # a verb may be named like a folder here
        shutil.copytree(self.workdir, kept)
        return Undisturbed(kept, seconds, changes)


def kills(rng: random.Random, seconds: float, changes: int) -> Iterator[Kill]:
    """Yields moments without end: at a random time, and after a random change, in turn."""
    while True:
        yield Kill(0, rng.uniform(0, seconds))
        yield Kill(rng.randint(1, changes), rng.uniform(0, DELAY))


def interrupt(runner: Runner, verb: str, source: Path | None, complete: Path, kill: Kill) -> Result:
    """Kills a verb once, looks at what stands, and repeats it."""
    runner.prepare(verb, source)
    code, *_ = runner.start(verb, kill)
    stood = files(runner.workdir)
    leftovers = [path for path in stood if is_leftover(path)]
    lines = broken(runner.workdir)
    unequal = difference(runner.workdir, complete)
    # Results that were complete before the kill are rightly refused by a verb that renews none.
    if unequal or small_runs.VERBS[verb].renews:
        again, _, _, errors = runner.start(verb)
        text = (errors.strip().splitlines() or [""])[-1]
        unequal = difference(runner.workdir, complete)
        unequal = f"the repetition ended with {again}: {text}" if again else unequal
    whole = len(stood) - len(leftovers)
    return Result(kill, code == -9, whole, len(leftovers), lines, unequal)


def source(complete: Mapping[str, Undisturbed], verb: str) -> Path | None:
    """Returns the folder of the run that a verb needs, or None."""
    before = small_runs.VERBS[verb].before
    return complete[before].folder if before else None


def measure(folder: Path, verbs: list[str], moments: int, seed: int) -> bool:
    """Runs the experiment and prints its table; returns whether all was whole and equal."""
    runner, faults = Runner(folder), []
    complete: dict[str, Undisturbed] = {}
    print("| verb | duration | changes | kills | files that stood | leftovers | broken | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for number, verb in enumerate(verbs):
        for name in (*small_runs.chain(verb), verb):
            if name not in complete:
                complete[name] = runner.undisturbed(name, source(complete, name))
        folder, seconds, changes = complete[verb]
        rng = random.Random(f"{seed}/{verb}")
        moments_of_verb = kills(rng, seconds, changes)
        count = moments // len(verbs) + (number < moments % len(verbs))
        results: list[Result] = []
        for _ in range(count):
            kill = next(moments_of_verb)
            result = interrupt(runner, verb, source(complete, verb), folder, kill)
            results.append(result)
            reasons = [*result.broken, *([result.difference] if result.difference else [])]
            faults += [f"{verb}, killed {describe(kill)}: {reason}" for reason in reasons]
        stood = sorted(result.whole for result in results)
        print(
            f"| {verb} | {seconds:.1f} s | {changes} | {sum(r.killed for r in results)} of {count} "
            f"| {stood[0]} to {stood[-1]} of {len(files(folder))} "
            f"| {sum(r.leftovers for r in results)} | {sum(bool(r.broken) for r in results)} "
            f"| {sum(r.difference is None for r in results)} of {count} |",
            flush=True,
        )
    for line in faults:
        print(line)
    return not faults


def describe(kill: Kill) -> str:
    """Returns a moment in words."""
    where = f"after change {kill.change}" if kill.change else "after the start"
    return f"{kill.seconds:.3f} s {where}"


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    # Without what stood before, "train" begins anew.
    verbs = [verb for verb in small_runs.VERBS if verb != "train anew"]
    parser.add_argument("--verbs", default=",".join(verbs))
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pae_interruptions_") as folder:
        good = measure(Path(folder), options.verbs.split(","), options.moments, options.seed)
    print(f"{options.moments} moments, seed {options.seed}, {time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
