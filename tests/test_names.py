"""Odd names: folders of runs, files of images, and what is written of them."""

import csv
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import runs
from data_pipelines.errors import BadInput, CannotWrite, spell
from layouts import write
from pae_jax import main
from pae_jax.workdir import checkpoint, files, paths

NOT_UTF8 = os.fsdecode(b"Pr\xfcfling")
# Names that file systems of Linux allow, by what happens to a workdir below such a folder.
WORK = (
    *("a b", "'", '"', "]", "(x)", "{x}", "#", "%41", "&", ";", "$HOME", "~", "|", "<", ">", ":"),
    *("!", ",", "=", "@", "`", "^", "\n", "\t", "\x01", "-x", ".x", "x "),
    *("x.", "\u00e9", "e\u0301", "\u65e5\u672c", "\U0001f600", "x" * 255, " ", "a:b"),
)
REFUSED = ("*", "?", "[x]", "[", "lr[1e-3]", "\x1b[31m", "\\", "a\\b", NOT_UTF8)


@pytest.mark.parametrize("name", WORK)
def test_a_workdir_below_a_folder_of_this_name_works(name, tmp_path):
    workdir = paths.to_workdir(tmp_path / name / "run")
    paths.check_savable(workdir)
    state = {"a": jnp.arange(4.0)}
    with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(1, state)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        step, restored = checkpoints.restore(state)
    assert step == 1
    np.testing.assert_array_equal(restored["a"], state["a"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_workdir_below_a_folder_of_this_name_is_refused(name, tmp_path, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    for place in (folder / "run", folder):
        with pytest.raises(BadInput, match="choose another folder, or a link to it") as caught:
            paths.check_savable(paths.to_workdir(place))
        assert str(caught.value).isprintable()
    # The whole path counts, not only the words of the user.
    monkeypatch.chdir(folder)
    with pytest.raises(BadInput, match="choose another folder"):
        paths.check_savable(paths.to_workdir("run"))
    # The advice works.
    (tmp_path / "link").symlink_to(folder)
    with checkpoint.Checkpoints(tmp_path / "link", keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.arange(4.0)})
    assert (folder / "checkpoints/1").is_dir()


def test_a_run_can_be_renamed_to_a_name_that_cannot_be_saved_to(tmp_path):
    state = {"a": jnp.arange(4.0)}
    with checkpoint.Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, state)
    (tmp_path / "run").rename(tmp_path / "lr[1e-3]")
    with checkpoint.Checkpoints(paths.to_workdir(tmp_path / "lr[1e-3]")) as checkpoints:
        assert checkpoints.restore(state)[0] == 1


def test_spelled_names_are_one_line_and_differ():
    names = ["a", "\u00e9", "b\n", "b\\x0a", "b\\\\x0a", "b\x0a\x0a", NOT_UTF8, "Pr\\xfcfling"]
    names += ["\x7f", "\u200f", "\U000e0001", "\\", "\\\\", "Pr\u00fcfling"]
    spelled = [spell(name) for name in names]
    assert len(set(spelled)) == len(names)
    for text in spelled:
        assert text.isprintable()
        assert text.encode()
    assert spelled[:3] == ["a", "\u00e9", "b\\x0a"]
    assert spell(NOT_UTF8) == "Pr\\xfcfling"


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_files_of_images_have_names_that_can_be_written(tmp_path, suffix):
    names = ["x" * 255, "x" * 254 + "y", "\u00e9" * 127, "a/" + "x" * 251, "a/b.png", NOT_UTF8]
    names += ["\n" * 200 + "/" + "\n" * 100, "b\nc"]
    written = [files.output_path(tmp_path, spell(name), suffix) for name in names]
    for path in written:
        files.write_atomically(path, "")
    assert len(set(written)) == len(names)
    assert all(path.is_file() and path.name.endswith(suffix) for path in written)
    assert written[4] == tmp_path / f"a/b.png{suffix}"
    assert written[5].name == f"Pr\\xfcfling{suffix}"


def test_the_longest_name_can_be_written_and_nothing_is_left(tmp_path):
    path = tmp_path / ("x" * 255)
    files.write_atomically(path, "first")
    files.write_atomically(path, "second")
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == [path.name]


def test_the_content_is_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    files.write_atomically(tmp_path / "a", "text")
    assert calls == ["fsync", "replace"]


def test_a_failure_to_clean_up_does_not_hide_the_cause(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(CannotWrite, match=r"file: cannot be written \(No space left on device\)$"):
        files.write_atomically(tmp_path / "file", "text")


def test_messages_of_odd_names_are_one_line():
    error = CannotWrite(Path(f"{NOT_UTF8}/a\nb"), OSError(28, "No space left on device"))
    expected = "Pr\\xfcfling/a\\x0ab: cannot be written (No space left on device)"
    assert str(error) == expected


ODD = (NOT_UTF8, "a\nb", "a\x1b[31mb", "x" * 245, "\u00e9" * 120, "a\\nb", "-x", " ", 'a\tb,"c"')


def test_images_of_odd_names_are_trained_on_evaluated_and_predicted(trained, tmp_path, capsys):
    """Nothing is a traceback, and each row has one name; files have the names of the rows."""
    run = runs.clone(trained, tmp_path)
    test = run.root / "data/test"
    rng = np.random.default_rng(0)
    for name in ODD:
        image = rng.integers(0, 256, (20, 24)).astype(np.uint8)
        for folder in (test / "good", test / f"{name[:50]}", run.root / "data/train/good"):
            write(folder / f"{name}.png", image + np.uint8(len(str(folder))))
    shutil.rmtree(run.root / "data/ground_truth")
    (run.root / "textures/0.png").rename(run.root / f"textures/{NOT_UTF8}.png")
    words = runs.words(run.root, train__steps=10)
    assert main.main(["train", *words, f"--workdir={tmp_path / 'new'}"]) == 0
    assert main.main(["evaluate", f"--workdir={tmp_path / 'new'}", "--save_maps"]) == 0
    out = tmp_path / os.fsdecode(b"\xfc\n")
    predicted = ["predict", f"--workdir={tmp_path / 'new'}", f"--images={test}", f"--out={out}"]
    assert main.main(predicted) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in printed)
    assert printed[-1] == f"{tmp_path}/\\xfc\\x0a/scores.csv"

    count = sum(len(files) for _, _, files in os.walk(test))
    tables = [tmp_path / "new/eval/scores.csv", out / "scores.csv"]
    names = [read_names(path) for path in tables]
    assert sorted(names[0]) == sorted(names[1])
    assert len(set(names[0])) == count
    assert all(name.isprintable() for name in names[0])
    assert {"good/Pr\\xfcfling.png", "good/a\\x0ab.png", "good/a\\\\nb.png"} <= set(names[0])
    report = (tmp_path / "new/eval/report.html").read_text()
    assert "good/Pr\\xfcfling.png" in report
    for folder, suffix in ((tmp_path / "new/eval/maps", "tiff"), (out / "masks", "png")):
        written = [str(path) for path in folder.rglob(f"*.{suffix}")]
        assert len(written) == count
        assert all(path.removeprefix(str(out)).isprintable() for path in written)


def read_names(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [row["name"] for row in csv.DictReader(file)]
