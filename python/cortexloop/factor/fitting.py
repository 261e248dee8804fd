"""Steps that fitted models share: moments, scores and regressions over batches of features, figures of merit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import metrics, regression
from cortexloop.factor._checks import Array, floats
from cortexloop.factor.factorize import cropped
from cortexloop.factor.factors import Factors
from cortexloop.factor.inputs import FeatureBatches, as_numpy
from cortexloop.factor.moments import FeatureMoments
from cortexloop.factor.nonlinearity import Softplus, fit_softplus
from cortexloop.factor.scores import Score, factor_features, mask_features, score, vector_features

_GROUP_BYTES = 500_000_000  # of reduced features in memory at once


def moments_of(
    batches: FeatureBatches, responses: Tensor, weights: Array | None, chosen: Tensor, permutations: int, seed: int
) -> FeatureMoments:
    """Streaming moments of the chosen images.

    Args:
        responses: [n, T] of the chosen images. weights: [B] of all images.
    """
    if weights is not None:
        w = floats(weights, "weights", 1)
        if len(w) != len(batches.inputs):
            raise ValueError(f"weights should be one number for each of {len(batches.inputs)} images, got {len(w)}")
        weights = w[chosen.to(w.device)]
    moments = FeatureMoments(
        batches.shape,
        responses.shape[1],
        permutations=permutations,
        seed=seed,
        responses=responses if permutations else None,
        device=batches.device,
    )
    for part, features in batches:
        x = features.float() if features.dtype == torch.float64 else features
        moments.update(x, responses[part], None if weights is None else weights[part], check=False)
    return moments


def scores_of(batches: FeatureBatches, readout: Factors, mode: Score, normalise: bool) -> Tensor:
    """Scores [n, T] of the chosen images in one pass."""
    scores = readout.masks.new_zeros(len(batches), len(readout))
    for part, features in batches:
        scores[part] = score(features, readout, mode, normalise=normalise)
    return scores


def constant_columns(scores: Tensor) -> list[int]:
    """Neurons whose score varies by no more than rounding."""
    s = scores.double()
    spread = s.amax(0) - s.amin(0)
    return [int(t) for t in torch.nonzero(spread <= 1e-7 * s.abs().amax(0))[:, 0]]


def fit_softplus_of(scores: Tensor, responses: Tensor, fitted: Tensor) -> Softplus:
    """The non-linearity of some neurons; the others get the constant mean response."""
    count = scores.shape[1]
    zero = torch.zeros(count, dtype=torch.float64)
    values = {name: zero.clone() for name in ("amplitude", "threshold", "offset", "scale")}
    values["offset"] = responses.mean(0).cpu().clone()
    values["converged"] = torch.ones(count, dtype=torch.bool)
    if len(fitted):
        found = fit_softplus(scores[:, fitted.to(scores.device)], responses[:, fitted.to(responses.device)])
        for name, value in found.tensors().items():
            values[name][fitted] = value.cpu()
    return Softplus(**values)


def fit_line(scores: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares gain and intercept [T] of responses on scores."""
    s, y = scores.double(), responses.to(scores.device).double()
    deviation = s - s.mean(0)
    power = deviation.square().sum(0)
    gain = torch.where(power > 0, (deviation * y).sum(0) / power.clamp(min=1e-300), 0.0)
    return gain, y.mean(0) - gain * s.mean(0)


def regress(
    batches: FeatureBatches,
    responses: Tensor,
    factors: Factors,
    neurons: list[int],
    reduction: str,
    regressor: str,
    alphas: Sequence[float] | None,
    folds: int | None,
    seed: int,
) -> tuple[Factors, Tensor, Tensor]:
    """Regress each neuron's responses on what its own factors make of the map.

    The reduced features of as many neurons as fit in memory are collected in one pass. Every regression is linear in
    the map, so that it is again a readout of factors: new vectors for "mask", new masks for "vector", scaled vectors
    for "factor".

    Returns:
        The readout, alpha [T] and intercept [T].
    """
    t, r = factors.masks.shape[:2]
    c, h, w = factors.feature_shape
    border = factors.border
    inner = (h - 2 * border) * (w - 2 * border)
    width = {"mask": r * c, "vector": r * inner, "factor": r}[reduction]
    masks, vectors = factors.masks.clone(), factors.vectors.clone()
    alpha = torch.full((t,), torch.inf, dtype=torch.float64)
    intercept = responses.mean(0).clone()
    group = max(1, _GROUP_BYTES // (4 * len(batches) * width))
    for start in range(0, len(neurons), group):
        chosen = neurons[start : start + group]
        some = factors.select(chosen)
        reduced = factors.masks.new_empty(len(batches), len(chosen), width)
        for part, features in batches:
            if reduction == "mask":
                seen = mask_features(features, some)
            elif reduction == "vector":
                seen = cropped(vector_features(features, some), border)
            else:
                seen = factor_features(features, some)
            reduced[part] = seen.reshape(len(seen), len(chosen), width)
        constant = _settle_constant_columns(reduced)
        for place, neuron in enumerate(chosen):
            model = regressed(reduced[:, place], responses[:, neuron : neuron + 1], regressor, alphas, folds, seed)
            beta = torch.where(constant[place], 0.0, model.weights[0].to(masks))
            alpha[neuron], intercept[neuron] = model.alpha[0], model.intercept[0]
            if reduction == "mask":
                vectors[neuron] = beta.view(r, c)
            elif reduction == "vector":
                masks[neuron] = 0.0
                cropped(masks[neuron], border).copy_(beta.view(r, h - 2 * border, w - 2 * border))
            else:
                vectors[neuron] *= beta[:, None]
    readout = factors.replaced(masks, vectors, method=f"{factors.method}, {regressor} on {reduction} features")
    return readout, alpha, intercept


def _settle_constant_columns(reduced: Tensor) -> Tensor:
    """Give columns [n, k, P] that vary by no more than rounding one value, lest a regression find meaning in it.

    Returns:
        bool [k, P], which these are.
    """
    low, high = reduced.amin(0), reduced.amax(0)
    negligible = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs())
    reduced.copy_(torch.where(negligible, low, reduced))
    return negligible


def regressed(
    x: Tensor,
    y: Tensor,
    regressor: str,
    alphas: Sequence[float] | None,
    folds: int | None,
    seed: int,
    **options: Any,
) -> regression.LinearModel:
    """Ridge or lasso, with the room's own defaults for what is None."""
    options["seed"] = seed
    if alphas is not None:
        options["alphas"] = alphas
    if folds is not None:
        options["folds"] = folds
    return regression.ridge(x, y, **options) if regressor == "ridge" else regression.lasso(x, y, **options)


def report(predictions: NDArray[Any], responses: Array, raw: Array | None, seed: int) -> dict[str, NDArray[np.float64]]:
    """Figures of merit [T] of predictions [B, T]."""
    y = as_numpy(floats(responses, "responses", 2, finite=False))
    if y.shape != predictions.shape:
        raise ValueError(f"responses should be {list(predictions.shape)} as the predictions are, got {list(y.shape)}")
    x, y = predictions.T, y.T
    found = {
        "pearson": metrics.pearson_r(x, y),
        "spearman": metrics.spearman_r(x, y),
        "r2": metrics.coefficient_of_determination(x, y),
        "fev": metrics.fraction_of_explained_variance(x, y),
    }
    if raw is not None:
        trials = as_numpy(floats(raw, "raw", 3, finite=False))
        if trials.shape[:2] != predictions.shape:
            raise ValueError(f"raw should be {[*predictions.shape, 'repeats']}, got {list(trials.shape)}")
        reliability = metrics.split_half(trials.transpose(1, 0, 2), seed=seed, spearman_brown=True)
        positive = reliability > 0
        found["ceiling"] = np.where(positive, np.sqrt(np.where(positive, reliability, 1.0)), np.nan)
        found["normalised"] = found["pearson"] / found["ceiling"]
    return found
