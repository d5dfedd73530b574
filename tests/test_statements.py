"""Sentences about rates are true for every number of images: counted and simulated."""

import re

import numpy as np
import pytest

from pae_jax.report import statements

NUMBERS = (1, 2, 3, 19, 20, 21, 22, 41, 100, 1000)
RATES = (0.0, 0.01, 0.05, 0.1, 0.5, 1.0)


def choose(scores, rate):
    """The rule of `detection.choose_thresholds`."""
    return np.quantile(scores, 1 - rate, axis=-1, method="higher")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n", NUMBERS)
def test_the_counts_are_those_of_the_rule(n, rate):
    scores = np.random.default_rng(n).permutation(n).astype(float)
    held_out, (k, m) = statements.exceedance(n, rate)
    assert (scores > choose(scores, rate)).sum() == held_out
    assert held_out <= rate * n + 1e-9
    assert (k, m) == (held_out + 1, n + 1)
    # With ties fewer exceed it, so that "at most" holds.
    tied = np.round(scores / 3)
    assert (tied > choose(tied, rate)).sum() <= held_out


@pytest.mark.parametrize("n", [1, 2, 20, 21, 100])
def test_the_probability_is_that_of_a_new_score(n):
    rng, draws = np.random.default_rng(0), 20000
    thresholds = choose(rng.gumbel(size=(draws, n)), 0.05)
    measured = (rng.gumbel(size=draws) > thresholds).mean()
    k, m = statements.exceedance(n, 0.05).chances
    assert measured == pytest.approx(k / m, abs=4 * np.sqrt(0.25 / draws))


@pytest.mark.parametrize(
    ("n", "source", "odds"),
    [
        (1, "The threshold is the score of the one normal image held out", "1 in 2 (50 %)"),
        (2, "largest score of the 2 normal images", "1 in 3 (33.3 %)"),
        (20, "largest score of the 20 normal images", "1 in 21 (4.76 %)"),
        (21, "At most 1 of the 21 normal images", "2 in 22 (9.09 %)"),
        (1000, "At most 49 of the 1000 normal images", "50 in 1001 (5 %)"),
    ],
)
def test_the_sentence(n, source, odds):
    text = statements.threshold(n, 0.05)
    assert source in text
    assert f"a probability of at most {odds}" in text
    assert "asks for 5 %" in text
    # No number of images is said to exceed it but the one that was counted.
    counts = re.findall(r"At most (\d+) of", text)
    assert counts == ([] if n < 21 else [str(statements.exceedance(n, 0.05).held_out)])


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (1, "1 in 2 (50 %), 5 % asked for; the threshold is the score of 1 held-out normal image"),
        (
            19,
            "1 in 20 (5 %), 5 % asked for; "
            "the threshold is the largest score of 19 held-out normal images",
        ),
        (21, "2 in 22 (9.09 %), 5 % asked for; from 21 held-out normal images"),
    ],
)
def test_the_words_of_the_table(n, text):
    assert statements.expected(n, 0.05) == f"at most {text}"


@pytest.mark.parametrize("n", [3, 20, 1000])  # fewer images are refused
def test_with_a_calibration_no_bound_is_claimed(n):
    words = statements.expected(n, 0.05, calibrated=True)
    assert words.startswith(f"about {statements.chance(n, 0.05)}, 5 % asked for")
    text = statements.threshold(n, 0.05, calibrated=True)
    assert "standardised by the other ones" in text
    assert text.endswith("this probability is an approximation.")
    assert "approximation" not in statements.threshold(n, 0.05)


def test_a_class_without_images_has_no_narrow_intervals():
    plain = "Intervals hold the middle 95 % of 50 draws of the test images with replacement."
    assert statements.intervals(50, 20, 0) == plain
    assert statements.intervals(50, 0, 20) == plain


def test_the_sentence_about_intervals():
    plain = "Intervals hold the middle 95 % of 50 draws of the test images with replacement."
    assert statements.intervals(50, 20, 1000) == plain
    assert statements.intervals(50, 1, 20) == (
        f"{plain} There is one good image, so that they show no variation between good images."
    )
    assert statements.intervals(50, 20, 2) == (
        f"{plain} With 2 defective images they tend to be too narrow."
    )
