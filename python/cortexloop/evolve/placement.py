"""Where an image is shown: its size and position in degrees of visual angle, on a canvas of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cortexloop.evolve.optimiser import positive, whole

MAX_PIXELS = 16384
"""Longest side of a placed image; a larger one is a mistake in degrees or pixels per degree."""

_AT_ONCE = 16
"""Images that `to_uint8` converts together: what lies between its passes stays in the cache."""

_ROUNDING = 1.5 * 2**23
"""Between 2^23 and 2^24 neighbouring float32 are 1 apart, so adding it rounds to whole numbers, half to even."""


class Placement:
    """Puts square or rectangular images on a canvas, as on the screen in front of an animal or a model.

        placement = Placement((227, 227), pixels_per_degree=20, size=5, position=(2, -1))
        shown = placement(generator(codes))

    The image is resized bilinearly with antialiasing (published in-silico code takes the nearest pixel instead), and
    what lies outside the canvas is cut.

    Args:
        canvas: (height, width) in pixels.
        pixels_per_degree: scale of the canvas.
        size: of the image in degrees, (width, height), or one number for a square.
        position: (x, y) of the image's centre in degrees from the canvas centre, x to the right, y up; of the receptive
            field, that is, if the animal fixates the centre.
        background: grey level 0..255 of the rest of the canvas, or (R, G, B).

    Raises:
        TypeError, ValueError: a number out of bounds, or an image that lies outside the canvas entirely.
    """

    def __init__(
        self,
        canvas: tuple[int, int],
        *,
        pixels_per_degree: float,
        size: float | tuple[float, float],
        position: tuple[float, float] = (0.0, 0.0),
        background: float | Sequence[float] = 127.5,
    ) -> None:
        height, width = _pair("canvas", canvas)
        self.canvas = (whole("canvas height", height, 1, MAX_PIXELS), whole("canvas width", width, 1, MAX_PIXELS))
        """(height, width) in pixels."""
        self.pixels_per_degree = positive("pixels_per_degree", pixels_per_degree)
        across, down = _pair("size", size) if isinstance(size, Sequence) else (size, size)
        self.size = (positive("size", across), positive("size", down))
        x, y = _pair("position", position)
        self.position = (_finite("position", x), _finite("position", y))
        colour = background if isinstance(background, Sequence) else (background,) * 3
        if len(colour) != 3 or not all(0 <= _finite("background", level) <= 255 for level in colour):
            raise ValueError(f"background should be a grey level or (R, G, B) within 0..255, got {background!r}")
        self.background = tuple(float(level) for level in colour)
        self.box = self._box()
        """(top, left, height, width) of the image in pixels; parts of it may lie outside the canvas."""

    def _box(self) -> tuple[int, int, int, int]:
        width, height = (max(1, math.floor(self.pixels_per_degree * side + 0.5)) for side in self.size)
        if max(height, width) > MAX_PIXELS:
            raise ValueError(
                f"the image would have {height} x {width} pixels, more than {MAX_PIXELS}; "
                f"check size (degrees) and pixels_per_degree"
            )
        x, y = self.position
        left = math.floor(self.canvas[1] / 2 + self.pixels_per_degree * x - width / 2 + 0.5)
        top = math.floor(self.canvas[0] / 2 - self.pixels_per_degree * y - height / 2 + 0.5)
        if top >= self.canvas[0] or left >= self.canvas[1] or top + height <= 0 or left + width <= 0:
            raise ValueError(
                f"the image lies outside the canvas: it covers rows {top} to {top + height - 1} and columns {left} to "
                f"{left + width - 1} of {self.canvas[0]} x {self.canvas[1]} pixels; check position and size (degrees)"
            )
        return top, left, height, width

    def __call__(self, images: Tensor) -> Tensor:
        """Placed images.

        Args:
            images: floating point [..., 3, h, w] in [0, 1], of the shape of `size` to within a pixel.

        Returns:
            [..., 3, H, W] in [0, 1]; `images` itself where they already are the canvas. Differentiable.

        Raises:
            TypeError, ValueError: not such images, or images that would be stretched in one direction.
        """
        check_images(images)
        top, left, height, width = self.box
        h, w = images.shape[-2:]
        if (h, w) == (height, width) == self.canvas and (top, left) == (0, 0):
            return images
        flat = images.reshape(-1, 3, h, w)
        if (h, w) != (height, width):
            # One pixel more or less in the box may be rounding; beyond that, circles would become ellipses.
            if abs(height * w - width * h) > max(h, w):
                raise ValueError(
                    f"images of {h} x {w} pixels would be stretched to {height} x {width}; "
                    f"give size as (width, height) in degrees, in the proportions of the images"
                )
            flat = functional.interpolate(flat, (height, width), mode="bilinear", antialias=True, align_corners=False)
            flat = flat.clamp(0, 1)  # rounding may leave the range by a bit
        shown = flat[:, :, max(0, -top) : self.canvas[0] - top, max(0, -left) : self.canvas[1] - left]
        level = flat.new_tensor(self.background) / 255
        placed = level[:, None, None].expand(len(flat), 3, *self.canvas).clone()
        top, left = max(0, top), max(0, left)
        placed[:, :, top : top + shown.shape[-2], left : left + shown.shape[-1]] = shown
        return placed.view(*images.shape[:-2], *self.canvas)

    def settings(self) -> dict[str, Any]:
        """All arguments, JSON-able."""
        return {
            "canvas": list(self.canvas),
            "pixels_per_degree": self.pixels_per_degree,
            "size": list(self.size),
            "position": list(self.position),
            "background": list(self.background),
        }


def to_uint8(images: Tensor) -> Tensor:
    """What a screen shows: levels 0..255, rounded half to even, values outside [0, 1] clamped.

    Args:
        images: floating point [..., 3, H, W], RGB, 0 black and 1 white; not NaN.

    Returns:
        uint8 [..., H, W, 3], contiguous.

    Raises:
        TypeError, ValueError: not such images.

    Equivalent to:
        >>> images = torch.tensor([0.0, 0.1, 1.2]).view(3, 1, 1)
        >>> torch.equal(to_uint8(images), (255 * images).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0))
        True
    """
    check_images(images)
    flat = images.detach().reshape(-1, *images.shape[-3:])
    pixels = torch.empty((len(flat), *flat.shape[2:], 3), dtype=torch.uint8, device=flat.device)
    step = _AT_ONCE if flat.device.type == "cpu" else max(1, len(flat))
    for first in range(0, len(flat), step):
        levels = flat[first : first + step].to(torch.float32).mul(255).clamp_(0, 255)
        # Their bits, read as an integer, end in the level. Three times as fast as rounding, converting, transposing.
        bits = levels.add_(_ROUNDING).view(torch.int32)
        for channel in range(3):
            pixels[first : first + step, ..., channel] = bits[:, channel]
    return pixels.view(*images.shape[:-3], *images.shape[-2:], 3)


def check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless it is a floating-point tensor [..., 3, h, w]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images should be a floating-point tensor [..., 3, h, w], got {kind}")
    if images.ndim < 3 or images.shape[-3] != 3 or 0 in images.shape[-2:]:
        raise ValueError(f"images should be [..., 3, h, w], got {list(images.shape)}")


def _pair(name: str, values: Any) -> tuple[Any, Any]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise ValueError(f"{name} should be two numbers, got {values!r}")
    return values[0], values[1]


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} should be made of finite numbers, got {value!r}")
    return float(value)
