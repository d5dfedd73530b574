"""The figures of experiments/penalties.py."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from penalties_statistics import Correlation, column, mean_and_error

# Colours that most people tell apart. A kind that is not named here takes the next of OTHERS.
COLOURS = {
    "none": "#000000",
    "random": "#0072b2",
    "tangent": "#009e73",
    "normal": "#d55e00",
    "both": "#cc79a7",
    "idempotency both": "#e69f00",
    "idempotency outer": "#a6761d",
    "idempotency inner": "#c0a800",
    "noise": "#56b4e9",
}
OTHERS = ("#999999", "#6a3d9a", "#b2df8a", "#fb9a99", "#1b9e77")
MARKERS = "osD^vP*X"
COLUMNS = 4
# An axis is logarithmic if its values are positive and differ by a larger factor.
LOGARITHMIC = 20
# A score is far from the others if it is this many interquartile ranges outside the quartiles.
FAR = 5.0


def colours(kinds: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each kind of penalty, in the order of the kinds."""
    others = itertools.cycle(OTHERS)
    return {kind: COLOURS.get(kind) or next(others) for kind in dict.fromkeys(kinds)}


def far(scores: np.ndarray) -> np.ndarray:
    """Returns which of the scores, (n,), are so far from the others that they would hide them.

    A model that collapsed to a constant is one. Scores that are not finite are not far.
    """
    known = scores[np.isfinite(scores)]
    if not known.size:
        return np.zeros(scores.shape, bool)
    low, high = np.quantile(known, (0.25, 0.75))
    reach = FAR * (high - low)
    return (scores < low - reach) | (scores > high + reach)


def scatter(
    members: Sequence[Mapping[str, Any]],
    correlations: Mapping[str, Mapping[str, Correlation]],
    score: str,
) -> bytes:
    """Returns a PNG with one panel per diagnostic, in which every trained model is a point.

    The axes span the models whose scores are not `far`. The others stand at the border as crosses.

    Args:
      members: `kind`, `weight`, `setting`, `sweep`, `seed`, `steps`, `data`, `metrics` and
        `diagnostics` of each.
      correlations: by diagnostic, "all" and "within", which stand in the panel's title.
      score: the metric on the vertical axes.
    """
    from matplotlib.ticker import NullFormatter

    palette = colours([member["kind"] for member in members])
    markers = dict(zip(dict.fromkeys(m["sweep"] for m in members), itertools.cycle(MARKERS)))
    largest = {
        kind: max(m["weight"] or 0 for m in members if m["kind"] == kind) for kind in palette
    }
    outside = far(column([member["metrics"].get(score) for member in members]))
    near = [member for member, out in zip(members, outside, strict=True) if not out]
    distant = [member for member, out in zip(members, outside, strict=True) if out]
    figure, panels = _grid(len(correlations), width=3.2, height=2.9)
    for axes, (name, found) in zip(panels, correlations.items(), strict=False):
        for line in _trainings(near):
            values = [(m["diagnostics"].get(name), m["metrics"].get(score)) for m in line]
            known = [pair for pair in values if None not in pair]
            axes.plot(*zip(*known, strict=True) if known else ([], []), color="0.85", zorder=1)
        for member in near:
            x, y = member["diagnostics"].get(name), member["metrics"].get(score)
            if x is None or y is None:
                continue
            strong = (member["weight"] or 0) >= largest[member["kind"]]
            colour = palette[member["kind"]]
            axes.plot(
                x,
                y,
                markers[member["sweep"]],
                # A hollow point has the smaller weight.
                markerfacecolor=colour if strong else "white",
                markeredgecolor=colour,
                markersize=5,
            )
        numbers = column([m["diagnostics"].get(name) for m in near])
        known = numbers[np.isfinite(numbers)]
        if known.size and known.min() > 0 and known.max() > LOGARITHMIC * known.min():
            axes.set_xscale("log")
            # The numbers between two powers of ten would overlap.
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.locator_params(axis="x", nbins=5)
        for member in distant:
            x, y = column([member["diagnostics"].get(name), member["metrics"][score]])
            _draw_at_border(axes, x, y, palette[member["kind"]])
        title = f"all {_text(found['all'])}\nwithin seeds {_text(found['within'])}"
        axes.set_title(title, fontsize=8)
        axes.set_xlabel(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supylabel(score, fontsize=9)
    handles = [_handle("o", colour, kind) for kind, colour in palette.items()]
    handles.append(_handle("o", "0.4", "smaller weight", face="white"))
    if distant:
        handles.append(_handle("X", "0.4", "beyond the axes"))
    if len(markers) > 1:
        handles += [_handle(marker, "0.4", sweep) for sweep, marker in markers.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    return _png(figure)


def iteration(members: Sequence[Mapping[str, Any]], score: str, reference: str) -> bytes:
    """Returns a PNG of the image AUROC against the number of applications of f.

    Args:
      members: those of one sweep: `kind`, `variant` and `detection`, the image AUROCs by
        application.
      score: the image score.
      reference: the variant that every panel shows in grey.
    """
    others = [member for member in members if member["variant"] != reference]
    palette = colours([member["kind"] for member in others or members])
    applications = list(members[0]["detection"])
    positions = np.arange(len(applications))

    def curve(variant: str) -> tuple[np.ndarray, np.ndarray]:
        group = [member for member in members if member["variant"] == variant]
        cells = [mean_and_error([m["detection"][n][score] for m in group]) for n in applications]
        return np.array([cell.mean for cell in cells]), np.array([cell.error for cell in cells])

    figure, panels = _grid(len(palette), width=3.2, height=2.6, sharey=True)
    for axes, (kind, colour) in zip(panels, palette.items(), strict=False):
        variants = dict.fromkeys(m["variant"] for m in members if m["kind"] == kind)
        axes.plot(positions, curve(reference)[0], color="0.7", linewidth=3, label=reference)
        for variant, style in zip(variants, itertools.cycle(("o--", "s-", "^:", "D-."))):
            mean, error = curve(variant)
            error = np.nan_to_num(error)
            axes.errorbar(
                positions,
                mean,
                error,
                fmt=style,
                color=colour,
                capsize=3,
                markersize=4,
                linewidth=1.2,
                label=variant,
            )
        axes.set_xticks(positions, [n.replace(" ", "\n") for n in applications], fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("applications of f", fontsize=9)
    figure.supylabel(f"image AUROC, {score}", fontsize=9)
    return _png(figure)


def _trainings(members: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Returns the members of several sweeps of one data set by setting and seed, by their steps."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for member in members:
        key = member["data"], member["setting"], member["seed"]
        groups.setdefault(key, []).append(member)
    return [sorted(g, key=lambda m: m["steps"]) for g in groups.values() if len(g) > 1]


def _draw_at_border(axes: Any, x: float, y: float, colour: str) -> None:
    """Draws the nearest point to (x, y) within the axes, which stay as they are."""
    limits = axes.get_xlim(), axes.get_ylim()
    x, y = (float(np.clip(value, *span)) for value, span in zip((x, y), limits, strict=True))
    axes.plot(x, y, "X", color=colour, markersize=6, clip_on=False, zorder=3)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])


def _text(found: Correlation) -> str:
    if not math.isfinite(found.value):
        return "ρ undefined"
    return f"ρ = {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _grid(count: int, *, width: float, height: float, sharey: bool = False) -> tuple[Any, Any]:
    """Returns a figure and its panels, of which those beyond `count` are removed."""
    # Not pyplot, because it keeps every figure in memory and may look for a display.
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat
    for axes in itertools.islice(figure.axes, count, None):
        axes.remove()
    return figure, panels


def _handle(marker: str, colour: str, label: str, face: str | None = None) -> Any:
    from matplotlib.lines import Line2D

    face = face or colour
    return Line2D(
        [],
        [],
        marker=marker,
        linestyle="",
        label=label,
        markerfacecolor=face,
        markeredgecolor=colour,
    )


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()
