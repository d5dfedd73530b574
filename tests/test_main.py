"""The command line: help, and every bad input as one line that names the file or key."""

import csv
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import runs
from layouts import encode, write
from pae_jax import main
from pae_jax.workdir import record

PROJECT = Path(__file__).parents[1]
IMAGE = np.zeros((20, 24), np.uint8)
HEAVY = ["flax", "grain", "jax", "matplotlib", "ml_collections", "numpy", "orbax", "skimage"]


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


def assert_refused(capsys, words: list[str], named: str) -> None:
    """Checks for exit status 2 and one line on stderr that begins with the verb and has `named`."""
    capsys.readouterr()
    assert main.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pae {words[0]}: ")
    assert named in line


def test_help_imports_nothing_heavy():
    script = (
        "import sys; from pae_jax import main\n"
        "try: main.main(['train', '--help'])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = run(sys.executable, "-c", script)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (
            (),
            (
                *("train", "evaluate", "predict", "sweep", "compare", "compile", "import"),
                *("configs", "cache"),
            ),
        ),
        ((), ("export", "pack")),
        (("train",), ("--config", "--workdir", "--config.KEY=VALUE")),
        (("evaluate",), ("--workdir", "--save_maps", "--config.eval.KEY=VALUE")),
        (("predict",), ("--workdir", "--images", "--out", "--config.eval.KEY=VALUE")),
        (("compare",), ("WORKDIR", "--out", "--config.eval.KEY=VALUE")),
        (("sweep",), ("--config", "--workdir", "--config.KEY=VALUE")),
        (("compile",), ("--config", "--topology", "--config.KEY=VALUE")),
        (("export",), ("--workdir", "--out", "--format", "--config.eval.KEY=VALUE")),
        (("pack",), ("--workdir", "--out", "--config.data.root=DIR")),
        (("import",), ("NAME", "ROOT[/CATEGORY]", "--out", "--test_fraction")),
    ],
)
def test_help(verb, flags, capsys):
    with pytest.raises(SystemExit) as done:
        main.main([*verb, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags)


def test_the_shipped_configs_are_listed_one_per_line(capsys):
    assert main.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(names)
    assert {"folder", "mvtec", "experiments/results"} < set(names)
    assert all(len(line.split()) > 3 for line in lines)
    assert_refused(capsys, ["configs", "folder"], "folder: `pae configs` takes no argument")


@pytest.mark.parametrize("words", [[], ["trian"], ["train"], ["predict", "--workdir=w"]])
def test_incomplete_commands(words):
    with pytest.raises(SystemExit) as done:
        main.main(words)
    assert done.value.code == 2


# ---- training: each function spoils the folder of images; the refusal precedes any training ----


def truncated(data: Path) -> str:
    path = data / "train/good/003.png"
    path.write_bytes(path.read_bytes()[:-40])
    return str(path)


def zero_bytes(data: Path) -> str:
    (data / "train/good/003.png").write_bytes(b"")
    return str(data / "train/good/003.png")


def text(data: Path) -> str:
    (data / "train/good/new.png").write_text("these are my notes\n")
    return str(data / "train/good/new.png")


def unreadable(data: Path) -> str:
    (data / "train/good/link.png").symlink_to(data / "nowhere.png")
    return str(data / "train/good/link.png")


def a_folder_named_like_an_image(data: Path) -> str:
    (data / "train/good/folder.png").mkdir()
    return str(data / "train/good/folder.png")


def no_good(data: Path) -> str:
    (data / "train/good").rename(data / "good")
    return str(data / "train/good")


def empty_good(data: Path) -> str:
    for path in (data / "train/good").iterdir():
        path.unlink()
    return str(data / "train/good")


def one_image(data: Path) -> str:
    for path in list((data / "train/good").iterdir())[1:]:
        path.unlink()
    return str(data / "train/good")


def bad_texture(data: Path) -> str:
    (data.parent / "textures/2.png").write_bytes(b"\x89PNG")
    return str(data.parent / "textures/2.png")


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        zero_bytes,
        text,
        unreadable,
        a_folder_named_like_an_image,
        no_good,
        empty_good,
        one_image,
        bad_texture,
    ],
)
def test_bad_images(spoil, tmp_path, capsys):
    root, workdir = runs.make_folder(tmp_path / "images"), tmp_path / "run"
    named = spoil(root / "data")
    assert_refused(capsys, ["train", *runs.words(root), f"--workdir={workdir}"], named)
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("--config.train.stepz=3", "train.stepz: no such key; did you mean train.steps?"),
        ("--config.data.size=0", "data.size: at least 1, not 0"),
        ("--config.data.textures=nowhere", "nowhere: "),
        ("--config.data.textures=tfds:nowhere", "nowhere"),
        ("--config.data.root=nowhere", "nowhere: "),
        ("--config.data.category=nut", "nut: "),
        ("--config.data.augmentation=flips+spin", "data.augmentation: no policy 'spin'"),
        ("--config.data.holdout_groups=sometimes", "data.holdout_groups: "),
        (
            "--config.sharding.data_parallel=64",
            "sharding.data_parallel: 64 devices asked for, 8 available",
        ),
        ("--config=nowhere.py", "nowhere.py: no such config file"),
        ("--workdir={file}/run", "{file}/run: cannot be written"),
        ("--workdir={file}", "{file}: cannot be written"),
        ("--workdir=/proc/run", "/proc/run: cannot be written"),
        ("steps=3", "steps=3: expected --config.key=value"),
    ],
)
def test_bad_words(word, named, tmp_path, capsys):
    root, workdir = runs.make_folder(tmp_path / "images"), tmp_path / "run"
    file = tmp_path / "file"
    file.write_text("")
    word, named = word.format(file=file), named.format(file=file)
    words = ["train", *runs.words(root), f"--workdir={workdir}", word]
    assert_refused(capsys, words, named)
    assert not (workdir / "config.json").exists()


def test_the_workdir_of_another_run(trained, tmp_path, capsys):
    copy = runs.clone(trained, tmp_path)
    command = ["train", f"--workdir={copy.workdir}"]
    words = runs.words(copy.root, train__seed=1)
    assert_refused(capsys, [*command, *words], "train.seed is 0 there and 1 now")
    with (copy.workdir / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = runs.words(copy.root)
        assert_refused(capsys, [*command, *words], f"{copy.workdir}: another process is training")
    write(
        copy.root / "data/train/good/005.png",
        np.arange(480, dtype=np.uint16).astype(np.uint8).reshape(20, 24),
    )
    assert_refused(capsys, [*command, *runs.words(copy.root)], "other data: fingerprint is ")


def test_a_workdir_without_a_checkpoint_takes_another_config(trained, tmp_path):
    """A run that failed before it saved anything does not block a corrected one."""
    from pae_jax import train

    config = runs.load_config(trained.root)
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 3}}))
    (tmp_path / "data.json").write_text("{}")
    assert train.train_and_evaluate(config, tmp_path).step == runs.STEPS
    assert record.read_config(tmp_path) == config
    runs.assert_same_state(tmp_path, trained.workdir)


# ---- evaluating ----


def mask_of_another_size(data: Path) -> str:
    write(data / "ground_truth/dent/000_mask.png", np.ones((9, 9), np.uint8))
    return str(data / "ground_truth/dent/000_mask.png")


def missing_mask(data: Path) -> str:
    (data / "ground_truth/dent/000_mask.png").unlink()
    return str(data / "test/dent/000.png")


def truncated_mask(data: Path) -> str:
    path = data / "ground_truth/dent/000_mask.png"
    path.write_bytes(path.read_bytes()[:-30])
    return str(data / "ground_truth/dent/000_mask.png")


def truncated_test_image(data: Path) -> str:
    path = data / "test/good/000.png"
    path.write_bytes(encode(np.full((20, 24), 7, np.uint8))[:-30])
    return str(path)


def no_test_images(data: Path) -> str:
    (data / "test").rename(data / "elsewhere")
    return str(data / "test")


@pytest.mark.parametrize(
    "spoil",
    [mask_of_another_size, missing_mask, truncated_mask, truncated_test_image, no_test_images],
)
def test_bad_test_images(spoil, trained, tmp_path, capsys):
    copy = runs.clone(trained, tmp_path)
    # The message names the image that the mask belongs to.
    named = spoil(copy.root / "data").replace("ground_truth", "test").replace("_mask.png", ".png")
    assert_refused(capsys, ["evaluate", f"--workdir={copy.workdir}"], named)
    assert not (copy.workdir / "eval/metrics.json").exists()


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("--config.train.steps=3", "--config.train.steps=3: after training, only --config.eval"),
        ("--config.eval.anomaly_map=ssmi", "eval.anomaly_map: names joined by +, "),
        (
            "--config.eval.anomaly_mop=ssim",
            "anomaly_mop: no such key; did you mean eval.anomaly_map?",
        ),
        ("--config.eval.map=ssim", "eval.map: renamed; use eval.anomaly_map"),
        ("--workdir={empty}", "{empty}/config.json: not found"),
        ("--workdir={empty}/typo", "{empty}/typo/config.json: not found"),
    ],
)
def test_bad_words_after_training(word, named, trained, tmp_path, capsys):
    word, named = word.format(empty=tmp_path), named.format(empty=tmp_path)
    folders = [f"--images={tmp_path}", f"--out={tmp_path / 'out'}"]
    for verb in (["evaluate"], ["predict", *folders]):
        assert_refused(capsys, [*verb, f"--workdir={trained.workdir}", word], named)
    assert not (trained.workdir / "eval").exists()
    assert not (tmp_path / "typo").exists()
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint(trained, tmp_path, capsys):
    for name in ("config.json", "data.json"):
        (tmp_path / name).write_bytes((trained.workdir / name).read_bytes())
    assert_refused(
        capsys, ["evaluate", f"--workdir={tmp_path}"], f"{tmp_path}: holds no checkpoint"
    )


def test_bad_folders_of_predict(trained, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    write(images / "a/one.png", IMAGE)

    def refused(images: Path, out: Path, named: str) -> None:
        words = ["predict", f"--workdir={trained.workdir}", f"--images={images}", f"--out={out}"]
        assert_refused(capsys, words, named)

    refused(tmp_path / "nowhere", out, str(tmp_path / "nowhere"))
    assert not out.exists()
    out.mkdir()
    refused(out, tmp_path / "other", f"{out}: no images")
    refused(images, images, f"{images}: not empty")
    refused(images, images / "a/one.png", f"{images / 'a/one.png'}: cannot be written")


def test_a_damaged_image_does_not_stop_the_others(trained, tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    noise = np.random.default_rng(0).integers(0, 256, (20, 24)).astype(np.uint8)
    for name in ("a/one", "a/two", "b", "c"):
        write(images / f"{name}.png", noise)
    (images / "a/two.png").write_bytes(encode(noise)[:-30])
    (images / "b.png").write_bytes(b"")
    words = ["predict", f"--workdir={trained.workdir}", f"--images={images}", f"--out={out}"]
    assert_refused(capsys, words, f"{images / 'a/two.png'}: ")
    with (out / "scores.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["a/one.png", "a/two.png", "b.png", "c.png"]
    for name, row in rows.items():
        good = name in ("a/one.png", "c.png")
        assert bool(row["score_sum"]) == bool(row["defective"]) == good
        assert row["error"].startswith("" if good else f"{images / name}: ")
        assert (not row["error"]) == good
        assert (out / f"heatmaps/{name}.png").exists() == good
    assert rows["a/one.png"]["score_sum"] == rows["c.png"]["score_sum"]
    for name in ("a/one.png", "c.png"):
        (images / name).unlink()
    assert_refused(capsys, [*words[:-1], f"--out={tmp_path / 'none'}"], "2 of 2 files cannot be")
    assert len((tmp_path / "none/scores.csv").read_text().splitlines()) == 3


def test_in_a_process_of_its_own(tmp_path):
    root = runs.make_folder(tmp_path)
    named = truncated(root / "data")
    words = [
        *runs.words(root),
        f"--workdir={tmp_path / 'run'}",
        "--config.sharding.data_parallel=-1",
    ]
    done = run(sys.executable, "-m", "pae_jax.main", "train", *words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"pae train: {named}: ")
