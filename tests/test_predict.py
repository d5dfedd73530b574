"""`pae predict`: what it judges, what it writes, and that an interruption changes nothing."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import tifffile
from PIL import Image

import runs
from data_pipelines.cache import in_order
from data_pipelines.errors import BadInput
from layouts import encode, write
from pae_jax import detection, main, predict
from pae_jax.inference import output, stream
from pae_jax.inference.regions import Region, find_regions
from pae_jax.metrics import measure
from pae_jax.report import pictures
from pae_jax.workdir import lock, trained_model

RNG = np.random.default_rng(0)
# About a quarter of the map of a noise image exceeds this, in several regions.
LIMIT = 0.55


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(out: Path) -> list[str]:
    return [row["name"] for row in rows(out / "scores.csv")]


def contents(out: Path) -> dict[str, bytes]:
    paths = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(capsys, words: list[str], expected: str) -> None:
    assert main.main(["predict", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert expected in line, line


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Eleven images, so that batches of four end with a part of one; the sixth is damaged."""
    folder = tmp_path_factory.mktemp("new")
    for i in range(11):
        write(folder / f"{i:02d}.png", noise(20 + i, 24))
    (folder / "05.png").write_bytes(encode(noise(20, 24))[:-30])
    return folder


@pytest.fixture(scope="module")
def complete(trained, images, tmp_path_factory) -> Path:
    """The results of an undisturbed prediction with everything that can be written."""
    out = tmp_path_factory.mktemp("complete") / "out"
    with pytest.raises(BadInput, match=r"05\.png: .*; 1 of 11 files cannot be read"):
        start(trained, images, out)
    return out


def start(trained: runs.Run, images: Path, out: Path, **options: object) -> None:
    everything = {"pixel_threshold": LIMIT, "save_maps": True, "save_reconstructions": True}
    predict.predict(trained.workdir, images, out, **everything | options)


# What is written.


def test_regions_of_a_drawn_map():
    values = np.zeros((8, 10), np.float32)
    values[1:3, 2:5] = 0.5
    values[2, 3] = 0.75
    values[3, 5] = 0.625  # touches the block at a corner
    values[6, 0] = 0.9375
    values[7, 8:] = 0.25
    values[5, 9] = 0.125  # below the threshold
    expected = [
        Region(left=0, top=6, width=1, height=1, area=1, peak=0.9375, mean=0.9375),
        Region(left=2, top=1, width=4, height=3, area=7, peak=0.75, mean=3.875 / 7),
        Region(left=8, top=7, width=2, height=1, area=2, peak=0.25, mean=0.25),
    ]
    assert find_regions(values, values > 0.125) == expected
    assert find_regions(values, values > 2) == []
    assert find_regions(values, values > -1)[0].area == values.size


@pytest.mark.parametrize("pixels", [7, 300, 2**20])
def test_regions_of_any_map_are_those_of_scipy(pixels, monkeypatch):
    """Whether or not the map is taken in one piece."""
    monkeypatch.setattr(pictures, "_STRIP", pixels)
    values = scipy.ndimage.gaussian_filter(RNG.random((40, 50)), 1).astype(np.float32)
    mask = values > 0.55
    labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    regions = find_regions(values, mask)
    assert len(regions) == count > 20
    for name, expected in (
        ("area", scipy.ndimage.sum_labels(mask, labels, range(1, count + 1))),
        ("peak", scipy.ndimage.maximum(values, labels, range(1, count + 1))),
        ("mean", scipy.ndimage.mean(values, labels, range(1, count + 1))),
    ):
        found = sorted(getattr(region, name) for region in regions)
        np.testing.assert_allclose(found, sorted(expected), rtol=1e-6)
    for region in regions:
        box = np.s_[region.top :, region.left :]
        inside = labels[box][: region.height, : region.width]
        assert (inside == labels[values == np.float32(region.peak)][0]).sum() == region.area


def test_every_file_has_the_size_of_its_image_and_all_agree(trained, tmp_path):
    photograph, out = noise(100, 613, 3), tmp_path / "out"
    write(tmp_path / "x.png", photograph)
    model = trained_model.load(trained.workdir)
    grey = Image.fromarray(photograph).convert("L").resize((16, 16), Image.Resampling.BILINEAR)
    batch = np.asarray(grey)[None, ..., None]
    (result,) = detection.detect_all(model.params, batch, model.config)
    expected_map = measure.resize_map(result.map, (100, 613))
    limit = float(np.quantile(expected_map, 0.7))

    start(trained, tmp_path / "x.png", out, pixel_threshold=limit)
    values = tifffile.imread(out / "maps/x.png.tiff")
    mask = read(out / "masks/x.png.png")
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected_map)
    np.testing.assert_array_equal(mask, 255 * (values > limit))
    assert read(out / "heatmaps/x.png.png").shape == (100, 613, 3)
    assert read(out / "reconstructions/x.png.png").shape == (100, 613, 3)
    (row,) = rows(out / "scores.csv")
    for name, score in result.scores.items():
        assert float(row[f"score_{name}"]) == float(score)
    limits = trained_model.thresholds(trained.workdir, model)
    assert float(row["threshold"]) == limits.score
    assert row["defective"] == str(int(float(row["score_sum"]) > limits.score))

    labels, count = scipy.ndimage.label(mask, np.ones((3, 3)))
    regions = rows(out / "regions.csv")
    assert int(row["regions"]) == count == len(regions) > 1
    assert [int(region["region"]) for region in regions] == [*range(1, count + 1)]
    peaks = [float(region["peak"]) for region in regions]
    assert peaks == sorted(peaks, reverse=True)
    written = sorted(tuple(float(region[key]) for key in Region._fields) for region in regions)
    expected = [
        (
            *(columns.start, rows_.start, columns.stop - columns.start, rows_.stop - rows_.start),
            *((labels == i).sum(), values[labels == i].max(), values[labels == i].mean()),
        )
        for i, (rows_, columns) in enumerate(scipy.ndimage.find_objects(labels), 1)
    ]
    np.testing.assert_allclose(written, sorted(expected), rtol=1e-5)


def test_thresholds_of_the_user(trained, images, tmp_path, capsys):
    """With both, neither the stored scores nor the training images are needed."""
    run = runs.clone(trained, tmp_path)
    (run.workdir / "thresholds.json").unlink()
    shutil.rmtree(run.root)
    words = [f"--workdir={run.workdir}", f"--images={images / '00.png'}"]
    refused(capsys, [*words, f"--out={tmp_path / 'a'}", "--threshold=0"], "training images")
    refused(capsys, [*words, f"--out={tmp_path / 'a'}", "--threshold=nan"], "threshold: a finite")
    assert not (tmp_path / "a").exists()
    for threshold, defective in ((-1, "1"), (1e9, "0")):
        out = tmp_path / defective
        limits = [f"--threshold={threshold}", "--pixel_threshold=-1"]
        assert main.main(["predict", *words, f"--out={out}", *limits]) == 0
        (row,) = rows(out / "scores.csv")
        assert (row["defective"], float(row["threshold"])) == (defective, threshold)
        (region,) = rows(out / "regions.csv")  # every pixel exceeds -1
        assert (region["width"], region["height"], region["area"]) == ("24", "20", "480")
        assert not (out / "maps").exists()


def test_a_result_does_not_depend_on_the_other_images(trained, images, tmp_path):
    """Of the same batch size bit for bit; of another one up to rounding."""
    for place, others in (("a", [noise(20, 24) for _ in range(3)]), ("b", []), ("c", [])):
        write(tmp_path / place / "0.png", read(images / "01.png"))
        for i, other in enumerate(others):
            write(tmp_path / place / f"{i + 1}.png", other)
    for i in range(3):
        write(tmp_path / f"b/{i + 1}.png", np.full((9, 9), 80 * i, np.uint8))
    found = {}
    for place in "abc":
        out = tmp_path / "out" / place
        start(trained, tmp_path / place, out)
        maps = contents(out)["maps/0.png.tiff"]
        found[place] = maps, float(rows(out / "scores.csv")[0]["score_sum"])
    assert found["a"] == found["b"]
    assert found["c"][1] == pytest.approx(found["a"][1], rel=1e-5)


# Which images.


@pytest.fixture
def places(tmp_path) -> Path:
    """A folder with nested and linked folders, a file that is no image, and results in it."""
    root = tmp_path / "root"
    for name in ("b.png", "a/1.png", "a/2.JPG", "deep/er/3.png", "out/heatmaps/b.png.png"):
        write(root / name, noise(9, 8))
    for name in ("out/masks/b.png.png", "run/panels/step_1.png", "run/eval/x.png", "new/x.png"):
        write(root / name, noise(9, 8))
    for name in ("out/scores.csv", "run/config.json", "run/data.json", "new/.unfinished", "n.txt"):
        (root / name).write_text("")
    write(tmp_path / "elsewhere/4.png", noise(9, 8))
    (root / "link").symlink_to(tmp_path / "elsewhere")
    return root


def listed(place: object) -> list[str]:
    return [image.name for image in predict.list_images(str(place), output.is_result)]


def test_folders_files_and_patterns(places, messages):
    everything = ["a/1.png", "a/2.JPG", "b.png", "deep/er/3.png", "link/4.png"]
    assert listed(places) == everything
    (line,) = messages
    assert "3 folder of results" in line and "1 .txt" in line
    assert listed(f"{places}/**") == everything
    assert listed(places / "b.png") == ["b.png"]
    assert listed(places / "*.png") == ["b.png"]
    assert listed(places / "a*") == ["a/1.png", "a/2.JPG"]
    (places / "empty").mkdir()
    assert listed(places / "[ade]*") == ["a/1.png", "a/2.JPG", "deep/er/3.png"]
    assert listed(places / "*/*.png") == ["a/1.png", "link/4.png"]
    assert listed(places / "**/[1-3].png") == ["a/1.png", "deep/er/3.png"]
    # Results that are named themselves are meant.
    assert listed(places / "out/masks") == ["b.png.png"]
    assert listed(places / "out/masks/*.png") == ["b.png.png"]
    write(places / "x[1].png", noise(9, 8))
    assert listed(places / "x[1].png") == ["x[1].png"]
    for place, line in (
        (places / "*.tif", "matches no image"),
        (places / "gone", "gone: No such file or directory"),
        (places / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(BadInput, match=line):
            listed(place)


def test_lists(places, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("image;split\nroot/b.png;test\nelsewhere/4.png;test\nroot/gone.png;test\n")
    assert listed(path) == ["root/b.png", "elsewhere/4.png", "root/gone.png"]
    path = places / "list.TXT"
    odd = os.fsdecode(b"a/\xfc .png")
    write(places / odd, noise(9, 8))
    path.write_bytes(
        b"\xef\xbb\xbfa/1.png\r\n\n" + os.fsencode(odd) + b"\n" + bytes(places / "a/2.JPG")
    )
    assert listed(path) == ["1.png", odd.removeprefix("a/"), "2.JPG"]
    for text, line in (
        ("", "names no image"),
        ("x.png\ny.png\n", "none of its 2 files exists .first: .*x.png"),
        ("b.png\na/1.png\n./b.png\n", "line 3: ./b.png stands in line 1, too"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=line):
            listed(path)
    other = tmp_path / "other.csv"
    other.write_text("name\nb.png\n")
    with pytest.raises(BadInput, match="no column image"):
        listed(other)


def test_a_list_whose_file_is_missing_and_a_second_prediction_beside_the_first(
    trained, places, tmp_path, capsys
):
    (places / "list.txt").write_text("b.png\ngone.png\n")
    words = [f"--workdir={trained.workdir}", f"--images={places / 'list.txt'}"]
    refused(capsys, [*words, f"--out={places / 'one'}"], "gone.png: cannot be read (No such file")
    good, gone = rows(places / "one/scores.csv")
    assert (good["error"], gone["name"], gone["threshold"]) == ("", "gone.png", "")
    words = [f"--workdir={trained.workdir}", f"--images={places}", f"--out={places / 'two'}"]
    assert main.main(["predict", *words]) == 0
    assert names(places / "two") == ["a/1.png", "a/2.JPG", "b.png", "deep/er/3.png", "link/4.png"]


# Interruptions.


@pytest.mark.parametrize("stand", [0, 3, 4, 6, 11])
def test_an_interrupted_prediction_goes_on(  # noqa: PLR0917 - fixtures
    trained, images, complete, tmp_path, monkeypatch, stand
):
    """After so many rows; a part of a line and regions without their image are dropped."""
    out, append = tmp_path / "out", output.Output.append

    def interrupted(self, row, regions):
        if self.done == stand:
            raise KeyboardInterrupt
        append(self, row, regions)

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "append", interrupted)
        if stand < 11:
            with pytest.raises(KeyboardInterrupt):
                start(trained, images, out)
        else:
            patch.setattr(output.Output, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                start(trained, images, out)
    assert names(out) == names(complete)[:stand]
    with (out / "scores.csv").open("a") as file:
        file.write("07.png,1.5,0.")
    with (out / "regions.csv").open("a") as file:
        file.write("07.png,1,0,0,1,1,1,0.5,0.5\n08.png,1")
    judged = []
    write_row = predict._Job.write
    monkeypatch.setattr(
        predict._Job, "write", lambda self, pair: (judged.append(pair), write_row(self, pair))[1]
    )
    with pytest.raises(BadInput, match="1 of 11 files"):
        start(trained, images, out)
    assert len(judged) == 11 - stand
    assert len(rows(complete / "regions.csv")) > 11
    assert contents(out) == contents(complete)
    with pytest.raises(BadInput, match="not empty; results are never overwritten"):
        start(trained, images, out)


def test_rows_stand_only_with_their_regions(trained, images, complete, tmp_path):
    """As after a loss of power, which may keep the end of one table and lose that of the other."""
    out = tmp_path / "out"
    with pytest.raises(BadInput):
        start(trained, images, out)
    for name, keep in (("regions.csv", 0.4), ("scores.csv", 0.9)):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[: int(keep * len(data))] + b"\0" * 9)
    model = predict.load(trained.workdir, pixel_threshold=LIMIT)
    job = predict._Job(model, None, out, True, True)
    record = predict._record(job, str(images), names(complete))
    output.files.write_json(out / output.UNFINISHED, record)
    with pytest.raises(BadInput, match="1 of 11 files"):
        start(trained, images, out)
    assert contents(out) == contents(complete)


def test_another_prediction_is_not_continued(trained, images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(trained, images, out)
    before = contents(out)
    shutil.copytree(images, tmp_path / "copy")
    for place, options, line in (
        (images, {"threshold": 5.0}, r"threshold is .* there and 5\.0 now"),
        (images, {"pixel_threshold": 0.3}, r"pixel_threshold is 0\.55 there and 0\.3 now"),
        (images, {"save_maps": False}, "save_maps is True there and False now"),
        (
            images,  # with both thresholds, nothing is chosen and stored in the workdir
            {"overrides": ["--config.eval.smoothing=none"], "threshold": 5.0},
            r"settings\.smoothing is 'gaussian' there and 'none' now",
        ),
        (tmp_path / "copy", {}, r"images\.place is "),
    ):
        with pytest.raises(BadInput, match="unfinished prediction by other settings") as caught:
            start(trained, place, out, **options)
        caught.match(line)
    # What has no part in the results may change, such as the memory that they need.
    assert contents(out) == before
    with pytest.raises(BadInput, match="1 of 11 files"):
        start(trained, images, out, overrides=["--config.eval.batch_size=2"])


def test_one_process_at_a_time(trained, images, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    words = [f"--workdir={trained.workdir}", f"--images={images / '01.png'}", f"--out={out}"]
    with lock.lock(out, "predicting"):
        refused(capsys, words, f"{out}: another process is predicting there")
    assert main.main(["predict", *words]) == 0
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def test_killed_and_repeated(trained, images, tmp_path):
    """By SIGKILL in a process of its own: every row once, and all as without."""
    many = tmp_path / "many"
    for i in range(60):
        write(many / f"{i:02d}.png", noise(200, 300))
    words = ["predict", f"--workdir={trained.workdir}", f"--images={many}"]
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "pae_jax.main", *words, f"--out={out}"],
        cwd=runs.CONFIGS.parent,
        env=runs.environment() | {"GLIBC_TUNABLES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "scores.csv").exists() or len(names(out)) < 5:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        _, _ = process.communicate()
    stood = len(names(out))
    assert 5 <= stood < 60
    assert main.main([*words, f"--out={out}"]) == 0
    assert names(out) == [f"{i:02d}.png" for i in range(60)]
    assert main.main([*words, f"--out={tmp_path / 'undisturbed'}"]) == 0
    found = {name: data for name, data in contents(out).items() if not name.endswith(".tmp")}
    assert found == contents(tmp_path / "undisturbed")


# The stream.


def test_few_images_are_in_memory_at_once():
    """A slow writer holds the decoding back, whatever the number of images."""
    size, alive, most = 4, 0, 0

    def decode(i: int) -> tuple[int, np.ndarray]:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return i, np.full((2, 2, 1), i % 256, np.uint8)

    def begin(batch: np.ndarray) -> detection.Detection:
        assert batch.shape == (size, 2, 2, 1)
        values = batch[..., 0].astype(np.float32)
        return detection.Detection(None, values, {"sum": values.sum(axis=(1, 2))})

    ahead = stream.ahead(size)
    for count in (1, 300):
        pairs = stream.detect_in_batches(begin, in_order(decode, range(count), ahead), size)
        for number, (i, found) in enumerate(in_order(lambda pair: pair, pairs, ahead)):
            assert i == number
            assert found is not None and found.scores["sum"] == 4 * (i % 256)
            alive -= 1
        assert alive == 0
    assert most <= 2 * ahead + 3 * size


def test_sizes_of_batches():
    sizes = [stream.batch_size(n, 16) for n in (0, 1, 2, 3, 5, 9, 16, 17, 20_000)]
    assert sizes == [1, 1, 2, 4, 8, 16, 16, 16, 16]
    assert stream.batch_size(9, 12) == 12
