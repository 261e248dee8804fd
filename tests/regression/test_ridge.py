"""Ridge against scikit-learn on the same folds, and against fits that are simply done again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cortexloop.regression import assign_folds, ridge

ALPHAS = 10.0 ** np.arange(-4, 6)
SHAPES = [(60, 12), (30, 30), (31, 30), (25, 80)]
Data = tuple[NDArray[np.float32], NDArray[np.float64]]


def problem(n: int, p: int, t: int = 5, seed: int = 0) -> Data:
    """Correlated features with an offset, one of them constant; responses with noise, each neuron more than the last."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) @ (np.eye(p) + 0.3 * rng.standard_normal((p, p))) + 3
    x[:, p // 2] = 0.1
    y = x @ rng.standard_normal((p, t)) + np.arange(1, t + 1) * 5 * rng.standard_normal((n, t)) + 10
    return x.astype(np.float32), y


@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_is_ridge_cv(shape: tuple[int, int]):
    x, y = problem(*shape)
    model = ridge(x, y, ALPHAS)
    peer = RidgeCV(ALPHAS, alpha_per_target=True).fit(x.astype(np.float64), y)
    np.testing.assert_array_equal(model.alpha, peer.alpha_)
    np.testing.assert_allclose(model.weights, peer.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(model.intercept, peer.intercept_, rtol=1e-8)
    np.testing.assert_allclose(model.predict(x), peer.predict(x.astype(np.float64)), rtol=1e-8)
    assert model.folds.numel() == 0
    assert (model.active <= shape[1]).all()


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_leave_one_out_scores_are_those_of_refits(shape: tuple[int, int], standardize: bool):
    """Each image left out in turn. Standardised features keep the scale of all images, as in the closed form."""
    x, y = problem(*shape)
    n = len(x)
    scaled = x.astype(np.float64)
    if standardize:
        scale = scaled.std(axis=0)
        scaled /= np.where(np.ptp(x, axis=0) == 0, 1, scale)
    model = ridge(x, y, ALPHAS, standardize=standardize, scoring="mse")
    errors = np.zeros((len(ALPHAS), y.shape[1]))
    for i in range(n):
        others = np.arange(n) != i
        for a, alpha in enumerate(ALPHAS):
            fit = Ridge(alpha).fit(scaled[others], y[others])
            errors[a] += (fit.predict(scaled[i : i + 1])[0] - y[i]) ** 2 / n
    np.testing.assert_allclose(-model.scores, errors, rtol=1e-5)
    as_r2 = ridge(x, y, ALPHAS, standardize=standardize).scores
    np.testing.assert_allclose(as_r2, 1 - errors / y.var(axis=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("scoring", ["r2", "mse"])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_folds_are_grid_search_neuron_by_neuron(shape: tuple[int, int], standardize: bool, scoring: Any):
    x, y = problem(*shape)
    folds = assign_folds(len(x), 4, seed=3)
    model = ridge(x, y, ALPHAS, folds=4, seed=3, standardize=standardize, scoring=scoring)
    assert torch.equal(model.folds, folds)
    name = {"r2": "r2", "mse": "neg_mean_squared_error"}[scoring]
    estimator = make_pipeline(StandardScaler(), Ridge()) if standardize else Ridge()
    grid = {("ridge__alpha" if standardize else "alpha"): ALPHAS}
    for t in range(y.shape[1]):
        search = GridSearchCV(estimator, grid, cv=PredefinedSplit(folds.numpy()), scoring=name)
        search.fit(x.astype(np.float64), y[:, t])
        np.testing.assert_allclose(model.scores[:, t], search.cv_results_["mean_test_score"], rtol=1e-6, atol=1e-8)
        assert float(model.alpha[t]) == next(iter(search.best_params_.values()))
        predicted = search.predict(x.astype(np.float64))
        np.testing.assert_allclose(model.predict(x)[:, t], predicted, rtol=1e-7)


def test_one_alpha_for_all_is_grid_search_over_all_neurons():
    x, y = problem(50, 20)
    folds = assign_folds(50, 5, seed=1)
    model = ridge(x, y, ALPHAS, folds=folds, per_target_alpha=False)
    search = GridSearchCV(Ridge(), {"alpha": ALPHAS}, cv=PredefinedSplit(folds.numpy())).fit(x.astype(np.float64), y)
    assert set(model.alpha.tolist()) == {search.best_params_["alpha"]}
    shared = RidgeCV(ALPHAS).fit(x.astype(np.float64), y).alpha_
    assert set(ridge(x, y, ALPHAS, per_target_alpha=False, scoring="mse").alpha.tolist()) == {shared}
    assert len(set(ridge(x, y, ALPHAS).alpha.tolist())) > 1
