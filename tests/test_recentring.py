"""Recentring and its inverse."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl


def test_recenter_subtracts_the_mean(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, size=(2, 4, 5, 3), dtype=np.uint8)
    got = cl.recenter(pixels)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, pixels - np.array(cl.IMAGE_MEAN), rtol=0, atol=2e-5)
    assert np.array_equal(cl.recenter(torch.from_numpy(pixels)).numpy(), got)
    planes = cl.recenter(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), layout="NCHW")
    assert np.array_equal(planes.transpose(0, 2, 3, 1), got)
    assert cl.recenter(pixels.astype(np.float64)).dtype == np.float64
    assert cl.recenter(pixels[0]).shape == (4, 5, 3)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_to_pixels_inverts(rng: np.random.Generator, layout: str) -> None:
    shape = (2, 4, 5, 3) if layout == "NHWC" else (2, 3, 4, 5)
    pixels = rng.integers(0, 256, size=shape, dtype=np.uint8)
    recentred = cl.recenter(pixels, layout=layout)
    assert np.array_equal(cl.to_pixels(recentred, layout=layout), pixels)
    back = cl.to_pixels(torch.from_numpy(recentred), layout=layout)
    assert back.dtype == torch.uint8
    assert np.array_equal(back.numpy(), pixels)
    exact = cl.to_pixels(recentred, layout=layout, dtype="float32")
    assert exact.dtype == np.float32
    np.testing.assert_allclose(exact, pixels, rtol=0, atol=1e-4)


def test_documented_examples() -> None:
    results = doctest.testmod(importlib.import_module("cortexloop.images"))
    assert results.attempted
    assert not results.failed


def test_to_pixels_clips_and_rounds() -> None:
    values = np.array([[-1e6, 0.0, 1e6]], np.float32)
    assert cl.to_pixels(values).tolist() == [[0, 109, 255]]
    assert cl.to_pixels(torch.from_numpy(values)).tolist() == [[0, 109, 255]]
    fractions = cl.to_pixels(values, dtype="float32")
    np.testing.assert_allclose(fractions, [[0, 109.27, 255]], rtol=1e-6)
    assert cl.to_pixels(torch.from_numpy(values), dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "HWC"}, 'layout should be "NHWC" or "NCHW"'),
        ({"layout": "NCHW"}, r"layout 'NCHW' has 3 channels .* in axis -3, got an array of shape \(2, 4, 5, 3\)"),
        ({"mean": (1.0, 2.0)}, "mean should be three numbers"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    images = np.zeros((2, 4, 5, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        cl.recenter(images, **arguments)
    with pytest.raises(ValueError, match=message):
        cl.to_pixels(images, **arguments)


def test_wrong_pixel_type() -> None:
    with pytest.raises(ValueError, match='dtype should be "uint8" or "float32"'):
        cl.to_pixels(np.zeros((1, 1, 3)), dtype="int32")
