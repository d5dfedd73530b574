"""Pages as a browser reads them: parsed, not matched as text; and what a report may hold."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from pae_jax.report.html import ImageEntry, Report

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Elements with their attributes, their parents and the text below them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open[-1]}"

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "up": list(self._open)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop()["tag"] == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def find(self, tag, inside=None, **attrs):
        return [
            e
            for e in self.elements
            if e["tag"] == tag
            and (inside is None or any(e is inside or u is inside for u in e["up"]))
            and all(e["attrs"].get(k) == v for k, v in attrs.items())
        ]


def entry(name, type_, score, **changes):
    rng = np.random.default_rng(len(name))
    picture = rng.integers(0, 256, (20, 30, 3), np.uint8)
    values = {
        "name": name,
        "type": type_,
        "label": type_ != "good",
        "score": score,
        "scores": {"sum": score, "max": score / 10},
        "image": picture,
        "reconstruction": picture // 2,
        "map": rng.uniform(0, 0.4, (20, 30)).astype(np.float32),
        "mask": None if type_ == "good" else np.eye(20, 30, dtype=bool),
    }
    return ImageEntry(**(values | changes))


def content(images, **changes):
    values = {
        "title": "tiles",
        "metrics": {"image_auroc_sum": (0.91234, 0.88, 0.94), "pixel_aupro": None},
        "per_type": [{"type": "crack", "images": 2, "image_auroc": (0.5, 0.25, 0.75)}],
        "diagnostics": {"of_another_method": 0.71, "idempotency": 1.25e-5, "undefined": np.nan},
        "provenance": {"config": "abc123", "versions": {"jax": "0.0.1"}, "seeds": [0, 1]},
        "curves": {
            "roc": (np.array([0, 0, 1.0]), np.array([0, 0.5, 1.0])),
            "precision_recall": (np.array([0, 0.5, 1.0]), np.array([1, 1.0, 0.6])),
        },
        "threshold": 4.5,
        "image_score": "sum",
        "images": iter(images),
    }
    return Report(**(values | changes))


IMAGES = [
    entry("good/000.png", "good", 1.0),
    entry("good/001.png", "good", 5.0),
    entry("crack/000.png", "crack", 9.0),
    entry("crack/001.png", "crack", 4.5),
    entry("dent/000.png", "dent", 7.5),
]


def picture(cell):
    media_type, _, data = cell["attrs"]["src"].partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert media_type == f"data:image/{image.format.lower()}"
    return np.asarray(image)
