"""Tests that a run which is killed repeatedly ends as the undisturbed run, bit for bit.

    python experiments/kill_and_resume.py [--runs 20] [--steps 100] [--seed 0] [--workdir NEW]

One run is not disturbed. Each of the others is killed by SIGKILL one to three times and started
again with the same command until it finishes. A third of the kills occurs during a save, a moment
after the temporary directory of a checkpoint appears. The others occur at a time that is uniform
between 0 and the duration of the undisturbed run: during the imports, the caching of the data,
the compilation or the steps. Every start is a new process, which reads compiled programs from
disk.

A run is equal if its newest checkpoint holds the same step, parameters, optimiser state and
moving average bit for bit, if it keeps the same checkpoints and no other files beside them, and if
metrics.jsonl has every step once, in order, with the same numbers except the times. If a run
differs, the exit code is 1 and its folder is kept.

In the table, "@N" gives the last step that was logged before the kill, "start" means that none
was logged since this start, and "save" that a checkpoint was being written.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pae_jax.workdir import provenance, record, trained_model

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "data.size": 64,
    "data.texture_size": 64,
    "model.widths": "4,8",
    "model.branch_width": 4,
    "optimizer.ema_decay": 0.99,
    "train.log_every": 1,
    "train.checkpoint_every": 10,
    "train.validate_every": 50,
    "train.panel_every": 50,
    "train.validation_examples": 8,
    "train.tensorboard": False,
}
SAVES = 3  # a kill during a save occurs in one of the first three saves since the start
PHASES: tuple[str, ...] = ("before the first checkpoint", "between", "during a save")
TIMEOUT = 600  # seconds after which a start counts as hanging


class Plan(NamedTuple):
    """The time of a kill.

    Attributes:
      save: the number of the save during which to kill, from 1; 0 for a kill at any time.
      seconds: the delay since the beginning of this save, or since the start of the process.
    """

    save: int
    seconds: float


class Attempt(NamedTuple):
    """One process of a run.

    Attributes:
      killed: whether it was killed, by `Plan`.
      seconds: its duration.
      resumed: the step from which it continued, or None if it ended before.
      step: the last step that it logged, or None.
      saving: whether a checkpoint was being written when it ended.
      checkpoints: the number of checkpoints when it ended.
      save: the longest time for which a temporary directory was seen, in seconds.
      code: its exit code.
      errors: its last line on stderr.
    """

    killed: bool
    seconds: float
    resumed: int | None
    step: int | None
    saving: bool
    checkpoints: int
    save: float
    code: int
    errors: str


def attempt(workdir: Path, steps: int, plan: Plan | None) -> Attempt:
    """Starts the training in `workdir` and waits for its end, or kills it as planned."""
    settings = {**SETTINGS, "train.steps": steps, "data.cache_dir": workdir / "cache"}
    command = [
        *(sys.executable, "-m", "pae_jax.main", "train", "--config=configs/smoke.py"),
        *(f"--config.{key}={value}" for key, value in settings.items()),
        f"--workdir={workdir}",
    ]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    leftover = temporaries(workdir)  # from earlier kills; this process removes them first
    seen: dict[str, float] = {}  # when each temporary directory of this process appeared
    killed, started_ns, save_start, longest_save = False, time.time_ns(), None, 0.0
    output = workdir.parent / f"{workdir.name}.stderr"
    with output.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | compiled, stdout=subprocess.DEVNULL, stderr=errors
        )
        start = time.monotonic()
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now - start > TIMEOUT:
                    raise TimeoutError(f"{workdir}: not finished after {TIMEOUT} seconds")
                current = temporaries(workdir)
                leftover &= current
                for name in current - leftover:
                    longest_save = max(longest_save, now - seen.setdefault(name, now))
                if plan and plan.save and save_start is None and len(seen) >= plan.save:
                    save_start = now
                since = save_start if plan and plan.save else start
                if plan and since is not None and now - since >= plan.seconds:
                    process.kill()
                    killed = process.wait() == -signal.SIGKILL
                    break
                time.sleep(0.002)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    seconds = time.monotonic() - start
    stderr = output.read_text(errors="replace")
    # The progress bar first shows the step from which the run continues.
    bar = re.search(r"train: .*?\| (\d+)/", stderr)
    return Attempt(
        killed=killed,
        seconds=seconds,
        resumed=int(bar[1]) if bar else None,
        step=last_step(workdir / "metrics.jsonl", started_ns),
        saving=bool(temporaries(workdir) - leftover),
        checkpoints=sum(name.isdigit() for name in listing(workdir)),
        save=longest_save,
        code=process.returncode,
        errors=(stderr.replace("\r", "\n").strip().splitlines() or [""])[-1],
    )


def listing(workdir: Path) -> set[str]:
    """Returns the names in the directory of the checkpoints."""
    try:
        return set(os.listdir(workdir / "checkpoints"))
    except FileNotFoundError:
        return set()


def temporaries(workdir: Path) -> set[str]:
    """Returns the names of checkpoints that are or were being written when the run was killed."""
    return {name for name in listing(workdir) if not name.isdigit()}


def last_step(path: Path, since_ns: int) -> int | None:
    """Returns the last step in metrics.jsonl; None if the file is older than `since_ns`."""
    if not path.exists() or path.stat().st_mtime_ns < since_ns:
        return None
    *complete, _ = path.read_text().split("\n")
    steps = [json.loads(line)["step"] for line in complete if '"train/loss"' in line]
    return steps[-1] if steps else None


def plans(rng: random.Random, duration: float, save: float) -> Iterator[Plan]:
    """Yields random plans without end.

    Args:
      rng: the random numbers.
      duration: the duration of an undisturbed run, in seconds.
      save: the longest time that writing a checkpoint took, in seconds.
    """
    while True:
        if rng.random() < 1 / 3:
            yield Plan(rng.randint(1, SAVES), rng.uniform(0, save))
        else:
            yield Plan(0, rng.uniform(0, duration))


def killed_run(workdir: Path, steps: int, kills: int, moments: Iterator[Plan]) -> list[Attempt]:
    """Starts the run until it finishes; kills the first `kills` starts, unless they end before."""
    attempts: list[Attempt] = []
    while not attempts or attempts[-1].killed:
        remaining = kills - len(attempts)
        attempts.append(attempt(workdir, steps, next(moments) if remaining > 0 else None))
        if not any(start.killed for start in attempts) and attempts[-1].code == 0:
            # The run finished before the first kill, so it is repeated.
            shutil.rmtree(workdir)
            attempts = []
    return attempts


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines
    ]


def state(workdir: Path) -> Mapping[str, np.ndarray]:
    """Returns every array of the newest checkpoint by name."""
    step, tree = trained_model.restore(workdir, record.read_config(workdir))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {"data position": np.asarray(step), **arrays}


def difference(workdir: Path, other: Path) -> str | None:
    """Describes the first difference between two finished runs; None if they are equal."""
    if listing(workdir) != listing(other):
        return f"checkpoints/ has {sorted(listing(workdir))}, not {sorted(listing(other))}"
    ours, theirs = state(workdir), state(other)
    if ours.keys() != theirs.keys():
        return f"the state has {ours.keys() ^ theirs.keys()} on one side only"
    for name, array in ours.items():
        another = theirs[name]
        same = (array.dtype, array.shape) == (another.dtype, another.shape)
        if not same or array.tobytes() != another.tobytes():
            return f"{name} of the state differs"
    lines, others = numbers(workdir), numbers(other)
    for number, (line, another) in enumerate(zip(lines, others, strict=False), 1):
        if line != another:
            return f"metrics.jsonl, line {number}: {line}, not {another}"
    if len(lines) != len(others):
        return f"metrics.jsonl has {len(lines)} lines, not {len(others)}"
    return None


def check_undisturbed(workdir: Path, steps: int) -> None:
    """Exits if the run with which the others are compared is incomplete."""
    steps_logged = [line["step"] for line in numbers(workdir) if "train/loss" in line]
    if steps_logged != list(range(1, steps + 1)):
        raise SystemExit(f"{workdir}: metrics.jsonl does not have every step once, in order")
    names = state(workdir).keys()
    for part in (".step", ".params", ".opt_state", ".ema"):
        if not any(name.startswith(part) for name in names):
            raise SystemExit(f"{workdir}: the state has no {part.removeprefix('.')}")


def cell(start: Attempt) -> str:
    """Formats a kill for the table."""
    position = "start" if start.step is None else f"@{start.step}"
    return f"{start.seconds:.1f} s {position}{' save' if start.saving else ''}"


def phase(start: Attempt) -> str:
    """Returns in which of `PHASES` a process was killed."""
    before, between, during = PHASES
    if start.saving:
        return during
    return between if start.checkpoints else before


def measure(folder: Path, runs: int, steps: int, seed: int) -> int:
    """Runs the experiment and prints its table; returns the number of runs that differ."""
    print(provenance.line("jax", "orbax-checkpoint"))
    # The first run also compiles, so its duration is not typical. Both must end equally.
    compiling, undisturbed = folder / "compiling", folder / "undisturbed"
    for workdir in (compiling, undisturbed):
        complete = attempt(workdir, steps, None)
        if complete.code:
            raise SystemExit(f"{workdir}: exit code {complete.code}: {complete.errors}")
    check_undisturbed(undisturbed, steps)
    if text := difference(compiling, undisturbed):
        raise SystemExit(f"{folder}: two undisturbed runs differ: {text}")
    print(
        f"{steps} steps, a checkpoint every {SETTINGS['train.checkpoint_every']}; seed {seed}; "
        f"undisturbed: {complete.seconds:.1f} s, longest save {complete.save:.2f} s\n"
    )
    print("| run | killed after | resumed from | equal |\n| --- | --- | --- | --- |", flush=True)
    rng = random.Random(seed)
    moments = plans(rng, complete.seconds, complete.save)
    phases: dict[str, int] = dict.fromkeys(PHASES, 0)
    resumed, unequal = set(), []
    for number in range(1, runs + 1):
        workdir = folder / f"{number:02d}"
        attempts = killed_run(workdir, steps, rng.randint(1, 3), moments)
        *kills, last = attempts
        if last.code:
            text = f"exit code {last.code}: {last.errors}"
        else:
            text = difference(workdir, undisturbed)
        for start in kills:
            phases[phase(start)] += 1
        starts = ["–" if start.resumed is None else start.resumed for start in attempts[1:]]
        resumed |= {start.resumed for start in attempts[1:]} - {None}
        if text:
            unequal.append(workdir)
        print(
            f"| {number} | {', '.join(map(cell, kills))} | {', '.join(map(str, starts))} "
            f"| {f'NO: {text}' if text else 'yes'} |",
            flush=True,
        )
    counts = ", ".join(f"{count} {name}" for name, count in phases.items())
    print(f"\n{sum(phases.values())} kills: {counts}; {len(resumed)} different steps resumed from")
    print(f"{runs - len(unequal)} of {runs} runs equal the undisturbed one, bit for bit")
    for workdir in unequal:
        print(f"differs: {workdir}")
    return len(unequal)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="a new or empty folder, which is kept")
    options = parser.parse_args()
    folder: Path = (options.workdir or Path(tempfile.mkdtemp(prefix="kill_and_resume-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--workdir: {folder} is not empty")
    unequal = measure(folder, options.runs, options.steps, options.seed)
    if not unequal and options.workdir is None:
        shutil.rmtree(folder)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
