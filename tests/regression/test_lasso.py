"""Lasso against scikit-learn on the same folds, and against the optimality conditions."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LassoCV
from sklearn.linear_model import lasso_path as sklearn_path
from sklearn.model_selection import PredefinedSplit

import cortexloop as cl
from cortexloop.regression import ConvergenceWarning, LinearModel, assign_folds, lasso, lasso_path

SHAPES = [(80, 15), (60, 60), (40, 120)]
Data = tuple[NDArray[np.float64], NDArray[np.float64]]


def problem(n: int, p: int, t: int = 3, seed: int = 0) -> Data:
    """Correlated features with an offset, one constant; sparse weights and noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) @ (np.eye(p) + 0.5 * rng.standard_normal((p, p)) / np.sqrt(p)) + 2
    x[:, p // 3] = 0.1
    weights = np.where(rng.random((p, t)) < 5 / p, rng.standard_normal((p, t)) * 2, 0)
    weights[0] = 1.0
    y = x @ weights + 0.7 * rng.standard_normal((n, t)) - 3
    return x, y


def violation(x: Any, y: Any, weights: Any, alpha: Any) -> float:
    """Largest violation of the optimality conditions, X'r / n = alpha sign(w), within alpha where w = 0; over alpha."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    slope = x.T @ (y - x @ weights) / len(x)
    wrong = np.where(weights != 0, np.abs(slope - alpha * np.sign(weights)), np.maximum(np.abs(slope) - alpha, 0))
    return float(wrong.max() / alpha)


@pytest.mark.parametrize("form", ["gram", "columns"])
@pytest.mark.parametrize("shape", [(60, 15), (40, 40), (25, 50)])
def test_path_is_scikit_learns_at_a_tight_tolerance(engine: str, shape: tuple[int, int], form: Any):
    x, y = problem(*shape)
    with cl.use_backend(engine):
        path = lasso_path(x, y, n_alphas=10, eps=0.05, tol=1e-10, form=form)
    assert float(path.gaps.max()) <= 1e-10
    for t in range(y.shape[1]):
        alphas = path.alphas[:, t].numpy()
        centred = np.asfortranarray(x - x.mean(axis=0)), y[:, t] - y[:, t].mean()
        _, coefficients, _ = sklearn_path(*centred, alphas=alphas, tol=1e-14, max_iter=10**6)
        scale = np.abs(coefficients).max()
        np.testing.assert_allclose(path.weights[:, t].T, coefficients, rtol=1e-6, atol=1e-6 * scale)
        expected = y[:, t].mean() - x.mean(axis=0) @ coefficients
        np.testing.assert_allclose(path.intercept[:, t], expected, rtol=1e-6)
        for a, alpha in enumerate(alphas):
            assert violation(x, y[:, t], path.weights[a, t].numpy(), alpha) < 1e-4
    assert int((path.weights[0] != 0).sum()) <= y.shape[1]  # at the largest alpha a weight at most, by rounding


@pytest.mark.parametrize("scoring", ["mse", "r2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_choice_is_that_of_lasso_cv(shape: tuple[int, int], scoring: Any):
    x, y = problem(*shape, seed=1)
    folds = assign_folds(len(x), 4, seed=2)
    model = lasso(x, y, folds=4, seed=2, n_alphas=20, eps=1e-2, tol=1e-10, scoring=scoring)
    assert torch.equal(model.folds, folds)
    assert model.kind == "lasso"
    for t in range(y.shape[1]):
        alphas = model.alphas[:, t].numpy()
        peer = LassoCV(alphas=alphas, cv=PredefinedSplit(folds.numpy()), tol=1e-10, max_iter=10**6).fit(x, y[:, t])
        mse = peer.mse_path_
        if scoring == "mse":
            np.testing.assert_allclose(-model.scores[:, t], mse.mean(axis=1), rtol=1e-4)
            np.testing.assert_allclose(float(model.alpha[t]), peer.alpha_, rtol=1e-12)
            np.testing.assert_allclose(model.weights[t], peer.coef_, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(float(model.intercept[t]), peer.intercept_, rtol=1e-3)
            np.testing.assert_array_equal(model.weights[t] != 0, peer.coef_ != 0)
        else:
            variance = np.array([y[folds.numpy() == f, t].var() for f in range(4)])
            np.testing.assert_allclose(model.scores[:, t], (1 - mse / variance).mean(axis=1), rtol=1e-4, atol=1e-4)


def test_the_grid_is_that_of_lasso_cv():
    x, y = problem(80, 15)
    peer = LassoCV(alphas=50, eps=1e-2, cv=3).fit(x, y[:, 0])
    model = lasso(x, y, n_alphas=50, eps=1e-2, folds=3)
    np.testing.assert_allclose(model.alphas[:, 0], peer.alphas_, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_objective_at_the_default_tolerance_is_not_worse(shape: tuple[int, int]):
    """Than scikit-learn's, by more than a millionth of the responses' variance."""
    x, y = problem(*shape, seed=3)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    path = lasso_path(x, y, n_alphas=50)
    for t in range(y.shape[1]):
        alphas = path.alphas[:, t].numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn may not converge
            _, theirs, _ = sklearn_path(np.asfortranarray(x), y[:, t], alphas=alphas)

        def objective(w: Any, t: int = t, alphas: Any = alphas) -> Any:
            return ((y[:, t, None] - x @ w) ** 2).mean(axis=0) / 2 + alphas * np.abs(w).sum(axis=0)

        worse = objective(path.weights[:, t].numpy().T) - objective(theirs)
        assert worse.max() <= 1e-6 * y[:, t].var()


def test_forms_agree():
    x, y = problem(60, 60)
    gram, columns = (lasso(x, y, folds=3, n_alphas=20, tol=1e-10, form=f) for f in ("gram", "columns"))
    assert torch.equal(gram.alpha, columns.alpha)
    torch.testing.assert_close(gram.scores, columns.scores, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gram.weights, columns.weights, rtol=1e-5, atol=1e-8)


# Problems in which rounding matters: weights of the wrong sign, more weights than images, worn roots, false gaps.
@example(n=29, p=42, seed=843, form="columns", duplicate=True)
@example(n=26, p=35, seed=253411, form="columns", duplicate=True)
@example(n=33, p=39, seed=595018, form="gram", duplicate=True)
@example(n=17, p=49, seed=259404, form="gram", duplicate=False)
@example(n=9, p=27, seed=691554, form="gram", duplicate=True)
@example(n=7, p=11, seed=514794, form="gram", duplicate=True)
@example(n=27, p=27, seed=83395, form="columns", duplicate=True)
@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(6, 40),
    p=st.integers(1, 50),
    seed=st.integers(0, 10**6),
    form=st.sampled_from(["gram", "columns"]),
    duplicate=st.booleans(),
)
def test_conditions_hold_for_any_problem(n: int, p: int, seed: int, form: Any, duplicate: bool):
    """Also with features that occur twice, where solutions are not unique."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    if duplicate:
        x = np.concatenate([x, x[:, : (p + 1) // 2], -x[:, :1]], axis=1)
    y = rng.standard_normal((n, 2))
    path = lasso_path(x, y, n_alphas=15, eps=1e-2, tol=1e-9, form=form)
    assert float(path.gaps.max()) <= 1e-9
    for t in range(2):
        for a in range(15):
            # A gap of 1e-9 leaves a relative violation of about its square root at most.
            assert violation(x, y[:, t], path.weights[a, t].numpy(), float(path.alphas[a, t])) < 1e-3


def test_alphas_may_be_a_list_and_neurons_do_not_matter_to_each_other():
    x, y = problem(50, 20, t=4)
    alphas = [0.01, 1.0, 0.1]
    model = lasso(x, y, alphas, folds=3)
    assert model.alphas[:, 0].tolist() == [1.0, 0.1, 0.01]
    for t in range(4):
        alone = lasso(x, y[:, t : t + 1], alphas, folds=3)
        torch.testing.assert_close(alone.weights[0], model.weights[t], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(alone.scores[:, 0], model.scores[:, t], rtol=1e-9, atol=1e-12)


def test_what_did_not_converge_is_told():
    x, y = problem(40, 120)
    with pytest.warns(ConvergenceWarning, match=r"of \d+ lasso solutions have a duality gap above tol = 1e-10"):
        lasso(x, y, folds=2, n_alphas=5, tol=1e-10, max_sweeps=1)


def test_excluded_neurons_are_listed():
    x, y = problem(40, 10, t=4)
    y[:, 1] = 3.0
    y[5, 2] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinite for neuron 2 and constant for neuron 1"):
        lasso(x, y)
    model = lasso(x, y, unusable="exclude", folds=3)
    assert model.excluded.tolist() == [1, 2]
    assert model.active[[1, 2]].tolist() == [0, 0]
    assert float(model.intercept[1]) == 3.0
    assert float(model.intercept[2]) == pytest.approx(np.nanmean(y[:, 2]))
    assert torch.isfinite(model.predict(x)).all()
    both = lasso(x, y[:, [0, 3]], folds=3)
    torch.testing.assert_close(both.weights, model.weights[[0, 3]], rtol=1e-9, atol=1e-12)
    again = LinearModel.from_tensors(model.tensors(), model.settings())
    assert torch.equal(again.predict(x), model.predict(x))


def test_bad_arguments_are_told_in_a_sentence():
    x, y = problem(20, 5)
    with pytest.raises(ValueError, match="form should be one of 'auto', 'gram', 'columns', got 'dense'"):
        lasso(x, y, form="dense")
    with pytest.raises(ValueError, match="alphas should be positive finite numbers"):
        lasso(x, y, [0.0, 1.0])
    with pytest.raises(ValueError, match="unrelated to every feature"):
        lasso(np.ones_like(x), y)
    with pytest.raises(ValueError, match='alphas should be "auto"'):
        lasso(x, y, "all")
    with pytest.raises(ValueError, match="scoring should be one of"):
        lasso(x, y, scoring="r")
