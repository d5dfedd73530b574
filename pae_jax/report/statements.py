"""Sentences about rates and intervals that hold for every number of images."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pae_jax.config import EvalConfig

# With fewer images of a class, percentile intervals are visibly too narrow. Of intervals for an
# AUROC of 0.8, 47 % held the true value with 2 images of each class, 84 % with 5, 94 % with 10.
FEW = 10


class Exceedance(NamedTuple):
    """How many normal images exceed a threshold that was chosen from n of them.

    Attributes:
      held_out: the largest number of the n images that exceed it.
      chances: the largest probability that a further normal image exceeds it, as (k, m) for k in m.
        It is an average over sets of n images and holds for images of the same distribution.
    """

    held_out: int
    chances: tuple[int, int]


def exceedance(images: int, rate: float) -> Exceedance:
    """Returns how many normal images exceed the threshold of `detection.choose_thresholds`.

    That threshold is the k-th smallest of the n scores. A further score of the same distribution is
    equally likely to have each of the n + 1 ranks, so that it is larger with probability
    (n + 1 - k) / (n + 1), and with ties less often.

    Args:
      images: n, the number of held-out normal images; at least 1.
      rate: `eval.false_positive_rate`.
    """
    scores = np.arange(images)
    threshold = np.quantile(scores, 1 - rate, method="higher")
    above = int((scores > threshold).sum())
    return Exceedance(above, (above + 1, images + 1))


def threshold(images: int, rate: float, *, calibrated: bool = False) -> str:
    """Returns where a threshold comes from and how often normal images exceed it.

    Args:
      images: the number of held-out normal images.
      rate: `eval.false_positive_rate`.
      calibrated: whether the maps are standardised by these images, each of them by the others.
    """
    above = exceedance(images, rate).held_out
    if images == 1:
        source = "The threshold is the score of the one normal image held out of training."
    elif above == 0:
        source = f"The threshold is the largest score of the {images} normal images held out of "
        source += "training; none of them exceeds it."
    else:
        source = f"At most {above} of the {images} normal images held out of training exceed the "
        source += "threshold."
    text = (
        f"{source} A further normal image of the same kind exceeds it with a probability of at "
        f"most {chance(images, rate)}, on average over the choice of held-out images; "
        f"eval.false_positive_rate asks for {_percent(rate)}."
    )
    if calibrated:
        # A further image is standardised by one image more than these, so that ranks differ.
        text += " The scores of these images are those of maps standardised by the other ones; "
        text += "because of eval.calibration this probability is an approximation."
    return text


def expected(images: int, rate: float, *, calibrated: bool = False) -> str:
    """Returns the same in a few words, for the printed table.

    Args:
      images: the number of held-out normal images.
      rate: `eval.false_positive_rate`.
      calibrated: as in `threshold`.
    """
    source = "1 held-out normal image" if images == 1 else f"{images} held-out normal images"
    if exceedance(images, rate).held_out == 0:
        source = f"the largest score of {source}" if images > 1 else f"the score of {source}"
        source = f"the threshold is {source}"
    else:
        source = f"from {source}"
    bound = "about" if calibrated else "at most"
    return f"{bound} {chance(images, rate)}, {_percent(rate)} asked for; {source}"


def chance(images: int, rate: float) -> str:
    """Returns the probability that a further normal image exceeds the threshold, as text."""
    k, m = exceedance(images, rate).chances
    return f"{k} in {m} ({_percent(k / m)})"


def intervals(resamples: int, good: int, defective: int) -> str:
    """Returns what the intervals of the metrics are.

    Args:
      resamples: the number of bootstrap draws.
      good: the number of good test images.
      defective: the number of defective test images.
    """
    text = f"Intervals hold the middle 95 % of {resamples} draws of the test images with "
    text += "replacement."
    for count, kind in ((good, "good"), (defective, "defective")):
        if count == 1:
            text += f" There is one {kind} image, so that they show no variation between "
            text += f"{kind} images."
        elif 0 < count < FEW:  # without a class there are no intervals that depend on it
            text += f" With {count} {kind} images they tend to be too narrow."
    return text


def calibration(images: int, settings: EvalConfig, *, by_position: bool) -> str:
    """Returns what the values of calibrated maps are.

    Args:
      images: the number of held-out normal images.
      settings: `eval` of the configuration.
      by_position: see `Calibration.by_position`.
    """
    where = " at its position" if by_position else ""
    added = ""
    if len(settings.parts) > 1:
        added = f", added over the maps {settings.anomaly_map} (none below −3)"
    return (
        "Maps are standardised: a value is the number of standard deviations from the mean of the "
        f"{images} held-out normal images{where} (eval.calibration={settings.calibration}){added}. "
        "Heat maps show negative values as 0. For the threshold, each of these images was "
        "standardised by the others."
    )


def floor(record: Mapping[str, Any]) -> str:
    """Returns what the floor is that a run is held against.

    Args:
      record: the section floor of metrics.json.
    """
    return (
        f"Floor: PCA with {record['components']} components of {record['training_images']} "
        "training images, fitted in closed form; a run that does not exceed it was not worth its "
        "training."
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"
