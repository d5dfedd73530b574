"""`pae predict`: anomaly maps, scores and decisions for new images."""

import os
from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import BadInput, spell
from data_pipelines.new_images import open_images
from pae_jax.detection import REPORTED_SCORES, detect_all
from pae_jax.report import pictures
from pae_jax.workdir import files, trained_model
from pae_jax.workdir.paths import AnyPath, check_local, to_path, to_workdir

# Stands in the folder until all results are there. A prediction that was interrupted begins anew.
UNFINISHED = ".unfinished"


def predict(
    workdir: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
) -> AnyPath:
    """Detects the anomalies in one image, or in every image under a folder.

    Writes out/scores.csv (name, scores, decision, error), out/heatmaps/NAME.png (the map over the
    image; all share one colour scale, which ends at twice the pixel threshold) and
    out/masks/NAME.png (255 where the map exceeds the pixel threshold), at the network's size.

    Names are written as `errors.spell` does. A file that cannot be read is a row with its error.

    Args:
      workdir: the folder of a training run, local or gs://.
      images: a local file, or a local folder, which is searched recursively.
      out: a folder or URI that does not exist yet, is empty, or holds what an interrupted
        prediction has written, which is removed.
      overrides: words --config.eval.KEY=VALUE, or places of the data, --config.data.root=DIR.

    Returns:
      The path of scores.csv.

    Raises:
      BadInput: one line that names the file, folder or key. If it names files that cannot be read,
        the results of all others are written.
    """
    check_local("--images", str(images))
    workdir, out = to_workdir(workdir), to_path(out)
    # Checked first, because restoring the model and reading the images take longer.
    unfinished = out / UNFINISHED
    if not (files.is_empty(out) or unfinished.exists()):
        raise BadInput(f"{out}: not empty; results are never overwritten")
    model = trained_model.load(workdir, overrides)
    # After the workdir, so that a wrong one leaves no empty folder.
    files.check_writable(out)
    thresholds = trained_model.thresholds(workdir, model)
    opened = open_images(
        str(images),
        shape=model.config.data.shape,
        channels=model.channels,
        value_range=model.value_range,
        setting=model.config.data.value_range,
    )
    _begin(out)
    # A generator, so that the maps of only one batch are in memory.
    detections = detect_all(model.params, opened.images, model.config)
    results = zip(opened.images, detections, strict=True)
    rows = []
    for name in opened.names:
        if name in opened.errors:
            rows.append({"name": spell(name), "error": opened.errors[name]})
            continue
        image, result = next(results)
        # Grey images are stored with one channel, and a picture has three.
        picture = np.broadcast_to(image, (*image.shape[:2], 3))
        heat = pictures.overlay(picture, pictures.heat_map(result.map, 2 * thresholds.pixel))
        pictures.save_png(files.output_path(out / "heatmaps", spell(name), ".png"), heat)
        mask = result.map > thresholds.pixel
        pictures.save_png(files.output_path(out / "masks", spell(name), ".png"), mask)
        scores = {key: float(value) for key, value in result.scores.items()}
        rows.append(
            {
                "name": spell(name),
                **{f"score_{key}": value for key, value in scores.items()},
                "defective": int(scores[model.config.eval.image_score] > thresholds.score),
            }
        )
    columns = ("name", *(f"score_{key}" for key in REPORTED_SCORES), "defective", "error")
    files.write_csv(out / "scores.csv", rows, columns)
    unfinished.unlink()
    if opened.errors:
        raise BadInput(
            f"{next(iter(opened.errors.values()))}; {len(opened.errors)} of {len(opened.names)} "
            f"files cannot be read, see the column error of {out / 'scores.csv'}"
        )
    return out / "scores.csv"


def _begin(out: AnyPath) -> None:
    """Marks a folder as unfinished, and removes what an interrupted prediction wrote there."""
    files.write_atomically(out / UNFINISHED, "")
    for name in ("heatmaps", "masks"):
        folder = out / name
        if folder.exists():
            files.remove_tree(folder)
    files.remove(out / "scores.csv")
