"""The report as a browser reads it: parsed, not matched as text."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax import diagnostics
from pae_jax.corruption import CorruptedBatch
from pae_jax.report import charts, html, pictures
from pae_jax.report.readings import READINGS
from pages import IMAGES, Page, content, entry, picture

HOSTILE = "a\"><script>alert('1')</script><img src=x onerror=alert(2)>&amp;.png"


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
    assert {"defective210.6667", "good110.5000"} <= cells
    truths = [r["attrs"]["data-truth"] for r in rows(page)]
    assert truths == ["defective", "defective", "good", "defective", "good"]


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
    assert not any(text.startswith("pixel_aupro") for text in texts)  # undefined
    assert "crack20.5000 (0.2500–0.7500)" in texts
    assert f"idempotency1.25e-05{READINGS['idempotency']}" in texts
    assert "of_another_method0.7100" in texts and not any(t.startswith("undefined") for t in texts)
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
    forms = page.find("form")
    assert len(forms) == 2 and all("hidden" in form["attrs"] for form in forms)
    style = page.find("style")[0]["text"]
    for name in (".filters", "#threshold"):
        assert f"{name}[hidden] {{ display: none; }}" in style


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


def test_the_floor_stands_beside_the_values(tmp_path):
    path = tmp_path / "report.html"
    metrics = {"a": (0.5, 0.25, 0.75), "b": 0.125, "undefined": None}
    floor = {"a": 0.0625, "undefined": 0.9, "b": float("nan")}
    html.write_report(path, content([], metrics=metrics, floor=floor, floor_name="simple"))
    texts = [r["text"] for r in Page(path.read_text()).find("tr")]
    assert "value95 % of drawssimple" in texts
    assert "a0.50000.2500–0.75000.0625" in texts and "b0.1250" in texts
    assert not any(text.startswith("undefined") for text in texts)


def test_every_diagnostic_has_a_reading():
    """Traced, not computed: only the names count."""

    def names():
        x = jnp.zeros((2, 4, 4, 3))
        batch = CorruptedBatch(x, x, jnp.zeros((2, 4, 4, 1)))
        found = diagnostics.errors(jnp.tanh, batch)
        return found | diagnostics.geometry(jnp.tanh, x, batch, jax.random.key(0))

    measured = jax.eval_shape(names)
    assert measured.keys() == READINGS.keys()
    assert all(text.endswith(".") and "\n" not in text for text in READINGS.values())


def test_regions_are_counted_and_outlined(tmp_path):
    values = np.zeros((20, 30), np.float32)
    values[2:5, 3:7] = 0.9
    values[5, 7] = 0.9  # connected by a corner
    values[15, 20] = 0.4
    values[10, 10] = 0.3  # at the threshold is not above it
    images = [
        entry("one", "good", 2.0, map=values),
        entry("none", "good", 1.0, map=np.zeros((20, 30), np.float32)),
    ]
    path = tmp_path / "report.html"
    html.write_report(path, content(images, pixel_threshold=0.3))
    page = Page(path.read_text())
    first, second = rows(page)
    assert [page.find("td", inside=r)[4]["text"] for r in (first, second)] == ["2", "0"]
    assert not page.find("img", inside=second, **{"class": "outline"})
    (outline,) = page.find("img", inside=first, **{"class": "outline"})
    assert outline["attrs"]["alt"] == "outlines of 2 regions"
    drawn = picture(outline)
    assert drawn.shape == (20, 30, 4)
    line = drawn[..., 3] > 0
    np.testing.assert_array_equal(drawn[line], [(*pictures.OUTLINE, 255)] * line.sum())
    # A ring just outside of each region.
    assert not line[values > 0.3].any()
    ring = np.zeros((20, 30), bool)
    ring[14:17, 19:22] = True
    ring[15, 20] = False
    np.testing.assert_array_equal(line[12:, 15:], ring[12:, 15:])
    assert line[1, 2:8].all() and line[2:5, 2].all() and line[6, 6:9].all()


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
