"""From images to anomaly maps, scores and decisions (§2.2), and `pae predict`."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from data_pipelines.dataset import TrainingSplit, open_images, open_training
from data_pipelines.errors import BadInput
from pae_jax import anomaly_map, checkpoint, pictures, preprocess, train_step
from pae_jax.config import Config, from_config_dict
from pae_jax.config_file import override
from pae_jax.detection import SCORES, Detection
from pae_jax.methods import METHODS


class Model(NamedTuple):
    """A trained model of a workdir: its configuration, parameters and their training step."""

    config: Config
    params: Any
    step: int
    channels: int  # of the stored images: 1 for a grey category, else 3


class Thresholds(NamedTuple):
    """Above them a score is called defective, a pixel of the map anomalous.

    Both are exceeded by `false_positive_rate` of the held-out normal images (by their score; by
    the maximum of their map), never chosen on test data.
    """

    score: float
    pixel: float
    images: int
    false_positive_rate: float


def detect(params: Any, images: Array, config: Config) -> Detection:
    """uint8 images (b, h, w, 1 or 3) → `Detection`; pure and jittable."""
    return judge(params, preprocess.to_float(images), config)


def judge(params: Any, x: Float[Array, "b h w 3"], config: Config) -> Detection:
    """The same of images in [0, 1]."""
    reconstruction, maps = METHODS[config.method].localise(params, x, config)
    scores = {kind: anomaly_map.image_score(maps, kind, config.eval.topk_share) for kind in SCORES}
    # A method of whole images gives one value; every score is this value.
    return Detection(reconstruction, jnp.broadcast_to(maps, x.shape[:3]), scores)


def detect_all(model: Model, images: np.ndarray) -> Iterator[Detection]:
    """`detect` over uint8 images (n, h, w, c); yields one `Detection` of numpy arrays an image.

    The last batch is filled up, so that one program does for all.
    """
    size = min(model.config.eval.batch_size, len(images))
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        batch = jax.device_get(_detect(model.params, images[rows], config=model.config))
        for i in range(min(size, len(images) - start)):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], batch)


_detect = jax.jit(detect, static_argnames="config")  # one, so that it compiles once a config


def load(workdir: Path, overrides: Sequence[str] = ()) -> Model:
    """The newest checkpoint of a workdir, with `--config.eval.…` overrides applied.

    Raises:
      BadInput: no run, no readable checkpoint, or an override outside the section eval.
    """
    config = checkpoint.read_config(workdir)
    for word in overrides:
        if not word.startswith("--config.eval."):
            raise BadInput(f"{word}: after training, only --config.eval.KEY=VALUE can be set")
    config = from_config_dict(override(config.to_dict(), overrides))
    step, state = restore(workdir, config)
    channels = checkpoint.read_data_record(workdir)["channels"]
    return Model(config, state.eval_params, step, channels)


def restore(
    workdir: Path, config: Config, *, until: int | None = None
) -> tuple[int, train_step.TrainState]:
    """The newest readable checkpoint, of no step after `until`, on the first device.

    Returns:
      (updates done, state).
    """
    template = jax.eval_shape(lambda: train_step.init_state(config, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    with checkpoint.Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(abstract, until=until)
    if restored is None:
        raise BadInput(f"{workdir}: holds no checkpoint yet")
    return restored


def open_split(workdir: Path, config: Config) -> TrainingSplit:
    """The run's training images and those held out.

    Raises:
      BadInput: the training images are gone, or are others than the run's.
    """
    data = config.data
    split = open_training(
        data.spec, holdout=data.holdout, seed=config.train.seed, images=data.images
    )
    if split.fingerprint != checkpoint.read_data_record(workdir)["fingerprint"]:
        raise BadInput(f"{data.root or data.source}: other training images than the run's")
    return split


def thresholds(
    workdir: Path, model: Model, split: Callable[[], TrainingSplit] | None = None
) -> Thresholds:
    """From the held-out normal images; kept in the workdir, so that they are needed once.

    Args:
      workdir: of the run.
      model: its model.
      split: opens its training images, `open_split` by default; called only where the workdir
        holds no thresholds of this step and these settings yet.
    """
    path = workdir / "thresholds.json"
    settings = model.config.to_dict()["eval"]
    kept = checkpoint.read_json(path) if path.exists() else {}
    if kept.get("eval") == settings and kept.get("step") == model.step:
        return Thresholds(**kept["thresholds"])
    opened = split() if split else open_split(workdir, model.config)
    found = list(detect_all(model, opened.held_out))
    scores = [float(one.scores[model.config.eval.score]) for one in found]
    maxima = [float(one.map.max()) for one in found]
    share = 1 - model.config.eval.false_positive_rate
    result = Thresholds(
        # The next observed value, not an interpolated one: the rate holds on these images.
        score=float(np.quantile(scores, share, method="higher")),
        pixel=float(np.quantile(maxima, share, method="higher")),
        images=len(found),
        false_positive_rate=model.config.eval.false_positive_rate,
    )
    record = {"eval": settings, "step": model.step, "thresholds": result._asdict()}
    checkpoint.write_json(path, record)
    return result


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
    checkpoint.check_writable(out)
    if any(out.iterdir()):
        raise BadInput(f"{out}: not empty; results are never overwritten")
    model = load(workdir, overrides)
    limits = thresholds(workdir, model)
    shape = model.config.data.shape
    names, pixels = open_images(str(images), shape=shape, channels=model.channels)
    rows = []
    for name, image, found in zip(names, pixels, detect_all(model, pixels), strict=True):
        picture = np.broadcast_to(image, (*image.shape[:2], 3))
        heat = pictures.overlay(picture, pictures.heat_map(found.map, 2 * limits.pixel))
        pictures.save_png(out / "heatmaps" / f"{name}.png", heat)
        pictures.save_png(out / "masks" / f"{name}.png", found.map > limits.pixel)
        decision = float(found.scores[model.config.eval.score]) > limits.score
        rows.append({"name": name, **_floats(found.scores), "defective": int(decision)})
    write_csv(out / "scores.csv", rows)
    return out / "scores.csv"


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of the same columns, in order, at once or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomically(path, text.getvalue())


def _floats(scores: dict[str, Any]) -> dict[str, float]:
    return {f"score_{kind}": float(value) for kind, value in scores.items()}
