"""Masks with soft edges, labels or no pixel at all, and what the metrics of pixels make of them."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

import runs
from data_pipelines.dataset import open_test
from data_pipelines.decode import decode_mask, read_mask
from data_pipelines.spec import DatasetSpec
from layouts import category, encode, write
from pae_jax import evaluate, metrics
from pae_jax.metrics import measure

DISC = np.hypot(*(np.mgrid[:64, :64] - 31.5)) < 12
WHITE = (255 * DISC).astype(np.uint8)


def saved(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def coloured_palette(indices):
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    # The colours of PASCAL VOC: some classes are dark.
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 64, 0, 0])
    return image


def all_black_palette():
    image = Image.fromarray(DISC.astype(np.uint8)).convert("P")
    image.putpalette([0] * 768)
    return image


def alpha(colour, values=WHITE):
    return Image.fromarray(np.dstack([np.full((64, 64, 3), colour, np.uint8), values]))


LABELS = DISC * (1 + np.arange(64) // 16)  # four classes
SOFT = gaussian_filter(255.0 * DISC, 1)

EXACT = {
    "two values": encode(WHITE),
    "values 0 and 1": encode(DISC.astype(np.uint8)),
    "values 100 and 0": encode((100 * DISC).astype(np.uint8)),
    "one bit": saved(Image.fromarray(DISC)),
    "one bit, 0 is white": saved(Image.fromarray(DISC), "TIFF", compression="group4"),
    "labels": encode(LABELS.astype(np.uint8)),
    "labels in 16 bits": encode(LABELS.astype(np.uint16)),
    "grey RGB": encode(np.repeat(WHITE[..., None], 3, -1)),
    "red": encode((DISC[..., None] * [255, 0, 0]).astype(np.uint8)),
    "coloured palette": saved(coloured_palette(LABELS % 5)),
    "gif": saved(Image.fromarray(WHITE), "GIF"),
    "palette without colours": saved(all_black_palette()),
    "black on transparent": saved(alpha(0)),
    "white on transparent": saved(alpha(255)),
    "unused alpha": saved(Image.merge("LA", [Image.fromarray(WHITE), Image.new("L", (64, 64))])),
    "float": saved(Image.fromarray(DISC.astype(np.float32)), "TIFF"),
}
WITHIN_A_PIXEL = {
    "jpeg 75": saved(Image.fromarray(WHITE), "JPEG", quality=75),
    "jpeg 30": saved(Image.fromarray(WHITE), "JPEG", quality=30),
    "jpeg, 4:2:0": saved(Image.fromarray(WHITE).convert("RGB"), "JPEG", quality=75),
    "jpeg of 100": saved(Image.fromarray((100 * DISC).astype(np.uint8)), "JPEG", quality=90),
    "soft": encode(SOFT.astype(np.uint8)),
    "soft palette": saved(Image.fromarray(SOFT.astype(np.uint8)).quantize(16)),
    "soft float": saved(Image.fromarray((SOFT / 255).astype(np.float32)), "TIFF"),
    "soft 16 bits": encode((SOFT * 257).astype(np.uint16)),
    "soft alpha": saved(alpha(0, SOFT.astype(np.uint8))),
    "webp": saved(Image.fromarray(WHITE).convert("RGB"), "WEBP", quality=60),
}


@pytest.mark.parametrize("data", EXACT.values(), ids=EXACT)
def test_masks_of_two_values_and_labels_are_exact(data):
    np.testing.assert_array_equal(decode_mask(data, "m", None), DISC)


@pytest.mark.parametrize("data", WITHIN_A_PIXEL.values(), ids=WITHIN_A_PIXEL)
def test_soft_masks_lose_only_their_edge(data):
    native = read_mask(data, "m")
    assert native.rule == "half"
    wrong = native.mask != DISC
    assert wrong.sum() <= 12  # of the 452 pixels of the disc
    # A perfect map keeps its score: no specks around the edge that count as regions.
    maps = [DISC + 0.2 * np.random.default_rng(0).random((64, 64))]
    assert metrics.aupro(maps, [native.mask]) > 0.97


def test_the_orientation_of_a_mask_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    half = np.zeros((8, 6), np.uint8)
    half[:2] = 255
    turned = decode_mask(saved(Image.fromarray(half), exif=exif), "m", None)
    np.testing.assert_array_equal(turned, np.rot90(half, -1) > 0)


def test_an_empty_mask_stays_empty():
    for image in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        assert not decode_mask(saved(Image.fromarray(image), "JPEG"), "m", None).any()
    white_is_zero = io.BytesIO()
    tifffile.imwrite(white_is_zero, np.full((8, 8), 65535, np.uint16), photometric="miniswhite")
    assert not decode_mask(white_is_zero.getvalue(), "m", None).any()


# A data set.


@pytest.fixture
def spec(tmp_path):
    root = category(tmp_path / "thing")
    return DatasetSpec("folder", str(root), "", (20, 24), "auto", str(tmp_path / "cache"))


def test_soft_masks_and_labels_are_told_in_one_line_each(spec, messages):
    soft = np.zeros((20, 24), np.uint8)
    soft[4:8, 6:12] = np.arange(100, 250, 25)
    labels = np.zeros((20, 24), np.uint8)
    labels[2:4], labels[4:8] = 1, 2
    for i in range(2):
        write(mask_path(spec, "crack", i), soft)
    write(mask_path(spec, "dent", 0), labels)
    for _ in range(2):  # decoded, then from the cache
        test = open_test(spec, channels=1)
        assert [int(mask.sum()) for mask in test.masks[:3]] == [20, 20, 6 * 24]
    lines = [line for line in messages if "two values" in line]
    assert len(lines) == 2
    assert "numbers of classes" in lines[0]
    assert lines[0].endswith("(1 of 4 masks)")
    assert "above half" in lines[1]
    assert lines[1].endswith("(2 of 4 masks)")


def mask_path(spec, defect_type, i):
    return Path(spec.root, f"ground_truth/{defect_type}/{i:03d}_mask.png")


def speck():
    mask = np.zeros((20, 24), np.uint8)
    mask[9, 9] = 255
    return mask


def test_empty_masks_are_named_and_have_no_labels(spec, messages):
    write(mask_path(spec, "crack", 1), np.zeros((20, 24), np.uint8))
    write(mask_path(spec, "dent", 0), speck())
    test = open_test(spec._replace(shape=(5, 6)), channels=1)
    assert test.has_pixel_labels.tolist() == [True, False, False, True, True, True, True]
    assert test.has_native_labels.tolist() == [True, False, True, True, True, True, True]
    assert [line.partition(";")[0] for line in messages] == [
        f"mask of {spec.root}/test/crack/001.png: marks no pixel, as 1 of 4 masks",
        f"mask of {spec.root}/test/dent/000.png: marks no pixel at 6×5, as 1 masks of too small "
        "defects",
    ]
    same_size = open_test(spec, channels=1)
    assert same_size.has_pixel_labels.tolist() == [True, False, True, True, True, True, True]


def test_without_masks_there_are_no_labels(spec):
    shutil.rmtree(f"{spec.root}/ground_truth")
    test = open_test(spec, channels=1)
    assert test.has_pixel_labels.tolist() == [False] * 4 + [True] * 3


def test_metrics_leave_out_the_pixels_of_empty_masks(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    options = ["--config.eval.bootstrap_resamples=5", "--config.eval.diagnostics=False"]
    mask = next((run.root / "data/ground_truth").rglob("*.png"))
    shape = np.asarray(Image.open(mask)).shape[:2]
    image = run.root / "data/test" / mask.parent.name / mask.name.replace("_mask", "")
    # The same metrics as without the image, which its mask of no pixel leaves out.
    write(mask, np.zeros(shape, np.uint8))
    record, report = evaluate.evaluate(run.workdir, overrides=options)
    assert record["evaluated_at"]["images_without_pixel_labels"] == 1
    assert "leave out 1 defective images" in report.read_text()
    mask.unlink()
    image.unlink()
    without = evaluate.evaluate(run.workdir, overrides=options).metrics
    assert without["evaluated_at"]["images_without_pixel_labels"] == 0
    for name in measure.PIXEL_METRICS:
        assert record[name] == without[name]
    for name in ("pixel_auroc", "pixel_aupro"):
        assert record["intervals"][name] == without["intervals"][name]


def test_all_masks_empty(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    for mask in (run.root / "data/ground_truth").rglob("*.png"):
        write(mask, np.zeros(np.asarray(Image.open(mask)).shape[:2], np.uint8))
    options = ["--config.eval.bootstrap_resamples=5", "--config.eval.diagnostics=False"]
    record = evaluate.evaluate(run.workdir, overrides=options).metrics
    assert all(np.isnan(record[name]) for name in measure.PIXEL_METRICS)
    assert record["image_auroc_sum"] == record["image_auroc_sum"]
