"""Large images in tiles: what the network sees, and that the joined map is that of the whole."""

import csv
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile

import pae_jax
from data_pipelines.errors import BadInput
from layouts import write
from pae_jax import anomaly_map, detection, image_ops, main, predict, unet
from pae_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from pae_jax.inference import stitching, tiles
from pae_jax.inference.stitching import Plan
from pae_jax.methods import METHODS

RNG = np.random.default_rng(0)
SMALL = ModelConfig(
    widths=(4,),
    convs_per_stage=1,
    bottleneck_layers=1,
    branch_width=4,
    dilation_rates=(1,),
    dilated_kernel_size=3,
    norm="none",
)
DEEP = dataclasses.replace(SMALL, widths=(2, 2), convs_per_stage=2, patch_size=2, skip="none")
WIDE = dataclasses.replace(SMALL, dilation_rates=(1, 3), dilated_kernel_size=5, input="high_pass")


def settings(**changes) -> Config:
    evaluation = EvalConfig(**changes)
    data = DataConfig(height=32, width=32, augmentation="flips")
    return Config(data=data, model=SMALL, eval=evaluation)


@pytest.fixture(scope="module")
def params():
    """Random weights whose reconstruction is far from the image, so that the map is not 0."""
    return METHODS["projection"].init(settings(), jax.random.key(0))


@pytest.fixture(scope="module")
def image():
    return RNG.integers(0, 256, (70, 91, 3), dtype=np.uint8)


# What is seen.


# The ends of the high pass are too small for float32.
@pytest.mark.parametrize(
    "config, rounded", [(SMALL, 0), (DEEP, 0), (WIDE, 4)], ids=["small", "deep", "wide"]
)
def test_reach_is_the_distance_to_which_the_gradient_reaches(config, rounded):
    """With equal, positive weights on a constant image no path of the gradient cancels."""
    stride, reach = unet.stride(config), unet.reach(config)
    middle = -(-reach // stride) * stride + 2 * stride
    x = jnp.ones((1, stride, 2 * middle, 3))
    network = unet.backbone(config)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x))

    def weight(leaf):
        if leaf.ndim == 1:
            return jnp.ones(leaf.shape)
        return jnp.full(leaf.shape, 1 / np.prod(leaf.shape[:-1]))

    variables = jax.tree.map(weight, shapes)

    @jax.jit
    def gradient(column):
        def value(x):
            return network.apply(variables, x)[0, :, column].sum()

        return jnp.abs(jax.grad(value)(x)).sum((0, 1, 3))

    distances = []
    for column in range(middle, middle + stride):
        values = np.asarray(gradient(column))
        (seen,) = np.nonzero(values > 1e-7 * values.max())
        distances.append(np.abs(seen - column).max())
    assert reach - rounded <= max(distances) <= reach
    assert seen.min() > 0 and seen.max() < x.shape[2] - 1


@pytest.mark.parametrize("name", anomaly_map.MAPS)
def test_reach_of_each_map_is_the_distance_to_which_a_pixel_changes_it(name):
    x = jnp.asarray(RNG.random((1, 8, 128, 1)), jnp.float32)
    y = jnp.asarray(RNG.random(x.shape), jnp.float32)
    function, reach = anomaly_map.MAPS[name], anomaly_map.REACH[name]
    before = function(x, y)
    distances = []
    for column in range(56, 64):
        change = jnp.abs(function(x, y.at[:, :, column].add(0.5)) - before).max((0, 1))
        distances.append(np.abs(np.nonzero(np.asarray(change) > 1e-6)[0] - column).max())
    # An image of 8 rows has two scales of the four; its reach is that of the coarser one.
    assert max(distances) == (2**2 if name == "msgms" else reach)


def test_what_depends_on_the_whole_image_has_no_halo():
    base = settings()
    reach = unet.reach(SMALL)
    assert tiles.neighbourhood(base) == (reach + 5, 2)
    assert tiles.neighbourhood(settings(anomaly_map="msgms")) == (reach + 16, 8)
    assert tiles.neighbourhood(settings(apply="tangent")) == (2 * reach + 5, 2)
    assert tiles.neighbourhood(settings(apply="iterate", iterations=3)) == (3 * reach + 5, 2)
    assert tiles.neighbourhood(dataclasses.replace(base, method="segmentation")) == (reach, 2)
    # An average over the image alone is the image's own map.
    flipped = settings(symmetries=True)
    plain, flips = (dataclasses.replace(flipped.data, augmentation=a) for a in ("none", "flips"))
    assert tiles.neighbourhood(dataclasses.replace(flipped, data=plain)) == (reach + 5, 2)
    flipped = dataclasses.replace(flipped, data=flips)
    learned = settings(anomaly_map="mse")
    learned = dataclasses.replace(learned, method="discrepancy")
    assert tiles.neighbourhood(learned) == (reach, 2)
    learned = dataclasses.replace(learned, eval=EvalConfig(anomaly_map="learned"))
    for config in (
        dataclasses.replace(base, model=dataclasses.replace(SMALL, norm="group")),
        settings(apply="fixed_point"),
        flipped,
        learned,  # the second network has a norm
    ):
        assert tiles.neighbourhood(config) is None
    for method in ("pca", "deep_svdd", "inpainting"):
        with pytest.raises(BadInput, match=f"tile: method={method} judges whole images"):
            tiles.neighbourhood(dataclasses.replace(base, method=method))


def test_a_calibration_by_position_has_no_tiles(params):
    with pytest.raises(BadInput, match=r"^tile: eval\.calibration=position knows maps"):
        tiles.plan(params, settings(calibration="position"), 3, "auto")


@pytest.mark.parametrize("tile", ["all", 5, 2**15, "16.5", True, ""])
def test_other_choices_are_refused(tile):
    with pytest.raises(BadInput, match=r"tile: off, auto or a side of 8 to 16384 pixels, not"):
        tiles.parse(tile)
    assert [tiles.parse(choice) for choice in ("off", "auto", "64", 64)] == ["off", "auto", 64, 64]


# Where tiles lie.


@pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 33, 61, 97])
@pytest.mark.parametrize("halo", [0, 4, 8])
def test_tiles_with_a_halo_take_each_pixel_once(size, halo):
    spans = stitching.spans_with_halo(size, 32, halo, 4)
    taken = np.concatenate([np.arange(span.first, span.last) for span in spans])
    np.testing.assert_array_equal(taken, np.arange(size))
    for span in spans:
        assert span.start % 4 == 0 and 0 <= span.start < span.stop <= size
        assert span.stop - span.start <= 32
        assert span.start == 0 or span.first - span.start >= halo
        assert span.stop == size or span.stop - span.last >= halo


@pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 33, 61])
def test_tiles_without_a_halo_overlap_by_half(size):
    spans = stitching.overlapping_spans(size, 16)
    assert (spans[0].start, spans[-1].stop) == (0, size)
    assert {span.stop - span.start for span in spans} == {min(16, size)}
    for one, other in itertools.pairwise(spans):
        assert 0 < other.start - one.start <= 8


# The joined map.


@pytest.mark.parametrize(
    "shape, changes",
    [
        ((59, 71), {}),  # the last tiles are shorter: four programs
        ((72, 88), {"anomaly_map": "msgms"}),
        ((58, 70), {"apply": "iterate", "iterations": 2}),
    ],
    ids=["ssim", "msgms", "twice"],
)
def test_with_a_halo_the_map_is_that_of_the_whole_image(params, shape, changes):
    config = settings(**changes)
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    whole, values = jax.jit(detection.unsmoothed_map, static_argnames="config")(
        params, image[None], config
    )
    reach, grid = tiles.neighbourhood(config)
    halo = -(-reach // grid) * grid

    def joined(halo):
        plan = Plan((2 * halo + 2 * grid,) * 2, halo, grid, 1)
        found, joined, differences = stitching.stitch(
            lambda batch: tiles._apply(params, batch, config, True), image, plan
        )
        assert differences == stitching.Differences()
        return found, joined

    found, close = joined(halo)
    np.testing.assert_allclose(close, values[0], atol=1e-5)
    np.testing.assert_allclose(found, whole[0], atol=1e-5)
    assert values.max() > 0.1
    if "iterations" in changes:  # a halo that is too narrow is seen
        assert np.abs(joined(grid)[1] - values[0]).max() > 1e-4


def test_blending_keeps_agreeing_maps_and_measures_others():
    picture = RNG.integers(0, 256, (50, 37, 1), dtype=np.uint8)
    calls = []

    def agreeing(batch):
        calls.append(batch.shape)
        return batch / np.float32(255), batch[..., 0] / np.float32(255)

    plan = Plan((16, 24), None, 1, 3)
    found, values, differences = stitching.stitch(agreeing, picture, plan)
    np.testing.assert_allclose(values, picture[..., 0] / 255, atol=1e-6)
    np.testing.assert_allclose(found, picture / 255, atol=1e-6)
    assert set(calls) == {(3, 16, 24, 1)} and len(calls) == 6  # 6 by 3 tiles
    assert differences.largest < 1e-6 and differences.pixels > 50 * 37 / 2

    def alternating(batch):
        numbers = np.arange(len(batch), dtype=np.float32)[:, None, None]
        return None, np.zeros(batch.shape[:3], np.float32) + numbers

    plan = Plan((50, 24), None, 1, 2)
    found, values, differences = stitching.stitch(alternating, picture[:, :36], plan)
    assert found is None
    assert (differences.largest, differences.total, differences.pixels) == (1, 600, 600)
    # From the first tile to the second the weights change linearly, with a sum of 1 or less.
    np.testing.assert_array_equal(values[:, :12], 0)
    np.testing.assert_array_equal(values[:, 24:], 1)
    left, right = image_ops.tent(24)[12:], image_ops.tent(24)[:12]
    np.testing.assert_allclose(values[7, 12:24], right / (left + right), rtol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "mean"])
def test_smoothing_is_that_of_small_maps(kind):
    values = RNG.random((40, 9)).astype(np.float32)
    kernel = anomaly_map.SMOOTHINGS[kind](11.3)  # wider than the map
    expected = image_ops.filter_axes(jnp.asarray(values), kernel)
    np.testing.assert_allclose(tiles.smooth(values, kernel), expected, atol=1e-6)
    assert tiles.smooth(values, np.ones(1)) is values


def test_auto_takes_the_largest_tile_that_fits(params, image, monkeypatch, messages):
    config = detection.inference_config(settings())

    def taken(side):
        example = jax.ShapeDtypeStruct((1, side, side, 3), np.uint8)
        sizes = tiles._apply.lower(params, example, config, True).compile().memory_analysis()
        return sizes.temp_size_in_bytes + sizes.output_size_in_bytes

    limit = taken(96)
    monkeypatch.setattr(tiles, "_MEMORY", limit)
    judged = tiles.Tiles(params, config, 3, "auto")
    side = judged.plan.side[0]
    assert judged.plan == Plan((side, side), 10, 2, 1) and 80 < side < 112
    assert taken(side) < 1.1 * limit
    assert f"tiles of {side} × {side} pixels, with a halo of 10" in messages[0]
    # All of the image, with the smoothing of the training size.
    found = judged.detect(image[None])
    _, values = detection.unsmoothed_map(params, jnp.asarray(image[None]), config)
    values = image_ops.filter_axes(values, anomaly_map.SMOOTHINGS["gaussian"](32 / 12))
    np.testing.assert_allclose(found.map, values, atol=1e-5)
    for name, scores in detection.image_scores(values, config.eval).items():
        np.testing.assert_allclose(found.scores[name], scores, rtol=1e-5)
    # Where most of a tile would be halo.
    monkeypatch.setattr(tiles, "_MEMORY", limit // 8)
    blended = tiles.Tiles(params, config, 3, "auto").plan
    assert blended == Plan((32, 32), None, 1, config.eval.batch_size)


# The verb and `load`.


def test_a_tile_as_large_as_the_image_is_the_whole_image(trained):
    model = pae_jax.load(trained.workdir, tile=40)
    picture = RNG.integers(0, 256, (24, 40, model.trained.channels), dtype=np.uint8)
    result = model(picture)
    config = detection.inference_config(model.config)
    fraction = config.eval.smoothing_fraction * 16 / 24
    changed = dataclasses.replace(config.eval, smoothing_fraction=fraction)
    config = dataclasses.replace(config, eval=changed)
    found = detection.start_batch(model.trained.params, picture[None], config)
    np.testing.assert_allclose(result.map, found.map[0], atol=1e-5)
    for name, score in result.scores.items():
        assert score == pytest.approx(float(found.scores[name][0]), rel=1e-4)
    assert np.abs(result.reconstruction / 255 - found.reconstruction[0]).max() < 0.6 / 255


def test_the_verb_writes_what_load_returns(trained, tmp_path, capsys, messages):
    pictures = [RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((33, 50, 3), (9, 12, 3))]
    for i, picture in enumerate(pictures):
        write(tmp_path / f"new/{i}.png", picture)
    words = [f"--workdir={trained.workdir}", f"--images={tmp_path}/new", f"--out={tmp_path}/out"]
    options = ["--tile=16", "--save_maps", "--pixel_threshold=0.5"]
    assert main.main(["predict", *words, *options]) == 0
    capsys.readouterr()
    assert any("16 × 16 pixels, overlapping by half, blended" in line for line in messages)
    assert any("that of score sum does not" in line for line in messages)
    assert any("where tiles overlap, their maps differ by" in line for line in messages)
    model = pae_jax.load(trained.workdir, pixel_threshold=0.5, tile="auto")
    assert model.tiles.plan == Plan((16, 16), None, 1, 4)
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    for i, (result, row) in enumerate(zip(model(pictures), rows, strict=True)):
        values = tifffile.imread(tmp_path / f"out/maps/{i}.png.tiff")
        assert values.shape == pictures[i].shape[:2] == result.reconstruction.shape[:2]
        # Without the reconstruction, which the verb leaves out, XLA compiles another program.
        np.testing.assert_allclose(values, result.map, atol=1e-6)
        assert float(row["score_sum"]) == pytest.approx(result.score)
        assert result.score == pytest.approx(values.sum(), rel=1e-5)
    assert model.tiles.differences.pixels > 0


def test_an_interrupted_prediction_goes_on_with_the_same_tiles_only(trained, tmp_path, monkeypatch):
    for i in range(3):
        write(tmp_path / f"new/{i}.png", RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    arguments = trained.workdir, tmp_path / "new", tmp_path / "out"
    write_job = predict._Job.write

    def interrupted(job, pair):
        if pair[0].image.name == "2.png":
            raise KeyboardInterrupt
        return write_job(job, pair)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predict._Job, "write", interrupted)
        predict.predict(*arguments, tile=16)
    for tile in ("off", 24):
        with pytest.raises(BadInput, match="tiles"):
            predict.predict(*arguments, tile=tile)
    scores = predict.predict(*arguments, tile=16)
    assert len(scores.read_text().splitlines()) == 4


def test_a_wrong_choice_is_refused_before_the_model_is_read(tmp_path, capsys):
    words = ["predict", "--workdir=/no/run", f"--images={tmp_path}", f"--out={tmp_path}/out"]
    assert main.main([*words, "--tile=large"]) == 2
    assert "tile: off, auto or a side of 8 to 16384 pixels, not large" in capsys.readouterr().err
