"""Metrics against hand-worked cases, NumPy one neuron at a time, invariances, and simulations with known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cortexloop.metrics import (
    brainscore_r2,
    coefficient_of_determination,
    mean_over_repeats,
    noise_corrected_r2,
    noise_variance,
    pearson_r,
    r_squared,
    repeat_counts,
    snr,
    split_half,
)

NAN = math.nan


def published_r2_er(x: np.ndarray, y: np.ndarray, n: float) -> float:
    """The formula of the specification for one neuron without missing images, term by term."""
    mean = np.nanmean(y, axis=1)
    s2 = np.nanmean(np.nanvar(y, axis=1, ddof=1))
    cx, cy = x - x.mean(), mean - mean.mean()
    sxx, syy, sxy = (cx**2).sum(), (cy**2).sum(), (cx * cy).sum()
    return (sxy**2 - s2 / n * sxx) / (sxx * syy - s2 / n * (len(x) - 1) * sxx)


def counts_with_gaps(rng: np.random.Generator, neurons: int, images: int, repeats: int) -> np.ndarray:
    """Poisson counts whose rate depends on the image, with 2..repeats repeats shown of each image."""
    rate = rng.gamma(3.0, 2.0, (neurons, images, 1))
    raw = rng.poisson(rate, (neurons, images, repeats)).astype(float)
    shown = rng.integers(2, repeats + 1, (neurons, images, 1))
    return np.where(np.arange(repeats) < shown, raw, NAN)


# ---- correlation


def test_hand_worked_correlation():
    # centred x: -1, 0, 1; centred y: -2, 1, 1: r = 3 / sqrt(2 * 6)
    assert pearson_r([1, 2, 3], [0, 3, 3]) == pytest.approx(3 / math.sqrt(12), abs=1e-15)
    assert r_squared([1, 2, 3], [0, 3, 3]) == pytest.approx(0.75, abs=1e-15)
    # residuals -1, 1, 0: 1 - 2/6
    assert coefficient_of_determination([1, 2, 3], [0, 3, 3]) == pytest.approx(2 / 3, abs=1e-15)
    assert pearson_r([1, 2, 3], [[0, 0], [2, 4], [3, NAN]]) == pytest.approx(3 / math.sqrt(12), abs=1e-15)


def test_equals_numpy_neuron_by_neuron():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 7, 50))
    x[rng.random(x.shape) < 0.1] = NAN
    y[rng.random(x.shape) < 0.2] = NAN
    r, r2, cod = pearson_r(x, y), r_squared(x, y), coefficient_of_determination(x, y)
    for i in range(len(x)):
        keep = ~np.isnan(x[i]) & ~np.isnan(y[i])
        a, b = x[i][keep], y[i][keep]
        assert r[i] == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-14)
        assert r2[i] == r[i] ** 2
        assert cod[i] == pytest.approx(1 - ((b - a) ** 2).sum() / ((b - b.mean()) ** 2).sum(), rel=1e-13)
        assert pearson_r(x[i], y[i]) == r[i]  # one neuron alone: the same bits


def test_large_offset_and_extreme_units_cost_no_digits():
    rng = np.random.default_rng(2)
    x, y = rng.integers(-8, 9, (2, 100)).astype(float)
    exact = pearson_r(x, y)
    assert pearson_r(x + 2.0**40, y - 2.0**40) == exact
    assert pearson_r(x * 2.0**-900, y * 2.0**900) == exact
    raw = np.stack([y, y + 1, y - 1], -1)
    assert noise_corrected_r2(x + 2.0**40, raw - 2.0**40) == noise_corrected_r2(x, raw)
    assert snr(raw * 2.0**-600) == snr(raw)


def test_undefined_values_are_nan_without_a_warning():
    varied = [1.0, 2.0, 4.0]
    for constant in ([0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [1e300, 1e300, 1e300]):
        assert np.isnan(pearson_r(constant, varied))
        assert np.isnan(pearson_r(varied, constant))
        assert np.isnan(coefficient_of_determination(varied, constant))
        assert np.isnan(noise_corrected_r2(constant, [[1, 2], [2, 3], [4, 5]]))
    assert coefficient_of_determination([2, 2, 2], [1, 2, 3]) == 0.0
    assert np.isnan(pearson_r([1, NAN, 2], [NAN, 1, 2]))  # one image left
    assert np.isnan(pearson_r([NAN, NAN], [1, 2]))
    assert np.isnan(pearson_r([], []))
    assert pearson_r(np.empty((0, 5)), np.empty((0, 5))).shape == (0,)
    # 0.1 averaged over 3 or 10 repeats differs by rounding unless the mean is taken with care
    repeats = np.where(np.arange(10) < np.array([[3], [10], [7]]), 0.1, NAN)
    assert np.isnan(pearson_r(varied, repeats))


def test_mean_over_repeats():
    raw = np.array([[[1, 3, NAN], [NAN, NAN, NAN], [4, NAN, NAN]]])
    np.testing.assert_array_equal(mean_over_repeats(raw), [[2, NAN, 4]])


def test_shapes_and_infinities_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 5\).*got \(2, 4\)"):
        pearson_r(np.zeros((2, 5)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="repeats"):
        pearson_r(np.zeros(5), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="predictions should have shape"):
        pearson_r(np.zeros((2, 5, 3)), np.zeros((2, 5, 3)))
    with pytest.raises(ValueError, match="infinity"):
        pearson_r([1, 2, np.inf], [1, 2, 3])
    with pytest.raises(ValueError, match="axis of repeats"):
        noise_corrected_r2(np.zeros((2, 5)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="repeats should be one of"):
        repeat_counts(np.zeros((2, 5, 3)), repeats="median")
    with pytest.raises(ValueError, match="raw responses should be"):
        snr(np.zeros(5))
    with pytest.raises(ValueError, match="splits should be at least 1"):
        split_half(np.zeros((2, 5, 3)), splits=0)
    with pytest.raises(ValueError, match="axes"):
        mean_over_repeats(np.zeros(5))
    with pytest.raises(ValueError, match="one axis more"):
        brainscore_r2(np.zeros((2, 5)), np.zeros((2, 5)))


# ---- noise-corrected R2, SNR


def test_hand_worked_noise_correction():
    # ybar = 1, 2, 6 (mean 3); var over repeats 2, 0, 2 -> s2 = 4/3, n = 2, m = 3
    raw = [[0, 2], [2, 2], [5, 7]]
    x = [0, 1, 2]  # X = -1, 0, 1: sum XY = 5, sum X^2 = 2, sum Y^2 = 4 + 1 + 9 = 14
    expected = (25 - 2 / 3 * 2) / (2 * 14 - 2 / 3 * 2 * 2)
    assert noise_variance(raw) == pytest.approx(4 / 3, abs=1e-15)
    assert repeat_counts(raw) == 2
    assert noise_corrected_r2(x, raw) == pytest.approx(expected, abs=1e-14)
    assert snr(raw) == pytest.approx((14 / 3 - 2 / 3 * (4 / 3) / 2) / (4 / 3), abs=1e-14)


def test_noise_correction_equals_the_formula_neuron_by_neuron():
    rng = np.random.default_rng(3)
    raw = counts_with_gaps(rng, 6, 40, 9)
    x = np.nanmean(raw, -1) + rng.normal(size=(6, 40))
    published = noise_corrected_r2(x, raw)
    own = noise_corrected_r2(x, raw, repeats="per_neuron")
    harmonic = noise_corrected_r2(x, raw, repeats="harmonic")
    count = (~np.isnan(raw)).sum(-1)
    for i in range(6):
        assert published[i] == pytest.approx(published_r2_er(x[i], raw[i], np.median(count[0])), rel=1e-12)
        assert own[i] == pytest.approx(published_r2_er(x[i], raw[i], np.median(count[i])), rel=1e-12)
        assert harmonic[i] == pytest.approx(published_r2_er(x[i], raw[i], 1 / np.mean(1 / count[i])), rel=1e-12)
        s2 = np.nanmean(np.nanvar(raw[i], axis=1, ddof=1))
        variance = np.var(np.nanmean(raw[i], axis=1))
        assert snr(raw)[i] == pytest.approx((variance - 39 / 40 * s2 / np.median(count[0])) / s2, rel=1e-12)


def test_missing_images_are_dropped_per_neuron():
    rng = np.random.default_rng(4)
    raw = counts_with_gaps(rng, 3, 30, 6)
    x = np.nanmean(raw, -1) + rng.normal(size=(3, 30))
    whole = noise_corrected_r2(x, raw, repeats="per_neuron")
    holes = raw.copy()
    holes[1, 5:9] = NAN
    unpredicted = x.copy()
    unpredicted[1, 5:9] = NAN
    keep = np.r_[0:5, 9:30]
    alone = noise_corrected_r2(x[1, keep], raw[1, keep], repeats="per_neuron")
    for result in (
        noise_corrected_r2(x, holes, repeats="per_neuron"),
        noise_corrected_r2(unpredicted, raw, repeats="per_neuron"),
    ):
        assert result[1] == pytest.approx(alone, rel=1e-12)
        np.testing.assert_array_equal(result[[0, 2]], whole[[0, 2]])
    assert snr(holes, repeats="per_neuron")[1] == pytest.approx(snr(raw[1, keep], repeats="per_neuron"), rel=1e-12)
    raw[2] = NAN
    assert np.isnan(noise_corrected_r2(x, raw)[2])
    assert np.isnan([snr(raw)[2], noise_variance(raw)[2], split_half(raw)[2]]).all()
    assert np.isnan(repeat_counts(raw, repeats="per_neuron")[2])


def test_snr_without_noise_and_without_signal():
    assert snr([[1, 1], [2, 2]]) == np.inf
    assert np.isnan(snr([[1, 1], [1, 1]]))
    assert np.isnan(snr([[1, 2]]))
    assert np.isnan(snr([[1, NAN], [2, NAN]]))


@pytest.mark.parametrize("noise", ["gaussian", "poisson"])
@pytest.mark.parametrize("true_r2", [0.0, 0.5, 1.0])
def test_noise_corrected_r2_recovers_the_truth(noise: str, true_r2: float):
    """2000 simulated neurons whose predictions correlate with the true rates by sqrt(true_r2), exactly."""
    rng = np.random.default_rng(5)
    neurons, images, repeats = 2000, 120, 4
    rate = rng.gamma(4.0, 1.5, images)
    signal = (rate - rate.mean()) / rate.std()
    other = rng.normal(size=images)
    other -= other.mean() + signal * (other @ signal) / (signal @ signal)
    x = math.sqrt(true_r2) * signal + math.sqrt(1 - true_r2) * other / other.std()
    if noise == "poisson":
        raw = rng.poisson(rate[:, None], (neurons, images, repeats)).astype(float)
    else:
        raw = rate[:, None] + rng.normal(0, 3.0, (neurons, images, repeats))
    estimate = noise_corrected_r2(np.broadcast_to(x, (neurons, images)), raw)
    error = estimate.std() / math.sqrt(neurons)
    # A ratio of unbiased estimators keeps a bias of order 1/m; 0.002 is well below the 0.02 spread of one neuron.
    assert abs(estimate.mean() - true_r2) < 4 * error + 0.002
    plain = r_squared(np.broadcast_to(x, (neurons, images)), raw).mean()
    if true_r2 > 0:
        assert plain < true_r2 - 0.05  # what the correction is for


def test_snr_recovers_the_truth():
    rng = np.random.default_rng(6)
    rate = rng.normal(0, 2.0, 200)
    raw = rate[:, None] + rng.normal(0, 3.0, (2000, 200, 5))
    estimate = snr(raw)
    assert abs(estimate.mean() - np.var(rate) / 9.0) < 4 * estimate.std() / math.sqrt(2000) + 0.001


# ---- reliability


def test_split_half_recovers_the_truth():
    """Halves of 4 of 8 repeats: rho = S / (S + noise/4); Spearman-Brown gives S / (S + noise/8)."""
    rng = np.random.default_rng(7)
    signal = rng.normal(0, 1.0, (300, 400, 1))
    raw = signal + rng.normal(0, 2.0, (300, 400, 8))
    half, whole = split_half(raw, splits=10), split_half(raw, splits=10, spearman_brown=True)
    error = half.std() / math.sqrt(300)
    assert abs(half.mean() - 1 / (1 + 4 / 4)) < 4 * error + 0.002
    np.testing.assert_allclose(whole, 2 * half / (1 + half), rtol=1e-14)
    assert abs(whole.mean() - 1 / (1 + 4 / 8)) < 4 * error + 0.002
    ceiling = brainscore_r2(signal[..., 0], raw, splits=10)
    assert abs(ceiling.mean() - 1.0) < 0.01


def test_split_half_is_seeded_and_uses_shown_repeats_only():
    rng = np.random.default_rng(8)
    raw = counts_with_gaps(rng, 4, 60, 7)
    np.testing.assert_array_equal(split_half(raw, splits=5, seed=3), split_half(raw, splits=5, seed=3))
    assert (split_half(raw, splits=5, seed=3) != split_half(raw, splits=5, seed=4)).all()
    # With exactly two repeats there is one split, up to order.
    pair = raw[:, :, :2]
    np.testing.assert_allclose(split_half(pair, splits=9), pearson_r(pair[:, :, 0], pair[:, :, 1]), atol=0.05)
    noiseless = np.where(np.isnan(raw), NAN, np.nanmean(raw, -1, keepdims=True))
    np.testing.assert_allclose(split_half(noiseless, splits=3), 1.0, rtol=1e-14)
    single = raw.copy()
    single[:, 10, 1:] = NAN
    without = np.delete(raw, 10, axis=1)
    assert split_half(single, splits=200)[0] == pytest.approx(split_half(without, splits=200)[0], abs=0.02)


# ---- properties

SIZES = st.tuples(st.integers(1, 4), st.integers(3, 12))
WHOLE = st.integers(-50, 50).map(float)
RAW = SIZES.flatmap(lambda s: hnp.arrays(np.float64, (*s, 4), elements=st.one_of(WHOLE, WHOLE, WHOLE, st.just(NAN))))


@settings(max_examples=60, deadline=None)
@given(raw=RAW, seed=st.integers(0, 99))
def test_properties_hold_for_any_counts(raw: np.ndarray, seed: int):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=raw.shape[:2])
    r, corrected, ratio = pearson_r(x, raw), noise_corrected_r2(x, raw), snr(raw)
    assert ((np.abs(r) <= 1) | np.isnan(r)).all()
    order = rng.permutation(raw.shape[1])
    np.testing.assert_allclose(pearson_r(x[:, order], raw[:, order]), r, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pearson_r(-3 * x + 7, raw), -r, rtol=0, atol=1e-12)
    np.testing.assert_allclose(noise_corrected_r2(0.5 * x - 2, raw), corrected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(snr(3 * raw + 5), ratio, rtol=1e-9, atol=1e-12)
    both = split_half(raw, splits=2)
    assert ((both <= 1) | np.isnan(both)).all()
    # A neuron's value depends on no other neuron, except through the published way of counting repeats.
    own = noise_corrected_r2(x, raw, repeats="per_neuron")
    for i in range(len(x)):
        np.testing.assert_array_equal(own[i], noise_corrected_r2(x[i], raw[i], repeats="per_neuron"))
