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

from cortexloop.regression import LinearModel, assign_folds, ridge

ALPHAS = 10.0 ** np.arange(-4, 6)
SHAPES = [(60, 12), (30, 30), (31, 30), (25, 80)]
Data = tuple[NDArray[np.float32], NDArray[np.float64]]


def problem(n: int, p: int, t: int = 5, seed: int = 0) -> Data:
    """Correlated features with an offset, one of them constant; each neuron has more noise than the last."""
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
    alphas = ALPHAS[::4]
    model = ridge(x, y, alphas, standardize=standardize, scoring="mse")
    errors = np.zeros((len(alphas), y.shape[1]))
    for i in range(n):
        others = np.arange(n) != i
        for a, alpha in enumerate(alphas):
            fit = Ridge(alpha).fit(scaled[others], y[others])
            errors[a] += (fit.predict(scaled[i : i + 1])[0] - y[i]) ** 2 / n
    np.testing.assert_allclose(-model.scores, errors, rtol=1e-5)
    as_r2 = ridge(x, y, alphas, standardize=standardize).scores
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
    for t in range(2):
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


def test_wide_features_in_float32_on_a_large_offset():
    """More features than a block of columns; float32 features are centred in float64."""
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((20, 9000)) + 100).astype(np.float32)
    y = rng.standard_normal((20, 2))
    model = ridge(x, y, [10.0, 1000.0])
    peer = RidgeCV([10.0, 1000.0], alpha_per_target=True).fit(x.astype(np.float64), y)
    np.testing.assert_array_equal(model.alpha, peer.alpha_)
    np.testing.assert_allclose(model.weights, peer.coef_, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_and_offset_of_features_follow_through(shape: tuple[int, int]):
    x, y = problem(*shape)
    x = x.astype(np.float64)
    plain = ridge(x, y, ALPHAS)
    scaled = ridge(4 * x - 7, y, 16 * ALPHAS)
    np.testing.assert_allclose(scaled.predict(4 * x - 7), plain.predict(x), rtol=1e-6)
    np.testing.assert_allclose(scaled.scores, plain.scores, rtol=1e-6, atol=1e-9)
    standard = ridge(x, y, ALPHAS, standardize=True)
    factors = np.linspace(0.5, 100, shape[1])
    again = ridge(x * factors, y, ALPHAS, standardize=True)
    np.testing.assert_allclose(again.predict(x * factors), standard.predict(x), rtol=1e-6)
    assert not standard.weights[:, shape[1] // 2].any()  # the constant feature


def test_excluded_neurons_are_listed_and_the_others_unchanged():
    x, y = problem(40, 10)
    y[:, 0] = 2.5
    y[3, 4] = np.inf
    with pytest.raises(ValueError, match=r"NaN or infinite for neuron 4 and constant for neuron 0; leave"):
        ridge(x, y)
    for folds in (None, 4):
        model = ridge(x, y, folds=folds, unusable="exclude")
        assert model.excluded.tolist() == [0, 4]
        assert torch.isinf(model.alpha[[0, 4]]).all()
        assert torch.isfinite(model.predict(x)).all()
        assert torch.isfinite(model.scores).all()
        assert (model.predict(x)[:, 0] == 2.5).all()
        others = ridge(x, y[:, 1:4], folds=folds)
        torch.testing.assert_close(model.weights[1:4], others.weights, rtol=1e-10, atol=1e-12)
    assert model.select([4, 1]).excluded.tolist() == [0]
    with pytest.raises(ValueError, match="none of the 1 neurons has finite responses that vary"):
        ridge(x, y[:, :1], unusable="exclude")


def test_models_are_saved_and_moved():
    x, y = problem(30, 8)
    model = ridge(x, y, folds=3)
    again = LinearModel.from_tensors(model.tensors(), model.settings())
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.scoring == "r2"
    assert again.to(dtype=torch.float32).predict(x).dtype == torch.float32
    assert torch.equal(model.score, model.scores.max(dim=0).values)
    few = model.select(torch.tensor([3, 0]))
    assert torch.equal(few.predict(x), model.predict(x)[:, [3, 0]])
    with pytest.raises(ValueError, match="not a complete linear model: weights missing"):
        LinearModel.from_tensors({k: v for k, v in model.tensors().items() if k != "weights"}, model.settings())
    with pytest.raises(ValueError, match="shapes of a linear model do not fit together"):
        LinearModel.from_tensors({**model.tensors(), "alpha": torch.zeros(2)}, model.settings())
    with pytest.raises(ValueError, match=r"features should be \[images, 8\], got \[30, 7\]"):
        model.predict(x[:, :7])


def test_bad_input_is_told_in_a_sentence():
    x, y = problem(20, 5)
    cases: list[tuple[Any, ...]] = [
        ((x[:, :, None], y), {}, r"features should be \[images, features\].*flatten maps: features.flatten\(1\)"),
        ((x, y[:, 0]), {}, r"one neuron alone is responses\[:, None\]"),
        ((x, y[:-1]), {}, "features are of 20 images and responses of 19"),
        ((x[:1], y[:1]), {}, "a fit needs at least 2 images, got 1"),
        ((np.where(x == x[2, 0], np.nan, x), y), {}, "features of image 2 hold NaN or infinity"),
        ((x, y, [0.0]), {}, "alphas should be positive finite numbers"),
        ((x, y), {"folds": 21}, r"folds should be 2 to 20 \(the number of images\), got 21"),
        ((x, y), {"folds": 20}, "constant within a fold of 1 images"),
        ((x, y), {"groups": np.zeros(20)}, "groups are held out together"),
        ((x, y), {"scoring": "r"}, "scoring should be one of 'r2', 'mse', got 'r'"),
        ((x, y), {"unusable": "drop"}, 'unusable should be "error" or "exclude"'),
    ]
    for arguments, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            ridge(*arguments, **options)
    with pytest.raises(TypeError, match="features should be a NumPy array or a torch tensor, got list"):
        ridge([[1.0]], y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="features should be real numbers, got complex128"):
        ridge(x.astype(np.complex128), y)
    assert ridge(x, y, folds=20, scoring="mse").scores.shape == (10, 5)


# ---- folds


def test_folds_are_random_even_and_reproducible():
    folds = assign_folds(23, 4, seed=1)
    assert torch.bincount(folds).tolist() == [6, 6, 6, 5]
    assert torch.equal(folds, assign_folds(23, 4, seed=1))
    assert not torch.equal(folds, assign_folds(23, 4, seed=2))
    # recorded fits have to be repeatable: these numbers never change
    assert assign_folds(10, 3, seed=0).tolist() == [0, 1, 2, 0, 1, 2, 1, 0, 0, 2]
    assert torch.equal(assign_folds(4, [0, 1, 1, 0]), torch.tensor([0, 1, 1, 0]))


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 12, 100)
    folds = assign_folds(100, 5, groups=groups, seed=3).numpy()
    for label in np.unique(groups):
        assert len(set(folds[groups == label])) == 1
    sizes = np.bincount(folds)
    assert sizes.min() > 0
    assert sizes.max() - sizes.min() <= np.bincount(groups).max()
    names = np.array([f"movie {g}" for g in groups])
    assert len(np.unique(assign_folds(100, 5, groups=names, seed=3))) == 5
    with pytest.raises(ValueError, match=r"folds should be 2 to 12 \(the number of groups\), got 13"):
        assign_folds(100, 13, groups=groups)
    with pytest.raises(ValueError, match=r"groups should be \[100\]"):
        assign_folds(100, 3, groups=groups[:9])
    with pytest.raises(ValueError, match="images of group 0 are in more than one fold"):
        assign_folds(4, np.array([0, 1, 0, 1]), groups=np.array([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="numbered 0 to k - 1"):
        assign_folds(3, np.array([0, 2, 2]))
    with pytest.raises(ValueError, match="integers"):
        assign_folds(3, np.array([0.0, 1.0, 1.0]))
    with pytest.raises(TypeError):
        assign_folds(3, 2.5)  # type: ignore[arg-type]
