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

IMAGES = 800
REPEATS = 4
NOISE = 0.5
"""Standard deviation of one repeat around the expected response, whose own is 1."""

SATURATION = 3.0
"""Where responses level off, in their standard deviations."""

TILE = 28
"""Side in pixels of the pieces that collages are made of: about the size of the neurons' receptive fields."""

_PIECES = 120  # procedural images that they are cut from

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
        self.luminance = nn.Conv2d(3, 1, 1, bias=False)
        self.simple = nn.Conv2d(1, len(kernels), _TAPS, stride=_STRIDE, padding=_TAPS // 2, bias=False)
        fixed = ((self.luminance, np.array(_LUMINANCE)[None, :, None, None]), (self.simple, kernels[:, None]))
        for layer, weights in fixed:
            layer.weight = nn.Parameter(torch.from_numpy(weights).to(torch.float32), requires_grad=False)
        self.rectified = nn.ReLU()
        self.pooled = nn.AvgPool2d(_POOL)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.pooled(self.rectified(self.simple(self.luminance(images))))
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
        named += (
            [f"{name}, light", f"{name}, dark"]
            if "edge" not in name
            else [f"{name} \N{UPWARDS ARROW}", f"{name} \N{DOWNWARDS ARROW}"]
        )
    return np.stack(both), tuple(named)


@dataclass(frozen=True, eq=False)
class Example:
    """A recording of model neurons.

    Attributes:
        images: uint8 [N, 112, 112, 3].
        raw: [T, N, repeats] responses with noise, about z-scored.
    """

    images: NDArray[np.uint8]
    raw: NDArray[np.float64]
    neurons: tuple[str, ...]


def recorded(seed: int) -> Example:
    """Noisy, saturating responses of the nine textbook neurons to collages."""
    bank = cl.ModelBank.from_weights(textbook.textbook_neurons())
    images = collages(IMAGES, seed)
    clean = cl.responses(images, bank).T.astype(np.float64)
    clean = (clean - clean.mean(axis=1, keepdims=True)) / clean.std(axis=1, keepdims=True)
    clean = SATURATION * np.tanh(clean / SATURATION)
    noise = np.random.default_rng(seed).normal(0.0, NOISE, (*clean.shape, REPEATS))
    return Example(images, clean[..., None] + noise, bank.names)


def collages(count: int, seed: int) -> NDArray[np.uint8]:
    """Images tiled with pieces of procedural images: uint8 [count, 112, 112, 3].

    What lies in one place says nothing about what lies in another, so that covariances with a response are confined to
    its receptive field; with whole procedural images, contours and textures would carry them far beyond.
    """
    rng = np.random.default_rng(seed)
    pieces = textbook.procedural_images(_PIECES, seed)
    side = textbook.SIZE // TILE + 1
    found = np.empty((count, textbook.SIZE, textbook.SIZE, 3), np.uint8)
    for image in found:
        tiled = np.empty((side * TILE, side * TILE, 3), np.uint8)
        for row in range(side):
            for column in range(side):
                y, x = rng.integers(textbook.SIZE - TILE + 1, size=2)
                piece = pieces[rng.integers(len(pieces)), y : y + TILE, x : x + TILE]
                tiled[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = piece
        y, x = rng.integers(TILE, size=2)
        image[:] = tiled[y : y + textbook.SIZE, x : x + textbook.SIZE]
    return found
