"""A drawn scene: a part on a bench with clutter that is no defect, as in some categories of VisA.

The position of the part varies a little, and the clutter differs between all images. Test images
have more clutter than training images, so that a detector that looks at the background is misled.
"""

import numpy as np

CLUTTER = {"train": (4, 9), "test": (10, 18)}  # the least and the largest number of things


def scene(
    rng: np.random.Generator, split: str, y: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the surroundings of a part.

    Args:
      rng: a generator of its own, so that the part does not depend on the scene.
      split: a key of `CLUTTER`.
      y: rows of the pixels.
      x: columns of the pixels.

    Returns:
      The colours of bench and clutter (h, w, 3) in [0, 1], and the mask of the part (h, w).
    """
    side = y.shape[0]
    centre = side / 2 + rng.uniform(-0.03, 0.03, 2) * side
    half = rng.uniform(0.33, 0.36, 2) * side
    corner = 0.08 * side
    # The distance to a rounded rectangle.
    down = np.maximum(np.abs(y - centre[0]) - half[0] + corner, 0)
    across = np.maximum(np.abs(x - centre[1]) - half[1] + corner, 0)
    part = np.hypot(down, across) <= corner

    bench = np.array((0.33, 0.29, 0.24)) + rng.normal(0, 0.01, 3)
    colours = bench * (1 + 0.08 * np.sin(2 * np.pi * (y / side + rng.random())))[..., None]
    for _ in range(rng.integers(*CLUTTER[split], endpoint=True)):
        cy, cx = rng.uniform(0, side, 2)
        angle = rng.uniform(0, np.pi)
        along = (y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)
        away = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        # A thing is a disc or a rod.
        length, width = rng.uniform(0.03, 0.09, 2) * side * ((1, 1), (2, 0.5))[rng.integers(2)]
        inside = (along / length) ** 2 + (away / width) ** 2 <= 1
        colours = np.where(inside[..., None], rng.uniform(0.05, 0.95, 3), colours)
    return colours, part
