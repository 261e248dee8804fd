"""Gabor patches: against the plain formula on the grid of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortexloop.evolve.generators import GaborGenerator
from cortexloop.evolve.generators.base import CODE_RMS

AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def linear(images: torch.Tensor) -> np.ndarray:
    """Images before the logistic function."""
    return torch.logit(images.double()).numpy() / 4


def reference(generator: GaborGenerator, code: np.ndarray) -> np.ndarray:
    """Up to a common factor, the image of a code before the logistic function, patch by patch, [3, H, W]."""
    h, w = generator.height, generator.width
    rest = generator._tables[0]  # random: place x, y, orientation, frequency, size at code 0
    y, x = np.meshgrid(np.arange(h) + 0.5, np.arange(w) + 0.5, indexing="ij")
    total = np.zeros((3, h, w))
    for at_rest, patch in zip(rest, code.reshape(-1, 11) / CODE_RMS, strict=True):
        dx, dy = x - w * logistic(at_rest[0] + patch[0]), y - h * logistic(at_rest[1] + patch[1])
        angle = at_rest[2] + np.pi / 4 * patch[2]
        slowest = 1 / max(h, w)
        frequency = slowest * (0.25 / slowest) ** logistic(at_rest[3] + patch[3])
        size = 0.25 * 4 ** logistic(at_rest[4] + patch[4]) / frequency
        envelope = np.exp(-(dx**2 + dy**2) / (2 * size**2)) / size
        phase = 2 * np.pi * frequency * (dx * np.cos(angle) + dy * np.sin(angle))
        colours = (patch[5:].reshape(2, 3) * [1, 0.28, 0.13]) @ AXES  # [part, RGB]
        total += envelope * (colours[0][:, None, None] * np.cos(phase) + colours[1][:, None, None] * np.sin(phase))
    return total


@pytest.mark.parametrize(("height", "width", "patches"), [(24, 24, 1), (31, 20, 7), (9, 40, 64)])
def test_equals_the_formula(height: int, width: int, patches: int):
    generator = GaborGenerator(height, width, 11 * patches, seed=2)
    code = CODE_RMS * torch.randn(3, generator.dim, generator=torch.Generator().manual_seed(1))
    found = linear(generator(code))
    expected = np.stack([reference(generator, c) for c in code.double().numpy()])
    factor = np.vdot(found, expected) / np.vdot(expected, expected)
    np.testing.assert_allclose(found, factor * expected, atol=2e-5 * np.abs(found).max() + 1e-5)


def test_one_patch_by_hand():
    """With the random spread set aside: a vertical wave of luminance in the middle; then moved, turned, in colour."""
    generator = GaborGenerator(33, 33, 11)
    rest, step, weight, grid_x, grid_y = generator._tables
    generator._tables = (np.zeros_like(rest), step, weight, grid_x, grid_y)

    def image(**entries: float) -> np.ndarray:
        names = ["x", "y", "angle", "frequency", "size", "even", "rb", "mg", "odd", "rb_odd", "mg_odd"]
        code = torch.tensor([CODE_RMS * entries.get(name, 0.0) for name in names])
        return linear(generator(code))

    frequency = np.sqrt(0.25 / 33)  # halfway in octaves between 1 / 33 and 1 / 4 cycles per pixel
    size = 0.5 / frequency  # halfway between a quarter and one wavelength
    x = np.arange(33) - 16.0
    profile = np.exp(-(x**2) / (2 * size**2)) * np.cos(2 * np.pi * frequency * x)
    upright = image(even=0.1)
    np.testing.assert_allclose(upright[0, 16] / upright[0, 16, 16], profile, atol=1e-4)
    np.testing.assert_allclose(upright[1], upright[0], atol=1e-6)
    np.testing.assert_allclose(image(even=-0.1), -upright, atol=1e-5)
    odd = image(odd=0.1)
    np.testing.assert_allclose(odd[0, 16, ::-1], -odd[0, 16], atol=1e-5)
    np.testing.assert_allclose(odd[0, 16, 16], 0, atol=1e-6)
    turned = image(even=0.1, angle=2)  # 2 times 45 degrees
    np.testing.assert_allclose(turned, upright.transpose(0, 2, 1), atol=1e-5)
    moved = image(even=0.1, x=np.log(3), y=-np.log(3))  # to 3/4 and 1/4 of the way
    assert np.unravel_index(moved[0].argmax(), (33, 33)) == (8, 24)
    red = image(rb=0.1)
    np.testing.assert_allclose(red[0], -red[2], atol=1e-6)
    np.testing.assert_allclose(red[1], 0, atol=1e-6)
    assert red[0, 16, 16] > 0


def test_dim_is_a_multiple_of_eleven():
    assert GaborGenerator(20, 20).dim == 704
    assert GaborGenerator(20, 20).patches == 64
    with pytest.raises(ValueError, match="multiple of 11, the parameters of a patch, such as 33 or 44, got 40"):
        GaborGenerator(20, 20, 40)
    with pytest.raises(ValueError, match="dim should be from 11 to 45056, got 5"):
        GaborGenerator(20, 20, 5)
