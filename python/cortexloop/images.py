"""Recentring, the only preprocessing of the compact models, and Gaussian blur.

A leaf: NumPy, torch and `cortexloop.weights` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop.weights import IMAGE_MEAN

Array = TypeVar("Array", NDArray[np.generic], torch.Tensor)


def _channel_axis(images: NDArray[np.generic] | torch.Tensor, layout: str) -> int:
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'layout should be "NHWC" or "NCHW", got {layout!r}')
    axis = -1 if layout == "NHWC" else -3
    if images.ndim < -axis or images.shape[axis] != 3:
        raise ValueError(
            f"layout {layout!r} has 3 channels (R, G, B) in axis {axis}, got an array of shape {tuple(images.shape)}"
        )
    return axis


def _mean_like(mean: Sequence[float], axis: int) -> NDArray[np.float32]:
    if len(mean) != 3:
        raise ValueError(f"mean should be three numbers (R, G, B), got {len(mean)}")
    # Rounded to float32, as in a packed bank: responses(recenter(x)) and responses(x) then agree bit for bit.
    return np.asarray(mean, dtype=np.float32).reshape((3,) + (1,) * (-1 - axis))


def recenter(images: Array, mean: Sequence[float] = IMAGE_MEAN, *, layout: str = "NHWC") -> Array:
    """Subtract the RGB mean from pixels.

    Args:
        images: uint8, or floating point of the same range, RGB 0..255, [..., H, W, 3] (or [..., 3, H, W] for "NCHW");
            NumPy or torch.
        mean: R, G, B, 0..255.
        layout: "NHWC" or "NCHW".

    Returns:
        float32 (float64 for float64 pixels) of the same shape and kind, about -116..155.

    Raises:
        ValueError: no axis of three channels where `layout` says, or an unknown layout.

    Equivalent to:
        >>> images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
        >>> torch.equal(recenter(images), images.float() - torch.tensor(IMAGE_MEAN))
        True
    """
    shift = _mean_like(mean, _channel_axis(images, layout))
    if isinstance(images, torch.Tensor):
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        return images.to(dtype) - torch.from_numpy(shift).to(images.device, dtype)
    return images.astype(np.float64 if images.dtype == np.float64 else np.float32) - shift


def to_pixels(
    images: Array, mean: Sequence[float] = IMAGE_MEAN, *, layout: str = "NHWC", dtype: str = "uint8"
) -> Array:
    """Add the RGB mean and clip to 0..255: the inverse of `recenter`.

    Args:
        images: recentred float images, [..., H, W, 3] (or [..., 3, H, W] for "NCHW"); NumPy or torch.
        mean: R, G, B, 0..255.
        layout: "NHWC" or "NCHW".
        dtype: "uint8" rounds to the nearest level (for files and screens), "float32" keeps fractions.

    Returns:
        Pixels 0..255 of the same shape and kind.

    Raises:
        ValueError: no axis of three channels where `layout` says, an unknown layout or an unknown dtype.
    """
    if dtype not in ("uint8", "float32"):
        raise ValueError(f'dtype should be "uint8" or "float32", got {dtype!r}')
    shift = _mean_like(mean, _channel_axis(images, layout))
    if isinstance(images, torch.Tensor):
        pixels = (images + torch.from_numpy(shift).to(images.device)).clamp(0, 255)
        return pixels.round().to(torch.uint8) if dtype == "uint8" else pixels.to(torch.float32)
    raw = np.clip(np.add(images, shift), 0, 255)
    result: NDArray[np.generic] = (np.rint(raw) if dtype == "uint8" else raw).astype(dtype)
    return result


def gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur over height and width, [..., H, W, C], each channel by itself; sigma in pixels.

    Equals scipy.ndimage.gaussian_filter with its defaults: radius 4 sigma (rounded), edges mirrored about the border
    between pixels ("reflect"). Tap by tap with elementwise sums, so that the bits of an image depend on nothing else in
    the batch.

    Raises:
        ValueError: if `sigma` is negative.
    """
    if sigma < 0:
        raise ValueError(f"sigma should not be negative, got {sigma}")
    if sigma == 0:
        return images
    radius = int(4.0 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (weights / weights.sum())[radius:].tolist()  # of the centre and of one side
    x = images
    for axis in (-3, -2):
        size = x.shape[axis]
        mirrored = np.pad(np.arange(size), radius, mode="symmetric")
        padded = x.index_select(axis, torch.from_numpy(mirrored).to(x.device))
        total = x * taps[0]
        for k, tap in enumerate(taps[1:], start=1):
            total += (padded.narrow(axis, radius - k, size) + padded.narrow(axis, radius + k, size)) * tap
        x = total
    return x
