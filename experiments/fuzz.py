"""Mutates images, configs and folder trees; each case must succeed or be refused in one line.

python -m experiments.fuzz --cases=20000 --seed=0 [--kinds=image,tree] [--jobs=2]
python -m experiments.fuzz --seed=0 --case=137     one case, with its traceback

A case is the functions that the verbs call before JAX compiles anything, on small files in a
temporary folder. It is a pure function of the seed and its number. Every outcome but success and
BadInput (one line) is a fault: another exception, more than 10 s, more than 2 GiB of memory above
that of the process before. The time in which a case waits for a busy CPU is not counted. Prints the
number of cases by outcome; exit code 1 with any fault.
"""

import argparse
import collections
import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SECONDS = 10.0
# A case that does not end is stopped after this time, busy machine or not.
HANG_SECONDS = 6 * SECONDS
MEMORY = 2**31
# The address space is larger than the memory in use: images that are reserved and not written.
ADDRESS_SPACE = 3 * MEMORY
OK, REFUSED = "ok", "refused"
# In memory where there is such a folder, because removing small trees from a disk is slow.
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
# Cases of one process.
BATCH = 250


def run_case(seed: int, number: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Runs one case; returns its kind, outcome, message, seconds and memory in bytes."""
    from data_pipelines.errors import BadInput
    from experiments import fuzz_cases

    kind = kinds[number % len(kinds)]
    rng = random.Random(f"{seed}/{kind}/{number}")
    top = Path(tempfile.mkdtemp(prefix="pae_fuzz_"))
    # Deep enough for values like ../.., because odd values of folders are relative to this one.
    folder = top / "a" / "b"
    folder.mkdir(parents=True)
    before, waited, began = _reset_peak(), _seconds_without_cpu(), time.monotonic()
    message = ""
    with warnings.catch_warnings(record=True) as caught, contextlib.chdir(folder):
        warnings.simplefilter("always")
        try:
            fuzz_cases.KINDS[kind](rng, folder)
            outcome = OK
        except BadInput as error:
            message = str(error)
            outcome = REFUSED if message and "\n" not in message else "BadInput of several lines"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            outcome = type(error).__name__
            message = f"{str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})"
    seconds, memory = time.monotonic() - began, _peak() - before
    starved = [x - waited.get(name, 0.0) for name, x in _seconds_without_cpu().items()]
    seconds -= max(starved, default=0.0)
    if outcome in (OK, REFUSED):
        if seconds > SECONDS:
            outcome = "slow"
        if memory > MEMORY:
            outcome = "memory"
    _remove_tree(top)
    return {
        "kind": kind,
        "number": number,
        "outcome": outcome,
        "message": message.replace(str(folder), "FOLDER"),
        "seconds": seconds,
        "memory": memory,
        "warnings": sorted({str(entry.category.__name__) for entry in caught}),
    }


def _remove_tree(folder: Path) -> None:
    def writable(function: Any, path: str, _: Any) -> None:
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IRWXU)
            function(path)

    shutil.rmtree(folder, onerror=writable)


def _reset_peak() -> int:
    """Forgets the largest memory so far; returns the present one. 0 where that is not Linux."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _seconds_without_cpu() -> dict[str, float]:
    """Returns how long each thread was ready to run and had no CPU; empty if that is not Linux."""
    seconds = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            seconds[path.parent.name] = int(path.read_text().split()[1]) / 1e9
    return seconds


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def work(seed: int, numbers: Sequence[int], kinds: Sequence[str]) -> None:
    """Runs cases and writes a line for each; a case that hangs ends the process."""
    from data_pipelines import errors
    from experiments import fuzz_cases  # noqa: F401 - before the limits

    logging.getLogger("pae_jax").addHandler(logging.NullHandler())
    logging.lastResort = None
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        print(json.dumps({"begins": number}), flush=True)
        # Not a signal, because a read that blocks in a thread would not end with it.
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        result = run_case(seed, number, kinds)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result), flush=True)
        for cached in (errors.warn, errors.inform):
            cached.cache_clear()
        if number % 20 == 0:  # mapped files of the cases before
            gc.collect()


def run_batch(command: Sequence[str], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the results of the cases; a process that dies loses one case, and another goes on.

    Args:
      command: the worker; the numbers follow as its last word.
      numbers: the cases.
    """
    left = list(numbers)
    while left:
        words = [*command, f"--worker={left[0]}:{left[-1] + 1}"]
        began, current = time.monotonic(), None
        with tempfile.TemporaryFile("w+") as stderr:
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True)
            assert process.stdout
            with process.stdout:
                for line in process.stdout:
                    result = json.loads(line)
                    if "begins" in result:
                        began, current = time.monotonic(), result["begins"]
                    else:
                        left.remove(result["number"])
                        current = None
                        yield result
            code = process.wait()
            if not left:
                return
            if current is None:
                stderr.seek(0)
                raise RuntimeError(f"the worker ended with {code}: {stderr.read()[-2000:]}")
        seconds = time.monotonic() - began
        left.remove(current)
        outcome = "hang" if seconds > SECONDS else f"the process died ({code})"
        yield {
            "kind": "?",
            "number": current,
            "outcome": outcome,
            "message": "",
            "seconds": seconds,
            "memory": 0,
            "warnings": [],
        }


def run_all(command: Sequence[str], cases: int, jobs: int) -> list[dict[str, Any]]:
    """Runs all cases in batches, `jobs` at a time."""
    batches = [range(i, min(i + BATCH, cases)) for i in range(0, cases, BATCH)]
    results: list[dict[str, Any]] = []
    errors: list[Exception] = []

    def run() -> None:
        with contextlib.suppress(IndexError):
            while not errors:
                try:
                    results.extend(run_batch(command, batches.pop(0)))
                except RuntimeError as error:
                    errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(results, key=lambda result: result["number"])


def report(results: Sequence[dict[str, Any]]) -> bool:
    """Prints the numbers by kind and outcome, and every kind of fault; returns whether none is."""
    counts = collections.Counter((result["kind"], result["outcome"]) for result in results)
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind:8}{outcome:28}{count:7d}")
    print(f"longest case {max(result['seconds'] for result in results):.1f} s, ", end="")
    print(f"most memory {max(result['memory'] for result in results) / 2**20:.0f} MiB")
    for name, count in collections.Counter(
        name for result in results for name in result["warnings"]
    ).items():
        print(f"Python warnings: {name} in {count} cases")
    faults = [result for result in results if result["outcome"] not in (OK, REFUSED)]
    seen = collections.Counter((fault["outcome"], fault["message"][-40:]) for fault in faults)
    for fault in faults:
        key = fault["outcome"], fault["message"][-40:]
        if key in seen:
            times = seen.pop(key)
            print(f"FAULT case {fault['number']} ({fault['kind']}), {times} times: ", end="")
            print(
                f"{fault['outcome']}: {fault['message']}".encode(errors="backslashreplace").decode()
            )
    return not faults


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="image,config,tree")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="run one case, with its traceback")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if args.worker:
        work(args.seed, range(*map(int, args.worker.split(":"))), kinds)
        return 0
    if args.case is not None:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        print(run_case(args.seed, args.case, kinds))
        return 0
    words = [
        sys.executable,
        "-m",
        "experiments.fuzz",
        f"--seed={args.seed}",
        f"--kinds={args.kinds}",
    ]
    began = time.monotonic()
    # A worker that is killed leaves its case's folder behind, in this one.
    with tempfile.TemporaryDirectory(prefix="pae_fuzz_", dir=PLACE) as place:
        os.environ["TMPDIR"] = place
        good = report(run_all(words, args.cases, args.jobs))
    print(f"{args.cases} cases, seed {args.seed}, {time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
