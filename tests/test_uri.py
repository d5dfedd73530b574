"""Every file operation of a run on a URI, on a bucket in memory; and what is refused."""

import importlib.util
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

import bucket
import runs
from data_pipelines.errors import BadInput, CannotWrite
from pae_jax import config, main, sweep
from pae_jax.workdir import files, lock, logs, paths, record, trained_model
from pae_jax.workdir.run import open_run
from pae_jax.workdir.staging import Staging


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """A bucket in memory; nothing may be written beside it, to a folder named gs:."""
    monkeypatch.chdir(tmp_path)
    with bucket.in_memory(monkeypatch) as memory:
        yield memory
    assert not list(tmp_path.glob("gs*"))


def upload(folder: Path, to: epath.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            (to / str(path.relative_to(folder))).write_bytes(path.read_bytes())


def listing(root: str | Path) -> dict[str, bytes]:
    """Returns the contents of all files under a folder, or of all objects under a URI."""
    if isinstance(root, Path):
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    prefix = root.removeprefix("gs:/") + "/"
    objects = bucket.MemoryBucket.store.items()
    return {n.removeprefix(prefix): f.getvalue() for n, f in objects if n.startswith(prefix)}


# Places.


@pytest.mark.parametrize("place", ["runs/a", "/tmp/x", "c:/x", "odd:/x", "a b/ü", "."])
def test_a_local_path_stays_a_local_path(place):
    assert paths.to_path(place) == Path(place)
    assert paths.to_workdir(Path(place)) == Path(place)


def test_a_uri_keeps_its_slashes(memory):
    path = paths.to_workdir("gs://bucket/a") / "b"
    assert str(path) == "gs://bucket/a/b"
    assert str(path / "") == "gs://bucket/a/b"
    assert paths.to_path(path) == path
    assert paths.is_uri(path)
    assert not paths.is_uri(Path("a"))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("memory://x/y", "memory:// is not supported; use a local folder or gs://, s3://, az://"),
        ("file:///tmp/x", "file:// is not supported"),
        (Path("gs://bucket/x"), "a URI is written gs://BUCKET/FOLDER, in Python as a string"),
        ("gs:///x", "a URI is written gs://BUCKET/FOLDER"),
        ("gs://", "a URI is written gs://BUCKET/FOLDER"),
    ],
)
def test_a_uri_that_cannot_be_used(place, line, memory):
    with pytest.raises(BadInput, match=line) as caught:
        paths.to_path(place)
    assert str(caught.value).startswith(str(place))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs"), ("az", "adlfs")])
def test_a_missing_package_is_named(scheme, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=f"^{scheme}://x/y: .*pip install {package}$"):
        paths.to_path(f"{scheme}://x/y")


def test_checkpoints_are_written_to_gs_only(memory, monkeypatch):
    monkeypatch.setitem(paths.PACKAGES, "s3", "fsspec")
    with pytest.raises(BadInput, match=r"^s3://bucket/x: a workdir is a local folder or gs://"):
        paths.to_workdir("s3://bucket/x")
    assert str(paths.to_path("s3://bucket/x")) == "s3://bucket/x"


@pytest.mark.parametrize("verb", ["train", "sweep", "evaluate", "predict"])
def test_every_verb_refuses_a_uri_in_one_line(verb, tmp_path, monkeypatch, capsys):
    """Before work starts, and without a local folder of that name."""
    monkeypatch.chdir(tmp_path)
    words = {
        "train": ["--config=smoke"],
        "sweep": ["--config=ablation:smoke"],
        "evaluate": [],
        "predict": [f"--images={tmp_path}", f"--out={tmp_path / 'out'}"],
    }
    assert main.main([verb, *words[verb], "--workdir=ftp://host/x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pae {verb}: ftp://host/x: ftp:// is not supported")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("root", "gs://bucket/images"),
        ("textures", "s3://bucket/textures"),
        ("textures", "tfds:gs://bucket/tfds"),
        ("cache_dir", "gs://bucket/cache"),
    ],
)
def test_data_on_a_uri_are_refused(key, value, tmp_path):
    options = config.from_config_dict({"data": {key: value}})
    with (
        pytest.raises(BadInput, match=rf"^data.{key}={value}: .*gcloud storage cp.*gcsfuse"),
        open_run(options, tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_images_on_a_uri_are_refused(tmp_path, capsys):
    words = [f"--workdir={tmp_path}", "--images=gs://bucket/new", f"--out={tmp_path / 'out'}"]
    assert main.main(["predict", *words]) == 2
    assert "--images=gs://bucket/new: images and caches are on a" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Files.


def test_files_are_written_read_and_listed(memory):
    root = paths.to_path("gs://bucket/run")
    with pytest.raises(BadInput, match=r"^gs://bucket/run/a.json: not found"):
        files.read_json(root / "a.json")
    files.check_writable(root)
    files.check_empty(root)
    files.write_json(root / "a.json", {"b": float("nan"), "a": "ü"})
    assert files.read_json(root / "a.json") == {"a": "ü", "b": None}
    files.write_csv(root / "deep/er.csv", [{"name": "x", "score": 1.5}])
    assert listing("gs://bucket/run")["deep/er.csv"] == b"name,score\nx,1.5\n"
    assert set(listing("gs://bucket/run")) == {"a.json", "deep/er.csv"}
    with pytest.raises(BadInput, match=r"^gs://bucket/run: not empty; results are never"):
        files.check_empty(root)


def test_a_bucket_that_cannot_be_written(memory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("403, forbidden\nand much more")

    monkeypatch.setattr(bucket.MemoryBucket, "_open", fail)
    root = paths.to_path("gs://bucket/run")
    with pytest.raises(BadInput, match=r"^gs://bucket/run: cannot be written \(403, forbidden\)$"):
        files.check_writable(root)
    with pytest.raises(CannotWrite, match=r"^gs://bucket/run/a: cannot be .*\(403, forbidden\)$"):
        files.write_atomically(root / "a", b"")
    with pytest.raises(BadInput, match=r"^gs://bucket/run/a: cannot be read \(403, forbidden\)$"):
        files.read_json(root / "a")


# The log.


def settings(**changes: object) -> config.Config:
    return config.from_config_dict({"train": {"log_every": 1, "steps": 20, **changes}})


def log_steps(log: logs.RunLog, numbers: range) -> None:
    for step in numbers:
        log.step(step, {"loss": 1 / step}, data_seconds=0.0)


def lines(root: epath.Path) -> list[int]:
    text = (root / "metrics.jsonl").read_bytes().decode()
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_the_log_is_uploaded_and_comes_back(memory):
    root, options = paths.to_path("gs://bucket/run"), settings(tensorboard=True)
    panel = np.zeros((8, 8, 3), np.uint8)
    with Staging(root) as staging:
        with logs.RunLog(root, options, start=0, staging=staging) as log:
            log_steps(log, range(1, 6))
            log.flush()
            staging.upload()
            assert lines(root) == [1, 2, 3, 4, 5]
            log_steps(log, range(6, 8))
            log.validation(20, {"loss": 1.0}, panel)
            assert lines(root) == [1, 2, 3, 4, 5]
        folder = staging.folder
    assert not folder.exists()
    assert lines(root) == [1, 2, 3, 4, 5, 6, 7, 20]
    names = set(listing("gs://bucket/run"))
    assert names >= {"metrics.jsonl", "panels/step_0000020.png"}
    assert sum(name.startswith("tensorboard/events") for name in names) == 1

    # A run that resumes from step 4 has the lines up to there.
    with Staging(root) as staging, logs.RunLog(root, options, start=4, staging=staging) as log:
        log_steps(log, range(5, 7))
    assert lines(root) == [1, 2, 3, 4, 5, 6]


def test_only_what_has_changed_is_uploaded_again(memory, monkeypatch):
    root = paths.to_path("gs://bucket/run")
    with Staging(root) as staging:
        (staging.folder / "a").mkdir()
        (staging.folder / "a/b").write_text("1")
        (staging.folder / "c").write_text("1")
        staging.upload()
        memory.store.clear()
        (staging.folder / "c").write_text("22")
        staging.upload()
        assert listing("gs://bucket/run") == {"c": b"22"}


def test_an_upload_that_fails_does_not_hide_the_cause(memory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no network")

    root = paths.to_path("gs://bucket/run")
    for error, expected in ((KeyError("cause"), KeyError), (None, CannotWrite)):
        with pytest.raises(expected), Staging(root) as staging:
            (staging.folder / "a").write_text("1")
            monkeypatch.setattr(bucket.MemoryBucket, "_open", fail)
            if error:
                raise error


def test_a_local_workdir_has_no_copies(tmp_path):
    with Staging(tmp_path) as staging:
        assert staging.folder == tmp_path
        assert staging.fetch("a") == tmp_path / "a"
    assert tmp_path.exists()


# The lock.


def owner(root: epath.Path, **changes: object) -> None:
    record = {"host": "another", "pid": 7, "id": "b", "time": time.time()}
    files.write_json(root / ".owner", record | changes)


def test_an_owner_file_names_host_process_and_time(memory):
    root = paths.to_path("gs://bucket/run")
    with lock.lock(root) as check:
        content = files.read_json(root / ".owner")
        assert (content["host"], content["pid"]) == (socket.gethostname(), os.getpid())
        assert abs(content["time"] - time.time()) < 60
        check()
        with pytest.raises(BadInput, match=rf"is training there \(process {os.getpid()} of "):
            lock.lock(root).__enter__()
    assert not (root / ".owner").exists()


def test_a_fresh_owner_is_respected_and_a_stale_one_replaced(memory):
    root = paths.to_path("gs://bucket/run")
    owner(root, time=time.time() - lock.STALE_SECONDS + 60)
    line = r"^gs://bucket/run: .* there \(process 7 of another\); .* wait (59|60) s or remove"
    with pytest.raises(BadInput, match=line):
        lock.lock(root).__enter__()
    owner(root, time=time.time() - lock.STALE_SECONDS - 1)
    with lock.lock(root):
        assert files.read_json(root / ".owner")["pid"] == os.getpid()


def test_an_owner_that_was_killed_on_this_host_is_replaced_at_once(memory):
    root = paths.to_path("gs://bucket/run")
    with subprocess.Popen(["true"]) as ended:
        pass
    owner(root, machine=lock._this_process()["machine"], pid=ended.pid)
    with lock.lock(root):
        pass


def test_an_owner_that_was_replaced_does_not_save(memory):
    root = paths.to_path("gs://bucket/run")
    with lock.lock(root) as check:
        owner(root)
        with pytest.raises(CannotWrite, match="taken over by process 7 of another"):
            check()
    assert files.read_json(root / ".owner")["pid"] == 7  # not removed


def test_the_owner_renews_the_time(memory, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    renewed, write = threading.Event(), lock.write_json
    count = 0

    def counted(path, value):
        nonlocal count
        write(path, value)
        count += 1
        if count > 2:
            renewed.set()

    monkeypatch.setattr(lock, "write_json", counted)
    root = paths.to_path("gs://bucket/run")
    with lock.lock(root):
        first = files.read_json(root / ".owner")["time"]
        assert renewed.wait(10)
        assert files.read_json(root / ".owner")["time"] > first


# Verbs.


def test_evaluate_and_predict_write_the_same_to_a_uri(trained, tmp_path, memory, monkeypatch):
    run = runs.clone(trained, tmp_path)
    upload(run.workdir, paths.to_path("gs://bucket/run"))
    restore = trained_model.restore
    # Orbax has a driver of its own for buckets; see test_uri_end_to_end.py.
    monkeypatch.setattr(
        trained_model, "restore", lambda workdir, *args, **kw: restore(run.workdir, *args, **kw)
    )
    for workdir in ("gs://bucket/run", str(run.workdir)):
        assert main.main(["evaluate", f"--workdir={workdir}", "--save_maps"]) == 0
    remote, local = listing("gs://bucket/run"), listing(run.workdir)
    assert remote.keys() == local.keys()
    assert remote == local
    assert {"eval/metrics.json", "eval/report.html", "eval/scores.csv"} <= remote.keys()

    images = f"--images={run.root / 'data/test'}"
    for workdir, out in (("gs://bucket/run", "gs://bucket/out"), (run.workdir, tmp_path / "out")):
        assert main.main(["predict", f"--workdir={workdir}", images, f"--out={out}"]) == 0
    assert listing("gs://bucket/out") == listing(tmp_path / "out")
    assert len(listing("gs://bucket/out")) == 2 + 2 * 7


def test_predict_refuses_a_uri_that_holds_something(trained, memory, capsys):
    (paths.to_path("gs://bucket/out") / "a.txt").write_bytes(b"")
    words = [f"--workdir={trained.workdir}", f"--images={trained.root / 'data/test'}"]
    assert main.main(["predict", *words, "--out=gs://bucket/out"]) == 2
    assert "gs://bucket/out: not empty" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused(trained, memory):
    root = paths.to_path("gs://bucket/run")
    upload(trained.workdir, root)
    record.check_workdir(root, runs.load_config(trained.root))
    other = runs.load_config(trained.root, train__seed=1)
    with pytest.raises(BadInput, match=r"^gs://bucket/run: holds .* train.seed is 0 there and 1"):
        record.check_workdir(root, other)


def test_the_tables_of_a_sweep(trained, tmp_path, memory, monkeypatch):
    """The members were trained and evaluated; the tables and charts are written."""
    options = runs.load_config(trained.root)
    entry = ("a", 0, options)
    monkeypatch.setattr(sweep, "load_sweep", lambda *_: [entry])
    local = runs.clone(trained, tmp_path).workdir
    assert main.main(["evaluate", f"--workdir={local}"]) == 0
    files.write_json(local / "config.json", files.read_json(trained.workdir / "config.json"))
    metrics = files.read_json(local / "eval/metrics.json")
    metrics["provenance"]["config_hash"] = options.hash
    files.write_json(local / "eval/metrics.json", metrics)
    upload(local, paths.to_path("gs://bucket/sweep/members/a-0"))
    table = sweep.sweep("any", "gs://bucket/sweep", say=lambda _: None).table
    assert str(table) == "gs://bucket/sweep/sweep/results.md"
    names = listing("gs://bucket/sweep/sweep").keys()
    assert {"results.md", "results.csv", "pixel_auroc.png"} <= names
