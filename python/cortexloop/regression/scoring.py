"""Scores of held-out images, and the model made of what a fit found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor

from cortexloop.regression.data import Matrix
from cortexloop.regression.model import LinearModel, Scoring


def check_scoring(scoring: str) -> None:
    """Raise if there is no such scoring.

    Raises:
        ValueError: neither "r2" nor "mse".
    """
    if scoring not in get_args(Scoring):
        raise ValueError(f"scoring should be one of {', '.join(map(repr, get_args(Scoring)))}, got {scoring!r}")


def spread(y: Tensor) -> Tensor:
    """Sum of squared deviations from the mean over images, [T]; exactly 0 for a constant column."""
    shifted = y - y[:1]
    return (shifted - shifted.mean(dim=0)).square().sum(dim=0)


def fold_scores(y: Tensor, predictions: Iterable[Tensor], scoring: Scoring) -> Tensor:
    """Scores [A, T] of predictions that come in blocks [images, alphas, T], for responses [images, T] of one fold.

    Raises:
        ValueError: "r2" is wanted and the responses of a neuron are constant within the fold.
    """
    error = torch.cat([(y[:, None] - block).square().sum(dim=0) for block in predictions])
    if scoring == "mse":
        return -error / len(y)
    total = spread(y)
    if bool((total == 0).any()):
        raise ValueError(
            f"responses of {int((total == 0).sum())} of {len(total)} neurons are constant within a fold of {len(y)} "
            'images, where R2 is undefined; use fewer folds, leave-one-out, or scoring="mse"'
        )
    return 1 - error / total


def assemble(
    *,
    responses: Matrix,
    usable: Tensor,
    weights: Tensor,
    intercept: Tensor,
    alpha: Tensor,
    scores: Tensor,
    alphas: Tensor,
    folds: Tensor,
    kind: str,
    scoring: Scoring,
) -> LinearModel:
    """The model of all neurons, from that of U usable ones: weights [U, P], scores [A, U], alphas [A] or [A, U]."""
    excluded = (~usable).nonzero()[:, 0]
    if len(excluded):
        raw = torch.as_tensor(responses).to(usable.device, torch.float64)
        raw = torch.where(torch.isfinite(raw), raw, torch.nan)
        mean = raw.nanmean(dim=0).nan_to_num(0.0)
        variance = (raw - mean).square().nanmean(dim=0).nan_to_num(0.0)

        def widen(values: Tensor, default: Tensor) -> Tensor:
            """[..., U] -> [..., T]"""
            wide = default.expand(*values.shape[:-1], len(usable)).clone()
            wide[..., usable] = values
            return wide

        weights = widen(weights.T, torch.zeros_like(mean)).T.contiguous()
        intercept = widen(intercept, mean)
        alpha = widen(alpha, torch.full_like(mean, torch.inf))
        scores = widen(scores, torch.zeros_like(mean) if scoring == "r2" else -variance)
        alphas = widen(alphas, torch.full_like(mean, torch.inf)) if alphas.ndim == 2 else alphas
    return LinearModel(
        weights=weights.contiguous(),
        intercept=intercept,
        alpha=alpha.clone(),
        scores=scores,
        alphas=alphas,
        folds=folds,
        excluded=excluded,
        kind=kind,
        scoring=scoring,
    )
