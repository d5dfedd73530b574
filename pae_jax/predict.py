"""From images to anomaly maps, scores and decisions (§2.2), and `pae predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.dataset import open_images
from data_pipelines.errors import BadInput
from pae_jax.detection import detect_all
from pae_jax.report import pictures
from pae_jax.workdir import files, trained_model


def predict(
    workdir: str | Path, images: str | Path, out: str | Path, *, overrides: Sequence[str] = ()
) -> Path:
    """Judges every image under a folder.

    Writes out/scores.csv (name, scores, decision), out/heatmaps/NAME.png (the map over the
    image, one colour scale for all, full at twice the pixel threshold) and out/masks/NAME.png
    (255 where the map exceeds the pixel threshold), at the network's size.

    Args:
      workdir: of a trained model.
      images: a folder, searched recursively.
      out: a folder that does not exist yet or is empty.
      overrides: words --config.eval.KEY=VALUE.

    Returns:
      The path of scores.csv.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    workdir, out = Path(workdir), Path(out)
    files.check_writable(out)
    if any(out.iterdir()):
        raise BadInput(f"{out}: not empty; results are never overwritten")
    model = trained_model.load(workdir, overrides)
    limits = trained_model.thresholds(workdir, model)
    shape = model.config.data.shape
    names, pixels = open_images(str(images), shape=shape, channels=model.channels)
    rows = []
    for name, image, found in zip(
        names, pixels, detect_all(model.params, pixels, model.config), strict=True
    ):
        picture = np.broadcast_to(image, (*image.shape[:2], 3))
        heat = pictures.overlay(picture, pictures.heat_map(found.map, 2 * limits.pixel))
        pictures.save_png(out / "heatmaps" / f"{name}.png", heat)
        pictures.save_png(out / "masks" / f"{name}.png", found.map > limits.pixel)
        decision = float(found.scores[model.config.eval.image_score]) > limits.score
        rows.append({"name": name, **_floats(found.scores), "defective": int(decision)})
    files.write_csv(out / "scores.csv", rows)
    return out / "scores.csv"


def _floats(scores: dict[str, Any]) -> dict[str, float]:
    return {f"score_{kind}": float(value) for kind, value in scores.items()}
