"""Each setting of an evaluation has a folder, and a folder is replaced as a whole."""

import json
import os
import shutil
from pathlib import Path

import pytest

import bucket
import runs
from data_pipelines.errors import CannotWrite
from pae_jax import evaluate, main
from pae_jax.config import EvalConfig
from pae_jax.workdir import eval_folder, paths

OWN = EvalConfig()


def tree(folder: Path) -> dict[str, bytes]:
    """Returns the files below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (OWN, "eval"),
        (EvalConfig(batch_size=1), "eval"),
        (EvalConfig(smoothing="none"), "eval_smoothing=none"),
        (EvalConfig(image_score="max", smoothing="none"), "eval_image_score=max,smoothing=none"),
        (EvalConfig(native_size=True), "eval_native_size=True"),
        (EvalConfig(smoothing_fraction=0.1), "eval_smoothing_fraction=0.1"),
    ],
)
def test_names(settings, name):
    assert eval_folder.folder_name(OWN, settings) == name
    assert eval_folder.folder_name(settings, settings) == "eval"


def test_long_names_are_cut_and_differ():
    def name(fraction: float) -> str:
        settings = EvalConfig(
            anomaly_map="msgms", smoothing="mean", smoothing_fraction=1 / 3, image_score="topk",
            topk_fraction=1 / 7, apply="fixed_point", solver="anderson", max_steps=100,
            native_size=True, aupro_limit=fraction,
        )  # fmt: skip
        return eval_folder.folder_name(OWN, settings)

    names = [name(0.1), name(0.2)]
    assert len(set(names)) == 2
    assert all(len(text) < 150 and text.startswith("eval_anomaly_map=msgms,") for text in names)


def test_other_settings_keep_what_an_earlier_evaluation_wrote(trained, tmp_path, capsys):
    workdir = runs.clone(trained, tmp_path).workdir
    assert main.main(["evaluate", f"--workdir={workdir}", "--save_maps"]) == 0
    own = tree(workdir / "eval")
    assert any(name.startswith("maps/") for name in own)
    words = ["--config.eval.smoothing=none", "--config.eval.image_score=max"]
    capsys.readouterr()
    assert main.main(["evaluate", f"--workdir={workdir}", *words]) == 0
    other = workdir / "eval_image_score=max,smoothing=none"
    assert capsys.readouterr().out.splitlines()[-1] == str(other / "report.html")
    assert tree(workdir / "eval") == own
    assert set(tree(other)) == {"metrics.json", "scores.csv", "report.html"}
    record = json.loads((other / "metrics.json").read_text())
    assert record["provenance"]["config"]["eval"]["smoothing"] == "none"
    # Words that repeat the run's own settings change nothing.
    report = evaluate.evaluate(workdir, overrides=["--config.eval.smoothing=gaussian"]).report
    assert report == workdir / "eval/report.html"


def test_stale_maps_and_odd_files(trained, tmp_path):
    """Maps of an earlier evaluation leave with it; a file of the user stays."""
    run = runs.clone(trained, tmp_path)
    evaluate.evaluate(run.workdir, save_maps=True)
    (run.workdir / "eval/notes.txt").write_text("mine")
    (run.workdir / "eval/mine").mkdir()
    (run.workdir / "eval/mine/a").write_text("b")
    (run.root / "data/test/good/000.png").rename(run.root / "data/test/good/new.png")
    evaluate.evaluate(run.workdir, save_maps=True)
    names = {Path(name).name for name in tree(run.workdir / "eval/maps/data/test/good")}
    assert "new.tiff" in names and "000.tiff" not in names
    evaluate.evaluate(run.workdir)
    names = set(tree(run.workdir / "eval"))
    assert names == {"metrics.json", "scores.csv", "report.html", "notes.txt", "mine/a"}
    assert not list(run.workdir.glob(".eval*"))


def write(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("moment", range(6))
def test_an_interruption_at_any_moment_loses_nothing(tmp_path, monkeypatch, moment):
    """A kill before the n-th call that changes the disk: one of the two is whole, or both are."""

    class Killed(BaseException):
        pass

    folder = tmp_path / "eval"
    write(folder, "old", "metrics.json", "maps/a", "notes.txt")
    count = 0

    def counted(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count > moment:
                raise Killed
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        for name in ("rmtree", "copy2"):
            patch.setattr(shutil, name, counted(getattr(shutil, name)))
        try:
            with eval_folder.replace(folder) as new:
                for name in ("metrics.json", "scores.csv"):
                    (new / name).write_bytes(b"new")
        except Killed:
            pass
    eval_folder.restore(folder)
    whole = {"metrics.json": b"old", "maps/a": b"old", "notes.txt": b"old"}
    renewed = {"metrics.json": b"new", "scores.csv": b"new", "notes.txt": b"old"}
    assert tree(folder) in (whole, renewed)
    with eval_folder.replace(folder) as new:
        write(new, "again", "metrics.json")
    assert tree(folder) == {"metrics.json": b"again", "notes.txt": b"old"}
    assert os.listdir(tmp_path) == ["eval"]


def test_an_error_leaves_the_earlier_one(tmp_path):
    folder = tmp_path / "eval"
    write(folder, "old", "metrics.json")

    def fail() -> None:
        with eval_folder.replace(folder) as new:
            write(new, "new", "metrics.json")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert tree(tmp_path) == {"eval/metrics.json": b"old"}


def test_a_swap_that_fails_is_undone(tmp_path, monkeypatch):
    folder = tmp_path / "eval"
    write(folder, "old", "metrics.json")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".eval.new":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CannotWrite), eval_folder.replace(folder) as new:
        write(new, "new", "metrics.json")
    assert tree(tmp_path) == {"eval/metrics.json": b"old"}


def test_a_linked_folder_is_replaced_where_it_is(tmp_path):
    write(tmp_path / "disk/eval", "old", "metrics.json", "maps/a")
    (tmp_path / "eval").symlink_to(tmp_path / "disk/eval")
    with eval_folder.replace(tmp_path / "eval") as new:
        write(new, "new", "metrics.json")
    assert (tmp_path / "eval").is_symlink()
    assert tree(tmp_path / "disk") == {"eval/metrics.json": b"new"}


def test_in_a_bucket_stale_maps_are_removed(monkeypatch):
    with bucket.in_memory(monkeypatch):
        folder = paths.to_path("gs://bucket/run/eval")
        with eval_folder.replace(folder) as new:
            for name in ("metrics.json", "maps/a", "maps/b/c"):
                (new / name).write_bytes(b"old")
        (folder / "notes.txt").write_bytes(b"mine")
        with eval_folder.replace(folder) as new:
            for name in ("metrics.json", "maps/d"):
                (new / name).write_bytes(b"new")
        files = {str(p).removeprefix("gs://bucket/run/"): p.read_bytes() for p in walk(folder)}
    assert files == {
        "eval/metrics.json": b"new",
        "eval/maps/d": b"new",
        "eval/notes.txt": b"mine",
    }


def walk(folder):
    for path in folder.iterdir():
        if path.is_dir():
            yield from walk(path)
        else:
            yield path
