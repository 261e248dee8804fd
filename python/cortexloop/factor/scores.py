"""How well a feature map fits the weights of a neuron: the linear score and its normalised relatives, and reductions.

`Weights` are either full, [T, C, H, W], or `Factors`, which are never written out in full where that can be avoided.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cortexloop.factor.factors import Factors
from cortexloop.functional import factorized_readout

Weights = Tensor | Factors
Score = Literal["dot", "cosine", "corr", "mse", "l1", "corr_mask", "mse_mask", "l1_mask"]


def score(features: Tensor, weights: Weights, mode: Score = "dot", *, normalise: bool = False) -> Tensor:
    """Scores [B, T] of feature maps for the weights of T neurons, in one pass for all neurons.

    With X an image's features, W a neuron's weights, D = C H W elements (published name in brackets):
    - "dot": sum W X; with `normalise`, over the number of elements with W > 0 ["dot"];
    - "cosine": sum W X / (|W| |X|) ["cosine"];
    - "corr": Pearson correlation over elements ["corr"];
    - "mse": -mean (X - W)^2 ["MSE"];  "l1": -mean |X - W| ["L1"];
    - "corr_mask", "mse_mask", "l1_mask": the same over the elements where W is not 0 ["corrmask", "MSEmask", "L1mask"].

    A ratio whose denominator is 0 (an image without any feature, a neuron without weights) is 0.

    Args:
        features: [B, C, H, W].
        weights: full or `Factors`.
        normalise: for "dot" only.

    Raises:
        ValueError: maps of another shape than the weights', an unknown mode, or `normalise` for another mode.
    """
    if mode not in get_args(Score):
        raise ValueError(f"score should be one of {get_args(Score)}, got {mode!r}")
    if normalise and mode != "dot":
        raise ValueError(f'normalise is of the score "dot", {mode!r} is a mean or ratio already')
    check_maps(features, weights)
    features = features.to(_like(weights))
    if mode == "dot":
        dot = linear_score(features, weights)
        return dot / _full(weights).gt(0).sum(1).clamp(min=1) if normalise else dot
    w = _full(weights)
    x = features.flatten(1)
    if mode in ("l1", "l1_mask"):
        return _l1(x, w, masked=mode == "l1_mask")
    dot = linear_score(features, weights).double()
    if mode.endswith("_mask"):
        mask = w.ne(0).to(w)
        count = mask.sum(1).double()
        sums, squares = (x @ mask.T).double(), (x.square() @ mask.T).double()
    else:
        count = torch.full_like(w[:, 0], w.shape[1], dtype=torch.float64)
        sums = x.sum(1, dtype=torch.float64)[:, None].expand(-1, len(w))
        squares = x.square().sum(1, dtype=torch.float64)[:, None].expand(-1, len(w))
    w_sum, w_square = w.sum(1, dtype=torch.float64), w.square().sum(1, dtype=torch.float64)
    count = count.clamp(min=1)
    if mode in ("mse", "mse_mask"):
        result = -(squares - 2 * dot + w_square) / count
    elif mode == "cosine":
        result = _ratio(dot, (squares * w_square).sqrt())
    else:
        spread = (
            (squares - sums.square() / count).clamp(min=0) * (w_square - w_sum.square() / count).clamp(min=0)
        ).sqrt()
        # What is left of a constant by rounding is not a spread.
        negligible = 1e-6 * (squares * w_square).sqrt()
        result = torch.where(spread > negligible, _ratio(dot - sums * w_sum / count, spread), 0.0).clamp(-1.0, 1.0)
    return result.to(w.dtype)


def linear_score(features: Tensor, weights: Weights) -> Tensor:
    """Sum over all elements of weights times features, [B, T]."""
    if isinstance(weights, Factors):
        return readout(features, weights.masks, weights.vectors)
    return features.flatten(1) @ weights.flatten(1).T


def readout(features: Tensor, masks: Tensor, vectors: Tensor) -> Tensor:
    """`functional.factorized_readout`, without its remark that float64, which was asked for, runs in plain torch."""
    backend = "reference" if features.dtype == torch.float64 else "auto"
    return factorized_readout(features, masks, vectors, backend=backend)


def paired_score(features: Tensor, weights: Weights, neurons: Tensor) -> Tensor:
    """Linear score of every image for a neuron of its own, [B]; differentiable in the features.

    Args:
        features: [B, C, H, W].
        neurons: int64 [B].
    """
    if isinstance(weights, Factors):
        b, c = features.shape[:2]
        maps = torch.bmm(weights.vectors[neurons], features.view(b, c, -1))  # [B, R, H W]
        return (maps * weights.masks[neurons].flatten(2)).sum((1, 2))
    return (features * weights[neurons]).flatten(1).sum(1)


def mask_features(features: Tensor, factors: Factors) -> Tensor:
    """What each mask sees, [B, T, R, C]: sum_hw X[b, c, h, w] mask[t, r, h, w] (published: spmask)."""
    t, r = factors.masks.shape[:2]
    seen = features.flatten(2) @ factors.masks.reshape(t * r, -1).T.to(features)  # [B, C, T R]
    return seen.mT.reshape(len(features), t, r, features.shape[1])


def vector_features(features: Tensor, factors: Factors) -> Tensor:
    """Where each vector is found, [B, T, R, H, W]: sum_c X[b, c, h, w] vector[t, r, c] (published: featvec)."""
    t, r, c = factors.vectors.shape
    found = factors.vectors.reshape(t * r, c).to(features) @ features.flatten(2)  # [B, T R, H W]
    return found.view(len(features), t, r, *features.shape[2:])


def factor_features(features: Tensor, factors: Factors) -> Tensor:
    """The score of each factor alone, [B, T, R] (published: factor)."""
    return (vector_features(features, factors) * factors.masks.to(features)).sum((-2, -1))


def check_maps(features: Tensor, weights: Weights) -> None:
    """Refuse maps of another shape than the weights'.

    Raises:
        ValueError: they differ.
    """
    expected = weights.feature_shape if isinstance(weights, Factors) else tuple(weights.shape[1:])
    if features.ndim != 4 or tuple(features.shape[1:]) != expected:
        raise ValueError(
            f"features should be [B, {', '.join(map(str, expected))}] as the weights are, got {list(features.shape)}"
        )


def _like(weights: Weights) -> Tensor:
    return weights.masks if isinstance(weights, Factors) else weights


def _full(weights: Weights) -> Tensor:
    return (weights.tensor() if isinstance(weights, Factors) else weights).flatten(1)


def _l1(x: Tensor, w: Tensor, *, masked: bool) -> Tensor:
    columns = []
    for row in w:
        chosen = torch.nonzero(row)[:, 0] if masked else slice(None)
        distance = (x[:, chosen] - row[chosen]).abs()
        columns.append(-distance.mean(1) if distance.shape[1] else x.new_zeros(len(x)))
    return torch.stack(columns, dim=1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
