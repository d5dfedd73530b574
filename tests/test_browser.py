"""The pages in a headless Chromium: sorting, filters, the threshold, and no request to a network.

The tests are skipped where there is no Chromium with its driver; .ci/run tries to install them.
"""

import json
import shutil

import pytest

from pae_jax.report import comparison, html
from pages import IMAGES, content, entry

webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: extra test")
WebDriverException = pytest.importorskip("selenium.common").WebDriverException

SETTINGS = (
    "--headless=new",
    "--window-size=1400,1000",
    "--no-sandbox",  # which root has not got
    "--disable-dev-shm-usage",  # small in containers
    "--disable-gpu",
)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    chromium = chromium or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in SETTINGS:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    try:
        started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    except WebDriverException as error:  # for example a snap in a container
        pytest.skip(f"{chromium} does not start: {error.msg}")
    yield started
    started.quit()


class Shown:
    """A page in the browser, with what a user sees and does."""

    def __init__(self, browser, path):
        browser.get_log("performance"), browser.get_log("browser")  # of the page before
        browser.get(path.as_uri())
        self._browser = browser

    def find(self, selector):
        return self._browser.find_elements("css selector", selector)

    def click(self, selector):
        (element,) = self.find(selector)
        element.click()

    def click_head(self, text):
        (button,) = [b for b in self.find("#images thead button") if b.text.split()[0] == text]
        button.click()

    def choose(self, name, value):
        self.click(f".filters [name={name}] option[value='{value}']")

    def names(self):
        """Returns the names of the visible rows, in their order."""
        return [row.text for row in self.find("#images tbody th") if row.is_displayed()]

    def decisions(self):
        """Returns the decisions by name, those of hidden rows too."""
        names, decisions = self.find("#images tbody th"), self.find("#images .decision")
        texts = [[e.get_attribute("textContent") for e in found] for found in (names, decisions)]
        return dict(zip(*texts, strict=True))

    def counts(self):
        return [cell.text for cell in self.find("#decisions td")]

    def slide(self, position):
        """Moves the slider as a user's hand does: sets its value, then the event."""
        script = (
            "const s = document.querySelector('#threshold [name=position]');"
            "s.value = arguments[0]; s.dispatchEvent(new Event('input', {bubbles: true}));"
        )
        self._browser.execute_script(script, str(position))

    def mark(self, chart):
        """Returns the operating point of a chart as (x, y) of the data; None where it is hidden."""
        (mark,) = self.find(f"[data-chart={chart}] .mark")
        if mark.get_attribute("visibility") == "hidden":
            return None
        (svg,) = self.find(f"[data-chart={chart}]")
        frame = map(float, svg.get_attribute("data-frame").split())
        left, right, bottom, top, x0, x1, y0, y1 = frame
        u, v = (float(mark.get_attribute(name)) for name in ("cx", "cy"))
        x = x0 + (u - left) / (right - left) * (x1 - x0)
        y = y0 + (v - bottom) / (top - bottom) * (y1 - y0)
        return pytest.approx(x, abs=1e-3), pytest.approx(y, abs=1e-3)

    def requests(self):
        """Returns the addresses that the page asked for, without the data that it holds itself."""
        messages = [
            json.loads(e["message"])["message"] for e in self._browser.get_log("performance")
        ]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = [request["request"]["url"] for request in sent]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self):
        """Returns errors of scripts and violations of the content security policy."""
        return self._browser.get_log("browser")


@pytest.fixture
def shown(browser, tmp_path):
    path = tmp_path / "report.html"
    html.write_report(path, content(IMAGES, pixel_threshold=0.35))
    return Shown(browser, path)


BY_SCORE = ["crack/000.png", "dent/000.png", "good/001.png", "crack/001.png", "good/000.png"]


def test_the_page_asks_for_nothing_but_itself(browser, tmp_path):
    path = tmp_path / "report.html"
    hostile = (
        "\"><img src=http://example.invalid/x onerror=alert(1)><script>fetch('//a.b')</script>"
    )
    html.write_report(path, content([*IMAGES, entry(hostile, "crack", 2.0)], notes=[hostile]))
    shown = Shown(browser, path)
    assert len(shown.names()) == 6
    shown.slide(1)
    shown.click_head("image")
    assert shown.requests() == [path.as_uri()]
    assert shown.complaints() == []
    # The log would show a request: one that a script of this test makes is refused and logged.
    browser.execute_script("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert any("Content Security Policy" in entry["message"] for entry in shown.complaints())


def test_columns_sort_up_and_down(shown):
    assert shown.names() == BY_SCORE
    shown.click_head("image")
    assert shown.names() == sorted(BY_SCORE)
    shown.click_head("image")
    assert shown.names() == sorted(BY_SCORE, reverse=True)
    shown.click_head("score")
    assert shown.names() == BY_SCORE
    shown.click_head("score")
    assert shown.names() == BY_SCORE[::-1]
    (head,) = shown.find("#images [aria-sort]")
    assert head.get_attribute("aria-sort") == "ascending"
    shown.click_head("regions")
    regions = [int(cells[-1].text) for cells in map(numbers, shown.find("#images tbody tr"))]
    assert regions == sorted(regions, reverse=True) and regions[0] > regions[-1]


def numbers(row):
    return row.find_elements("css selector", "td.number")


def test_filters_hide_rows_and_count_the_others(shown):
    (count,) = shown.find("#count")
    assert count.text == "5 of 5 images"
    shown.choose("type", "crack")
    assert shown.names() == ["crack/000.png", "crack/001.png"] and count.text == "2 of 5 images"
    shown.choose("decision", "wrong")
    assert shown.names() == ["crack/001.png"]
    shown.choose("type", "")
    assert shown.names() == ["good/001.png", "crack/001.png"]


def test_the_slider_moves_decisions_counts_rates_and_marks(shown):
    before = shown.decisions()
    assert before["crack/001.png"] == "good, missed"
    assert shown.counts() == ["2", "1", "0.6667", "1", "1", "0.5000"]
    assert shown.mark("roc") == (0.5, 0.6667)
    (slider,) = shown.find("#threshold [name=position]")
    (value,) = shown.find("#threshold [name=value]")
    # Below all scores, then at 1, 4.5 (a score, and the run's threshold), 5, 7.5 and 9.
    assert slider.get_attribute("max") == "5" and slider.get_attribute("value") == "2"
    assert value.get_attribute("value") == "4.5"

    shown.slide(0)
    assert set(shown.decisions().values()) == {"defective, right", "defective, false alarm"}
    assert shown.counts() == ["3", "0", "1.0000", "2", "0", "1.0000"]
    assert shown.mark("roc") == (1, 1) and shown.mark("precision_recall") == (1, 0.6)
    shown.slide(1)
    assert shown.counts() == ["3", "0", "1.0000", "1", "1", "0.5000"]
    assert shown.decisions()["crack/001.png"] == "defective, right"
    shown.slide(5)
    assert set(shown.decisions().values()) == {"good, right", "good, missed"}
    assert shown.counts() == ["0", "3", "0", "0", "2", "0"]
    assert shown.mark("precision_recall") is None  # no image is called defective

    value.clear()
    value.send_keys("8\ue007")  # and the key Enter
    assert shown.counts() == ["1", "2", "0.3333", "0", "2", "0"]
    assert slider.get_attribute("value") == "4"
    shown.choose("decision", "wrong")
    assert shown.names() == ["dent/000.png", "crack/001.png"]
    shown.slide(3)
    assert shown.names() == ["crack/001.png"]  # the filter follows

    shown.click("#threshold button")
    assert shown.decisions() == before
    assert shown.counts() == ["2", "1", "0.6667", "1", "1", "0.5000"]


def test_rates_are_written_as_without_scripts(browser, tmp_path):
    """The page of the run's threshold is the same before and after the script has decided."""
    images = [entry(f"{i}", "good", float(i)) for i in range(3)]
    path = tmp_path / "report.html"
    for threshold in (-1.0, 0.0, 2.0):
        html.write_report(path, content(images, threshold=threshold))
        shown = Shown(browser, path)
        before = shown.counts(), shown.decisions()
        shown.slide(0)
        shown.click("#threshold button")
        assert (shown.counts(), shown.decisions()) == before


def test_outlines_can_be_hidden(shown):
    outlines = shown.find("#images img.outline")
    assert len(outlines) == 5 and all(image.is_displayed() for image in outlines)
    for image in outlines:
        below = image.find_element("xpath", "preceding-sibling::img")
        assert image.rect == below.rect  # laid over the heat map
    shown.click(".filters [name=outlines]")
    assert not any(image.is_displayed() for image in outlines)


def test_infinite_and_undefined_scores(browser, tmp_path):
    path = tmp_path / "report.html"
    images = [entry("0", "good", float("nan")), entry("1", "crack", float("inf")), *IMAGES]
    html.write_report(path, content(images))
    shown = Shown(browser, path)
    before = shown.decisions()
    shown.slide(0)
    assert shown.decisions()["0"] == "good, right"  # NaN is above nothing
    shown.click("#threshold button")
    assert shown.decisions() == before
    html.write_report(path, content([]))
    empty = Shown(browser, path)
    assert empty.names() == [] and empty.complaints() == []


def test_the_page_of_a_comparison(browser, tmp_path):
    path = tmp_path / "comparison.html"
    comparison.write_page(path, compared())
    shown = Shown(browser, path)
    names = ["crack/000.png", "good/001.png", "dent/000.png", "crack/001.png", "good/000.png"]
    assert shown.names() == names  # where the runs differ first, by falling score of run 1
    shown.choose("decision", "differ")
    assert shown.names() == names[:2]
    shown.choose("decision", "")
    shown.choose("type", "crack")
    assert shown.names() == ["crack/000.png", "crack/001.png"]
    shown.choose("type", "")
    (second,) = [b for b in shown.find("#images thead button") if b.text == "run 2"]
    second.click()
    scores = [float(numbers(row)[1].text.split()[0]) for row in shown.find("#images tbody tr")]
    assert scores == sorted(scores, reverse=True)
    assert shown.requests() == [path.as_uri()]
    assert shown.complaints() == []


def compared():
    """Two runs on five images; run 2 misses one defective image and raises one false alarm."""
    others = {"crack/000.png": 0.1, "good/001.png": 0.9}
    images = []
    for image in IMAGES:
        score = others.get(image.name, image.score / 10)
        first = comparison.View(image.score, image.score > 5, image.image, image.map)
        second = comparison.View(score, score > 0.5, image.image[:10, :15], image.map[:10, :15])
        fields = image.name, image.type, image.label, image.mask
        images.append(comparison.ComparedImage(*fields, [first, second]))
    run = {
        "workdir": "runs/a",
        "image_score": "sum",
        "threshold": {"score": 5.0, "images": 20},
        "provenance": {"config": {"method": "pca"}, "step": 0},
    }
    value = {"value": 0.5, "interval": [0.25, 0.75]}
    difference = {"difference": 0.25, "difference_interval": [0.125, 0.375]}
    names = ("called_by_run", "called_by_this_run_only")
    counts: dict = {**{key: [1, 1] for key in names}, **dict.fromkeys(("all", "some", "none"), 1)}
    record = {
        "runs": [run, run | {"workdir": "runs/b"}],
        "metrics": {"image_auroc_sum": [value, value | difference]},
        "decisions": {"defective": counts, "good": counts},
    }
    return comparison.Comparison("tiles", ["A note."], record, [0.35, None], iter(images))
