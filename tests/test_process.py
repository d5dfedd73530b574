"""Joining the processes of one training: what cannot work is one line, in a stated time."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax.devices import process

PROJECT = Path(__file__).parents[1]
# `pae train` that waits three seconds for its partners.
IMPATIENT = """
import sys
from pae_jax import main
from pae_jax.devices import process
process.JOIN_TIMEOUT = 3
sys.exit(main.main(sys.argv[1:]))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_malformed_process_addresses_are_refused():
    for word in ("host:1", "host:1/2", "host:1/two/0", "host/2/0", ":1/2/0", "host:one/2/0"):
        with pytest.raises(BadInput, match=r"--distributed: auto or HOST:PORT/COUNT/INDEX, not"):
            process.join_processes(word)
    with pytest.raises(BadInput, match="--distributed: process 2 of 2"):
        process.join_processes("host:1/2/2")
    for port in (0, 65536):
        with pytest.raises(BadInput, match=f"--distributed: port {port} is not between"):
            process.join_processes(f"host:{port}/2/0")


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BadInput, match=f"cannot listen on port {port} .*take another"):
            process.join_processes(f"localhost:{port}/2/0")


@pytest.mark.parametrize("words", ["auto", "localhost:PORT/2/0", "localhost:PORT/2/1"])
def test_missing_partners_are_one_line_in_a_stated_time(tmp_path, words):
    words = words.replace("PORT", str(free_port()))
    began = time.monotonic()
    flags = ["--config=smoke", f"--workdir={tmp_path / 'w'}", f"--distributed={words}"]
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "train", *flags],
        cwd=PROJECT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - began < 60
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    why = "neither a TPU slice nor" if words == "auto" else "after 3 s not all processes have"
    assert done.stderr.startswith(f"pae train: --distributed={words}: {why}")
    assert not (tmp_path / "w").exists()


@pytest.fixture
def processes(monkeypatch):
    """Returns a list of texts that the other processes are going to give, one per exchange."""
    texts: list[str] = []
    monkeypatch.setattr(process, "gather_texts", lambda text: [text, texts.pop(0)])
    return texts


def test_one_failure_ends_all_processes(processes):
    processes += ["", "data.root: not there", "data.root: not there", "", ""]
    with process.fail_together():
        pass
    line = r"^process 1 of 2: data\.root: not there$"
    with pytest.raises(BadInput, match=line), process.fail_together():
        pass
    # A process with an error of its own reports that one.
    with pytest.raises(BadInput, match=r"^mine$"), process.fail_together():
        raise BadInput("mine")
    with pytest.raises(OSError, match="full"), process.fail_together():
        raise OSError("full")
    with contextlib.suppress(KeyboardInterrupt), process.fail_together():
        raise KeyboardInterrupt
    assert processes == [""]  # an interruption is not waited with
