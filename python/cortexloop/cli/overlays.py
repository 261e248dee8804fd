"""Heat maps over pictures: as arrays, for files, and as parts of an HTML page."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from cortexloop.cli import charts

WARM, COOL = (226, 84, 46), (52, 112, 206)
"""Colours of positive and negative values."""

_FADED = 0.45
"""Contrast that is left of a picture behind a map."""


def overlay(
    pixels: NDArray[np.uint8], values: NDArray[np.floating], *, scale: float | None = None
) -> NDArray[np.uint8]:
    """A grey, faded picture with the map in colour: warm above 0, cool below, clear at 0.

    Args:
        pixels: [H, W, 3].
        values: [h, w]; enlarged smoothly to the picture. All equal to 0: the grey picture.
        scale: the value of full colour; the largest of this map if not given. Larger ones are cut.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = pixels.shape[:2]
    grey = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    base = np.repeat((128 + 96 + _FADED * (grey - 128))[..., None].clip(0, 255), 3, axis=2)
    strength = enlarged(values, height, width)
    top = float(np.abs(values).max()) if scale is None else scale
    strength = np.clip(strength / top, -1, 1) if top > 0 else np.zeros_like(strength)
    color = np.where((strength >= 0)[..., None], WARM, COOL)
    alpha = np.abs(strength)[..., None] ** 0.7
    return np.rint(base * (1 - alpha) + color * alpha).clip(0, 255).astype(np.uint8)


def enlarged(values: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """A map [h, w] brought to [height, width] by Pillow's bilinear filter, where it is not that already."""
    if values.shape == (height, width):
        return values.astype(np.float64)
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float64)


def heat(values: NDArray[np.floating], *, scale: float | None = None) -> str:
    """Data URI of a PNG with one pixel per value: warm above 0, cool below, clear at 0."""
    top = float(np.abs(values).max()) if scale is None else scale
    strength = np.clip(np.abs(values) / top, 0, 1) if top > 0 else np.zeros(values.shape)
    rgba = np.empty((*values.shape, 4), np.uint8)
    rgba[..., :3] = np.where((values >= 0)[..., None], WARM, COOL)
    rgba[..., 3] = np.rint(255 * strength**0.8)
    return charts.data_uri(Image.fromarray(rgba), "PNG")


def thumbnail(pixels: NDArray[np.uint8], longest: int) -> str:
    """Data URI of a JPEG of an image [H, W, 3], made smaller where a side is longer than `longest` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return charts.data_uri(picture, "JPEG")


def frame(
    background: str | None,
    layer: str | None,
    size: tuple[int, int],
    *,
    ellipse: tuple[float, float, float, float, float] | None = None,
    faded: bool = True,
) -> Markup:
    """One picture of a page: a background, a heat map stretched over it and an outline.

    Args:
        background, layer: data URIs.
        size: height and width of the frame in image pixels.
        ellipse: x, y, semi-axes along x and y before rotation, in image pixels, and the rotation in degrees (clockwise,
            as the page's y axis points down).
        faded: whether the background is grey and faint, as behind a heat map.
    """
    height, width = size
    parts = [f'<div class="frame" style="aspect-ratio:{width}/{height}">']
    if background is not None:
        kind = ' class="behind"' if faded else ""
        parts.append(f'<img{kind} src="{background}" alt="">')
    if layer is not None:
        parts.append(f'<img class="over" src="{layer}" alt="">')
    if ellipse is not None:
        x, y, a, b, angle = ellipse
        parts.append(
            f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none"><ellipse cx="{x:.2f}" cy="{y:.2f}" '
            f'rx="{a:.2f}" ry="{b:.2f}" transform="rotate({angle:.1f} {x:.2f} {y:.2f})"/></svg>'
        )
    return Markup("".join([*parts, "</div>"]))
