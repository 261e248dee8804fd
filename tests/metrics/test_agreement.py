"""Rank correlation, explained variance and noise ceilings: hand-worked, against SciPy, and on simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import rankdata, spearmanr

from cortexloop.metrics import (
    ceiling_normalised_r,
    coefficient_of_determination,
    fraction_of_explained_variance,
    noise_ceiling,
    pearson_r,
    spearman_r,
)

NAN = math.nan


def test_hand_worked_ranks():
    # ranks 0, 1, 2 and 0, 1.5, 1.5: centred -1, 0, 1 and -1, .5, .5: r = 1.5 / sqrt(2 * 1.5)
    assert spearman_r([1, 5, 90], [-3, 7, 7]) == pytest.approx(1.5 / math.sqrt(3), abs=1e-15)
    assert spearman_r([1, 2, 3, NAN], [1, 4, 9, -5]) == pytest.approx(1, abs=1e-15)
    assert spearman_r([1, 2, 3], [[5, 1], [2, NAN], [1, 1]]) == pytest.approx(-1, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(
        np.float64,
        st.tuples(st.just(2), st.integers(1, 4), st.integers(2, 12)),
        elements=st.one_of(st.integers(-4, 4).map(float), st.just(NAN)),
    )
)
def test_ranks_are_scipys_neuron_by_neuron(values: np.ndarray):
    x, y = values
    got = spearman_r(x, y)
    for i in range(len(x)):
        keep = ~np.isnan(x[i]) & ~np.isnan(y[i])
        a, b = rankdata(x[i][keep]), rankdata(y[i][keep])
        expected = pearson_r(a, b)
        np.testing.assert_allclose(got[i], expected, atol=1e-12)
        if not np.isnan(expected):
            assert got[i] == pytest.approx(spearmanr(x[i][keep], y[i][keep]).statistic, abs=1e-12)


def test_rank_correlation_ignores_any_rising_function():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 40))
    np.testing.assert_array_equal(spearman_r(np.exp(3 * x), y**3), spearman_r(x, y))
    assert np.isnan(spearman_r([1, 1, 1], [1, 2, 3]))
    assert spearman_r(np.empty((0, 5)), np.empty((0, 5))).shape == (0,)
    assert np.isnan(spearman_r([], []))


def test_explained_variance_ignores_an_offset_only():
    # residuals 0, 2, 1: variance 2/3; responses 1, 5, 6: variance 14/3
    assert fraction_of_explained_variance([1, 3, 5], [1, 5, 6]) == pytest.approx(1 - 2 / 14, abs=1e-15)
    rng = np.random.default_rng(1)
    y = rng.normal(size=(6, 50))
    x = y + rng.normal(size=(6, 50))
    got = fraction_of_explained_variance(x, y)
    np.testing.assert_allclose(got, 1 - (y - x).var(axis=1) / y.var(axis=1), rtol=1e-12)
    np.testing.assert_allclose(fraction_of_explained_variance(x + 1000, y), got, rtol=1e-9)
    centred = x - x.mean(axis=1, keepdims=True) + y.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(coefficient_of_determination(centred, y), got, rtol=1e-12)
    holes = np.where(rng.random(y.shape) < 0.2, NAN, y)
    for i in range(6):
        keep = ~np.isnan(holes[i])
        alone = fraction_of_explained_variance(x[i][keep], y[i][keep])
        assert fraction_of_explained_variance(x, holes)[i] == pytest.approx(alone, rel=1e-12)
    assert np.isnan(fraction_of_explained_variance([1, 2, 3], [2, 2, 2]))
    assert fraction_of_explained_variance([7, 7, 7], [1, 2, 3]) == 0.0


def test_ceiling_equals_all_pairs_of_resamples():
    """The shortcut over sums of unit vectors against the definition, with the same draws."""
    rng = np.random.default_rng(2)
    raw = rng.normal(size=(3, 20, 1)) + rng.normal(size=(3, 20, 5))
    draws = np.random.default_rng(7)
    means = []
    for _ in range(10):
        chosen = (draws.random(raw.shape) * 5).astype(int)
        means.append(np.take_along_axis(raw, chosen, -1).mean(-1))
    for i in range(3):
        r = np.corrcoef([m[i] for m in means])
        expected = r[~np.eye(10, dtype=bool)].mean()
        assert noise_ceiling(raw, resamples=10, seed=7)[i] == pytest.approx(expected, rel=1e-12)


def test_ceiling_recovers_the_truth():
    """Resampled means have twice the noise variance S2/n (less its share within the sample): r = S / (S + noise)."""
    rng = np.random.default_rng(3)
    signal, noise, repeats = 1.0, 2.0, 10
    raw = rng.normal(0, signal, (200, 300, 1)) + rng.normal(0, noise, (200, 300, repeats))
    # Two resamples of one sample share its own error; each adds (n - 1) / n^2 of the noise variance.
    shared = signal**2 + noise**2 / repeats
    own = noise**2 * (repeats - 1) / repeats**2
    ceiling = noise_ceiling(raw, resamples=20)
    assert ceiling.mean() == pytest.approx(shared / (shared + own), abs=0.005)


def test_ceiling_is_seeded_and_uses_shown_repeats_only():
    rng = np.random.default_rng(4)
    raw = rng.normal(size=(4, 30, 1)) + rng.normal(size=(4, 30, 6))
    np.testing.assert_array_equal(noise_ceiling(raw, seed=1), noise_ceiling(raw, seed=1))
    assert (noise_ceiling(raw, seed=1) != noise_ceiling(raw, seed=2)).all()
    noiseless = np.repeat(raw[..., :1], 6, axis=-1)
    noiseless[:, ::2, 4:] = NAN
    np.testing.assert_allclose(noise_ceiling(noiseless), 1.0, rtol=1e-12)
    single = raw.copy()
    single[:, 7, 1:] = NAN
    without = np.delete(raw, 7, axis=1)
    np.testing.assert_allclose(noise_ceiling(single), noise_ceiling(without), atol=0.02)
    assert np.isnan(noise_ceiling(raw[..., :1])).all()
    assert np.isnan(noise_ceiling(np.ones((3, 5))))
    x = raw.mean(-1)
    np.testing.assert_allclose(ceiling_normalised_r(x, raw), 1 / noise_ceiling(raw), rtol=1e-12)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="resamples should be at least 2"):
        noise_ceiling(np.zeros((5, 3)), resamples=1)
    with pytest.raises(ValueError, match="raw responses should be"):
        noise_ceiling(np.zeros(5))
    with pytest.raises(ValueError, match="should be finite"):
        noise_ceiling([[np.inf, 1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="one axis more"):
        ceiling_normalised_r(np.zeros((2, 5)), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="responses should have the shape"):
        spearman_r(np.zeros((2, 5)), np.zeros((2, 4)))
