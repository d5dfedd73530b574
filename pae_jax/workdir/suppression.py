"""Suppression of the background (§4) by a network that `pae foreground` has trained.

The background of an image becomes black, 0 in every channel, and the object at least 1, which
changes its black pixels by one grey level of 256. Black is chosen because the mask can then be read
from the image, exactly, after flips, crops, rotations and gains (`image_ops.foreground`): nothing
travels beside the images, so that pipeline, checkpoints and compiled programs keep their form.

    F/foreground.npz   the network, written by `pae foreground` when it has finished
    W/foreground.npz   a copy in the workdir of each run, which needs F no more after its training

The same function serves training, held-out, test and new images. It takes one image at a time, so
that its mask does not depend on others.
"""

import functools
import hashlib
import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from scipy import ndimage

from data_pipelines.cache import cached, content_key
from data_pipelines.dataset import TrainingSplit
from data_pipelines.errors import BadInput, first_line, warn
from pae_jax import image_ops, unet
from pae_jax.config import Config, ModelConfig
from pae_jax.metrics.regions import label_regions
from pae_jax.workdir import archive
from pae_jax.workdir.files import write_atomically
from pae_jax.workdir.paths import AnyPath

NAME = "foreground.npz"
NETWORK = ModelConfig(
    patch_size=2,
    widths=(16, 32, 64),
    convs_per_stage=1,
    bottleneck_layers=1,
    branch_width=32,
    dilation_rates=(1, 2, 4),
    dilated_kernel_size=3,
    output="logit",
)
# Regions below this fraction of the largest one are clutter. A piece that broke off may be small.
SPECK = 1 / 20
# A mask of less than this fraction of the image has found no object.
LEAST = 0.005
# Part of the file and of the cache's keys: increase it whenever masks change.
_VERSION = 1
_SETTINGS = "settings"


class Foreground(NamedTuple):
    """A trained network that finds the object of an image.

    Attributes:
      params: the parameters of `NETWORK`.
      shape: (h, w) of the images that the network sees.
      margin: the mask grows by this fraction of the shorter side of the image.
      encoded: the content of the file.
    """

    params: Any
    shape: tuple[int, int]
    margin: float
    encoded: bytes

    @property
    def fingerprint(self) -> str:
        """32 hex digits, a hash of the file."""
        return hashlib.sha256(self.encoded).hexdigest()[:32]


def encode(params: Any, shape: tuple[int, int], margin: float) -> Foreground:
    """Returns a trained network with the content of its file."""
    settings = json.dumps({"version": _VERSION, "shape": shape, "margin": margin})
    content = archive.encode({_SETTINGS: np.array(settings)} | archive.by_name(params))
    return Foreground(params, shape, margin, content)


def write(folder: AnyPath, foreground: Foreground) -> None:
    """Writes the file into a workdir.

    Raises:
      CannotWrite: no space or no permission.
    """
    write_atomically(folder / NAME, foreground.encoded)


def read(folder: AnyPath, advice: str) -> Foreground:
    """Reads the file of a workdir.

    Args:
      folder: the workdir of `pae foreground`, or of a run.
      advice: what to do if that fails, for messages.

    Raises:
      BadInput: no finished network, a damaged file, or one of another version.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{path}: no such file, so no trained foreground network; {advice}"
        ) from None
    except Exception as error:  # the drivers of buckets raise many types
        raise BadInput(f"{path}: cannot be read ({first_line(error, 300)})") from error
    try:
        arrays = archive.decode(data)
        settings = json.loads(str(arrays.pop(_SETTINGS)))
        version, shape, margin = (settings[name] for name in ("version", "shape", "margin"))
    except Exception as error:  # zip, numpy and json raise many types
        raise BadInput(f"{path}: damaged ({first_line(error, 120)}); {advice}") from error
    template = init(jax.random.key(0), abstract=True)
    expected = {name: leaf.shape for name, leaf in archive.by_name(template).items()}
    if version != _VERSION or expected != {name: array.shape for name, array in arrays.items()}:
        raise BadInput(f"{path}: of another version of this package; {advice}")
    leaves = [arrays[name] for name in expected]
    params = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return Foreground(params, (shape[0], shape[1]), margin, data)


def named_by(config: Config) -> Foreground | None:
    """Returns the network that `data.foreground` names; None if it names none.

    Raises:
      BadInput: see `read`.
    """
    if not (place := config.data.foreground):
        return None
    return read(
        Path(place), f"train it by `pae foreground --workdir={place}`, or see data.foreground"
    )


def init(key: Array, *, abstract: bool = False) -> Any:
    """Returns random parameters of `NETWORK`, or only their shapes and types."""
    # The shapes do not depend on the size of the images.
    example = jnp.zeros((1, 32, 32, image_ops.CHANNELS))
    make = functools.partial(unet.UNet(NETWORK, outputs=1).init, key)
    return jax.eval_shape(make, example) if abstract else make(example)


def logits(params: Any, x: Float[Array, "b h w 3"]) -> Float[Array, "b h w"]:
    """Returns the logit that a pixel belongs to the object; a pure function."""
    values: Any = unet.UNet(NETWORK, outputs=1).apply(params, x)
    return values[..., 0]


def find(image: UInt8[np.ndarray, "h w c"], foreground: Foreground) -> Bool[np.ndarray, "h w"]:
    """Returns the mask of the object.

    Specks are left out. Holes are filled, because a defect may look like the background; and the
    mask grows by the margin, because defects also lie on the border of an object. A mask of less
    than `LEAST` of the image is empty: no object was found.
    """
    with _one_at_a_time:
        found = jax.device_get(_find(foreground.params, image[None], shape=foreground.shape))
    mask = np.asarray(ndimage.binary_fill_holes(large_regions(found[0], SPECK)))
    if mask.mean() < LEAST:
        return np.zeros_like(mask)
    # The distance to the object, so that the margin is round.
    distance = np.asarray(ndimage.distance_transform_edt(~mask))
    return distance <= foreground.margin * min(mask.shape)


def large_regions(mask: Bool[np.ndarray, "h w"], fraction: float) -> Bool[np.ndarray, "h w"]:
    """Returns the regions of at least a fraction of the area of the largest one."""
    regions = label_regions(mask)
    areas = np.bincount(regions.ravel())
    areas[0] = 0  # the background
    return (areas >= max(fraction * areas.max(), 1))[regions]


def suppress(
    image: UInt8[np.ndarray, "h w c"], foreground: Foreground | None
) -> UInt8[np.ndarray, "h w c"]:
    """Returns the image with a black background, and an object that is nowhere black.

    An image in which no object is found stays whole, so that no part of it escapes the detection.

    Args:
      image: of any size.
      foreground: the network; None returns the image.
    """
    if foreground is None:
        return image
    mask = find(image, foreground)
    kept = np.maximum(image, np.uint8(1))
    return np.where(mask[..., None], kept, np.uint8(0)) if mask.any() else kept


def suppress_all(
    images: np.ndarray, foreground: Foreground | None, *, cache_dir: str, part: str
) -> np.ndarray:
    """Returns images with suppressed backgrounds, computed once and cached.

    Args:
      images: uint8 (n, h, w, c).
      foreground: the network; None returns the images.
      cache_dir: `data.cache_dir`.
      part: "training", "held-out" or "test", for messages.

    Returns:
      uint8 (n, h, w, c), memory-mapped.
    """
    if foreground is None or not len(images):
        return images
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    key = content_key("foreground", _VERSION, foreground.fingerprint, images.shape, digests)

    def build() -> Any:
        return tuple(images.shape), lambda i: suppress(images[i], foreground)

    purpose = f"{part} images with suppressed backgrounds"
    suppressed = cached(cache_dir, key, [tuple(images.shape)], build, purpose=purpose)
    if whole := [i for i, image in enumerate(suppressed) if image.any(axis=-1).all()]:
        warn(
            f"data.foreground: no background, or no object, in {len(whole)} of {len(images)} "
            f"{part} images (first: number {whole[0] + 1}), which stay whole; look at the sheet of "
            "`pae foreground`"
        )
    return suppressed


def suppress_split(
    split: TrainingSplit, foreground: Foreground | None, cache_dir: str
) -> TrainingSplit:
    """Returns the split with suppressed backgrounds; its fingerprints stay those of the files."""
    return split._replace(
        images=suppress_all(split.images, foreground, cache_dir=cache_dir, part="training"),
        held_out=suppress_all(split.held_out, foreground, cache_dir=cache_dir, part="held-out"),
    )


# Threads would compile the same program several times, and share the cores anyway.
_one_at_a_time = threading.Lock()


@functools.partial(jax.jit, static_argnames="shape")
def _find(
    params: Any, images: UInt8[Array, "b h w c"], *, shape: tuple[int, int]
) -> Bool[Array, "b h w"]:
    x = image_ops.to_float(images)
    # With a low-pass filter, as Pillow resizes what the network was trained on.
    seen = jax.image.resize(x, (len(x), *shape, image_ops.CHANNELS), "linear", antialias=True)
    return jax.image.resize(logits(params, seen), x.shape[:3], "linear") > 0
