"""Ridge that grows: the sums exactly, the fits against `regression.ridge`."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cortexloop.realtime.refit import ALPHAS, RecursiveRidge, Refit
from cortexloop.regression import ridge

Double = NDArray[np.float64]


def problem(n: int, p: int, seed: int = 0) -> tuple[Double, Double]:
    """Features of different scales far from zero, and responses with noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) * rng.uniform(0.5, 3, p) + rng.uniform(-5, 5, p)
    return x, x @ rng.standard_normal(p) / np.sqrt(p) + rng.standard_normal(n)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("n", "p"), [(40, 6), (12, 30), (7, 6)])
def test_equals_ridge_of_all_images_at_once(n: int, p: int, standardize: bool) -> None:
    x, y = problem(n, p)
    model = RecursiveRidge(p, standardize=standardize)
    for part in np.array_split(np.arange(n), 5):
        model.add(x[part], y[part])
    expected = ridge(x, y[:, None], ALPHAS, standardize=standardize)
    fit = model.solve()
    assert fit.alpha == float(expected.alpha[0])
    assert fit.score == pytest.approx(float(expected.score[0]), rel=1e-9)
    np.testing.assert_allclose(fit.weights, expected.weights[0].numpy(), rtol=1e-7, atol=1e-9)
    others = problem(9, p, seed=5)[0]
    np.testing.assert_allclose(model.predict(others), expected.predict(others)[:, 0].numpy(), rtol=1e-7, atol=1e-8)
    assert model.response_variance == pytest.approx(y.var())


def test_running_validation_counts_errors_before_images_are_added() -> None:
    x, y = problem(50, 4)
    model = RecursiveRidge(4, validation="running")
    errors, base = np.zeros(len(ALPHAS)), 0.0
    for first in range(0, 50, 10):
        some = slice(first, first + 10)
        if first:
            for k, alpha in enumerate(ALPHAS):
                before = ridge(x[:first], y[:first, None], [alpha])
                errors[k] += np.square(before.predict(x[some])[:, 0].numpy() - y[some]).sum()
            base += np.square(y[:first].mean() - y[some]).sum()
        model.add(x[some], y[some])
    fit = model.solve()
    assert fit.alpha == ALPHAS[int(errors.argmin())]
    assert fit.score == pytest.approx(1 - errors.min() / base, rel=1e-9)
    expected = ridge(x, y[:, None], [fit.alpha])
    np.testing.assert_allclose(fit.weights, expected.weights[0].numpy(), rtol=1e-8)


def test_sums_of_whole_numbers_are_exact() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(-1000, 1000, (90, 70)), rng.integers(-1000, 1000, 90)
    model = RecursiveRidge(70)
    model.add(x, y)
    shifted = x - x[0]
    np.testing.assert_array_equal(model._sum_xx, shifted.T @ shifted)
    np.testing.assert_array_equal(model._sum_x, shifted.sum(0))
    np.testing.assert_array_equal(model._sum_xy, shifted.T @ (y - y[0]))


@pytest.mark.parametrize("validation", ["leave_one_out", "running"])
def test_division_into_calls_does_not_change_a_bit(validation: str) -> None:
    x, y = problem(60, 5)
    y[[3, 17]] = np.nan
    whole = RecursiveRidge(5, validation=validation)
    whole.add(x, y)
    rng = np.random.default_rng(2)
    for _ in range(5):
        cuts = np.sort(rng.choice(60, 7))
        parts = RecursiveRidge(5, validation=validation)
        for some in np.split(np.arange(60), cuts):
            parts.add(x[some], y[some])
        assert parts.digest() == whole.digest()
        assert (parts.count, parts.ignored) == (58, 2)
    if validation == "leave_one_out":
        np.testing.assert_array_equal(parts.solve().weights, whole.solve().weights)
        shuffled = RecursiveRidge(5)
        order = rng.permutation(60)
        shuffled.add(x[order], y[order])
        assert shuffled.digest() != whole.digest()
        assert shuffled.solve().alpha == whole.solve().alpha
        np.testing.assert_allclose(shuffled.solve().weights, whole.solve().weights, rtol=1e-9)


def test_rows_with_nan_are_left_out_and_told() -> None:
    x, y = problem(20, 3)
    clean = RecursiveRidge(3)
    clean.add(x[2:], y[2:])
    model = RecursiveRidge(3)
    dirty_x, dirty_y = x.copy(), y.copy()
    dirty_x[0, 1] = dirty_y[1] = np.nan
    assert model.add(dirty_x, dirty_y).tolist() == [False, False] + [True] * 18
    assert model.digest() == clean.digest()
    assert not model.add(np.full((4, 3), np.nan), np.zeros(4)).any()
    assert model.digest() == clean.digest()
    assert model.ignored == 6


def test_features_far_from_zero_lose_no_digits() -> None:
    x, y = problem(40, 3)
    near, far = RecursiveRidge(3, alphas=[1.0]), RecursiveRidge(3, alphas=[1.0])
    x = np.round(x * 2**20) / 2**20
    near.add(x, y)
    far.add(x + 2.0**30, y)  # exact
    np.testing.assert_array_equal(far.solve().weights, near.solve().weights)


def test_constants_have_no_weight_and_constant_responses_no_model() -> None:
    x, y = problem(30, 4)
    x[:, 2] = 0.1
    for standardize in (False, True):
        model = RecursiveRidge(4, standardize=standardize)
        model.add(x, y)
        assert model.solve().weights[2] == 0
    for validation in ("leave_one_out", "running"):
        flat = RecursiveRidge(4, validation=validation)
        flat.add(x[:10], np.full(10, 2.5))
        flat.add(x[10:], np.full(20, 2.5))
        fit = flat.solve()
        assert (fit.weights == 0).all()
        assert np.isnan(fit.score)
        assert fit.alpha == max(ALPHAS)
        assert (flat.predict(x) == 2.5).all()


def test_one_image_is_no_model_and_two_are() -> None:
    x, y = problem(2, 3)
    model = RecursiveRidge(3)
    with pytest.raises(RuntimeError, match="fitted to 2 images at least, so far there are 0"):
        model.solve()
    assert model.response_variance == 0
    model.add(x[:1], y[:1])
    with pytest.raises(RuntimeError, match="so far there are 1"):
        model.predict(x)
    model.add(x[1:], y[1:])
    assert np.isfinite(model.predict(x)).all()


def test_bad_input_changes_nothing() -> None:
    x, y = problem(5, 3)
    model = RecursiveRidge(3)
    before = model.digest()
    with pytest.raises(ValueError, match=r"features should be \[images, 3\], got \[5, 2\]"):
        model.add(x[:, :2], y)
    with pytest.raises(ValueError, match=r"responses should be \[5\]"):
        model.add(x, y[:4])
    y[2] = np.inf
    with pytest.raises(ValueError, match="should be finite, or NaN"):
        model.add(x, y)
    assert (model.digest(), model.count, model.ignored) == (before, 0, 0)
    with pytest.raises(ValueError, match="at least 1 feature, got 0"):
        RecursiveRidge(0)
    with pytest.raises(ValueError, match="alphas should be a list of positive numbers"):
        RecursiveRidge(3, alphas=[0.0])
    with pytest.raises(ValueError, match="validation should be one of"):
        RecursiveRidge(3, validation="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="after 2 responses at the earliest, got after = 1"):
        Refit(after=1).model(3)
    assert Refit(validation="running").model(3).settings()["validation"] == "running"
