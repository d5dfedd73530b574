"""Does a run that is killed again and again end as the undisturbed one, bit for bit?

    python benchmarks/survival.py [--runs 20] [--steps 100] [--seed 0] [--workdir NEW]

One run is left in peace. Each of the others is killed by SIGKILL one to three times, and started
again with the same command until it finishes. A third of the kills falls into a save: a moment
after the temporary directory of a checkpoint appears. The others fall at any time from 0 to the
undisturbed run's duration, uniformly: into the imports, the cache of the data, the compilation,
the steps. Every start is a process of its own, which finds compiled programs on disk.

A run is equal if its newest checkpoint holds the same step, parameters, optimiser state and
moving average, bit for bit, if the same checkpoints are kept and nothing else beside them, and if
metrics.jsonl has every step once, in order, with the same numbers (times aside). Exit code 1 if
one differs; its folder is kept then.

In the table "@" stands before the last step that was logged when the kill came; "start" means
none was since this start, "save" that a checkpoint was being written.
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
SAVES = 3  # a kill within a save falls into one of the first few since the start
PHASES: tuple[str, ...] = ("before the first checkpoint", "between", "during a save")
LIMIT = 600  # seconds after which a start counts as hanging


class Plan(NamedTuple):
    """When to kill: `seconds` after the start or, where `save` is positive, of the save-th save."""

    save: int
    seconds: float


class Attempt(NamedTuple):
    """One process, from start to end.

    Attributes:
      killed: whether it was killed, by `Plan`.
      seconds: how long it lived.
      resumed: the step from which it went on, or None if it did not come so far.
      step: the last step it logged, or None.
      saving: a checkpoint was being written when it ended.
      checkpoints: their number when it ended.
      save: the longest that a checkpoint's temporary directory was seen, in seconds.
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
    """Starts the training in `workdir` and waits for its end, or brings it about."""
    words = {**SETTINGS, "train.steps": steps, "data.cache_dir": workdir / "cache"}
    command = [
        *(sys.executable, "-m", "pae_jax.main", "train", "--config=configs/smoke.py"),
        *(f"--config.{key}={value}" for key, value in words.items()),
        f"--workdir={workdir}",
    ]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    left = temporaries(workdir)  # by kills before; this process removes them first
    seen: dict[str, float] = {}  # the temporary directories of this process's saves, since when
    killed, began, saved, save = False, time.time_ns(), None, 0.0
    output = workdir.parent / f"{workdir.name}.stderr"
    with output.open("w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | compiled, stdout=subprocess.DEVNULL, stderr=errors
        )
        start = time.monotonic()
        try:
            while process.poll() is None:
                now = time.monotonic()
                if now - start > LIMIT:
                    raise TimeoutError(f"{workdir}: no end after {LIMIT} seconds")
                there = temporaries(workdir)
                left &= there
                for name in there - left:
                    save = max(save, now - seen.setdefault(name, now))
                if plan and plan.save and saved is None and len(seen) >= plan.save:
                    saved = now
                since = saved if plan and plan.save else start
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
    written = output.read_text(errors="replace")
    bar = re.search(r"train: .*?\| (\d+)/", written)  # of the progress, as it first appears
    return Attempt(
        killed=killed,
        seconds=seconds,
        resumed=int(bar[1]) if bar else None,
        step=last_step(workdir / "metrics.jsonl", began),
        saving=bool(temporaries(workdir) - left),
        checkpoints=sum(name.isdigit() for name in listing(workdir)),
        save=save,
        code=process.returncode,
        errors=(written.replace("\r", "\n").strip().splitlines() or [""])[-1],
    )


def listing(workdir: Path) -> set[str]:
    """Names in the directory of the checkpoints."""
    try:
        return set(os.listdir(workdir / "checkpoints"))
    except FileNotFoundError:
        return set()


def temporaries(workdir: Path) -> set[str]:
    """Those of checkpoints that are being written, or that were when the run was killed."""
    return {name for name in listing(workdir) if not name.isdigit()}


def last_step(path: Path, began: int) -> int | None:
    """The step of the last whole line of training, if one was written since `began`, in ns."""
    if not path.exists() or path.stat().st_mtime_ns < began:
        return None
    *whole, _ = path.read_text().split("\n")
    steps = [json.loads(line)["step"] for line in whole if '"train/loss"' in line]
    return steps[-1] if steps else None


def plans(draw: random.Random, duration: float, save: float) -> Iterator[Plan]:
    """Endless; `save` is the longest that writing a checkpoint took, in seconds."""
    while True:
        if draw.random() < 1 / 3:
            yield Plan(draw.randint(1, SAVES), draw.uniform(0, save))
        else:
            yield Plan(0, draw.uniform(0, duration))


def killed_run(workdir: Path, steps: int, kills: int, moments: Iterator[Plan]) -> list[Attempt]:
    """Starts until the run finishes; the first `kills` are killed, but those that end before."""
    attempts: list[Attempt] = []
    while not attempts or attempts[-1].killed:
        left = kills - len(attempts)
        attempts.append(attempt(workdir, steps, next(moments) if left > 0 else None))
        if not any(start.killed for start in attempts) and attempts[-1].code == 0:
            shutil.rmtree(workdir)  # it finished before the kill came: once more
            attempts = []
    return attempts


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines
    ]


def state(workdir: Path) -> Mapping[str, np.ndarray]:
    """Every array of the newest checkpoint, by name."""
    step, tree = trained_model.restore(workdir, record.read_config(workdir))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {"data position": np.asarray(step), **arrays}


def difference(workdir: Path, other: Path) -> str | None:
    """The first thing in which two finished runs differ."""
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
    """What the others are compared with must itself be whole."""
    steps_logged = [line["step"] for line in numbers(workdir) if "train/loss" in line]
    if steps_logged != list(range(1, steps + 1)):
        raise SystemExit(f"{workdir}: metrics.jsonl has not every step once, in order")
    names = state(workdir).keys()
    for part in (".step", ".params", ".opt_state", ".ema"):
        if not any(name.startswith(part) for name in names):
            raise SystemExit(f"{workdir}: the state has no {part.removeprefix('.')}")


def cell(start: Attempt) -> str:
    where = "start" if start.step is None else f"@{start.step}"
    return f"{start.seconds:.1f} s {where}{' save' if start.saving else ''}"


def phase(start: Attempt) -> str:
    before, between, during = PHASES
    if start.saving:
        return during
    return between if start.checkpoints else before


def measure(folder: Path, runs: int, steps: int, seed: int) -> int:
    """Prints the table; returns how many runs differ."""
    print(provenance.line("jax", "orbax-checkpoint"))
    # The first one compiles, so that its duration is not the others'; it must end as the second.
    compiling, undisturbed = folder / "compiling", folder / "undisturbed"
    for workdir in (compiling, undisturbed):
        whole = attempt(workdir, steps, None)
        if whole.code:
            raise SystemExit(f"{workdir}: exit code {whole.code}: {whole.errors}")
    check_undisturbed(undisturbed, steps)
    if found := difference(compiling, undisturbed):
        raise SystemExit(f"{folder}: two undisturbed runs differ: {found}")
    print(
        f"{steps} steps, a checkpoint every {SETTINGS['train.checkpoint_every']}; seed {seed}; "
        f"undisturbed: {whole.seconds:.1f} s, its longest save {whole.save:.2f} s\n"
    )
    print("| run | killed after | resumed from | equal |\n| --- | --- | --- | --- |", flush=True)
    draw = random.Random(seed)
    moments = plans(draw, whole.seconds, whole.save)
    phases: dict[str, int] = dict.fromkeys(PHASES, 0)
    resumed, unequal = set(), []
    for number in range(1, runs + 1):
        workdir = folder / f"{number:02d}"
        attempts = killed_run(workdir, steps, draw.randint(1, 3), moments)
        *kills, last = attempts
        if last.code:
            found = f"exit code {last.code}: {last.errors}"
        else:
            found = difference(workdir, undisturbed)
        for start in kills:
            phases[phase(start)] += 1
        starts = ["–" if start.resumed is None else start.resumed for start in attempts[1:]]
        resumed |= {start.resumed for start in attempts[1:]} - {None}
        if found:
            unequal.append(workdir)
        print(
            f"| {number} | {', '.join(map(cell, kills))} | {', '.join(map(str, starts))} "
            f"| {f'NO: {found}' if found else 'yes'} |",
            flush=True,
        )
    told = ", ".join(f"{count} {name}" for name, count in phases.items())
    print(f"\n{sum(phases.values())} kills: {told}; {len(resumed)} different steps resumed from")
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
    parser.add_argument("--workdir", type=Path, help="new or empty, and kept")
    options = parser.parse_args()
    folder: Path = (options.workdir or Path(tempfile.mkdtemp(prefix="survival-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--workdir: {folder} is not empty")
    unequal = measure(folder, options.runs, options.steps, options.seed)
    if not unequal and options.workdir is None:
        shutil.rmtree(folder)
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
