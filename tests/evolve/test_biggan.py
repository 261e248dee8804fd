"""A network that the caller brings: how codes reach it and images come back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from cortexloop.evolve.generators import BigGANGenerator


class Network(nn.Module):
    """5 x 6 pixels: noise to red and green, class to blue, truncation to the first pixel; remembers its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.calls: list[Tensor] = []

    def forward(self, codes: Tensor, truncation: float) -> Tensor:
        self.calls.append(codes.detach().clone())
        images = torch.zeros(len(codes), 3, 5, 6)
        images[:, 0] = codes[:, 0, None, None]
        images[:, 1] = codes[:, 2, None, None]
        images[:, 2] = codes[:, 3, None, None] * self.scale
        images[:, :, 0, 0] = truncation
        return images


def small(network: nn.Module | None = None, **options: object) -> BigGANGenerator:
    chosen = Network().eval() if network is None else network
    return BigGANGenerator(chosen, **{"height": 5, "width": 6, "noise_dim": 3, "class_dim": 2, "batch": 4, **options})


def test_codes_images_and_passes():
    network = Network().eval()
    generator = small(network, truncation=0.4)
    assert generator.dim == 5
    codes = torch.arange(35.0).view(7, 5) / 20 - 0.9
    images = generator(codes)
    assert images.shape == (7, 3, 5, 6)
    inner = images[:, :, 1, 1]
    expected = (codes[:, [0, 2, 3]] + 1) / 2
    torch.testing.assert_close(inner, expected.clamp(0, 1))
    torch.testing.assert_close(images[:, :, 0, 0], torch.full((7, 3), 0.7))
    assert [tuple(call.shape) for call in network.calls] == [(4, 5), (4, 5)]
    assert torch.equal(network.calls[1][3], codes[6])  # filled up with the last code
    assert torch.equal(generator(codes[5]), images[5])
    assert generator(codes[:0]).shape == (0, 3, 5, 6)
    assert not images.requires_grad  # though the network has parameters


def test_fixed_vectors():
    noise, vector = torch.tensor([0.1, 0.2, 0.3]), [0.4, -0.4]
    network = Network().eval()
    of_class = small(network, noise=noise)
    assert of_class.dim == 2
    of_class(torch.tensor([[0.5, 0.6]]))
    torch.testing.assert_close(network.calls[-1][0], torch.tensor([0.1, 0.2, 0.3, 0.5, 0.6]))
    of_noise = small(network, class_vector=vector)
    assert of_noise.dim == 3
    of_noise(torch.tensor([[0.5, 0.6, 0.7]]))
    torch.testing.assert_close(network.calls[-1][0], torch.tensor([0.5, 0.6, 0.7, 0.4, -0.4]))
    assert json.loads(json.dumps(of_noise.settings()))["class_vector"] == pytest.approx(vector)
    with pytest.raises(ValueError, match="should not both be fixed"):
        small(noise=noise, class_vector=vector)
    with pytest.raises(ValueError, match=r"noise should be 3 finite numbers, got \[2\]"):
        small(noise=vector)


def test_another_signature():
    seen = []

    def call(noise: Tensor, vectors: Tensor, truncation: float) -> Tensor:
        seen.append((tuple(noise.shape), tuple(vectors.shape), truncation))
        return (noise.sum(1) + vectors.sum(1))[:, None, None, None].expand(-1, 3, 5, 6)

    generator = small(call=call)
    codes = 0.1 * torch.ones(2, 5)
    torch.testing.assert_close(generator(codes), torch.full((2, 3, 5, 6), 0.75))
    assert seen == [((4, 3), (4, 2), 0.7)]


def test_gradient():
    codes = torch.full((2, 5), 0.1, requires_grad=True)
    small()(codes)[:, :, 1, 1].sum().backward()
    torch.testing.assert_close(codes.grad, torch.tensor([[0.5, 0, 0.5, 0.5, 0]]).expand(2, -1))


def test_samples():
    generator = BigGANGenerator(Network().eval())
    codes = generator.sample(400, seed=1)
    assert codes.shape == (400, 256)
    assert codes[:, :128].abs().max() <= 1.4  # 2 times the truncation
    assert codes[:, :128].std() == pytest.approx(0.7 * 0.88, rel=0.01)  # 0.88: of normal numbers cut at 2
    assert codes[:, 128:].std() == pytest.approx(0.06, rel=0.01)
    assert torch.equal(codes, generator.sample(400, seed=1))
    assert not torch.equal(codes, generator.sample(400, seed=2))
    assert small(noise=[0, 0, 0]).sample(2).shape == (2, 2)


def test_errors():
    with pytest.raises(ValueError, match="should be in evaluation mode"):
        small(Network())
    with pytest.raises(ValueError, match=r"should return \[4, 3, 7, 6\], got \[4, 3, 5, 6\]; give height and width"):
        small(height=7)(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="truncation should be a finite number above 0"):
        small(truncation=0.0)
    with pytest.raises(ValueError, match=r"codes should be \[\.\.\., 5\]"):
        small()(torch.zeros(1, 256))
