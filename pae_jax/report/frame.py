"""The common parts of the pages: template, texts of numbers, pictures as data URIs. Host code.

A page needs no network and no other file: pictures are data URIs, charts inline SVG, and its
content security policy forbids the browser to fetch anything. `style.css` and `script.js` are
written into the page.
"""

import base64
import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool
from markupsafe import Markup

from pae_jax.report import pictures
from pae_jax.report.table import is_defined
from pae_jax.workdir.files import AnyPath, write_atomically

THUMBNAIL_SIDE = 160  # pixels of a thumbnail's longer side
JPEG_QUALITY = 75
# A quantile and not the maximum, because one extreme pixel would darken all other maps.
SCALE_QUANTILE = 0.999  # the fraction of the maps' pixels below the end of the heat scale

# Style and script are allowed "inline", because they are part of the page.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


class Table(NamedTuple):
    """A table of texts; the first cell of a row names it, columns in `texts` hold sentences."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[int] = ()


class Score(NamedTuple):
    """A cell of the gallery: what the script sorts by, and what is shown."""

    sort_value: str
    text: str


class Picture(NamedTuple):
    """A picture of the gallery.

    Attributes:
      name: for screen readers.
      uri: a data URI; None if there is no such picture.
      outline: a transparent picture that is laid over it; None for none.
      regions: the name of the outline, for screen readers.
    """

    name: str
    uri: str | None
    outline: str | None = None
    regions: str = ""


def write(path: AnyPath, template: str, context: Mapping[str, Any]) -> None:
    """Writes a page at once or not at all.

    Args:
      path: the file.
      template: the name of a file of this package.
      context: the template's variables, without those of every page.
    """
    # With `StrictUndefined` a misspelt variable raises an error instead of leaving a gap.
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # These two files belong to the package, so they need no escaping.
    files = {"style": Markup(_read("style.css")), "script": Markup(_read("script.js"))}
    text = environment.get_template(template).render(policy=POLICY, **files, **context)
    # The name of a file, and so the page, need not be valid text.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _read(name: str) -> str:
    return importlib.resources.files("pae_jax.report").joinpath(name).read_text("utf-8")


def text(value: Any) -> str:
    """Returns a number with four digits, a dash for an undefined one, (value, low, high) as one."""
    if isinstance(value, tuple | list):
        point, *ends = map(text, value)
        return f"{point} ({'–'.join(ends)})"
    if not is_defined(value):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"
    return str(value)


def sortable(score: float) -> float:
    """Returns the score; negative infinity for NaN.

    Comparisons with NaN are false, so one NaN would leave a list unsorted.
    """
    return -math.inf if math.isnan(score) else score


def score_cell(value: float) -> Score:
    """Returns the cell of an image score."""
    # The script reads the value with JavaScript's `Number`, which knows Infinity and not inf.
    return Score(repr(sortable(value)).replace("inf", "Infinity"), f"{value:.6g}")


def heat_limit(maps: Iterable[np.ndarray]) -> float:
    """Returns the end of the heat scale, which all maps share; 0 without maps."""
    values = [values.ravel() for values in maps]
    return float(np.quantile(np.concatenate(values), SCALE_QUANTILE)) if values else 0.0


def heat_scale(limit: float) -> dict[str, str]:
    """Returns the picture of the heat scale and its texts."""
    return {
        "picture": png(pictures.heat_map(np.linspace(0, 1, 128)[None], 1.0)),
        "end": f"{limit:.3g}",
        "below": f"{SCALE_QUANTILE:.1%}",
    }


def thumbnail_mask(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h2 w2"]:
    """Returns the mask as a thumbnail; one marked pixel marks its thumbnail's pixel.

    Small defects so stay visible.
    """
    return pictures.shrink_map(mask.astype(np.float32), THUMBNAIL_SIDE) > 0


def jpeg(picture: np.ndarray) -> str:
    """Returns a data URI of a picture."""
    return _uri("jpeg", pictures.encode(picture, "jpeg", quality=JPEG_QUALITY, optimize=True))


def png(picture: np.ndarray) -> str:
    """Returns a data URI of a mask, whose edges JPEG would blur."""
    return _uri("png", pictures.encode(picture))


def _uri(image_format: str, content: bytes) -> str:
    return f"data:image/{image_format};base64,{base64.b64encode(content).decode()}"
