"""Small charts as inline SVG. Colours come from the page's style sheet by class, so light and dark themes both fit."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 10.0, 34.0


@dataclass(frozen=True, eq=False)
class Series:
    """A curve. `style` is a CSS class: "a", "b" or "quiet"."""

    x: NDArray[np.floating]
    y: NDArray[np.floating]
    style: str = "a"


@dataclass(frozen=True)
class _Axes:
    """Maps data to the drawing; `box` is the plotting area (left, top, right, bottom)."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: float
    height: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (self.height - TOP - BOTTOM)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    span = high - low
    raw = span / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    level: tuple[float, str] | None = None,
    width: float = 300,
    height: float = 190,
) -> Markup:
    """Curves; `level` draws a dashed horizontal line with a caption."""
    ys = np.concatenate([s.y for s in series] + ([np.array([level[0]])] if level else []))
    xs = np.concatenate([s.x for s in series])
    axes = _fit(xs, ys, width, height, zero=True)
    parts = [_frame(axes, x_label, y_label)]
    if level is not None:
        y = axes.y(level[0])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        above = y - 5 if y > TOP + 16 else y + 13
        parts.append(
            f'<text class="note" x="{width - RIGHT - 2}" y="{above:.1f}" text-anchor="end">{escape(level[1])}</text>'
        )
    for s in series:
        points = " ".join(f"{axes.x(float(x)):.1f},{axes.y(float(y)):.1f}" for x, y in zip(s.x, s.y, strict=True))
        parts.append(f'<polyline class="line {s.style}" points="{points}"/>')
    return _svg(parts, width, height)


def scatter(
    x: NDArray[np.floating],
    y: NDArray[np.floating],
    x_label: str,
    y_label: str,
    *,
    width: float = 300,
    height: float = 190,
) -> Markup:
    """Points; pairs with a NaN are left out. More than 1,500 are thinned evenly."""
    shown = np.isfinite(x) & np.isfinite(y)
    x, y = x[shown], y[shown]
    step = -(-len(x) // 1500) if len(x) else 1
    x, y = x[::step], y[::step]
    if not len(x):
        return Markup("")
    axes = _fit(x, y, width, height, zero=False)
    path = "".join(f"M{axes.x(float(a)):.1f} {axes.y(float(b)):.1f}h0" for a, b in zip(x, y, strict=True))
    return _svg([_frame(axes, x_label, y_label), f'<path class="points" d="{path}"/>'], width, height)


def histogram(
    values: NDArray[np.floating],
    x_label: str,
    y_label: str,
    *,
    bins: int = 24,
    marks: Sequence[tuple[float, str]] = (),
    width: float = 520,
    height: float = 210,
) -> Markup:
    """Bars with vertical marks, each with a caption."""
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, bins=bins)
    xs = np.concatenate([edges, [mark[0] for mark in marks]])
    axes = _Axes(float(xs.min()), float(xs.max()), 0.0, 1.12 * float(max(counts.max(), 1)), width, height)
    if axes.x1 <= axes.x0:
        axes = _Axes(axes.x0 - 0.5, axes.x1 + 0.5, axes.y0, axes.y1, width, height)
    parts = [_frame(axes, x_label, y_label)]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            left, right, top = axes.x(float(low)), axes.x(float(high)), axes.y(float(count))
            size = f'width="{max(right - left - 1, 0.5):.1f}" height="{axes.y(0) - top:.1f}"'
            parts.append(f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" {size}/>')
    for i, (value, caption) in enumerate(marks):
        x = axes.x(value)
        anchor, shift = ("end", -5) if x > 0.6 * width else ("start", 5)
        parts.append(f'<line class="level" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        y = TOP + 10 + 14 * i
        parts.append(f'<text class="note" x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">{escape(caption)}</text>')
    return _svg(parts, width, height)


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


def _fit(x: NDArray[np.floating], y: NDArray[np.floating], width: float, height: float, *, zero: bool) -> _Axes:
    x0, x1, y0, y1 = float(x.min()), float(x.max()), float(y.min()), float(y.max())
    if zero:
        y0, y1 = min(y0, 0.0), max(y1, 0.0)
    if x1 <= x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    if y1 <= y0:
        y0, y1 = y0 - 0.5, y1 + 0.5
    margin = 0.06 * (y1 - y0)
    side = 0.0 if zero else 0.03 * (x1 - x0)
    return _Axes(x0 - side, x1 + side, y0 - (0 if zero and y0 == 0 else margin), y1 + margin, width, height)


def _frame(axes: _Axes, x_label: str, y_label: str) -> str:
    parts = []
    right, bottom = axes.width - RIGHT, axes.height - BOTTOM
    for value in ticks(axes.y0, axes.y1, 4):
        y = axes.y(value)
        kind = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(axes.x0, axes.x1, 5):
        x = axes.x(value)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 14:.1f}" text-anchor="middle">{_number(value)}</text>'
        )
    middle = (LEFT + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{axes.height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    y = (TOP + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(10 {y}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _svg(parts: Sequence[str], width: float, height: float) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>')
