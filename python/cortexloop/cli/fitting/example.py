"""The built-in example: recordings of textbook neurons, and a small fixed network to explain them with.

It needs no file, and the truth is known: where each neuron looks and what it prefers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cortexloop as cl
from cortexloop import textbook

IMAGES = 360
REPEATS = 4
NOISE = 0.6
"""Standard deviation of one repeat around the expected response, whose own is about 1."""

ORIENTATIONS = 8
_TAPS = 13
_STRIDE, _POOL = 2, 2
_LUMINANCE = (0.299, 0.587, 0.114)


class FilterNetwork(nn.Module):
    """Simple cells of one scale at all places: images [B, 3, H, W] in 0..1, mean subtracted -> maps [B, 36, H/4, W/4].

    Luminance goes through odd and even Gabor filters of 8 orientations and through centre-surround filters of two
    sizes, each in both polarities, then a ReLU and average pooling of 2 x 2. Nothing is trained.

    Attributes:
        channels: what each channel prefers, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        kernels, self.channels = _filters()
        self.simple = nn.Conv2d(3, len(kernels), _TAPS, stride=_STRIDE, padding=_TAPS // 2, bias=False)
        weights = torch.from_numpy(kernels)[:, None] * torch.tensor(_LUMINANCE)[:, None, None]
        self.simple.weight = nn.Parameter(weights.to(torch.float32), requires_grad=False)
        self.rectified = nn.ReLU()
        self.pooled = nn.AvgPool2d(_POOL)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.pooled(self.rectified(self.simple(images)))
        return maps


LAYER = "pooled"


def _filters() -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Kernels [36, 13, 13], each 1 for the image it likes best among those of contrast 1, and their names."""
    taps = np.arange(_TAPS) - _TAPS // 2
    y, x = np.meshgrid(taps, taps, indexing="ij")
    envelope = np.exp(-(x**2 + y**2) / (2 * 2.6**2))
    kernels, names = [], []
    for i in range(ORIENTATIONS):
        angle = math.pi * i / ORIENTATIONS
        across = x * math.sin(angle) + y * math.cos(angle)  # of a contour counter-clockwise from horizontal; y is down
        label = f"{180 * i / ORIENTATIONS:g}\N{DEGREE SIGN}"
        kernels += [-envelope * np.sin(2 * math.pi * across / 9), envelope * np.cos(2 * math.pi * across / 7)]
        names += [f"edge {label}", f"bar {label}"]
    for sigma, label in ((1.4, "small"), (2.6, "large")):
        radius = (x**2 + y**2) / (2 * sigma**2)
        wide = np.exp(-radius / 2.56)
        kernels.append(np.exp(-radius) - wide * np.exp(-radius).sum() / wide.sum())
        names.append(f"{label} spot")
    both, named = [], []
    for kernel, name in zip(kernels, names, strict=True):
        kernel = kernel - kernel.mean()
        kernel /= np.abs(kernel).sum() / 2
        both += [kernel, -kernel]
        named += [f"{name}, light", f"{name}, dark"] if "edge" not in name else [f"{name} \N{UPWARDS ARROW}", f"{name} \N{DOWNWARDS ARROW}"]
    return np.stack(both), tuple(named)


@dataclass(frozen=True, eq=False)
class Example:
    """A recording of model neurons.

    Attributes:
        images: uint8 [N, 112, 112, 3].
        raw: [T, N, repeats] responses with noise.
    """

    images: NDArray[np.uint8]
    raw: NDArray[np.float64]
    neurons: tuple[str, ...]


def recorded(seed: int) -> Example:
    """Noisy responses of the nine textbook neurons to procedural images."""
    bank = cl.ModelBank.from_weights(textbook.textbook_neurons())
    images = textbook.procedural_images(IMAGES, seed)
    clean = cl.responses(images, bank).T.astype(np.float64)
    noise = np.random.default_rng(seed).normal(0.0, NOISE, (*clean.shape, REPEATS))
    return Example(images, clean[..., None] + noise, bank.names)
