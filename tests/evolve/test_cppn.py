"""The coordinate network: against a plain one, weight by weight, and its lengths of code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortexloop.evolve.generators import CPPNGenerator
from cortexloop.evolve.generators.base import CODE_RMS
from cortexloop.evolve.generators.cppn import code_length


def unit(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x)) - 0.5


@pytest.mark.parametrize(("height", "width", "units"), [(12, 12, 1), (20, 14, 8), (9, 16, 16)])
def test_equals_a_plain_network(height: int, width: int, units: int):
    generator = CPPNGenerator(height, width, code_length(units), seed=4)
    code = CODE_RMS * torch.randn(2, generator.dim, generator=torch.Generator().manual_seed(1))
    inputs, first, second, scale, last, colours = generator._tables
    for image, values in zip(generator(code).double().numpy(), code.double().numpy() / CODE_RMS, strict=True):
        w1, w2, w3 = np.split(values, [20 * units, 20 * units + units * (units + 1)])
        w1 = w1.reshape(units, 20) + first
        w2 = (w2.reshape(units, units + 1) + second) * scale
        w3 = colours @ w3.reshape(3, units + 1) * last
        for pixel in range(height * width):
            hidden = unit(w1 @ inputs[:, pixel])
            hidden = unit(w2 @ np.append(hidden, 1))
            expected = unit(w3 @ np.append(hidden, 1)) + 0.5
            row, column = divmod(pixel, width)
            np.testing.assert_allclose(image[:, row, column], expected, atol=2e-6)


def test_inputs_are_coordinates_and_waves():
    inputs = CPPNGenerator(11, 21)._tables[0].reshape(20, 11, 21)
    x, y, radius, bias = inputs[:4] / inputs[2, 5, 20] * 2  # the distance at the right edge stands for 20 / 21
    np.testing.assert_allclose(x, np.broadcast_to(2 * np.linspace(-1, 1, 21), (11, 21)), atol=1e-12)
    np.testing.assert_allclose(y, np.broadcast_to(np.linspace(-1, 1, 11)[:, None], (11, 21)), atol=1e-12)
    np.testing.assert_allclose(radius, np.hypot(x, y), atol=1e-12)
    assert np.ptp(bias) == 0
    sine, cosine = inputs[4:12], inputs[12:]
    power = sine**2 + cosine**2  # of each wave the same everywhere, falling with its frequency from 1 to 8 cycles
    np.testing.assert_allclose(power, np.broadcast_to(power[:, :1, :1], power.shape), rtol=1e-9)
    np.testing.assert_allclose(power[0] / power[7], 64, rtol=1e-9)


def test_structure_appears_with_the_first_step_from_zero():
    """At code 0 the last layer has a gradient that differs between pixels: the hidden layers are random there."""
    generator = CPPNGenerator(16, 16)
    zero = torch.zeros(generator.dim, requires_grad=True)
    image = generator(zero)
    (gradient,) = torch.autograd.grad(image[0, 2, 3] - image[0, 12, 9], zero)
    assert (gradient[-3 * 17 :].abs() > 1e-5).sum() > 30


def test_lengths_of_codes():
    assert [code_length(h) for h in (1, 8, 16, 24)] == [28, 259, 643, 1155]
    assert CPPNGenerator(8, 8).dim == 643
    assert [CPPNGenerator(8, 8, code_length(h)).units for h in range(1, 65)] == list(range(1, 65))
    with pytest.raises(ValueError, match="h units in each layer, such as 588 or 643, got 640"):
        CPPNGenerator(8, 8, 640)
    with pytest.raises(ValueError, match="such as 643 or 700, got 650"):
        CPPNGenerator(8, 8, 650)
    with pytest.raises(ValueError, match="dim should be from 28 to 5635, got 9999"):
        CPPNGenerator(8, 8, 9999)
