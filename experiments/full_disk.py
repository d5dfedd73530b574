r"""Refuses every file that a verb writes, one by one, as a full or read-only disk does.

    python -m experiments.full_disk [--verbs=train,evaluate,…] [--modes=space,…]

Each verb first runs undisturbed while an audit hook of Python lists every path that is opened for
writing, made, renamed or removed below its folders. Digits in names are left out, so that
step_4.png and step_8.png count as one. Then each path fails once in each mode:

    space       to open, make or rename it raises ENOSPC
    read-only   the same with EROFS, and to remove it
    full        from its opening on no file of the process can grow (RLIMIT_FSIZE), TensorStore's,
                which Python does not see, included

A case must end in one of two ways. Refused: exit code 1 or 2, and one line on stderr that names the
path, a file beside it or a folder above it, and the reason; no traceback. The same command without
the failure then ends as the undisturbed run. Or it went on: exit code 0, at most one line, and
equal results, as where a cache cannot be written. In both cases what stood before is whole.

A worker runs the cases of a verb in one process; a case that hangs ends it and is a fault. The exit
code is 1 with any fault.
"""

import argparse
import contextlib
import errno
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from experiments import interruptions, small_runs
from pae_jax.workdir import eval_folder

MODES = {"space": errno.ENOSPC, "read-only": errno.EROFS, "full": errno.EFBIG}
REFUSED, WENT_ON = "refused", "went on"
# Before the key of a path that is removed. A full disk allows that.
REMOVAL = "removal of "
TIMEOUT = 300
# Lines that a run writes in any case: progress bars.
_BAR = re.compile(r"^[a-z]+: +\d+%|^\s*$")


# ---- the disk ----


class _Disk:
    """The state of the audit hook, which lists the paths below a folder and refuses one."""

    folder: Path | None = None
    seen: dict[str, None]
    refused: str | None = None
    mode = "space"
    # The whole path that was refused, which the message has to name.
    path = ""


_disk = _Disk()


def key(path: Path) -> str:
    """Returns a path without numbers and random parts, so that it is that of another run too."""
    text = re.sub(r"[0-9a-f]{32}|tmp[a-z0-9_]{8}\b", "*", str(path))
    return re.sub(r"\d+", "#", text)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _disk.folder is None or (full := _written(event, arguments)) is None:
        return
    name = key(Path(full).relative_to(_disk.folder))
    if event == "os.remove":
        name = REMOVAL + name
    _disk.seen[name] = None
    if name != _disk.refused:
        return
    _disk.path = full
    if _disk.mode == "full":
        _limit_files(0)
    else:
        number = MODES[_disk.mode]
        raise OSError(number, os.strerror(number), full)


def _written(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Returns the path below the folder that an event of Python writes or removes, or None."""
    if event not in ("open", "os.mkdir", "os.rename", "os.remove"):
        return None
    path = arguments[0] if event != "os.rename" else arguments[1]
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    full = os.path.abspath(os.fsdecode(path))
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & writes):
        return None
    # A real disk answers first that a folder is there, or that there is nothing to remove.
    if event in ("os.mkdir", "os.remove") and os.path.lexists(full) != (event == "os.remove"):
        return None
    return full if full.startswith(f"{_disk.folder}{os.sep}") else None


def _limit_files(size: int) -> None:
    # Python ignores the signal, so that a write fails with EFBIG.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@contextlib.contextmanager
def disk(folder: Path, refused: str | None = None, mode: str = "space") -> Iterator[_Disk]:
    """Lists what is written below a folder, and refuses one key, while the context is open."""
    if not hasattr(_disk, "seen"):
        sys.addaudithook(_audit)  # there is no way to remove it
    _disk.seen, _disk.refused, _disk.mode, _disk.path = {}, refused, mode, ""
    _disk.folder = folder.resolve()
    try:
        yield _disk
    finally:
        _disk.folder = None
        _limit_files(resource.RLIM_INFINITY)


# ---- cases ----


class Result(NamedTuple):
    """The outcome of a case.

    Attributes:
      outcome: REFUSED, WENT_ON, or what is wrong.
      message: the lines on stderr that an undisturbed run does not write.
    """

    outcome: str
    message: str


class Cases:
    """The cases of one verb, in this process.

    Attributes:
      keys: what the verb writes.
    """

    def __init__(self, verb: str, folder: Path):
        self._verb, self._images = verb, folder / "images"
        self._top, self._before, self._complete = (folder / x for x in ("case", "before", "end"))
        self._workdir = self._top / "run"
        small_runs.make_images(self._images)
        self._prepare_before()
        self._lines: set[str] = set()
        for _ in range(2):  # the first one compiles
            self._reset()
            with disk(self._top) as seen:
                code, lines = self._run(verb)
            if code:
                raise RuntimeError(f"{verb}: {code}: {lines}")
            self._lines |= set(lines)
        self.keys = list(seen.seen)
        shutil.copytree(self._workdir, self._complete)

    def _prepare_before(self) -> None:
        """Writes what stands before the verb: earlier results, and those of the verb in part."""
        self._before.mkdir()
        settings = small_runs.VERBS[self._verb]
        self._workdir.mkdir(parents=True)
        if settings.prepare:
            settings.prepare(self._workdir)
        repeated = settings.renews and not settings.clears
        for verb in [*small_runs.chain(self._verb), *([self._verb] if repeated else [])]:
            code, lines = self._run(verb)
            if code:
                raise RuntimeError(f"{verb}: {code}: {lines}")
        # A training resumes, and a sweep trains its second member.
        if settings.cut:
            settings.cut(self._workdir)
        shutil.copytree(self._workdir, self._before / "run")

    def _reset(self) -> None:
        shutil.rmtree(self._top, ignore_errors=True)
        shutil.copytree(self._before, self._top)

    def _run(self, verb: str) -> tuple[int, list[str]]:
        """Runs a verb; returns its exit code and its lines on stderr."""
        from data_pipelines import errors
        from pae_jax import main

        settings = small_runs.VERBS[verb]
        words = settings.words(self._images, self._workdir)
        if any(word.startswith("--config.data.cache_dir=") for word in words):
            words.append(f"--config.data.cache_dir={self._top / 'cache'}")
        for once in (errors.warn, errors.inform):
            once.cache_clear()
        place = {"PAE_CACHE": str(self._workdir / "cache")} if settings.clears else {}
        with (
            mock.patch.dict(os.environ, place),
            _stderr() as lines,
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = main.main(words)
        return code, [line for line in lines if not _BAR.match(line)]

    def run(self, refused: str, mode: str) -> Result:
        """Runs the verb with one path refused, looks at what stands, and repeats it."""
        self._reset()
        error: BaseException | None = None
        code, lines = 0, []
        with disk(self._top, refused, mode) as state:
            try:
                code, lines = self._run(self._verb)
            except BaseException as caught:
                error = caught
        said = [line for line in lines if line not in self._lines]
        message = " / ".join(said)
        if error is not None:
            return Result(f"{type(error).__name__}: {error}"[:300], message)
        outcome = _judge(code, said, state.path, mode, self._verb.split()[0])
        if faults := self._damage():
            outcome = f"broken: {faults[0]}"
        elif outcome == WENT_ON and (text := self._difference()):
            outcome = f"went on, and {text}"
        elif outcome == REFUSED:
            again, lines = self._run(self._verb)
            text = " / ".join(lines) if again else self._difference()
            outcome = f"the repetition: {text}" if text else outcome
        return Result(outcome, message)

    def _damage(self) -> list[str]:
        """Returns a line for every file that is not whole, and for every earlier one lost."""
        # A disk that refuses W/eval also refuses the way back; the next evaluation takes it.
        for old in list(self._workdir.rglob(".*.old")):
            eval_folder.restore(old.with_name(old.name[1:].removesuffix(".old")))
        earlier, faults = self._before / "run", interruptions.broken(self._workdir)
        for path in interruptions.files(earlier):
            if "checkpoints" in path.parts or small_runs.VERBS[self._verb].clears:
                continue  # the verb may have removed an old one, and the others were restored
            if not (self._workdir / path).exists():
                faults.append(f"{path} is gone")
            elif path.suffix != ".jsonl" and not interruptions.same(path, earlier, self._workdir):
                faults.append(f"{path} has changed")
        return faults

    def _difference(self) -> str | None:
        return interruptions.difference(self._workdir, self._complete)


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """Yields a list that holds the lines of stderr after the context, also those of C++."""
    lines: list[str] = []
    read, write = os.pipe()  # not a file, whose length would be limited

    def collect() -> None:
        with os.fdopen(read, errors="replace", newline="") as pipe:
            lines.extend(re.split(r"[\r\n]+", pipe.read()))

    thread = threading.Thread(target=collect)
    kept = os.dup(2)
    os.dup2(write, 2)
    thread.start()
    try:
        with (
            os.fdopen(write, "w", buffering=1, errors="backslashreplace") as stream,
            contextlib.redirect_stderr(stream),
        ):
            yield lines
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        thread.join()


def _judge(code: int, said: Sequence[str], path: str, mode: str, verb: str) -> str:
    """Returns REFUSED or WENT_ON, or what is wrong with the end of a case."""
    if not path:
        return "the path was not written"
    if len(said) > 1:
        return f"{len(said)} lines, exit code {code}"
    if code == 0:
        return WENT_ON
    if not said or not said[0].startswith(f"pae {verb}: "):
        return f"exit code {code} without a line of the verb"
    if os.strerror(MODES[mode]) not in said[0]:
        return "the line does not give the reason"
    # The full disk may show at a later file than that from which on it was full.
    named = re.search(r"(/[^ ]*?):? ", said[0] + " ")
    close = named and (path.startswith(named[1]) or os.path.dirname(path) in named[1])
    return REFUSED if close or (mode == "full" and named) else "the line does not name the path"


# ---- all of them ----


def work(verb: str, modes: Sequence[str], first: int) -> None:
    """Runs the cases of a verb from number `first` on, and writes a line of JSON for each."""
    from pae_jax.devices import process

    with tempfile.TemporaryDirectory(prefix="pae_full_disk_") as folder:
        process.use_compilation_cache()
        cases = Cases(verb, Path(folder))
        pairs = [
            (name, mode)
            for name in cases.keys
            for mode in modes
            if mode == "read-only" or not name.startswith(REMOVAL)
        ]
        for number, (name, mode) in enumerate(pairs):
            if number < first:
                continue
            entry = {"number": number, "verb": verb, "path": name, "mode": mode}
            print(json.dumps(entry), flush=True)
            faulthandler.dump_traceback_later(TIMEOUT, exit=True)
            result = cases.run(name, mode)
            faulthandler.cancel_dump_traceback_later()
            message = result.message.replace(folder, "FOLDER")
            outcome = result.outcome.replace(folder, "FOLDER")
            print(json.dumps({**entry, "outcome": outcome, "message": message}), flush=True)


def run_verb(verb: str, modes: Sequence[str], cache: Path) -> Iterator[dict[str, Any]]:
    """Yields the results of the cases of a verb; a process that hangs loses one case."""
    first = 0
    command = [sys.executable, "-m", "experiments.full_disk", f"--modes={','.join(modes)}"]
    while True:
        with tempfile.TemporaryFile("w+") as stderr:
            process = subprocess.Popen(
                [*command, f"--worker={verb}:{first}"],
                cwd=small_runs.ROOT,
                env=small_runs.environment(cache),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
            assert process.stdout
            current: dict[str, Any] | None = None
            with process.stdout:
                for line in process.stdout:
                    entry = json.loads(line)
                    current = None if "outcome" in entry else entry
                    first = entry["number"] + 1
                    if current is None:
                        yield entry
            if process.wait() == 0:
                return
            stderr.seek(0)
            trace = stderr.read()
        if current is None:
            raise RuntimeError(f"{verb}: the worker ended with {process.returncode}: {trace}")
        # The main thread is the last one of the trace, and its deepest frame the first.
        *_, main_thread = trace.split("(most recent call first):")
        frames = re.findall(r'File ".*?([^/]*)", line (\d+) in (\w+)', main_thread)
        where = ", ".join(f"{file}:{line} {name}" for file, line, name in frames[:4])
        yield {**current, "outcome": f"hang, or the process died ({process.returncode})"} | {
            "message": where
        }


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbs", default=",".join(small_runs.VERBS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    modes = options.modes.split(",")
    if options.worker:
        verb, _, first = options.worker.partition(":")
        work(verb, modes, int(first))
        return 0
    began, faults, count = time.monotonic(), 0, 0
    print("| verb | path | mode | outcome | line |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="pae_full_disk_") as cache:
        for verb in options.verbs.split(","):
            for entry in run_verb(verb, modes, Path(cache)):
                count += 1
                good = entry["outcome"] in (REFUSED, WENT_ON)
                faults += not good
                outcome = entry["outcome"] if good else f"FAULT: {entry['outcome']}"
                cells = (verb, entry["path"], entry["mode"], outcome, entry.get("message", ""))
                print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\n{count} cases, {faults} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
