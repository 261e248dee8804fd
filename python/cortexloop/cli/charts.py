"""Small charts as inline SVG, drawn by matplotlib; their colours and font are the page's, so light and dark fit."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:  # matplotlib is imported when the first chart is drawn: other commands start without it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 38.0
"""Around the plotting area, in CSS pixels."""

CURVES = tuple(f"curve-{letter}" for letter in "abcdefghi")
"""Colours for many curves in one chart; a page that uses them defines them, in this order."""

# Matplotlib draws with these stand-ins; in the finished SVG they become variables of the page's style sheet.
_NAMES = ("a", "b", "bar", "ink", "soft", "faint", "grid", *CURVES)
_COLORS = {name: f"#fe00{i:02x}" for i, name in enumerate(_NAMES)}
_FONT = "DejaVu Sans"  # comes with matplotlib; only measures the text
_VARIABLES = {color: f"var(--{name})" for name, color in _COLORS.items()} | {f"'{_FONT}'": "var(--sans)"}
_STAND_INS = re.compile("|".join(_VARIABLES))

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cortexloop",
    "path.simplify": False,
    "font.family": _FONT,
    "font.size": 11,
    "text.color": _COLORS["ink"],
    "axes.axisbelow": True,
    "axes.labelcolor": _COLORS["soft"],
    "axes.labelpad": 5,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "xtick.color": _COLORS["faint"],
    "ytick.color": _COLORS["faint"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.pad": 5,
    "ytick.major.pad": 6,
    "xtick.bottom": False,
    "ytick.left": False,
    "grid.color": _COLORS["grid"],
    "grid.linewidth": 1,
    "lines.linewidth": 2,
}


@dataclass(frozen=True, eq=False)
class Series:
    """A curve, with a band from `low` to `high` behind it if both are given.

    `style` names the CSS variable of its colour: "a", "b" or one of `CURVES`.
    """

    x: NDArray[np.floating]
    y: NDArray[np.floating]
    style: str = "a"
    low: NDArray[np.floating] | None = None
    high: NDArray[np.floating] | None = None
    thin: bool = False


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    level: tuple[float, str] | None = None,
    width: float = 322,
    height: float = 200,
) -> Markup:
    """Curves; `level` draws a dashed horizontal line with a caption."""
    with _style():
        figure, axes = _figure(width, height, x_label, y_label)
        for s in series:
            if s.low is not None and s.high is not None:
                outline = np.concatenate([s.x, s.x[::-1]]), np.concatenate([s.low, s.high[::-1]])
                axes.fill(*outline, color=_COLORS[s.style], alpha=0.18, linewidth=0)
        for s in series:
            width_of_line = 1.0 if s.thin else 2.0
            axes.plot(s.x, s.y, color=_COLORS[s.style], linewidth=width_of_line, solid_capstyle="round")
        low, high = _limits(np.concatenate([s.x for s in series]))
        axes.set_xlim(low, high)
        shown = [v for s in series for v in (s.y, s.low, s.high) if v is not None]
        ys = np.concatenate([*shown, np.array([0.0] if level is None else [0.0, level[0]])])
        bottom, top = _limits(ys, margin=0.06)
        axes.set_ylim(0.0 if ys.min() == 0 else bottom, top)
        if level is not None:
            _mark(axes.axhline, level[0])
            # Below the line where it would leave the drawing above it.
            above = level[0] < bottom + 0.85 * (top - bottom)
            axes.annotate(
                level[1], (high, level[0]), (0, 4 if above else -4), textcoords="offset points",
                ha="right", va="bottom" if above else "top",
            )  # fmt: skip
        return _svg(figure, axes)


def scatter(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    x_label: str,
    y_label: str,
    *,
    curve: Series | None = None,
    width: float = 322,
    height: float = 200,
) -> Markup:
    """Points, with a curve over them; pairs with a NaN are left out. More than 1,500 are thinned evenly."""
    shown = np.isfinite(x) & np.isfinite(y)
    x, y = x[shown], y[shown]
    step = -(-len(x) // 1500) if len(x) else 1
    x, y = x[::step], y[::step]
    if not len(x):
        return Markup("")
    with _style():
        figure, axes = _figure(width, height, x_label, y_label)
        across, up = (x, y) if curve is None else (np.append(x, curve.x), np.append(y, curve.y))
        axes.set_xlim(_limits(across, margin=0.03))
        axes.set_ylim(_limits(up, margin=0.06))
        # One path of round-capped strokes without length: a fifth of the size of as many markers.
        gap = np.full(len(x), np.nan)
        dots = [np.stack([v, v, gap], 1).ravel() for v in (x, y)]
        axes.plot(*dots, color=_COLORS["b"], alpha=0.5, linewidth=3.2, solid_capstyle="round")
        if curve is not None:
            axes.plot(curve.x, curve.y, color=_COLORS[curve.style], solid_capstyle="round")
        return _svg(figure, axes)


def histogram(
    values: NDArray[np.floating],
    x_label: str,
    y_label: str,
    *,
    bins: int = 24,
    marks: Sequence[tuple[float, str]] = (),
    width: float = 514,
    height: float = 210,
) -> Markup:
    """Bars with vertical marks, each with a caption; NaN are left out."""
    from matplotlib.ticker import MaxNLocator

    values = values[np.isfinite(values)]
    span = _limits(values) if values.size else (0.0, 1.0)  # equal but for rounding: no bins would fit between them
    with _style():
        figure, axes = _figure(width, height, x_label, y_label)
        counts, edges, _ = axes.hist(values, bins, range=span, rwidth=0.94, color=_COLORS["bar"])
        low, high = _limits(np.concatenate([edges, [value for value, _ in marks]]))
        axes.set_xlim(low, high)
        axes.set_ylim(0, 1.12 * max(np.max(counts), 1))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        for i, (value, caption) in enumerate(marks):
            _mark(axes.axvline, value)
            left = value > low + 0.6 * (high - low)  # where there is more room
            axes.annotate(
                caption, (value, 1), (-5 if left else 5, -1 - 14 * i), xycoords=axes.get_xaxis_transform(),
                textcoords="offset points", ha="right" if left else "left", va="top",
            )  # fmt: skip
        return _svg(figure, axes)


@dataclass(frozen=True, eq=False)
class Interval:
    """A value on the row `row` of `interval_chart` with its interval; NaN bounds draw the value alone."""

    row: int
    value: float
    low: float
    high: float
    style: str = "a"


def interval_chart(
    rows: Sequence[str],
    intervals: Sequence[Interval],
    x_label: str,
    *,
    width: float = 514,
) -> Markup:
    """Values with intervals, one row per name from the top down; values of one row are spread within it."""
    left, line = 112.0, 34.0
    height = TOP + BOTTOM + line * len(rows)
    with _style():
        figure, axes = _figure(width, height, x_label, "", left=left)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        of_row = [[i for i in intervals if i.row == row] for row in range(len(rows))]
        for row, members in enumerate(of_row):
            for place, one in enumerate(members):
                y = row + min(0.22, 0.8 / len(members)) * (place - (len(members) - 1) / 2)
                color = _COLORS[one.style]
                if np.isfinite(one.low) and np.isfinite(one.high):
                    axes.plot([one.low, one.high], [y, y], color=color, alpha=0.55)
                axes.plot([one.value, one.value], [y, y], color=color, linewidth=7, solid_capstyle="round")
        ends = np.array([v for one in intervals for v in (one.value, one.low, one.high) if np.isfinite(v)] + [0.0])
        low, high = _limits(ends, margin=0.04)
        axes.set_xlim(0.0 if ends.min() == 0 else low, high)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params("y", labelcolor=_COLORS["ink"], labelsize=11)
        return _svg(figure, axes, baseline=False)


def strip_chart(
    rows: Sequence[str],
    values: Sequence[NDArray[np.floating]],
    x_label: str,
    *,
    styles: Sequence[str] = (),
    width: float = 514,
) -> Markup:
    """One dot per value, one row per name from the top down, with a mark at each row's median; NaN are left out."""
    left, line = 150.0, 38.0
    height = TOP + BOTTOM + line * len(rows)
    with _style():
        figure, axes = _figure(width, height, x_label, "", left=left)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        for row, numbers in enumerate(values):
            shown = np.sort(numbers[np.isfinite(numbers)])
            color = _COLORS[styles[row] if styles else "b"]
            # Golden-ratio steps spread neighbours over the row's height without chance.
            y = row + 0.5 * (np.arange(len(shown)) * 0.618034 % 1 - 0.5)
            gap = np.full(len(shown), np.nan)
            dots = [np.stack([v, v, gap], 1).ravel() for v in (shown, y)]
            axes.plot(*dots, color=color, alpha=0.45, linewidth=4.5, solid_capstyle="round")
            if len(shown):
                axes.plot([np.median(shown)] * 2, [row - 0.36, row + 0.36], color=color, linewidth=3)
        ends = np.concatenate([*(v[np.isfinite(v)] for v in values), [0.0]])
        low, high = _limits(ends, margin=0.04)
        axes.set_xlim(0.0 if ends.min() == 0 else low, high)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params("y", labelcolor=_COLORS["ink"], labelsize=11)
        return _svg(figure, axes, baseline=False)


def heat_map(values: NDArray[np.floating], base: float) -> str:
    """Data URI of a PNG, one pixel per entry: `base` is transparent, above it warm, below it cool."""
    deviation = values - base
    scale = float(np.abs(deviation).max()) or 1.0
    strength = np.abs(deviation) / scale
    rgba = np.empty((*values.shape, 4), np.uint8)
    rgba[..., :3] = np.where((deviation >= 0)[..., None], (226, 84, 46), (52, 112, 206))
    rgba[..., 3] = np.rint(255 * strength**0.8)
    return data_uri(Image.fromarray(rgba), "PNG")


def picture(pixels: NDArray[np.uint8], *, lossless: bool = True) -> str:
    """Data URI of an RGB image [H, W, 3]: PNG, or a JPEG of high quality for what was a photograph anyway."""
    return data_uri(Image.fromarray(pixels), "PNG" if lossless else "JPEG")


def data_uri(image: Image.Image, kind: str) -> str:
    """The image as a `data:` address."""
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, kind, quality=92, subsampling=0)
    else:
        image.save(buffer, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _style() -> AbstractContextManager[None]:
    """Matplotlib's own defaults and `_STYLE`, whatever the user's configuration says; restored afterwards."""
    import matplotlib.style

    return matplotlib.style.context(["default", _STYLE])


def _figure(width: float, height: float, x_label: str, y_label: str, *, left: float = LEFT) -> tuple[Figure, Axes]:
    """A new figure and its plotting area; not pyplot's, so nothing has to be closed."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure((width / 72, height / 72), dpi=72, frameon=False)  # one point is one CSS pixel
    FigureCanvasSVG(figure)
    area = (left / width, BOTTOM / height, 1 - (left + RIGHT) / width, 1 - (TOP + BOTTOM) / height)
    axes = figure.add_axes(area, frameon=False, xlabel=x_label, ylabel=y_label)
    axes.yaxis.set_label_coords(-(left - 11) / (width - left - RIGHT), 0.5)  # the same place in every chart
    axes.grid(axis="y")
    for axis, most in ((axes.xaxis, 6), (axes.yaxis, 5)):
        axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _mark(line: Callable[..., object], value: float) -> None:
    """A dashed line across the plotting area."""
    line(value, color=_COLORS["ink"], alpha=0.65, linewidth=1, dashes=(4, 3))


def _limits(values: NDArray[np.floating], margin: float = 0.0) -> tuple[float, float]:
    """Lowest and highest value and a share of their distance beyond; apart by more than rounding."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)


def _svg(figure: Figure, axes: Axes, *, baseline: bool = True) -> Markup:
    """The drawing as an element of an HTML page.

    Paths and texts are all that is drawn here. What a page with many drawings cannot share stays behind: prolog and
    metadata, style rules for everything, and ids with the clip paths that refer to them (nothing reaches beyond the
    plotting area).
    """
    bottom, top = axes.get_ylim()
    if baseline and bottom <= 0 <= top:
        axes.axhline(0, color=_COLORS["faint"], linewidth=0.8, zorder=0.9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = ElementTree.fromstring(buffer.getvalue())
    svg = ElementTree.Element("svg", viewBox=drawn.attrib["viewBox"], role="img")
    svg.set("aria-label", " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel()))))
    for element in drawn.iter():
        tag = element.tag.rpartition("}")[2]
        if tag in ("path", "text"):
            kept = {key: _shown(key, value) for key, value in element.attrib.items() if key not in ("id", "clip-path")}
            ElementTree.SubElement(svg, tag, kept).text = element.text
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _shown(key: str, value: str) -> str:
    """An attribute as the page needs it: variables for stand-ins, and paths to a hundredth of a pixel on one line."""
    if key == "d":
        return " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split())
    return _STAND_INS.sub(lambda found: _VARIABLES[found[0]], value)
