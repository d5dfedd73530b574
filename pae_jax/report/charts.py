"""The report's drawings as inline SVG, coloured by the page's style sheet. Host code."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

WIDTH, HEIGHT, MARGIN = 340, 260, 44  # of the drawing and of its axes' labels, in SVG units


class _Axes:
    """A frame with ticks; maps data to SVG units and collects the marks."""

    def __init__(self, title: str, labels: tuple[str, str], x: np.ndarray, y: np.ndarray):
        self._title, self._labels = title, labels
        self._x, self._y = x, y  # the tick positions; the first and the last bound the axis
        self._marks: list[str] = []

    def at(self, x: Any, y: Any) -> tuple[Any, Any]:
        """SVG units of data, numbers or arrays."""
        right, top = WIDTH - 18, 26
        u = MARGIN + (x - self._x[0]) / (self._x[-1] - self._x[0]) * (right - MARGIN)
        bottom = HEIGHT - MARGIN
        v = bottom - (y - self._y[0]) / (self._y[-1] - self._y[0]) * (bottom - top)
        return np.round(u, 1), np.round(v, 1)

    def line(self, x: np.ndarray, y: np.ndarray, kind: str) -> None:
        points = np.stack(self.at(x, y), axis=-1)
        # Points that the drawing cannot tell apart are drawn once.
        moved = np.append(True, np.any(np.diff(points, axis=0) != 0, axis=-1))
        text = " ".join(f"{u:g},{v:g}" for u, v in points[moved])
        self._marks.append(f'<polyline class="{kind}" points="{text}"/>')

    def point(self, x: float, y: float, text: str) -> None:
        u, v = self.at(x, y)
        label = f"<title>{escape(text)}</title>"
        self._marks.append(f'<circle class="mark" cx="{u:g}" cy="{v:g}" r="4">{label}</circle>')

    def bar(self, left: float, right: float, top: float, kind: str, text: str) -> None:
        (u, v), (u2, v2) = self.at(left, top), self.at(right, self._y[0])
        self._marks.append(
            f'<rect class="{kind}" x="{u:g}" y="{v:g}" width="{u2 - u:.1f}" '
            f'height="{v2 - v:.1f}"><title>{escape(text)}</title></rect>'
        )

    def svg(self, description: str) -> str:
        ticks = []
        for x in self._x:
            u, v = self.at(x, self._y[0])
            ticks.append(f'<text x="{u:g}" y="{v + 15:g}" text-anchor="middle">{x:.6g}</text>')
        for y in self._y:
            u, v = self.at(self._x[0], y)
            ticks.append(f'<text x="{u - 5:g}" y="{v + 4:g}" text-anchor="end">{y:.6g}</text>')
            right = self.at(self._x[-1], y)[0]
            ticks.append(f'<line class="tick" x1="{u:g}" y1="{v:g}" x2="{right:g}" y2="{v:g}"/>')
        x_label, y_label = map(escape, self._labels)
        middle = (HEIGHT - MARGIN + 26) / 2
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
            f'<text class="title" x="{WIDTH / 2:g}" y="14">{escape(self._title)}</text>'
            f"{''.join(ticks + self._marks)}"
            f'<text x="{(WIDTH + MARGIN) / 2:g}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}'
            f'</text><text transform="translate(11 {middle:g}) rotate(-90)" '
            f'text-anchor="middle">{y_label}</text></svg>'
        )


_UNIT = np.linspace(0, 1, 6)


def _ticks(low: float, high: float, smallest: float = 0.0) -> Float[np.ndarray, " ticks"]:
    """Round numbers that enclose [low, high] in at most eight, at least `smallest` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * 6 >= high - low)
    step = max(step, smallest)
    return step * np.arange(math.floor(low / step), math.ceil(high / step) + 1)


def roc(
    false_positive_rate: Float[np.ndarray, " n"],
    true_positive_rate: Float[np.ndarray, " n"],
    operating_point: tuple[float, float] | None,
) -> str:
    """The ROC curve, the diagonal of a blind guess, and the (false, true) rates in use."""
    labels = ("false positive rate", "true positive rate")
    axes = _Axes("ROC", labels, _UNIT, _UNIT)
    axes.line(np.array([0.0, 1.0]), np.array([0.0, 1.0]), "guide")
    axes.line(false_positive_rate, true_positive_rate, "curve")
    return _with_operating_point(axes, labels, operating_point, "ROC curve")


def precision_recall(
    recall: Float[np.ndarray, " n"],
    precision: Float[np.ndarray, " n"],
    operating_point: tuple[float, float] | None,
) -> str:
    """Precision against recall, in steps as average precision sums it; recall ascending."""
    labels = ("recall", "precision")
    axes = _Axes("Precision–recall", labels, _UNIT, _UNIT)
    axes.line(np.repeat(recall, 2)[:-1], np.repeat(precision, 2)[1:], "curve")
    return _with_operating_point(axes, labels, operating_point, "Precision–recall curve")


def _with_operating_point(
    axes: _Axes,
    labels: tuple[str, str],
    point: tuple[float, float] | None,
    description: str,
) -> str:
    if point is not None:
        text = f"at the threshold: {labels[0]} {point[0]:.4f}, {labels[1]} {point[1]:.4f}"
        axes.point(*point, text)
        description = f"{description}; {text}"
    return axes.svg(description)


def histogram(
    scores: Float[np.ndarray, " n"],
    defective: Bool[np.ndarray, " n"],
    threshold: float,
    bins: int = 30,
) -> str:
    """Counts of good and of defective images per interval of the score, side by side."""
    finite = np.isfinite(scores)
    scores, defective = scores[finite], defective[finite]
    marks = np.append(scores, threshold) if np.isfinite(threshold) else scores
    low, high = (float(marks.min()), float(marks.max())) if marks.size else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # (nearly) one value
        high = low + (abs(low) or 1.0)
    edges = np.linspace(low, high, bins + 1)
    counts = {
        kind: np.histogram(scores[defective == truth], edges)[0]
        for kind, truth in (("good", False), ("defective", True))
    }
    tallest = max(1.0, *(float(c.max()) for c in counts.values()))
    axes = _Axes(
        "Scores", ("score", "images"), _ticks(low, high), _ticks(0.0, tallest, smallest=1.0)
    )
    half = (edges[1] - edges[0]) / 2
    for side, (kind, values) in enumerate(counts.items()):
        for left, right, count in zip(edges[:-1], edges[1:], values, strict=True):
            if count:
                start = left + side * half
                text = f"{count} {kind}, score {left:.4g} to {right:.4g}"
                axes.bar(start, start + half, float(count), kind, text)
    if np.isfinite(threshold):
        axes.line(np.full(2, threshold), np.array([0.0, tallest]), "threshold")
    text = f"Histogram of the scores of good and defective images; threshold {threshold:.6g}"
    return axes.svg(text)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(class of the style sheet, text) pairs as a line of swatches."""
    swatch = '<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true">'
    return " ".join(
        f'<span>{swatch}<rect class="{kind}" width="10" height="10"/></svg> {escape(text)}</span>'
        for kind, text in entries
    )
