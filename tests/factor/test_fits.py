"""Batched least squares: the output non-linearity and Gaussians, against scipy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import OptimizeWarning, curve_fit

from cortexloop.factor import compare_fields, fit_gaussians, fit_softplus, overlap


def test_softplus_is_at_least_as_good_as_scipy(rng: np.random.Generator):
    """Published start and bounds; where scipy's single start ends in a worse minimum, ours is better."""
    images, neurons = 200, 8
    x = rng.standard_normal((images, neurons)) * rng.uniform(0.01, 30, neurons) + rng.uniform(-5, 5, neurons)
    z = x / x.std(0)
    y = rng.uniform(1, 30, neurons) * np.logaddexp(0, 2 * z - rng.uniform(-2, 4, neurons))
    y += rng.uniform(0, 5, neurons) + rng.standard_normal((images, neurons)) * 3
    y[:, 0] *= -1  # a falling one: the best rising curve is nearly flat
    found = fit_softplus(x, y)
    ours = ((found(torch.from_numpy(x)).numpy() - y) ** 2).sum(0)
    for t in range(neurons):
        s = y[:, t].std() / x[:, t].std()
        q = s * x[:, t]
        bounds = ([0, y[:, t].min() - 10, q.min() - 10], [np.inf, y[:, t].max(), q.max()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)
            (a, b, theta), _ = curve_fit(
                lambda q, a, b, theta: a * np.logaddexp(0, q - theta) + b,
                q,
                y[:, t],
                p0=(1, y[:, t].min(), np.median(q)),
                bounds=bounds,
                maxfev=20000,
            )
        theirs = ((a * np.logaddexp(0, q - theta) + b - y[:, t]) ** 2).sum()
        assert ours[t] <= theirs * (1 + 1e-6)
        assert float(found.amplitude[t]) >= 0
        assert bounds[0][1] <= float(found.offset[t]) <= bounds[1][1]
        assert bounds[0][2] <= float(found.threshold[t]) <= bounds[1][2]
    assert found.converged.all()


def test_softplus_recovers_its_parameters(rng: np.random.Generator):
    """s is not free: it is sd(y) / sd(x), so the amplitude has to be chosen for that to hold."""
    x = rng.standard_normal((100, 3))
    s, theta, offset = np.array([3.0, 0.7, 9.0]), np.array([1.0, -2.0, 4.0]), np.array([0.0, 2.0, -1.0])
    curve = np.logaddexp(0, s * x - theta)
    amplitude = s * x.std(0) / curve.std(0)
    y = amplitude * curve + offset
    found = fit_softplus(x, y)
    np.testing.assert_allclose(found(torch.from_numpy(x)).numpy(), y, rtol=1e-6, atol=1e-6)
    for name, expected in (("amplitude", amplitude), ("threshold", theta), ("offset", offset), ("scale", s)):
        np.testing.assert_allclose(getattr(found, name).numpy(), expected, rtol=1e-4, atol=1e-4, err_msg=name)
    # the same neuron alone gives the same numbers
    alone = fit_softplus(x[:, 1:2], y[:, 1:2])
    torch.testing.assert_close(alone.amplitude, found.amplitude[1:2], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((9, 2)), np.arange(18.0).reshape(9, 2), "scores of neurons 0, 1 are constant"),
        (np.arange(18.0).reshape(9, 2), np.ones((9, 2)), "responses of neurons 0, 1 are constant"),
        (np.ones((9, 2)), np.ones((8, 2)), "of the same, at least 4, images"),
        (np.full((9, 2), np.nan), np.ones((9, 2)), "scores should be finite"),
    ],
)
def test_softplus_refuses(x: np.ndarray, y: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        fit_softplus(x, y)


SHAPE = (12, 17)  # H, W: not square, so that an exchange of x and y shows


def gaussian(p: np.ndarray) -> np.ndarray:
    a, x0, y0, su, sv, theta, offset = p
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    u = np.cos(theta) * (xx - x0) + np.sin(theta) * (yy - y0)
    v = -np.sin(theta) * (xx - x0) + np.cos(theta) * (yy - y0)
    return offset + a * np.exp(-(u**2) / (2 * su**2) - v**2 / (2 * sv**2))


def test_gaussians_are_recovered(rng: np.random.Generator):
    n = 20
    p = np.stack(
        [
            rng.uniform(0.5, 3, n) * 10.0 ** rng.uniform(-6, 6, n),
            rng.uniform(3, 14, n),
            rng.uniform(3, 9, n),
            rng.uniform(2, 4, n),
            rng.uniform(0.8, 1.8, n),
            rng.uniform(0, math.pi, n),
            rng.uniform(-1, 1, n),
        ],
        axis=1,
    )
    p[:, 6] *= p[:, 0]
    found = fit_gaussians(np.stack([gaussian(q) for q in p]))
    for k, name in enumerate(("amplitude", "x", "y", "sigma_u", "sigma_v", "theta", "offset")):
        np.testing.assert_allclose(getattr(found, name).numpy(), p[:, k], rtol=1e-6, atol=1e-7, err_msg=name)
    assert found.converged.all()
    assert (found.r_squared > 1 - 1e-9).all()
    np.testing.assert_allclose(found.maps()[3].numpy(), gaussian(p[3]), rtol=1e-9)


def test_gaussians_of_noisy_maps_are_at_least_as_good_as_scipy(rng: np.random.Generator):
    truths = [np.array([2.0, rng.uniform(4, 12), rng.uniform(4, 8), 3.0, 1.5, 0.7, 0.5]) for _ in range(6)]
    maps = np.stack([gaussian(p) + 0.3 * rng.standard_normal(SHAPE) for p in truths])
    found = fit_gaussians(maps)
    for t, p in enumerate(truths):
        best, _ = curve_fit(lambda _, *q: gaussian(np.array(q)).ravel(), None, maps[t].ravel(), p0=p)
        theirs = ((gaussian(best) - maps[t]) ** 2).sum()
        assert ((found.maps()[t].numpy() - maps[t]) ** 2).sum() <= theirs * (1 + 1e-6)


def test_flat_and_noise_maps_do_no_harm(rng: np.random.Generator):
    maps = np.stack([np.zeros(SHAPE), np.full(SHAPE, 3.0), rng.standard_normal(SHAPE)])
    maps = np.concatenate([maps, np.eye(*SHAPE)[None]])
    found = fit_gaussians(maps)
    for name in ("amplitude", "x", "y", "sigma_u", "sigma_v", "theta", "offset", "r_squared"):
        assert torch.isfinite(getattr(found, name)).all(), name
    assert found.amplitude[:2].tolist() == [0.0, 0.0]
    assert float(found.offset[1]) == 3.0
    assert not found.inside()[:2].any()
    assert len(fit_gaussians(np.zeros((0, 5, 5))).x) == 0
    with pytest.raises(ValueError, match="at least 3 x 3"):
        fit_gaussians(np.zeros((1, 2, 5)))


def test_agreement_of_fields():
    a = np.array([1.0, 6, 5, 2, 2, 0, 0])
    moved, narrow = a.copy(), a.copy()
    moved[1:3] += 3, 4
    narrow[3:5] = 1
    first = np.stack([gaussian(a)] * 3)
    second = np.stack([gaussian(q) for q in (a, moved, narrow)])
    found = compare_fields(first, second, pixels_per_degree=10)
    np.testing.assert_allclose(found.distance.numpy(), [0, 5, 0], atol=1e-6)
    np.testing.assert_allclose(found.distance_degrees.numpy(), [0, 0.5, 0], atol=1e-7)
    assert float(found.iou[0]) == 1.0
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    d2, bound = (xx - 6) ** 2 + (yy - 5) ** 2, -2 * math.log(0.3)
    expected = (d2 < bound).sum() / (d2 < 4 * bound).sum()
    assert float(found.iou[2]) == pytest.approx(expected)
    assert 0 < float(found.iou[1]) < float(found.iou[2])
    np.testing.assert_allclose(found.correlation.numpy(), found.correlation_fitted.numpy(), atol=1e-6)
    r = np.corrcoef(first[2].ravel(), second[2].ravel())[0, 1]
    assert float(found.correlation[2]) == pytest.approx(r)
    with pytest.raises(ValueError, match="of one shape"):
        compare_fields(first, second[:, :-1])
    assert overlap(torch.zeros(1, 3, 3, dtype=torch.bool), torch.zeros(1, 3, 3, dtype=torch.bool)).item() == 0.0
