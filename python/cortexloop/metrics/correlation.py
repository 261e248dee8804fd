"""Agreement between predictions and responses, neuron by neuron.

Conventions of this folder:
- The last axis of predictions and of averaged responses is images; raw responses have a further axis, repeats.
- A NaN is a value that does not exist: an image without prediction or without response is dropped for that neuron.
- Everything is computed in float64, centred and scaled before any product is formed, so that a large offset
  (or a very large or small unit) costs no digits.
- An undefined value (fewer than two images left, or a constant input) is nan, without a warning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
Mask = NDArray[np.bool_]


def pearson_r(predictions: ArrayLike, responses: ArrayLike) -> Values:
    """Pearson correlation between predictions and responses over images.

    Args:
        predictions: [N, images] or [images], any unit.
        responses: the same shape, or with a last axis of repeats ([N, images, repeats] or [images, repeats]), which is
            averaged over the repeats that were shown. NaN = not shown.

    Returns:
        [N] (or a scalar array) in [-1, 1]; nan where predictions or responses are constant or fewer than two images
        remain.

    Raises:
        ValueError: if the shapes do not fit together or a value is infinite.
    """
    x, y, shown = paired(predictions, responses)
    x, _ = standardised(x, shown)
    y, _ = standardised(y, shown)
    sxy, sxx, syy = (x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1)
    r = divide(sxy, np.sqrt(sxx) * np.sqrt(syy))
    return np.clip(r, -1.0, 1.0)  # rounding can leave 1 + 2e-16


def r_squared(predictions: ArrayLike, responses: ArrayLike) -> Values:
    """Squared Pearson correlation, the "raw R2" of the compact-model paper: [N] in [0, 1].

    Arguments, nan and errors as `pearson_r`. It ignores the sign and scale of predictions; the metric that does not is
    `coefficient_of_determination`.
    """
    r: Values = pearson_r(predictions, responses) ** 2
    return r


def coefficient_of_determination(predictions: ArrayLike, responses: ArrayLike) -> Values:
    """Fraction of response variance explained by the predictions as they stand: 1 - sum (y - x)^2 / sum (y - mean y)^2.

    Arguments and errors as `pearson_r`. [N], at most 1, negative where the mean response predicts better; nan where the
    responses are constant or fewer than two images remain. Constant predictions are defined here (0 at best). The
    compact models predict in an arbitrary unit, so this is meaningful only after fitting a scale and an offset.
    """
    x, y, shown = paired(predictions, responses)
    deviation, scale = standardised(y, shown)
    defined = shown & (scale > 0)[..., None]
    residual = np.where(defined, y - x, 0.0) / np.where(scale > 0, scale, 1.0)[..., None]
    return 1.0 - divide((residual * residual).sum(-1), (deviation * deviation).sum(-1))


def mean_over_repeats(raw: ArrayLike) -> Values:
    """Average responses over the repeats that were shown.

    Args:
        raw: [..., images, repeats], NaN = not shown.

    Returns:
        [..., images]; nan for an image that was never shown.

    Raises:
        ValueError: if `raw` has fewer than two axes or a value is infinite.
    """
    values = as_values(raw, "raw responses")
    if values.ndim < 2:
        raise ValueError(f"raw responses should have axes [..., images, repeats], got shape {values.shape}")
    return mean_where(values, ~np.isnan(values))


def as_values(values: ArrayLike, what: str) -> Values:
    """A float64 copy or view of `values`, refused if it holds an infinity."""
    array = np.asarray(values, dtype=np.float64)
    if np.isinf(array).any():
        raise ValueError(f"{what} should be finite (or NaN for missing), got an infinity")
    return array


def paired(predictions: ArrayLike, responses: ArrayLike) -> tuple[Values, Values, Mask]:
    """Predictions and repeat-averaged responses of one shape, and where both exist."""
    x, y = as_values(predictions, "predictions"), as_values(responses, "responses")
    if x.ndim not in (1, 2):
        raise ValueError(f"predictions should have shape [N, images] or [images], got {x.shape}")
    if y.ndim == x.ndim + 1 and y.shape[:-1] == x.shape:
        y = mean_over_repeats(y)
    if y.shape != x.shape:
        raise ValueError(
            f"responses should have the shape of the predictions, {x.shape}, or that shape and a last axis of repeats, "
            f"got {y.shape}"
        )
    return x, y, ~(np.isnan(x) | np.isnan(y))


def standardised(values: Values, shown: Mask) -> tuple[Values, Values]:
    """Centred values in units of their largest deviation, 0 where not shown, and that unit, [...].

    A row whose shown values are all equal becomes exactly 0 with unit 0, although its mean may be off by rounding.
    """
    shifted = np.where(shown, values - _first(values, shown), 0.0)
    mean = shifted.sum(-1, keepdims=True) / np.maximum(shown.sum(-1, keepdims=True), 1)
    centred = np.where(shown, shifted - mean, 0.0)
    varies = shifted.any(-1, keepdims=True)
    unit = np.where(varies, np.abs(centred).max(-1, keepdims=True, initial=0.0), 0.0)
    return np.where(unit > 0, centred / np.where(unit > 0, unit, 1.0), 0.0), unit[..., 0]


def mean_where(values: Values, chosen: Mask) -> Values:
    """Mean of the chosen values over the last axis, nan where there is none; exact where they are all equal."""
    first = _first(values, chosen)
    return first[..., 0] + divide(np.where(chosen, values - first, 0.0).sum(-1), chosen.sum(-1))


def _first(values: Values, chosen: Mask) -> Values:
    """The first chosen value of each row, [..., 1], or 0: an origin that costs no digits under any offset."""
    if values.shape[-1] == 0:
        return np.zeros((*values.shape[:-1], 1))
    first = np.take_along_axis(values, chosen.argmax(-1)[..., None], -1)
    return np.where(chosen.any(-1, keepdims=True), first, 0.0)


def divide(numerator: Values, denominator: NDArray[np.generic]) -> Values:
    """numerator / denominator, nan where the denominator is 0."""
    zero = denominator == 0
    return np.asarray(np.where(zero, np.nan, numerator / np.where(zero, 1, denominator)))
