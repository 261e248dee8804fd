"""Small problems of factor models: maps of known masks and vectors, and a tiny network as their source."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cortexloop.features import ModuleFeatures, Preprocess


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(count: int, rank: int, h: int, w: int, rng: np.random.Generator, border: int = 0) -> Tensor:
    """Gaussian masks [T, R, H, W] float64, at different places."""
    yy, xx = np.mgrid[:h, :w]
    masks = np.zeros((count, rank, h, w))
    for t in range(count):
        for r in range(rank):
            x0 = rng.uniform(border + 1, w - border - 2)
            y0 = (r + 0.5) * h / rank + rng.uniform(-0.5, 0.5)
            masks[t, r] = np.exp(-((xx - x0) ** 2 + (yy - y0) ** 2) / (2 * rng.uniform(0.7, 1.2) ** 2))
    if border:
        inside = np.zeros((h, w))
        inside[border:-border, border:-border] = 1
        masks *= inside
    return torch.from_numpy(masks)


@pytest.fixture
def known(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Masks [5, 2, 9, 8] and vectors [5, 2, 12], float64."""
    return blobs(5, 2, 9, 8, rng), torch.from_numpy(rng.standard_normal((5, 2, 12)))


class TinyNetwork(nn.Module):
    """Two convolutions with ReLU: images [B, 3, 24, 24] to maps [B, 6, 10, 10]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Conv2d(3, 5, 5, stride=2)
        self.second = nn.Conv2d(5, 6, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            self.first.bias.fill_(0.3)
            self.second.bias.fill_(1.0)  # no unit is silent for noise

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


@pytest.fixture(scope="session")
def source() -> ModuleFeatures:
    """The tiny network's last layer, [6, 10, 10]."""
    network = nn.Sequential(TinyNetwork(), nn.Identity()).eval()
    return ModuleFeatures(network, "1", preprocess=Preprocess(24, (0.5,) * 3, (0.25,) * 3), batch=16, name="tiny")
