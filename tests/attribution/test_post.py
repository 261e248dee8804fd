"""Steps from attribution maps to pictures."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch

from cortexloop.attribution import Post


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.randn(2, 3, 11, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_nothing_is_done_unasked(maps):
    assert Post()(maps) is maps or torch.equal(Post()(maps), maps)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sum", lambda m: m.sum(-1)),
        ("mean", lambda m: m.mean(-1)),
        ("max_abs", lambda m: np.abs(m).max(-1)),
        ("l2", lambda m: np.sqrt((m**2).sum(-1))),
    ],
)
def test_channels(maps, name, expected):
    result = Post(channels=name)(maps)
    assert result.shape[2:] == Post(channels=name).shape(11, 9)
    np.testing.assert_allclose(result.numpy(), expected(maps.numpy()), rtol=1e-12, atol=1e-12)


def test_rectification(maps):
    assert torch.equal(Post(rectify="abs")(maps), maps.abs())
    assert torch.equal(Post(rectify="relu")(maps), maps.clamp(min=0))


def test_blur_is_scipys(maps):
    result = Post(channels="sum", blur=1.5)(maps)
    expected = scipy.ndimage.gaussian_filter(maps.sum(-1).numpy(), (0, 0, 1.5, 1.5))
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-12)
    coloured = Post(blur=1.5)(maps)
    np.testing.assert_allclose(coloured.sum(-1).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_percentile_and_maximum(maps):
    result = Post(clip=90, normalise=True)(maps).flatten(2).numpy()
    flat = maps.flatten(2).numpy()
    bound = np.percentile(np.abs(flat), 90, axis=-1, keepdims=True)
    np.testing.assert_allclose(result, np.clip(flat, -bound, bound) / bound, rtol=1e-12)


def test_maps_of_zeros_stay(maps):
    result = Post(channels="l2", clip=99, normalise=True)(torch.zeros_like(maps))
    assert torch.equal(result, torch.zeros(2, 3, 11, 9, dtype=torch.float64))
    assert Post(clip=99, normalise=True)(maps[:0]).shape == (0, 3, 11, 9, 3)


@pytest.mark.parametrize(
    "bad", [{"rectify": "square"}, {"channels": "median"}, {"blur": -1}, {"clip": 0}, {"clip": 101}]
)
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Post(**bad)
