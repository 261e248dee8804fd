"""The reduced-precision forward where every value on the way is exact in bfloat16: it has to give the exact bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import _native
from cortexloop.weights import CompactWeights, LayerWeights

MEAN = (116.0, 109.0, 100.0)


def norm(bias: np.ndarray) -> dict[str, np.ndarray | float]:
    """Batch norm that only adds `bias`: gamma / sqrt(0.75 + 0.25) = 1."""
    n = len(bias)
    one, zero = np.ones(n, np.float32), np.zeros(n, np.float32)
    return {"epsilon": 0.25, "bias": bias, "gamma": one, "beta": zero, "mean": zero, "variance": 0.75 * one}


def model(
    name: str, rng: np.random.Generator, kernel: int, stride: int, filters: int, size: tuple[int, int]
) -> CompactWeights:
    """Each first-layer filter copies 1080 times one shifted colour; images are 0 or 1 above the mean.

    1080 is 135 times a power of two: it and its doubles fit the 8 significant bits of bfloat16.
    """
    first = np.zeros((5, 5, 3, filters), np.float32)
    for o in range(filters):
        first[rng.integers(5), rng.integers(5), rng.integers(3), o] = 1080
    bias = np.full(filters, 1080, np.float32)
    depthwise = np.zeros((kernel, kernel, filters), np.float32)
    for c in range(filters):
        depthwise[rng.integers(kernel), rng.integers(kernel), c] = rng.choice([-1, 1, 2])
    pointwise = np.zeros((filters, 5), np.float32)
    pointwise[rng.integers(filters, size=5), np.arange(5)] = 1
    layers = (
        LayerWeights(stride=1, kernel=first, **norm(bias)),
        LayerWeights(stride=stride, depthwise=depthwise, pointwise=pointwise, **norm(np.zeros(5, np.float32))),
    )
    plain = CompactWeights(name, layers, np.zeros((1, 1, 5), np.float32), 1.0, *size, MEAN)
    h, w = plain.map_sizes()[-1]
    readout = rng.choice([-1.0, 1.0], size=(h, w, 5)).astype(np.float32)
    return CompactWeights(name, layers, readout, 1.0, *size, MEAN).validate()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(3, 4), (4, 3), (5, 8), (12, 13), (17, 18), (9, 39)], ids=str)
def test_fast_forward_of_exact_values(
    isa: str, kernel: int, stride: int, size: tuple[int, int], rng: np.random.Generator
) -> None:
    filters = int(rng.choice([1, 3, 16, 17, 33, 49]))
    bank = cl.ModelBank([model(name, rng, kernel, stride, filters, size) for name in ("a", "b", "c")])
    images = torch.from_numpy(rng.integers(0, 2, size=(2, *size, 3)).astype(np.float32))
    expected = cl.responses(images.double(), bank, backend="reference")
    assert torch.unique(expected).numel() > 1 or min(size) < kernel
    got = cl.responses(images, bank, backend="cpu", precision="fast")
    assert torch.equal(got.double(), expected)
    assert _native.isa() == isa
