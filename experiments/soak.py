"""Trains, evaluates and predicts in turn in one process: memory, open files and threads stay flat.

    python -m experiments.soak --minutes=60 [--out=FOLDER]

A round is a training with another seed in a new workdir, its evaluation with maps, and the
prediction of a folder; the workdir is removed. After each round and a collection of garbage
FOLDER/soak.csv gets a line: round, seconds, resident memory in MiB, open files, threads, and the
MiB that TensorStore has lost. At the end FOLDER/soak.png shows the curves, and a table gives first,
median, last and growth.

TensorStore up to 0.1.86 at least never frees the parts of the JSON that it hands to Python. Orbax
asks for such JSON several times in each save and restore, about 0.2 MiB a round here. The soak
counts it, and judges the memory without it.

Growth is that of a straight line through the second half of the rounds. The exit code is 1 if
memory grows there by more than 2 % of its median, or if open files or threads grow by one or more.
Linux only, because the numbers are those of /proc.
"""

import argparse
import contextlib
import csv
import gc
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import small_runs

# The growth of memory over the second half that is allowed, as a fraction of the median.
MEMORY_BOUND = 0.02
# The growth of the number of open files or of threads that is a leak.
COUNT_BOUND = 1.0
# A line through fewer points says little.
MIN_ROUNDS = 6


class Round(NamedTuple):
    """One round, and the state of the process after it."""

    number: int
    seconds: float
    memory: float  # MiB
    files: int
    threads: int
    lost: float = 0.0  # MiB of the memory that TensorStore never frees


class Growth(NamedTuple):
    """The course of one quantity: over all rounds, and its growth over the second half."""

    name: str
    first: float
    median: float
    last: float
    per_round: float
    growth: float
    bound: float


def run_round(number: int, images: Path, workdir: Path) -> Round:
    """Trains, evaluates and predicts once in a new workdir, which is removed."""
    from pae_jax import config_file, evaluate, predict, train

    began = time.monotonic()
    config = config_file.load("default", small_runs.overrides(images, train__seed=number))
    result = train.train_and_evaluate(config, workdir)
    if result.outcome != train.FINISHED:
        raise RuntimeError(f"round {number}: {result.outcome} at step {result.step}")
    evaluate.evaluate(workdir, save_maps=True)
    predict.predict(workdir, images / "data/test", workdir / "out")
    shutil.rmtree(workdir)
    return state(number, time.monotonic() - began)


def state(number: int, seconds: float) -> Round:
    """Returns the numbers of this process after a collection of garbage."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    (memory,) = (line.split()[1] for line in lines if line.startswith("VmRSS"))
    # Listing the folder opens it.
    files = len(os.listdir("/proc/self/fd")) - 1
    return Round(number, seconds, int(memory) / 1024, files, len(os.listdir("/proc/self/task")))


class LostJson:
    """The memory of the JSON that TensorStore never frees.

    Attributes:
      size: bytes, from the call of `start` on.
    """

    def __init__(self) -> None:
        self.size = 0

    def start(self) -> None:
        """Counts what is lost of the results of the functions that Orbax calls."""
        import tensorstore

        spec, name = tensorstore.KvStore.Spec, "experimental_collect_matching_metrics"
        spec.to_json = self._counted(spec.to_json)
        setattr(tensorstore, name, self._counted(getattr(tensorstore, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.size += lost_bytes(result)
            return result

        return counted


def lost_bytes(value: Any, is_lost: bool = False) -> int:
    """Returns the bytes of the parts of a new JSON value that nothing will free.

    There is one reference too many to these parts, or to one that holds them.

    Python's allocator rounds up to 16 bytes. Small numbers and single characters are shared by all
    values, so they take no memory.
    """
    parts = list(value) if isinstance(value, list | dict) else []
    if isinstance(value, dict):
        parts += value.values()
    size = 0
    for part in parts:
        # The references of the value, of the list of parts, of the variable and of the argument.
        part_is_lost = is_lost or sys.getrefcount(part) > 4
        is_shared = isinstance(part, bool | None) or (
            part < 257 if isinstance(part, int) else isinstance(part, str) and len(part) < 2
        )
        if part_is_lost and not is_shared:
            size += -(-sys.getsizeof(part) // 16) * 16
        size += lost_bytes(part, part_is_lost)
    return size


def growths(rounds: Sequence[Round]) -> list[Growth]:
    """Returns the growth of memory, open files and threads.

    Args:
      rounds: at least two.
    """
    numbers = np.arange(len(rounds) - len(rounds) // 2, len(rounds))

    def growth(name: str, values: Sequence[float], bound: float) -> Growth:
        half = values[len(values) - len(values) // 2 :]
        slope = float(np.polyfit(numbers, half, 1)[0]) if len(half) > 1 else 0.0
        median = statistics.median(values)
        return Growth(name, values[0], median, values[-1], slope, slope * (len(half) - 1), bound)

    memory = [entry.memory - entry.lost for entry in rounds]
    return [
        growth("memory (MiB)", memory, MEMORY_BOUND * statistics.median(memory)),
        growth("lost by TensorStore (MiB)", [entry.lost for entry in rounds], math.inf),
        growth("open files", [entry.files for entry in rounds], COUNT_BOUND),
        growth("threads", [entry.threads for entry in rounds], COUNT_BOUND),
    ]


def is_flat(growth: Growth) -> bool:
    """Returns whether the growth over the second half is within its bound."""
    # A line through the half grows by a little less than one if the count grows by one.
    return growth.growth < growth.bound * 0.999


def table(values: Sequence[Growth]) -> str:
    """Returns a Markdown table of the growths."""
    lines = [
        "| | first | median | last | per round | second half | bound | flat |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for value in values:
        name, first, median, last, per_round, growth, bound = value
        lines.append(
            f"| {name} | {first:.1f} | {median:.1f} | {last:.1f} | {per_round:+.4f} "
            f"| {growth:+.2f} | {bound:.2f} | {'yes' if is_flat(value) else 'NO'} |"
        )
    return "\n".join(lines)


def draw(rounds: Sequence[Round], path: Path) -> None:
    """Writes the curves of memory, open files and threads as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    names = ("resident memory (MiB)", "open files", "threads", "lost (MiB)")
    columns = zip(*(entry[2:] for entry in rounds), strict=True)
    for axes, name, values in zip(
        figure.subplots(len(names), sharex=True), names, columns, strict=True
    ):
        axes.plot([entry.number for entry in rounds], values, linewidth=1)
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.1 * max(1, *values))
        axes.grid(alpha=0.3)
    axes.set_xlabel("round of training, evaluating and predicting")
    FigureCanvasAgg(figure).print_png(str(path))


def soak(minutes: float, out: Path, place: Path) -> list[Round]:
    """Runs rounds for some minutes, at least `MIN_ROUNDS`, and writes a line of CSV after each."""
    from pae_jax.devices import process

    process.use_compilation_cache()
    small_runs.make_images(place / "images")
    lost = LostJson()
    lost.start()
    end, rounds = time.monotonic() + 60 * minutes, []
    with (out / "soak.csv").open("w", newline="") as file, (out / "soak.err").open("w") as bars:
        writer = csv.writer(file)
        writer.writerow(Round._fields)
        while time.monotonic() < end or len(rounds) < MIN_ROUNDS:
            # The progress bars of all rounds are of no interest.
            with contextlib.redirect_stderr(bars):
                done = run_round(len(rounds), place / "images", place / "run")
            rounds.append(done._replace(lost=lost.size / 2**20))
            number, seconds, memory, files, threads, size = rounds[-1]
            writer.writerow(
                [number, f"{seconds:.2f}", f"{memory:.2f}", files, threads, f"{size:.3f}"]
            )
            file.flush()
    return rounds


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="a folder for the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pae_soak_") as place:
        os.environ["PAE_CACHE"] = f"{place}/cache"
        rounds = soak(options.minutes, options.out, Path(place))
    values = growths(rounds)
    draw(rounds, options.out / "soak.png")
    seconds = sum(entry.seconds for entry in rounds)
    print(f"{len(rounds)} rounds, {seconds / 60:.1f} minutes\n{table(values)}")
    return 0 if all(map(is_flat, values)) else 1


if __name__ == "__main__":
    sys.exit(main())
