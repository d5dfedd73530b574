"""SIGTERM and Ctrl-C in a single process."""

import os
import signal

import pytest

import runs
from pae_jax import train
from pae_jax.workdir import logs
from pae_jax.workdir.checkpoint import Checkpoints


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop(number):
    before = signal.getsignal(number)
    with train._catch_interruption() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        assert interrupted()
    assert signal.getsignal(number) is before


def test_a_second_sigterm_changes_nothing_and_a_second_ctrl_c_ends_the_process():
    # A shell starts what runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with train._catch_interruption() as interrupted:
        # Not `os.kill`, whose signal another thread may receive, so that the handler runs later.
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the first of its own kind
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_second_sigterm_during_the_last_save_changes_nothing(trained, tmp_path, monkeypatch):
    """Launchers send SIGTERM to the group and to its leader; the checkpoint is still written."""
    step, wait = logs.RunLog.step, Checkpoints.wait

    def stop(self, number, *args):
        step(self, number, *args)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def slow(self):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(logs.RunLog, "step", stop)
    monkeypatch.setattr(Checkpoints, "wait", slow)
    result = train.train_and_evaluate(runs.load_config(trained.root), tmp_path)
    assert result.outcome == train.STOPPED
    assert runs.read_state(tmp_path)[0] == result.step < 30
