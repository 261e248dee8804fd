"""Cosine images: against scipy's transform, and the statistics of natural images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn

from cortexloop.evolve.generators import FourierGenerator
from cortexloop.evolve.generators.base import CODE_RMS

AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def planes(images: torch.Tensor) -> np.ndarray:
    """Coefficients [b, axis, ky, kx] of images before the logistic function."""
    linear = torch.logit(images.double()).numpy() / 4
    return dctn(np.einsum("ac,bchw->bahw", AXES, linear), axes=(-2, -1), norm="ortho")


def codes(count: int, dim: int) -> torch.Tensor:
    return CODE_RMS * torch.randn(count, dim, generator=torch.Generator().manual_seed(3))


def reference(height: int, width: int, dim: int, code: np.ndarray) -> np.ndarray:
    """Images by the definition: sorted frequencies, amplitudes, scipy's inverse transform."""
    order = sorted(
        ((1 if axis == 0 else 4) * ((ky * width) ** 2 + (kx * height) ** 2), axis, ky, kx)
        for axis in range(3)
        for ky in range(height)
        for kx in range(width)
    )[:dim]
    side = max(height, width)
    amplitude = np.array([1 / max(1.0, side * np.hypot(ky / height, kx / width)) for _, _, ky, kx in order])
    axes = np.array([axis for _, axis, _, _ in order])
    spread = np.array([1.0, 0.28, 0.13])
    power = np.array([np.sum(amplitude[axes == axis] ** 2) for axis in range(3)])
    wanted = np.where(power > 0, spread, 0)
    wanted *= 0.22 * np.sqrt(3 / np.sum(wanted**2))  # standard deviation along each axis
    total = np.zeros((len(code), height, width, 3))
    for axis in np.flatnonzero(power):
        gain = wanted[axis] * np.sqrt(height * width / power[axis]) / CODE_RMS
        plane = np.zeros((len(code), height, width))
        for i in np.flatnonzero(axes == axis):
            plane[:, order[i][2], order[i][3]] = code[:, i] * amplitude[i] * gain
        total += idctn(plane, axes=(1, 2), norm="ortho")[..., None] * AXES[axis]
    return 1 / (1 + np.exp(-4 * total.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("height", "width", "dim"),
    [(24, 24, 500), (24, 24, 1728), (13, 17, 200), (17, 12, 612), (5, 40, 90), (7, 9, 1), (7, 9, 2), (7, 9, 3)],
)
def test_equals_the_definition(height: int, width: int, dim: int):
    code = codes(3, dim)
    expected = reference(height, width, dim, code.double().numpy())
    np.testing.assert_allclose(FourierGenerator(height, width, dim)(code), expected, atol=2e-6)


def test_first_coefficients_by_hand():
    """1 x 2 pixels: luminance mean, red-blue mean, magenta-green mean; luminance step; chromatic steps."""
    generator = FourierGenerator(1, 2, 6)
    linear = torch.logit(generator(5 * torch.eye(6)).double()).numpy()[:, :, 0, :]
    order = [(0, 1), (1, 1), (2, 1), (0, -1), (1, -1), (2, -1)]  # axis; right pixel relative to the left one
    for found, (axis, sign) in zip(linear, order, strict=True):
        assert found[:, 1] == pytest.approx(sign * found[:, 0], rel=1e-5, abs=1e-6)
        direction = found[:, 0] / np.linalg.norm(found[:, 0])
        assert direction == pytest.approx(AXES[axis], abs=1e-5)


def test_random_images_have_the_spectrum_and_colours_of_natural_ones():
    found = planes(FourierGenerator(112, 112)(codes(200, 4096)))
    # Amplitude falls as 1 / frequency: mean power in rings, against radial frequency.
    radius = np.hypot(*np.meshgrid(np.arange(112), np.arange(112), indexing="ij"))
    rings = np.geomspace(1.5, 55, 10)
    ring = np.digitize(radius, rings)
    power = [np.mean(found[:, 0, ring == i] ** 2) for i in range(1, 10)]
    centre = [np.exp(np.log(radius[ring == i]).mean()) for i in range(1, 10)]
    assert np.polyfit(np.log(centre), np.log(power) / 2, 1)[0] == pytest.approx(-1, abs=0.03)
    # Standard deviations along the colour axes, and RMS contrast over pixels and channels
    spread = np.sqrt(np.mean(found**2, axis=(0, 2, 3)))
    assert spread / spread[0] == pytest.approx([1, 0.28, 0.13], rel=0.05)
    assert np.sqrt(np.mean(found**2)) == pytest.approx(0.22, rel=0.03)
    # Luminance has two thirds of the coefficients; colour goes up to half its frequencies.
    used = np.any(np.abs(found) > 1e-4, axis=0)
    counts = used.sum(axis=(1, 2))
    assert counts.sum() == 4096
    assert counts / 4096 == pytest.approx([2 / 3, 1 / 6, 1 / 6], abs=0.01)
    top = [radius[plane].max() for plane in used]
    assert top[1] == pytest.approx(top[0] / 2, abs=1)


def test_a_longer_code_refines_a_shorter_one():
    short, long = FourierGenerator(32, 32, 60), FourierGenerator(32, 32, 300)
    code = torch.cat((codes(2, 60), torch.zeros(2, 240)), dim=1)
    a, b = planes(short(code[:, :60])), planes(long(code))
    for axis in range(3):
        ratio = b[:, axis][np.abs(a[:, axis]) > 1e-3] / a[:, axis][np.abs(a[:, axis]) > 1e-3]
        assert ratio == pytest.approx(ratio[0], rel=1e-2)
    np.testing.assert_allclose(b[np.abs(a) < 1e-5], 0, atol=1e-4)


def test_defaults_and_errors():
    assert FourierGenerator(112, 112).dim == 4096
    assert FourierGenerator(10, 10).dim == 300
    with pytest.raises(ValueError, match="dim should be from 1 to 300, got 301"):
        FourierGenerator(10, 10, 301)
    with pytest.raises(ValueError, match="dim should be from 1 to 300, got 0"):
        FourierGenerator(10, 10, 0)
