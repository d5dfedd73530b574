"""`pae predict`: anomaly maps, scores and decisions for a folder of images."""

import os
from collections.abc import Sequence

import numpy as np

from data_pipelines.dataset import open_images
from data_pipelines.errors import BadInput
from pae_jax.detection import detect_all
from pae_jax.report import pictures
from pae_jax.workdir import files, trained_model
from pae_jax.workdir.paths import AnyPath, check_local, to_path, to_workdir


def predict(
    workdir: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
) -> AnyPath:
    """Detects the anomalies in every image under a folder.

    Writes out/scores.csv (name, scores, decision), out/heatmaps/NAME.png (the map over the
    image; all share one colour scale, which ends at twice the pixel threshold) and
    out/masks/NAME.png (255 where the map exceeds the pixel threshold), at the network's size.

    Args:
      workdir: the folder of a training run, local or gs://.
      images: a local folder, searched recursively.
      out: a folder or URI that does not exist yet or is empty.
      overrides: words --config.eval.KEY=VALUE.

    Returns:
      The path of scores.csv.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    check_local("--images", str(images))
    workdir, out = to_workdir(workdir), to_path(out)
    # Checked first, because restoring the model and reading the images take longer.
    if not files.is_empty(out):
        raise BadInput(f"{out}: not empty; results are never overwritten")
    model = trained_model.load(workdir, overrides)
    # After the workdir, so that a wrong one leaves no empty folder.
    files.check_writable(out)
    thresholds = trained_model.thresholds(workdir, model)
    shape = model.config.data.shape
    names, pixels = open_images(
        str(images),
        shape=shape,
        channels=model.channels,
        value_range=model.value_range,
        setting=model.config.data.value_range,
    )
    # A generator, so that the maps of only one batch are in memory.
    detections = detect_all(model.params, pixels, model.config)
    rows = []
    for name, image, result in zip(names, pixels, detections, strict=True):
        # Grey images are stored with one channel, and a picture has three.
        picture = np.broadcast_to(image, (*image.shape[:2], 3))
        heat = pictures.overlay(picture, pictures.heat_map(result.map, 2 * thresholds.pixel))
        pictures.save_png(out / "heatmaps" / f"{name}.png", heat)
        pictures.save_png(out / "masks" / f"{name}.png", result.map > thresholds.pixel)
        scores = {key: float(value) for key, value in result.scores.items()}
        rows.append(
            {
                "name": name,
                **{f"score_{key}": value for key, value in scores.items()},
                "defective": int(scores[model.config.eval.image_score] > thresholds.score),
            }
        )
    files.write_csv(out / "scores.csv", rows)
    return out / "scores.csv"
