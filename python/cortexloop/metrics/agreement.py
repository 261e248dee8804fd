"""More ways in which predictions agree with responses: by ranks, up to an offset, and relative to a noise ceiling.

The conventions of `cortexloop.metrics.correlation` hold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cortexloop.metrics.correlation import (
    Mask,
    Values,
    as_values,
    divide,
    mean_where,
    paired,
    pearson_r,
    standardised,
)


def spearman_r(predictions: ArrayLike, responses: ArrayLike) -> Values:
    """Spearman correlation over images: Pearson correlation of ranks, equal values sharing their mean rank.

    Arguments, nan and errors as `pearson_r`. [N] in [-1, 1]. It does not change under a rising function of predictions.
    """
    x, y, shown = paired(predictions, responses)
    return pearson_r(np.where(shown, _ranks(x, shown), np.nan), np.where(shown, _ranks(y, shown), np.nan))


def fraction_of_explained_variance(predictions: ArrayLike, responses: ArrayLike) -> Values:
    """FEV: 1 - var(y - x) / var(y) for predictions x and responses y.

    As `coefficient_of_determination`, but an offset between predictions and responses costs nothing. Arguments and
    errors as `pearson_r`. [N], at most 1; nan where the responses are constant or fewer than two images remain.
    """
    x, y, shown = paired(predictions, responses)
    deviation, scale = standardised(y, shown)
    defined = shown & (scale > 0)[..., None]
    residual, unit = standardised(np.where(defined, y - x, 0.0), defined)
    share = divide((residual * residual).sum(-1), (deviation * deviation).sum(-1))
    return 1.0 - share * (unit / np.where(scale > 0, scale, 1.0)) ** 2


def noise_ceiling(raw: ArrayLike, *, resamples: int = 100, seed: int = 0) -> Values:
    """How well averaged responses agree with themselves: mean correlation between bootstrap resamples of the repeats.

    For each resample the repeats of every image are drawn with replacement, as many as were shown, and averaged; the
    result is the mean Pearson correlation over images between all pairs of different resamples. A prediction's r
    divided by it is `ceiling_normalised_r`. Source: Wang & Ponce's factor models.

    Args:
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown. Images with fewer than two repeats are
            dropped for that neuron: their resamples would all be equal.
        resamples: at least 2.
        seed: of `numpy.random.default_rng`; equal seeds give equal results.

    Returns:
        [N], at most 1; nan where fewer than two resamples vary over images.

    Raises:
        ValueError: if `raw` has another number of axes, a value is infinite or there are fewer than 2 resamples.
    """
    if resamples < 2:
        raise ValueError(f"resamples should be at least 2, got {resamples}")
    values = as_values(raw, "raw responses")
    if values.ndim not in (2, 3):
        raise ValueError(f"raw responses should be [N, images, repeats] or [images, repeats], got shape {values.shape}")
    shown = ~np.isnan(values)
    order = (~shown).argsort(-1, kind="stable")  # shown repeats first
    values = np.take_along_axis(values, order, -1)
    count = shown.sum(-1, keepdims=True)
    usable = count[..., 0] >= 2
    drawn = (np.arange(values.shape[-1]) < count) & usable[..., None]
    rng = np.random.default_rng(seed)
    total = np.zeros(usable.shape)  # sum over resamples of standardised mean responses
    varying = np.zeros(usable.shape[:-1], dtype=np.int64)
    for _ in range(resamples):
        chosen = (rng.random(values.shape) * count).astype(np.intp)
        means = mean_where(np.take_along_axis(values, chosen, -1), drawn)
        deviation, _ = standardised(np.where(usable, means, 0.0), usable)
        length = np.sqrt((deviation * deviation).sum(-1))
        total += np.where(length > 0, 1.0, 0.0)[..., None] * deviation / np.where(length > 0, length, 1.0)[..., None]
        varying += length > 0
    # |sum of k unit vectors|^2 = k + twice the sum of the correlations of all pairs
    pairs = varying * (varying - 1)
    return divide((total * total).sum(-1) - varying, pairs)


def ceiling_normalised_r(predictions: ArrayLike, raw: ArrayLike, *, resamples: int = 100, seed: int = 0) -> Values:
    """Pearson correlation with the averaged responses, divided by their `noise_ceiling`.

    Args:
        predictions: [N, images] or [images].
        raw: [N, images, repeats] or [images, repeats], NaN = repeat not shown.
        resamples, seed: as `noise_ceiling`.

    Returns:
        [N], not clipped; nan where either part is, and of no meaning where the ceiling is not positive.

    Raises:
        ValueError: if the shapes do not fit together, a value is infinite or there are fewer than 2 resamples.
    """
    if np.ndim(raw) != np.ndim(predictions) + 1:
        raise ValueError(f"raw responses should have one axis more than predictions, repeats, got {np.shape(raw)}")
    return divide(pearson_r(predictions, raw), noise_ceiling(raw, resamples=resamples, seed=seed))


def _ranks(values: Values, shown: Mask) -> Values:
    """Ranks among the shown values of each row, from 0; equal values share their mean. Others have no meaning."""
    if values.shape[-1] == 0:
        return values
    keyed = np.where(shown, values, np.inf)
    order = keyed.argsort(-1, kind="stable")
    ordered = np.take_along_axis(keyed, order, -1)
    place = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    starts = np.ones(values.shape, dtype=bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    ends = np.ones(values.shape, dtype=bool)
    ends[..., :-1] = starts[..., 1:]
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=-1)
    last = np.minimum.accumulate(np.where(ends, place, values.shape[-1])[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, -1)
    return ranks
