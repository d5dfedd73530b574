"""The log of a run and the messages of the package."""

import json
import logging

import jax
import numpy as np
import pytest

from pae_jax import config
from pae_jax.workdir import logs


def settings(**train):
    return config.from_config_dict({"train": {"tensorboard": False, **train}})


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_speed_are_logged_at_intervals(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now)
    panel = np.zeros((4, 4, 3), np.uint8)
    options = settings(log_every=5, batch_size=8, panel_every=10, steps=20)
    with logs.RunLog(tmp_path, options, start=0) as log:
        for step in range(1, 11):
            now += 0.5
            log.step(step, {"loss": 1 / step}, data_seconds=0.1)
            if step == 5:
                now += 100.0  # does not count as time of steps
                log.validation(5, {"bias": 0.25}, panel)
        log.validation(10, {"bias": float("nan")}, panel)
    first, validation, second, last = records(tmp_path)
    assert (first["step"], first["train/loss"]) == (5, pytest.approx(0.2))
    assert second["speed/step_seconds"] == pytest.approx(0.5)
    assert second["speed/images_per_second"] == pytest.approx(16)
    assert second["speed/data_wait_fraction"] == pytest.approx(0.2)
    assert validation == {"step": 5, "validation/bias": 0.25}
    assert last == {"step": 10, "validation/bias": None}
    assert [path.name for path in (tmp_path / "panels").iterdir()] == ["step_0000010.png"]


def test_a_resumed_run_writes_no_line_twice(tmp_path):
    """The log is cut at step 4 before its validation, and a torn line is removed."""
    lines = [{"step": step, "train/loss": float(step)} for step in range(1, 7)]
    lines.insert(4, {"step": 4, "validation/loss": 1.0})
    lines.insert(0, {"step": 0, "validation/loss": 2.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 7, "tra')
    with logs.RunLog(tmp_path, settings(log_every=1), start=4) as log:
        assert records(tmp_path) == [lines[0], *lines[1:5]]
        log.step(5, {"loss": 5.0}, data_seconds=0.0)
    assert [line["step"] for line in records(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_tensorboard_has_the_same_scalars(tmp_path, monkeypatch):
    added = []
    scalar = logs.Board.scalar
    monkeypatch.setattr(
        logs.Board, "scalar", lambda self, *args: (added.append(args), scalar(self, *args))
    )
    options = settings(log_every=1, tensorboard=True, steps=2)
    with logs.RunLog(tmp_path, options, start=0) as log:
        log.step(1, {"loss": 0.5}, data_seconds=0.0)
        values = {"bias": 0.25, "undefined": float("nan")}
        log.validation(2, values, np.zeros((4, 4, 3), np.uint8))
    written = {(name, step): value for name, value, step in added}
    lines = {(k, line["step"]): v for line in records(tmp_path) for k, v in line.items()}
    assert lines.pop(("validation/undefined", 2)) is None
    assert written == {key: value for key, value in lines.items() if key[0] != "step"}
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"validation/bias" in events.read_bytes()
    assert b"panel" in events.read_bytes()


def test_the_bar_appears_with_the_first_step(tmp_path, capsys):
    """Before that it would stand at 0 while the step is compiled."""
    with logs.RunLog(tmp_path, settings(steps=20), start=10) as log:
        assert capsys.readouterr().err == ""
        log.step(11, {"loss": 1.0}, data_seconds=0.0)
    assert "11/20" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "prefix"), [(1, ""), (4, "[process 3 of 4] ")])
def test_messages_go_to_stderr(monkeypatch, capsys, count, prefix):
    logger = logging.getLogger("pae_jax")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: count - 1)
    logs.configure_logging()
    logs.configure_logging()
    logging.getLogger("pae_jax.train").info("steps: %d", 3)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{prefix}steps: 3\n")
