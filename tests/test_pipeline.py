"""Batches: a pure function of seed and step for any processes, threads and restarts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.pipeline import batches, index_batch

N, M = 13, 5
IMAGES = np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
TEXTURES = np.arange(M, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)


def take(count, **options):
    """Returns the batches of single steps, for any number of steps per element."""
    options = {"seed": 3, "batch_size": 4} | options
    steps = []
    for element in batches(IMAGES, TEXTURES, **options):
        assert len(element["image"]) == len(element["texture"]) == options.get("steps", 1)
        for i in range(len(element["image"])):
            steps.append({name: values[i] for name, values in element.items()})
        if len(steps) >= count:
            return steps[:count]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_shapes_and_content():
    for step, batch in enumerate(take(10)):
        assert batch["image"].shape == (4, 4, 6, 3)
        assert batch["texture"].shape == (4, 8, 8, 1)
        assert batch["image"].dtype == batch["texture"].dtype == np.uint8
        index = index_batch(N, M, seed=3, batch_size=4, step=step)
        assert set(index) == set(batch) == {"image", "texture"}
        np.testing.assert_array_equal(batch["image"], IMAGES[index["image"]])
        np.testing.assert_array_equal(batch["texture"], TEXTURES[index["texture"]])


@pytest.mark.parametrize("start", [1, 4, 9])
def test_resumed_equals_uninterrupted(start):
    assert_same(take(12)[start:], take(12 - start, start_step=start))


def test_threads_do_not_matter():
    assert_same(take(20, num_threads=1), take(20, num_threads=8))


@pytest.mark.parametrize("start", [0, 6])
def test_several_steps_make_one_element(start):
    assert_same(take(12, steps=3, start_step=start), take(12, start_step=start))


def test_by_index_names_what_would_be_gathered():
    for index, batch in zip(take(9, by_index=True, steps=3), take(9), strict=True):
        assert index["image"].dtype == index["texture"].dtype == np.int32
        np.testing.assert_array_equal(IMAGES[index["image"]], batch["image"])
        np.testing.assert_array_equal(TEXTURES[index["texture"]], batch["texture"])


@pytest.mark.parametrize("rows", [(0, 1), (0, 3), (2,), (0, 1, 2, 3)])
@pytest.mark.parametrize("by_index", [False, True])
def test_a_process_reads_some_rows_of_the_batch(rows, by_index):
    whole = take(8, by_index=by_index)
    expected = [{key: values[list(rows)] for key, values in step.items()} for step in whole]
    assert_same(take(8, rows=rows, by_index=by_index), expected)


def sequence(count, batch_size, **options):
    """Returns the first indices of images, of textures and of reserved images, if there are any."""
    draws = [
        index_batch(N, M, **({"seed": 3} | options), batch_size=batch_size, step=s)
        for s in range(-(-count // batch_size))
    ]
    return [np.concatenate([draw[name] for draw in draws])[:count] for name in draws[0]]


@given(batch_size=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_the_order_does_not_depend_on_the_batch_size(batch_size):
    for ours, one_by_one in zip(sequence(65, batch_size), sequence(65, 1), strict=True):
        np.testing.assert_array_equal(ours, one_by_one)


def test_every_image_and_texture_once_an_epoch():
    images, textures = sequence(N * M, 4)
    image_epochs, texture_epochs = images.reshape(M, N), textures.reshape(N, M)
    for epochs, n in ((image_epochs, N), (texture_epochs, M)):
        assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in image_epochs}) == M


def test_reserved_images_have_a_sequence_of_their_own():
    """The others come as if there were no more of them."""
    images, textures, reserved = sequence(36, 4, reserved=4)
    expected = batches(IMAGES[: N - 4], TEXTURES, seed=3, batch_size=36)
    np.testing.assert_array_equal(IMAGES[images], next(expected)["image"][0])
    np.testing.assert_array_equal(textures, sequence(36, 4)[1])
    assert (np.sort(reserved.reshape(9, 4), axis=1) == np.arange(N - 4, N)).all()
    assert len({tuple(epoch) for epoch in reserved.reshape(9, 4)}) > 4


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"num_threads": 1}, {"rows": (0, 1, 2, 3)}])
def test_reserved_images_are_read_by_row(options):
    whole = take(9, reserved=4)
    assert_same(take(9, reserved=4, **options), whole)
    assert_same(take(5, reserved=4, start_step=4), whole[4:])
    for index, batch in zip(take(9, reserved=4, by_index=True), whole, strict=True):
        assert set(index) == {"image", "texture", "reserved"}
        np.testing.assert_array_equal(IMAGES[index["reserved"]], batch["reserved"])


def test_seeds_and_streams_are_independent():
    first, second = sequence(N * 3, 1, seed=0)[0], sequence(N * 3, 1, seed=1)[0]
    assert (first != second).any()
    # The epochs of one seed do not appear later in the other, either.
    epochs = {tuple(e) for s in (first, second) for e in s.reshape(3, N)}
    assert len(epochs) == 6
    index = index_batch(50, 50, seed=0, batch_size=50, step=0)
    assert (index["image"] != index["texture"]).any()


def test_orders_are_uniform():
    # 3! orders of three images over 1,200 epochs: 200 each, standard deviation 13.
    index = index_batch(3, 1, seed=0, batch_size=3_600, step=0)
    _, counts = np.unique(index["image"].reshape(-1, 3), axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 200).max() < 60


def test_the_order_is_pinned():
    # The same for all versions and machines: a resumed run continues the order it began with.
    index = index_batch(7, 3, seed=11, batch_size=9, step=2)
    assert index["image"].tolist() == [3, 5, 6, 2, 6, 0, 1, 4, 5]
    assert index["texture"].tolist() == [0, 1, 2, 1, 2, 0, 1, 2, 0]


def test_one_image_and_one_texture():
    pair = batches(IMAGES[:1], TEXTURES[:1], seed=0, batch_size=3)
    assert next(pair)["image"].shape == (1, 3, 4, 6, 3)
