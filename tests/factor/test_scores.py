"""Scores of weights on maps, against their definitions written out, and the reductions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cortexloop.factor import Factors, factor_features, mask_features, score, vector_features
from cortexloop.factor.scores import paired_score


@pytest.fixture
def factors(known: tuple[Tensor, Tensor]) -> Factors:
    masks, vectors = known
    masks = torch.where(masks > 0.1, masks, 0.0)  # so that W is 0 in places
    return Factors(masks, vectors, "known")


def by_definition(x: np.ndarray, w: np.ndarray, mode: str) -> float:
    if mode.endswith("_mask"):
        x, w = x[w != 0], w[w != 0]
    x, w = x.ravel(), w.ravel()
    return {
        "dot": lambda: (w * x).sum(),
        "cosine": lambda: (w * x).sum() / (np.linalg.norm(w) * np.linalg.norm(x)),
        "corr": lambda: np.corrcoef(x, w)[0, 1],
        "mse": lambda: -((x - w) ** 2).mean(),
        "l1": lambda: -np.abs(x - w).mean(),
    }[mode.removesuffix("_mask")]()


@pytest.mark.parametrize("mode", ["dot", "cosine", "corr", "mse", "l1", "corr_mask", "mse_mask", "l1_mask"])
def test_scores_equal_their_definitions(factors: Factors, rng: np.random.Generator, mode: str):
    features = torch.from_numpy(rng.gamma(1.0, 2.0, (4, 12, 9, 8)))
    expected = [[by_definition(x, w, mode) for w in factors.tensor().numpy()] for x in features.numpy()]
    np.testing.assert_allclose(score(features, factors, mode).numpy(), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(score(features, factors.tensor(), mode).numpy(), expected, rtol=1e-10, atol=1e-12)
    if mode == "dot":
        positive = (factors.tensor() > 0).flatten(1).sum(1).numpy()
        published = score(features, factors, normalise=True).numpy()
        np.testing.assert_allclose(published, np.array(expected) / positive, rtol=1e-10)


@pytest.mark.parametrize("mode", ["dot", "cosine", "corr", "mse", "l1", "corr_mask", "mse_mask", "l1_mask"])
def test_scores_are_finite_for_nothing(factors: Factors, mode: str):
    empty = factors.replaced(factors.masks * 0, factors.vectors * 0, method="empty")
    for features in (torch.zeros(2, 12, 9, 8), torch.ones(2, 12, 9, 8)):
        for weights in (empty, factors):
            found = score(features, weights, mode)
            assert torch.isfinite(found).all()
            if mode.startswith(("cosine", "corr")) and (weights is empty or not features.any()):
                assert not found.any()
    assert score(torch.zeros(0, 12, 9, 8), factors, mode).shape == (0, 5)


def test_correlations_ignore_an_offset(factors: Factors, rng: np.random.Generator):
    features = torch.from_numpy(rng.standard_normal((3, 12, 9, 8)))
    near, far = score(features, factors, "corr"), score(features + 1e4, factors, "corr")
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-6)
    assert not score(torch.full((1, 12, 9, 8), 0.1), factors, "corr").any()


def test_reductions_are_partial_sums(factors: Factors, rng: np.random.Generator):
    features = torch.from_numpy(rng.integers(-4, 5, (3, 12, 9, 8))).double()
    masked, where, alone = (f(features, factors) for f in (mask_features, vector_features, factor_features))
    assert masked.shape == (3, 5, 2, 12)
    assert where.shape == (3, 5, 2, 9, 8)
    assert alone.shape == (3, 5, 2)
    torch.testing.assert_close(masked, torch.einsum("bchw,trhw->btrc", features, factors.masks))
    torch.testing.assert_close(where, torch.einsum("bchw,trc->btrhw", features, factors.vectors))
    torch.testing.assert_close((masked * factors.vectors).sum(-1), alone)
    torch.testing.assert_close(alone.sum(-1), score(features, factors))
    neurons = torch.tensor([4, 0, 2])
    expected = score(features, factors)[torch.arange(3), neurons]
    torch.testing.assert_close(paired_score(features, factors, neurons), expected)
    torch.testing.assert_close(paired_score(features, factors.tensor(), neurons), expected)


def test_bad_input_is_refused(factors: Factors):
    with pytest.raises(ValueError, match=r"features should be \[B, 12, 9, 8\]"):
        score(torch.zeros(1, 12, 8, 9), factors)
    with pytest.raises(ValueError, match="score should be one of"):
        score(torch.zeros(1, 12, 9, 8), factors, "euclid")
    with pytest.raises(ValueError, match="normalise is of the score"):
        score(torch.zeros(1, 12, 9, 8), factors, "corr", normalise=True)
