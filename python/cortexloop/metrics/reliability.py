"""How reliable responses are over repeats, and metrics of predictions corrected for that.

Raw responses are [N, images, repeats] or [images, repeats] with NaN = repeat not shown; the conventions of
`cortexloop.metrics.correlation` hold. Averaged responses do not suffice: the noise is measured between repeats.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cortexloop.metrics.correlation import (
    Mask,
    Values,
    as_values,
    divide,
    mean_over_repeats,
    mean_where,
    paired,
    pearson_r,
    standardised,
)

Repeats = Literal["published", "per_neuron", "harmonic"]


def noise_corrected_r2(predictions: ArrayLike, raw: ArrayLike, *, repeats: Repeats = "published") -> Values:
    """r2_ER: squared correlation between predictions and the *expected* responses, corrected for trial noise.

    With m images, n repeats, ybar_i the mean over repeats, s2 the noise variance, X and Y the centred x and ybar:

        r2_ER = [ (sum X Y)^2 - (s2/n) sum X^2 ] / [ sum X^2 sum Y^2 - (s2/n) (m-1) sum X^2 ]

    Source: Pospisil & Bair 2021 as used by Cowley et al. (raw counts, no variance-stabilising square root).

    Args:
        predictions: [N, images] or [images], any unit: the value does not change under an affine map of them.
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown. An image without a repeat (or without a
            prediction) is dropped for that neuron. Images with a single repeat do not enter s2.
        repeats: how n is counted, see `repeat_counts`.

    Returns:
        [N], not clipped: noise can make it negative or larger than 1, and meaningless where no signal exceeds the
        noise (denominator near or below 0). nan where predictions are constant, fewer than two images remain, or no
        image has two repeats.

    Raises:
        ValueError: if the shapes do not fit together, a value is infinite or `repeats` is unknown.
    """
    values = _raw(raw)
    x, y, shown = paired(predictions, values)
    if values.ndim != x.ndim + 1:
        raise ValueError(
            f"raw responses should have a last axis of repeats: {(*x.shape, 'repeats')}, got {values.shape}"
        )
    values = np.where(shown[..., None], values, np.nan)
    x, _ = standardised(x, shown)
    y, unit = standardised(y, shown)
    noise_of_mean = divide(_noise_variance(values, unit), repeat_counts(values, repeats=repeats))
    sxy, sxx, syy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)
    m = shown.sum(-1)
    # Both sides are divided by sum X^2, which is 0 exactly where predictions are constant.
    return divide(divide(sxy * sxy, sxx) - noise_of_mean, syy - noise_of_mean * (m - 1))


def snr(raw: ArrayLike, *, repeats: Repeats = "published") -> Values:
    """Signal-to-noise ratio: variance of the expected response over images / variance over repeats.

        SNR = [ var_i(ybar_i) - (m-1)/m s2/n ] / s2        (var with ddof 0)

    Source: Cowley et al., class_neural_data; the authors drop units below about 0.15.

    Args:
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown.
        repeats: how n is counted, see `repeat_counts`.

    Returns:
        [N]; slightly negative is possible; inf for responses that vary over images but not over repeats; nan where
        neither varies, fewer than two images were shown, or no image has two repeats.

    Raises:
        ValueError: if `raw` has another number of axes, a value is infinite or `repeats` is unknown.
    """
    values = _raw(raw)
    y = mean_over_repeats(values)
    shown = ~np.isnan(y)
    m = shown.sum(-1)
    centred, unit = standardised(y, shown)
    variance = divide((centred * centred).sum(-1), m)
    noise = _noise_variance(values, unit)
    n = repeat_counts(values, repeats=repeats)
    ratio = divide(variance - divide(divide((m - 1.0) * noise, m), n), noise)
    return np.where(m < 2, np.nan, np.where((noise == 0) & (variance > 0), np.inf, ratio))


def noise_variance(raw: ArrayLike) -> Values:
    """Trial-to-trial variance s2: unbiased variance over repeats, averaged over images with at least two repeats.

    Args:
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown.

    Returns:
        [N], in squared units of `raw`; nan where no image has two repeats.

    Raises:
        ValueError: if `raw` has another number of axes or a value is infinite.
    """
    values = _raw(raw)
    return _noise_variance(values, np.ones(values.shape[:-2]))


def repeat_counts(raw: ArrayLike, *, repeats: Repeats = "published") -> Values:
    """The number of repeats n behind an averaged response, over images shown at least once.

    Args:
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown.
        repeats: "published": median over images, counted on neuron 0 and used for all (Cowley et al.);
            "per_neuron": the median of each neuron's own counts; "harmonic": their harmonic mean, which makes s2/n the
            exact mean noise variance of ybar when the counts differ between images.

    Returns:
        [N], not necessarily whole numbers; nan for a neuron that was never shown an image.

    Raises:
        ValueError: if `raw` has another number of axes, a value is infinite or `repeats` is unknown.
    """
    if repeats not in get_args(Repeats):
        raise ValueError(f"repeats should be one of {get_args(Repeats)}, got {repeats!r}")
    values = _raw(raw)
    count = (~np.isnan(values)).sum(-1)
    if repeats == "harmonic":
        shown = count > 0
        return divide(shown.sum(-1).astype(np.float64), np.where(shown, 1.0 / np.maximum(count, 1), 0.0).sum(-1))
    rows = [_median_shown(row) for row in np.atleast_2d(count)]
    medians: Values = np.array(rows[:1] * len(rows) if repeats == "published" else rows, dtype=np.float64)
    return medians if count.ndim > 1 else medians[0:1].reshape(())


def split_half(raw: ArrayLike, *, splits: int = 50, seed: int = 0, spearman_brown: bool = False) -> Values:
    """Reliability of averaged responses: correlation between the means of two random halves of the repeats.

    For each split, each neuron and each image the shown repeats are divided at random (an odd one falls to the second
    half), the halves averaged and correlated over images; the result is the mean over splits.

    Args:
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown. Images with fewer than two repeats are
            dropped for that neuron.
        splits: number of random splits, at least 1 (50 in the paper).
        seed: of `numpy.random.default_rng`; equal seeds give equal results.
        spearman_brown: return 2 rho / (1 + rho) of the mean rho: the reliability of all repeats rather than of half.

    Returns:
        [N], at most 1; nan where a half is constant over images in every split or fewer than two images remain.

    Raises:
        ValueError: if `raw` has another number of axes, a value is infinite or `splits` is less than 1.
    """
    if splits < 1:
        raise ValueError(f"splits should be at least 1, got {splits}")
    values = _raw(raw)
    shown = ~np.isnan(values)
    shown &= (shown.sum(-1) >= 2)[..., None]
    half = shown.sum(-1, keepdims=True) // 2
    rng = np.random.default_rng(seed)
    total, defined = np.zeros(values.shape[:-2]), np.zeros(values.shape[:-2], dtype=np.int64)
    for _ in range(splits):
        first = shown & (_random_rank(rng, shown) < half)
        rho = pearson_r(mean_where(values, first), mean_where(values, shown & ~first))
        total += np.where(np.isnan(rho), 0.0, rho)
        defined += ~np.isnan(rho)
    rho = divide(total, defined)
    return divide(2.0 * rho, 1.0 + rho) if spearman_brown else rho


def brainscore_r2(predictions: ArrayLike, raw: ArrayLike, *, splits: int = 50, seed: int = 0) -> Values:
    """Brain-Score-like explained fraction: r(predictions, mean responses)^2 / SB, SB = split half, Spearman-Brown.

    Source: Cowley et al., who compare it with r2_ER. The denominator is neither squared nor rooted. Arguments as
    `noise_corrected_r2` and `split_half`. [N]; nan where either part is; of no meaning where the reliability is
    not positive.

    Raises:
        ValueError: if the shapes do not fit together, a value is infinite or `splits` is less than 1.
    """
    values = _raw(raw)
    if values.ndim != np.ndim(predictions) + 1:
        raise ValueError(f"raw responses should have one axis more than predictions, repeats, got {values.shape}")
    return divide(
        pearson_r(predictions, values) ** 2, split_half(values, splits=splits, seed=seed, spearman_brown=True)
    )


def _raw(raw: ArrayLike) -> Values:
    values = as_values(raw, "raw responses")
    if values.ndim not in (2, 3):
        raise ValueError(f"raw responses should be [N, images, repeats] or [images, repeats], got shape {values.shape}")
    return values


def _median_shown(counts: NDArray[np.integer]) -> float:
    counts = counts[counts > 0]
    return float(np.median(counts)) if counts.size else float("nan")


def _random_rank(rng: np.random.Generator, shown: Mask) -> NDArray[np.intp]:
    """A random rank of every repeat among those shown of its image, [..., repeats]; the others come last."""
    key = np.where(shown, rng.random(shown.shape), 2.0)
    return key.argsort(-1).argsort(-1)


def _noise_variance(values: Values, unit: Values) -> Values:
    """Noise variance of each neuron in units of unit^2 (of 1 where the unit is 0)."""
    shown = ~np.isnan(values)
    count = shown.sum(-1)
    centred, own_unit = standardised(values, shown)
    deviation = own_unit / np.where(unit > 0, unit, 1.0)[..., None]
    usable = count >= 2
    variance = np.where(usable, (centred * centred).sum(-1) / np.maximum(count - 1, 1) * deviation**2, 0.0)
    return divide(variance.sum(-1), usable.sum(-1))
