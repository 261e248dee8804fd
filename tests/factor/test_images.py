"""Preferred images and receptive fields through a small network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortexloop.factor import Factors, back_projected, feature_field, fit_gaussians, optimal_images, score
from cortexloop.features import ModuleFeatures


@pytest.fixture
def factors(rng: np.random.Generator) -> Factors:
    """Three neurons that read one channel each at one position of the maps [6, 10, 10]."""
    masks, vectors = torch.zeros(3, 1, 10, 10), torch.zeros(3, 1, 6)
    for t, (y, x) in enumerate([(2, 2), (5, 7), (7, 4)]):
        masks[t, 0, y, x] = 1.0
        vectors[t, 0] = torch.from_numpy(rng.random(6)).float()
    return Factors(masks, vectors, "points")


def test_images_climb_the_score_of_their_neuron(factors: Factors, source: ModuleFeatures):
    found = optimal_images(factors, source, starts=2, steps=15, step_size=2.0, batch=4, seed=1)
    assert found.images.shape == (3, 2, 24, 24, 3)
    assert found.best.shape == (3, 24, 24, 3)
    assert (found.scores > found.initial).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 255
    for t in range(3):
        reached = score(source(found.images[t]), factors)[:, t]
        np.testing.assert_allclose(reached.numpy(), found.scores[t], rtol=1e-4)
        assert (found.trajectory[t].max(1) == found.scores[t]).all()
    assert not found.stuck.any()
    fallen = optimal_images(factors, source, steps=15, minimize=True, seed=1)
    assert (fallen.scores <= fallen.initial[:, :1]).all()


def test_images_do_not_depend_on_the_batch_or_form(factors: Factors, source: ModuleFeatures):
    """Factors or full weights, one neuron or all, one batch or several: the same images, from the same noise."""
    whole = optimal_images(factors, source, starts=2, steps=4, score="cosine")
    full = optimal_images(factors.tensor(), source, starts=2, steps=4, score="cosine", batch=1)
    alone = optimal_images(factors.select([1]), source, starts=2, steps=4, score="cosine")
    np.testing.assert_allclose(full.images, whole.images, atol=0.02)
    np.testing.assert_allclose(alone.images[0], whole.images[1], atol=0.02)
    assert (np.abs(whole.scores) <= 1).all()
    again = optimal_images(factors, source, starts=2, steps=4, score="cosine")
    np.testing.assert_array_equal(again.images, whole.images)


def test_start_images_are_used(factors: Factors, source: ModuleFeatures):
    start = np.full((24, 24, 3), 100, np.uint8)
    still = optimal_images(factors, source, steps=1, step_size=0.0, start=start)
    np.testing.assert_array_equal(still.images, np.broadcast_to(np.float32(100), still.images.shape))


def test_silent_starts_are_reported(factors: Factors, source: ModuleFeatures):
    nothing = factors.replaced(factors.masks * 0, factors.vectors, method="nothing")
    found = optimal_images(nothing, source, starts=2, steps=3)
    assert found.stuck.all()
    assert np.isfinite(found.images).all()


def test_fields_lie_where_the_weights_do(factors: Factors, source: ModuleFeatures):
    field = feature_field(factors)
    torch.testing.assert_close(field, feature_field(factors.tensor()))
    assert field.flatten(1).argmax(1).tolist() == [22, 57, 74]
    shown = back_projected(factors, source, count=20, batch=7)
    assert shown.shape == (3, 24, 24)
    for t, (y, x) in enumerate([(2, 2), (5, 7), (7, 4)]):
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[2 * y : 2 * y + 5, 2 * x : 2 * x + 5] = True  # a 5 x 5 kernel of stride 2
        assert not shown[t][~inside].any()
        assert shown[t][inside].any()
    fit = fit_gaussians(shown)
    assert torch.isfinite(fit.x).all()


def test_back_projection_is_the_mean_absolute_gradient(factors: Factors, source: ModuleFeatures):
    images = np.random.default_rng(0).uniform(0, 255, (5, 24, 24, 3)).astype(np.float32)
    expected = torch.zeros(3, 24, 24)
    for image in images:
        for t in range(3):
            x = torch.from_numpy(image[None]).requires_grad_()
            (source.differentiable(x) * factors.tensor()[t]).sum().backward()
            expected[t] += x.grad[0].abs().sum(-1) / 5
    torch.testing.assert_close(back_projected(factors, source, images=images, batch=2), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(back_projected(factors.tensor(), source, images=images), expected, rtol=1e-4, atol=1e-7)


def test_bad_input_is_refused(factors: Factors, source: ModuleFeatures):
    small = Factors(factors.masks[..., :9], factors.vectors, "small")
    with pytest.raises(ValueError, match=r"the maps of tiny are \[6, 10, 10\], the weights are for \[6, 10, 9\]"):
        optimal_images(small, source)
    with pytest.raises(ValueError, match=r"the maps of tiny are"):
        back_projected(small, source)
    with pytest.raises(ValueError, match="score should be"):
        optimal_images(factors, source, score="corr")
    with pytest.raises(ValueError, match="at least 1"):
        optimal_images(factors, source, starts=0)
    with pytest.raises(ValueError, match="start should be"):
        optimal_images(factors, source, start=np.zeros((24, 24, 1)))
    with pytest.raises(ValueError, match="steps should be at least 1"):
        optimal_images(factors, source, steps=0)
