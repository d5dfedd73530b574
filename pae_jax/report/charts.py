"""The charts of the report as inline SVG, coloured by the page's style sheet. Host code.

Every text goes through `Markup.format`, which escapes its arguments.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from markupsafe import Markup

WIDTH, HEIGHT = 340, 260  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 44, 322, 26, 216  # the frame of the data; axis labels stand outside it

_UNIT = np.linspace(0, 1, 6)


class _Axes:
    """A frame with ticks. It maps data to SVG units and collects the marks."""

    def __init__(self, title: str, labels: tuple[str, str], x: np.ndarray, y: np.ndarray):
        self._title, self._labels = title, labels
        self._x, self._y = x, y  # the tick positions; the first and the last bound the axis
        self._marks: list[Markup] = []

    def to_svg_units(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Returns the position of data, numbers or arrays, to a tenth of a unit."""
        u = LEFT + (x - self._x[0]) / (self._x[-1] - self._x[0]) * (RIGHT - LEFT)
        # SVG counts from the top down.
        v = BOTTOM - (y - self._y[0]) / (self._y[-1] - self._y[0]) * (BOTTOM - TOP)
        return np.round(u, 1), np.round(v, 1)

    def add_line(self, x: np.ndarray, y: np.ndarray, css_class: str) -> None:
        """Adds a line through the points."""
        points = np.stack(self.to_svg_units(x, y), axis=-1)
        # Consecutive points that round to the same position are drawn once, because a curve may
        # have millions of them.
        moved = np.append(True, np.any(np.diff(points, axis=0) != 0, axis=-1))
        positions = " ".join(f"{u:g},{v:g}" for u, v in points[moved])
        self._marks.append(
            Markup('<polyline class="{}" points="{}"/>').format(css_class, positions)
        )

    def add_point(self, point: tuple[float, float] | None, text: str) -> None:
        """Adds a dot with a text that the browser shows beside the pointer; None hides it.

        The script moves the dot with the threshold.
        """
        shown = "hidden" if point is None else "visible"
        dot = Markup(
            '<circle class="mark" visibility="{}" cx="{:g}" cy="{:g}" r="4">'
            "<title>{}</title></circle>"
        )
        self._marks.append(dot.format(shown, *self.to_svg_units(*(point or (0.0, 0.0))), text))

    def add_bar(self, left: float, right: float, top: float, css_class: str, text: str) -> None:
        """Adds a bar from the x axis to `top` with a text like that of a dot."""
        (u, v), (u2, v2) = self.to_svg_units(left, top), self.to_svg_units(right, self._y[0])
        bar = Markup(
            '<rect class="{}" x="{:g}" y="{:g}" width="{:.1f}" height="{:.1f}">'
            "<title>{}</title></rect>"
        )
        self._marks.append(bar.format(css_class, u, v, u2 - u, v2 - v, text))

    def svg(self, name: str, description: str) -> Markup:
        """Returns the whole chart.

        Args:
          name: by which the script finds it.
          description: what a screen reader reads.
        """
        # The frame in SVG units and in units of the data, from which the script computes positions.
        frame = [LEFT, RIGHT, BOTTOM, TOP, self._x[0], self._x[-1], self._y[0], self._y[-1]]
        chart = Markup(
            '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{description}" '
            'data-chart="{name}" data-frame="{frame}">'
            '<text class="title" x="{center:g}" y="14">{title}</text>{ticks}{marks}'
            '<text x="{x_center:g}" y="{x_bottom}" text-anchor="middle">{x_label}</text>'
            '<text transform="translate(11 {y_center:g}) rotate(-90)" '
            'text-anchor="middle">{y_label}</text></svg>'
        )
        return chart.format(
            width=WIDTH,
            height=HEIGHT,
            description=description,
            name=name,
            frame=" ".join(repr(float(value)) for value in frame),
            center=WIDTH / 2,
            title=self._title,
            ticks=self._ticks(),
            marks=Markup("").join(self._marks),
            x_center=(LEFT + RIGHT) / 2,
            x_bottom=HEIGHT - 8,
            x_label=self._labels[0],
            y_center=(TOP + BOTTOM) / 2,
            y_label=self._labels[1],
        )

    def _ticks(self) -> Markup:
        x_tick = Markup('<text x="{:g}" y="{:g}" text-anchor="middle">{:.6g}</text>')
        y_tick = Markup('<text x="{:g}" y="{:g}" text-anchor="end">{:.6g}</text>')
        y_line = Markup('<line class="tick" x1="{:g}" y1="{:g}" x2="{:g}" y2="{:g}"/>')
        ticks = []
        for x in self._x:
            u, v = self.to_svg_units(x, self._y[0])
            ticks.append(x_tick.format(u, v + 15, x))
        for y in self._y:
            u, v = self.to_svg_units(self._x[0], y)
            ticks.append(y_tick.format(u - 5, v + 4, y))
            ticks.append(y_line.format(u, v, self.to_svg_units(self._x[-1], y)[0], v))
        return Markup("").join(ticks)


def roc(
    false_positive_rate: Float[np.ndarray, " n"],
    true_positive_rate: Float[np.ndarray, " n"],
    operating_point: tuple[float, float] | None,
) -> Markup:
    """Returns the ROC curve, the diagonal of a random guess, and the (false, true) rates in use."""
    labels = ("false positive rate", "true positive rate")
    axes = _Axes("ROC", labels, _UNIT, _UNIT)
    axes.add_line(np.array([0.0, 1.0]), np.array([0.0, 1.0]), "guide")
    axes.add_line(false_positive_rate, true_positive_rate, "curve")
    return _with_operating_point(axes, labels, operating_point, "roc", "ROC curve")


def precision_recall(
    recall: Float[np.ndarray, " n"],
    precision: Float[np.ndarray, " n"],
    operating_point: tuple[float, float] | None,
) -> Markup:
    """Returns precision against ascending recall, in steps, as average precision sums it."""
    labels = ("recall", "precision")
    axes = _Axes("Precision–recall", labels, _UNIT, _UNIT)
    axes.add_line(np.repeat(recall, 2)[:-1], np.repeat(precision, 2)[1:], "curve")
    return _with_operating_point(
        axes, labels, operating_point, "precision_recall", "Precision–recall curve"
    )


def _with_operating_point(
    axes: _Axes,
    labels: tuple[str, str],
    point: tuple[float, float] | None,
    name: str,
    description: str,
) -> Markup:
    text = "at the threshold"
    if point is not None:
        text = f"{text}: {labels[0]} {point[0]:.4f}, {labels[1]} {point[1]:.4f}"
        description = f"{description}; {text}"
    axes.add_point(point, text)
    return axes.svg(name, description)


def histogram(
    scores: Float[np.ndarray, " n"],
    defective: Bool[np.ndarray, " n"],
    threshold: float,
    bins: int = 30,
) -> Markup:
    """Returns the counts of good and of defective images per interval of the score."""
    # An infinite score has no position on the axis.
    finite = np.isfinite(scores)
    scores, defective = scores[finite], defective[finite]
    marks = np.append(scores, threshold) if np.isfinite(threshold) else scores
    low, high = (float(marks.min()), float(marks.max())) if marks.size else (0.0, 1.0)
    # The intervals need a positive width, even if all scores are equal.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0)
    edges = np.linspace(low, high, bins + 1)
    counts = {
        "good": np.histogram(scores[~defective], edges)[0],
        "defective": np.histogram(scores[defective], edges)[0],
    }
    # An axis needs a positive length, even without images.
    tallest = max(1.0, *(float(values.max()) for values in counts.values()))
    axes = _Axes(
        "Scores", ("score", "images"), _ticks(low, high), _ticks(0.0, tallest, smallest=1.0)
    )
    # The bars of the two classes stand side by side, so that neither hides the other.
    half = (edges[1] - edges[0]) / 2
    for side, (name, values) in enumerate(counts.items()):
        for left, right, count in zip(edges[:-1], edges[1:], values, strict=True):
            if count:
                start = left + side * half
                text = f"{count} {name}, score {left:.4g} to {right:.4g}"
                axes.add_bar(start, start + half, float(count), name, text)
    if np.isfinite(threshold):
        axes.add_line(np.full(2, threshold), np.array([0.0, tallest]), "threshold")
    return axes.svg(
        "histogram",
        f"Histogram of the scores of good and defective images; threshold {threshold:.6g}",
    )


def _ticks(low: float, high: float, smallest: float = 0.0) -> Float[np.ndarray, " ticks"]:
    """Returns at most eight round numbers that enclose [low, high], at least `smallest` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * 6 >= high - low)
    step = max(step, smallest)
    return step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)
