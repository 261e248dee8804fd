"""From pixel levels to what networks take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import cortexloop as cl
from cortexloop.features import Preprocess


@pytest.fixture
def pixels(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, size=(2, 12, 10, 3), dtype=np.uint8))


def test_imagenet_is_the_usual_normalisation(pixels):
    x = Preprocess.imagenet((12, 10))(pixels, torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    expected = ((pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    assert x.is_contiguous()


def test_recentred_is_what_banks_see(pixels):
    assert torch.equal(Preprocess.recentred((12, 10))(pixels), cl.recenter(pixels))


def test_keras_caffe_order(pixels):
    """BGR minus a mean, no division."""
    caffe = Preprocess((12, 10), (103.939, 116.779, 123.68), (1, 1, 1), scale=1.0, channels="BGR")
    expected = pixels.double().flip(-1) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64)
    torch.testing.assert_close(caffe(pixels, torch.float64), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-9)


def test_nothing_is_resized_unasked(pixels):
    with pytest.raises(ValueError, match=r"12 x 10 pixels, the network takes 8 x 8: .*resize=True"):
        Preprocess.imagenet(8)(pixels)


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_resizing_smooths_as_pillow_does(pixels, name):
    plain = Preprocess((6, 5), (0, 0, 0), (1, 1, 1), scale=1.0, resize=True, interpolation=name)
    resized = plain(pixels).permute(0, 2, 3, 1)
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[name]
    for image, own in zip(pixels.numpy(), resized.numpy(), strict=True):
        by_pillow = np.asarray(Image.fromarray(image).resize((5, 6), how), dtype=np.float64)
        assert np.abs(np.clip(own, 0, 255) - by_pillow).max() <= (1.0 if name == "bilinear" else 8.0)


def test_resizing_keeps_levels_and_gradients(pixels):
    grow = Preprocess((24, 20), (0, 0, 0), (1, 1, 1), scale=1.0, resize=True, interpolation="nearest")
    levels = pixels.double().requires_grad_()
    x = grow(levels, torch.float64)
    assert torch.equal(x[:, :, ::2, ::2], pixels.double().permute(0, 3, 1, 2))
    (gradient,) = torch.autograd.grad(x.sum(), levels)
    assert torch.equal(gradient, torch.full_like(gradient, 4))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": (8,)}, "height and a width"),
        ({"size": 0}, "height and a width"),
        ({"mean": (1, 2)}, "three numbers"),
        ({"std": (1, 0, 1)}, "positive"),
        ({"scale": 0.0}, "positive"),
        ({"layout": "CHW"}, "layout"),
        ({"channels": "GBR"}, "channels"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
)
def test_bad_options(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Preprocess(**{"size": 8, "mean": (0, 0, 0), "std": (1, 1, 1), **change})


def test_equal_and_hashable():
    assert Preprocess.imagenet(8) == Preprocess.imagenet((8, 8))
    assert hash(Preprocess.imagenet(8)) == hash(Preprocess.imagenet((8, 8)))
