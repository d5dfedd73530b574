"""The report as a browser reads it: parsed, not matched as text."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pae_jax.report import charts, html
from pae_jax.report.html import ImageEntry, Report

HOSTILE = "a\"><script>alert('1')</script><img src=x onerror=alert(2)>&amp;.png"
VOID = {"meta", "img"}


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
        "diagnostics": {"contraction": 0.71, "idempotency": 1.25e-5},
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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    html.write_report(path, content(IMAGES))
    return Page(path.read_text())


def table(page, **attrs):
    (element,) = page.find("table", **attrs)
    return element


def rows(page):
    (body,) = page.find("tbody", inside=table(page, id="images"))
    return page.find("tr", inside=body)


def picture(cell):
    media_type, _, data = cell["attrs"]["src"].partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert media_type == f"data:image/{image.format.lower()}"
    return np.asarray(image)


def test_rows_stand_in_order_of_falling_score(page):
    images = rows(page)
    assert [page.find("th", inside=r)[0]["text"] for r in images] == [
        "crack/000.png",
        "dent/000.png",
        "good/001.png",
        "crack/001.png",
        "good/000.png",
    ]
    values = [page.find("td", inside=r)[2]["attrs"]["data-value"] for r in images]
    assert [float(v) for v in values] == [9.0, 7.5, 5.0, 4.5, 1.0]


def test_decisions_are_marked_and_counted(page):
    outcomes = [(r["attrs"]["data-type"], r["attrs"]["data-decision"]) for r in rows(page)]
    assert outcomes == [
        ("crack", "right"),
        ("dent", "right"),
        ("good", "wrong"),
        ("crack", "wrong"),  # at the threshold is not above it
        ("good", "right"),
    ]
    texts = [page.find("td", inside=r)[1]["text"] for r in rows(page)]
    assert texts[2:4] == ["defective, false alarm", "good, missed"]
    cells = {t["text"] for t in page.find("tr")}
    assert {"defective21", "good11"} <= cells


def test_columns_sort_and_rows_filter(page):
    (head,) = page.find("thead", inside=table(page, id="images"))
    columns = page.find("th", inside=head)
    sortable = [c for c in columns if page.find("button", inside=c)]
    names = [c["text"] for c in sortable]
    assert names == ["image", "type", "decision", "score (sum)", "max"]
    assert [c["attrs"].get("aria-sort") for c in sortable] == [None] * 3 + ["descending", None]
    for row in rows(page):
        cells = [e for e in page.find("th", inside=row) + page.find("td", inside=row)]
        assert len(cells) == len(columns)
        assert all("data-value" in c["attrs"] for c in cells[: len(sortable)])
    choices = {
        s["attrs"]["name"]: [o["attrs"]["value"] for o in page.find("option", inside=s)]
        for s in page.find("select")
    }
    assert choices == {
        "type": ["", "crack", "dent", "good"],
        "decision": ["", "right", "wrong"],
    }


def test_pictures_show_their_images(page):
    shown = page.find("img", inside=rows(page)[0])
    assert [s["attrs"]["alt"] for s in shown] == [
        "input",
        "reconstruction",
        "heat map",
        "true mask",
    ]
    image, reconstruction, heat, mask = map(picture, shown)
    truth = IMAGES[2]
    assert abs(image.mean(axis=(0, 1)) - truth.image.mean(axis=(0, 1))).max() < 3
    difference = reconstruction.mean(axis=(0, 1)) - truth.reconstruction.mean(axis=(0, 1))
    assert abs(difference).max() < 3
    assert heat.shape == (20, 30, 3) and heat.std() > 10
    np.testing.assert_array_equal(mask, truth.mask * 255)
    assert len(page.find("img", inside=rows(page)[-1])) == 3  # a good image has no mask


def test_tables_hold_the_values(page):
    texts = [t["text"] for t in page.find("tr")]
    assert "image_auroc_sum0.91230.8800–0.9400" in texts
    assert "pixel_aupro–" in texts
    assert "crack20.5000 (0.2500–0.7500)" in texts
    assert "contraction0.7100" in texts and "idempotency1.25e-05" in texts
    terms = [e["text"] for e in page.find("dt") + page.find("dd")]
    assert terms == ["config", "versions.jax", "seeds", "abc123", "0.0.1", "[0, 1]"]


def test_undefined_intervals_are_left_out(tmp_path):
    path = tmp_path / "report.html"
    nan = float("nan")
    html.write_report(path, content([], metrics={"a": (0.5, nan, nan), "b": (0.25, 0.125, 0.375)}))
    texts = [r["text"] for r in Page(path.read_text()).find("tr")]
    assert "a0.5000" in texts and "b0.25000.1250–0.3750" in texts
    html.write_report(path, content([], metrics={"a": (0.5, nan, nan)}))
    assert "95 %" not in path.read_text()


def test_filters_are_hidden_without_scripts(page):
    """The style sheet must repeat the attribute, since its `display` would override it."""
    (form,) = page.find("form")
    assert "hidden" in form["attrs"]
    assert ".filters[hidden] { display: none; }" in page.find("style")[0]["text"]


def test_charts_are_drawn_with_the_operating_point(page):
    labels = [s["attrs"].get("aria-label") for s in page.find("svg", role="img")]
    assert len(labels) == 3 and "threshold 4.5" in labels[0]
    assert "false positive rate 0.5000, true positive rate 0.6667" in labels[1]
    assert "recall 0.6667, precision 0.6667" in labels[2]
    bars = [e["attrs"]["class"] for e in page.find("rect") if page.find("title", inside=e)]
    assert bars.count("good") == 2 and bars.count("defective") == 3


def test_page_loads_nothing_from_outside(tmp_path):
    path = tmp_path / "report.html"
    html.write_report(path, content([*IMAGES, entry(HOSTILE, "crack", 2.0)]))
    text = path.read_text()
    assert not re.search(r"(https?|ftp|file|wss?):|//[a-z]|@import|url\(", text)
    for element in Page(text).elements:
        for name, value in element["attrs"].items():
            assert name not in ("href", "srcset", "action") and not name.startswith("on")
            assert name != "src" or value.startswith("data:image/")
        assert element["tag"] not in ("link", "iframe", "object", "base")


def test_text_is_escaped(tmp_path):
    path = tmp_path / "report.html"
    images = [
        entry(HOSTILE, HOSTILE, 2.0, scores={HOSTILE: 1.0}),
        entry("b\udcff.png", "good", 1.0),
    ]
    hostile = {HOSTILE: HOSTILE}
    html.write_report(
        path,
        content(
            images,
            title=HOSTILE,
            metrics={HOSTILE: 1.0},
            per_type=[{"type": HOSTILE, HOSTILE: 1.0}],
            diagnostics={HOSTILE: 1.0},
            provenance={"nested": hostile},
            image_score=HOSTILE,
            threshold_source=HOSTILE,
            notes=[HOSTILE],
        ),
    )
    page = Page(path.read_text())
    assert len(page.find("script")) == 1
    assert all(i["attrs"]["src"].startswith("data:") for i in page.find("img"))
    assert page.find("h1")[0]["text"] == HOSTILE
    assert rows(page)[0]["attrs"]["data-type"] == HOSTILE
    names = [page.find("th", inside=r)[0] for r in rows(page)]
    assert names[0]["text"] == names[0]["attrs"]["data-value"] == HOSTILE
    assert names[1]["text"] == "b\\udcff.png"
    assert f"nested.{HOSTILE}" in [e["text"] for e in page.find("dt")]


def test_heat_maps_share_one_scale(tmp_path):
    bright = np.full((20, 30), 0.8, np.float32)
    grey = np.full((20, 30, 3), 100, np.uint8)
    images = [
        entry(str(i), "good", 1.0 + i, map=bright * factor, image=grey)
        for i, factor in enumerate((1.0, 0.5, 0.25))
    ]
    path = tmp_path / "report.html"
    html.write_report(path, content(images))
    page = Page(path.read_text())
    heats = [picture(page.find("img", inside=r)[2]).mean() for r in reversed(rows(page))]
    assert heats[0] > heats[1] + 10 > heats[2] + 20
    (scale,) = page.find("p", **{"class": "scale"})
    assert "0.8, one scale for all; 99.9% of all pixels lie below" in scale["text"]


def test_page_stays_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8)
    values = np.linspace(0, 1, 400 * 300, dtype=np.float32).reshape(400, 300)
    sizes = []
    for count in (1, 5):
        images = [
            entry(str(i), "a", float(i), image=noise, reconstruction=noise, map=values, mask=None)
            for i in range(count)
        ]
        html.write_report(tmp_path / "report.html", content(images))
        sizes.append((tmp_path / "report.html").stat().st_size)
    page = Page((tmp_path / "report.html").read_text())
    assert all(max(picture(i).shape) <= 160 for i in page.find("img", inside=rows(page)[0]))
    assert (sizes[1] - sizes[0]) / 4 < 40_000  # noise, the worst case; photographs take 12,000


def test_degenerate_content_is_still_a_page(tmp_path):
    path = tmp_path / "report.html"
    html.write_report(path, content([], curves={}, per_type=[], diagnostics={}))
    assert rows(Page(path.read_text())) == []
    flat = {"map": np.zeros((20, 30), np.float32), "scores": {}}
    images = [entry("0", "good", 0.0, **flat), entry("1", "good", 0.0, **flat)]
    html.write_report(path, content(images, threshold=0.0))
    page = Page(path.read_text())
    assert [r["attrs"]["data-decision"] for r in rows(page)] == ["right", "right"]
    images = [entry("0", "good", float("nan")), entry("1", "crack", float("inf")), *IMAGES]
    html.write_report(path, content(images))
    page = Page(path.read_text())
    names = [page.find("th", inside=r)[0]["text"] for r in rows(page)]
    assert names[0] == "1" and names[-1] == "0"
    values = [page.find("td", inside=r)[2]["attrs"]["data-value"] for r in rows(page)]
    assert (values[0], values[-1]) == ("Infinity", "-Infinity")


def test_failed_report_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    html.write_report(path, content(IMAGES))
    before = path.read_bytes()

    def broken():
        yield IMAGES[0]
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        html.write_report(path, content(broken()))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_long_curves_are_thinned_without_a_visible_change():
    x = np.linspace(0, 1, 200_001)
    drawing = charts.roc(x, np.sqrt(x), None)
    assert len(drawing) < 100_000
    (line,) = re.findall(r'<polyline class="curve" points="([^"]*)"', drawing)
    points = np.array([p.split(",") for p in line.split()], float)
    full = charts.roc(np.array([0.0, 1.0]), np.array([0.0, 1.0]), None)
    (ends,) = re.findall(r'<polyline class="curve" points="([^"]*)"', full)
    (left, bottom), (right, top) = (map(float, p.split(",")) for p in ends.split())
    fraction = (points - (left, bottom)) / (right - left, top - bottom)
    np.testing.assert_allclose(fraction[:, 1] ** 2, fraction[:, 0], atol=2e-3)
    assert np.abs(np.diff(points, axis=0)).max() < 1


def test_histogram_of_scores_one_rounding_apart():
    scores = np.array([1.0, np.nextafter(1.0, 2.0)])
    drawing = charts.histogram(scores, np.array([False, True]), 1.0)
    assert "1 good, score 1 to" in drawing and "1 defective, score 1 to" in drawing


def test_precision_recall_is_drawn_in_steps():
    drawing = charts.precision_recall(np.array([0, 0.5, 1.0]), np.array([1, 1, 0.5]), None)
    (line,) = re.findall(r'<polyline class="curve" points="([^"]*)"', drawing)
    points = np.array([p.split(",") for p in line.split()], float)
    horizontal = np.diff(points, axis=0)[:, 1] == 0
    vertical = np.diff(points, axis=0)[:, 0] == 0
    assert np.all(horizontal | vertical)
    assert horizontal.sum() == 2 and vertical.sum() == 1
    assert points[-1, 1] == points[-2, 1]  # the last step runs at the last precision


@pytest.mark.parametrize(
    ("low", "high", "smallest"),
    [(0.0, 1.0, 0.0), (8991.0, 27190.0, 0.0), (-0.3, 1e-4, 0.0), (0.0, 3.0, 1.0), (0.0, 1.0, 1.0)],
)
def test_ticks_are_round_and_enclose_the_values(low, high, smallest):
    ticks = charts._ticks(low, high, smallest)
    steps = np.diff(ticks)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    np.testing.assert_allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    assert steps[0] >= smallest
