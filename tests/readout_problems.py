"""Problems for the readouts of feature maps: exact in float32 (small integers), and random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a readout: images, channels, map, neurons; rank for factors, `shared` for positions."""

    batch: int
    channels: int
    height: int
    width: int
    neurons: int
    rank: int = 1
    shared: bool = True
    align_corners: bool = True

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


FACTORIZED = (
    Shape(2, 3, 5, 4, 7),
    Shape(3, 17, 1, 1, 65, rank=2),
    Shape(5, 77, 14, 14, 64, rank=3),
    Shape(2, 7, 23, 29, 130),
    Shape(4, 16, 3, 1, 1, rank=5),
    Shape(3, 1, 40, 40, 70, rank=2),
    Shape(2, 70, 1, 1, 3),
    Shape(140, 3, 4, 5, 3, rank=2),  # more images than the gradient's kernel takes at a time
    Shape(1030, 2, 2, 3, 3, rank=2),  # and than the forward pass does
    Shape(3, 6, 12, 11, 270, rank=2),  # more neurons than share a tile of features
)
POINT = (
    Shape(2, 3, 5, 9, 7),
    Shape(3, 17, 1, 1, 65, shared=False),
    Shape(3, 16, 1, 1, 65, align_corners=False),
    Shape(5, 77, 9, 5, 600, shared=False),
    Shape(2, 7, 8, 4, 1, align_corners=False),
    Shape(4, 16, 3, 1, 20, shared=False),
    Shape(4, 16, 1, 3, 20, shared=False, align_corners=False),
    Shape(2, 1, 2, 2, 20),
)


def _integers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=generator).float()


def _normals(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def factorized(shape: Shape, *, exact: bool, seed: int = 1) -> tuple[Three, Tensor]:
    """(features, masks, vectors), cotangent [B, T]; float32."""
    generator = torch.Generator().manual_seed(seed)
    draw = _integers if exact else _normals
    s = shape
    inputs = (
        draw(generator, s.batch, s.channels, s.height, s.width),
        draw(generator, s.neurons, s.rank, s.height, s.width),
        draw(generator, s.neurons, s.rank, s.channels),
    )
    return inputs, draw(generator, s.batch, s.neurons)


def point(shape: Shape, *, exact: bool, seed: int = 1) -> tuple[Three, Tensor]:
    """(features, positions, vectors), cotangent [B, T]; float32. Positions in [-1.25, 1.25], exact ones at eighths."""
    generator = torch.Generator().manual_seed(seed)
    draw = _integers if exact else _normals
    s = shape
    places = (s.neurons, 2) if s.shared else (s.batch, s.neurons, 2)
    eighths = torch.randint(-10, 11, places, generator=generator) / 8
    positions = eighths if exact else torch.rand(places, generator=generator) * 2.5 - 1.25
    inputs = (
        draw(generator, s.batch, s.channels, s.height, s.width),
        positions,
        draw(generator, s.neurons, s.channels),
    )
    return inputs, draw(generator, s.batch, s.neurons)


def weighted_factors(features: Tensor, masks: Tensor, vectors: Tensor) -> Tensor:
    """The definition, by way of each neuron's weight of each feature."""
    return torch.einsum("bchw,tchw->bt", features, torch.einsum("trc,trhw->tchw", vectors, masks))


def hat(distance: Tensor) -> Tensor:
    """1 at distance 0, 0 from distance 1 on, a straight line between."""
    return (1 - distance.abs()).clamp_min(0)


def interpolated(features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool) -> Tensor:
    """The definition, with the weight of every pixel written out: hat(x - column) * hat(y - row)."""
    batch, _, height, width = features.shape
    x, y = positions.expand(batch, -1, -1).unbind(-1)
    x, y = (((p + 1) / 2 * (n - 1)) if align_corners else ((p + 1) * n - 1) / 2 for p, n in ((x, width), (y, height)))
    columns = hat(x[..., None] - torch.arange(width, dtype=x.dtype))
    rows = hat(y[..., None] - torch.arange(height, dtype=y.dtype))
    return torch.einsum("bchw,bth,btw,tc->bt", features, rows, columns, vectors)
