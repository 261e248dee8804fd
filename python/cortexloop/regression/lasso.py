"""Lasso of all neurons on shared features, whose products are formed once for each fold and not for each neuron.

Minimises |y - Xw - b|^2 / (2n) + alpha |w|_1 for every neuron and alpha, as scikit-learn does. Each neuron's path of
alphas starts where all weights are 0 and goes down from solution to solution.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import functional
from cortexloop.functional import LassoSets
from cortexloop.regression.data import Matrix, Unusable, as_alphas, as_pair, column_means
from cortexloop.regression.folds import Folds, assign_folds
from cortexloop.regression.model import LinearModel, Scoring
from cortexloop.regression.scoring import assemble, check_scoring, fold_scores

Form = Literal["auto", "gram", "columns"]
GRAM_LIMIT = 2**30
"""Bytes of Gram matrices that are held at the same time, and of the largest one that "auto" forms."""
GRAM_RATIO = 3
"""Features per image up to which "auto" forms Gram matrices: from there on, working sets of few features are faster."""
WEIGHTS_LIMIT = 2**28
"""Bytes of weights of one call: all neurons' paths are not kept at the same time."""
STEPS = 10
"""Alphas on the way to the chosen one, in the fit to all images."""


class ConvergenceWarning(UserWarning):
    """Some solutions are less exact than was asked for; the message says how many and how far off."""


@dataclass(frozen=True, eq=False)
class LassoPath:
    """Solutions for T neurons along A alphas, from all images.

    Attributes:
        weights: float64 [A, T, P]. intercept: float64 [A, T]. alphas: float64 [A, T], falling.
        gaps: float64 [A, T], duality gap / sum of squares of the centred responses. sweeps: int64 [A, T].
    """

    weights: Tensor
    intercept: Tensor
    alphas: Tensor
    gaps: Tensor
    sweeps: Tensor


def lasso(
    features: Matrix,
    responses: Matrix,
    alphas: Any = "auto",
    folds: Folds = 5,
    *,
    n_alphas: int = 100,
    eps: float = 1e-3,
    groups: NDArray[Any] | Tensor | None = None,
    seed: int = 0,
    tol: float = 1e-4,
    max_sweeps: int = 10000,
    form: Form = "auto",
    scoring: Scoring = "mse",
    unusable: Unusable = "error",
) -> LinearModel:
    """Fit all neurons; alpha of each by cross-validation, then weights from all images.

    Equivalent to one scikit-learn `LassoCV(alphas, cv=folds)` per neuron with the same folds.

    Args:
        features: [n, P], any floating dtype; computed with in float64. P may exceed n.
        responses: [n, T], one column per neuron.
        alphas: "auto": for each neuron `n_alphas` from the smallest that gives no weights, down to `eps` times that, at
            equal ratios; or a list for all neurons.
        folds: a number of folds, or the fold of each image [n].
        groups: [n], images of one group are held out together (with a number of folds).
        seed: of the folds.
        tol: a solution is done when its duality gap is at most tol * (sum of squares of the centred responses).
        max_sweeps: for each alpha; if they do not suffice, `ConvergenceWarning`.
        form: "gram" (products of all features, P * P numbers per fold), "columns" (products of the few in question and
            residuals; for P much larger than n), or "auto".
        scoring: "mse": mean over folds of the mean squared error, times -1; "r2": of the coefficient of determination.
        unusable: what to do about constant or NaN responses: "error", or "exclude" and list in `excluded`.

    Raises:
        TypeError: not arrays or tensors of numbers.
        ValueError: shapes that do not fit together, fewer than 2 images, values that are not finite, alphas that are
            not positive, unusable responses, features of which none varies, or an unknown option.
    """
    check_scoring(scoring)
    x, y, usable = as_pair(features, responses, unusable)
    held_out = assign_folds(len(x), folds, groups=groups, seed=seed)
    data = _Data(x, y[:, usable], form)
    grid = data.grid(alphas, n_alphas, eps)
    k = int(held_out.max()) + 1
    errors = torch.zeros(len(grid), data.neurons, dtype=torch.float64, device=x.device)
    counted = _Counted(tol)
    for train, block, path in data.solve(
        held_out.to(x.device) != torch.arange(k, device=x.device)[:, None], grid, tol, max_sweeps, counted
    ):
        errors[:, block] += data.scores(train, block, path.weights, scoring) / k
    alpha = torch.take_along_dim(grid, errors.argmax(dim=0)[None], dim=0)
    steps = torch.linspace(0, 1, STEPS, dtype=torch.float64, device=x.device)[:, None]
    down = torch.maximum(data.largest, alpha[0]) ** (1 - steps) * alpha**steps
    weights = torch.empty(data.neurons, data.features, dtype=torch.float64, device=x.device)
    everyone = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    for _, block, path in data.solve(everyone, down, tol, max_sweeps, counted):
        weights[block] = path.weights[-1]
    counted.warn()
    return assemble(
        responses=responses,
        usable=usable,
        weights=weights,
        intercept=data.response_means - weights @ data.means,
        alpha=alpha[0],
        scores=errors,
        alphas=grid,
        folds=held_out,
        kind="lasso",
        scoring=scoring,
    )


def lasso_path(
    features: Matrix,
    responses: Matrix,
    alphas: Any = "auto",
    *,
    n_alphas: int = 100,
    eps: float = 1e-3,
    tol: float = 1e-4,
    max_sweeps: int = 10000,
    form: Form = "auto",
) -> LassoPath:
    """Solutions of all neurons along their alphas, from all images. Arguments and errors as `lasso`.

    Weights of all alphas are kept: 8 A T P bytes.
    """
    x, y, _ = as_pair(features, responses, "error")
    data = _Data(x, y, form)
    grid = data.grid(alphas, n_alphas, eps)
    counted = _Counted(tol)
    everyone = torch.ones(1, len(x), dtype=torch.bool, device=x.device)
    parts = [path for _, _, path in data.solve(everyone, grid, tol, max_sweeps, counted)]
    counted.warn()
    weights = torch.cat([part.weights for part in parts], dim=1)
    return LassoPath(
        weights=weights,
        intercept=data.response_means - weights @ data.means,
        alphas=grid,
        gaps=torch.cat([part.gaps for part in parts], dim=1),
        sweeps=torch.cat([part.sweeps for part in parts], dim=1),
    )


class _Counted:
    """Solutions that stopped short, to be told of once."""

    def __init__(self, tol: float) -> None:
        self.tol, self.short, self.all, self.worst = tol, 0, 0, 0.0

    def add(self, gaps: Tensor) -> None:
        short = ~(gaps <= self.tol)  # also a NaN
        self.short += int(short.sum())
        self.all += gaps.numel()
        self.worst = max(self.worst, float(gaps.max()))

    def warn(self) -> None:
        if self.short:
            warnings.warn(
                f"{self.short} of {self.all} lasso solutions have a duality gap above tol = {self.tol:g}, the largest "
                f"is {self.worst:.3g} (relative to the responses' sum of squares); raise max_sweeps, tol or the alphas",
                ConvergenceWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class _Solved:
    """What `LassoPath` says, for some neurons and one training set."""

    weights: Tensor
    gaps: Tensor
    sweeps: Tensor


class _Data:
    """Centred features and responses, and the training sets made of them."""

    def __init__(self, x: Tensor, y: Tensor, form: Form) -> None:
        if form not in get_args(Form):
            raise ValueError(f"form should be one of {', '.join(map(repr, get_args(Form)))}, got {form!r}")
        self.raw, self.means, self.response_means = x, column_means(x), column_means(y)
        self.x, self.y = x.double() - self.means, y - self.response_means
        self.features, self.neurons = x.shape[1], y.shape[1]
        small = self.features <= GRAM_RATIO * len(x) and 8 * self.features**2 <= GRAM_LIMIT
        self.gram_form = form == "gram" or (form == "auto" and small)
        self.gram = self.x.T @ self.x if self.gram_form else None
        self.columns = None if self.gram_form else self.x.T.contiguous()
        self.cross = self.x.T @ self.y
        self.largest = self.cross.abs().amax(dim=0) / len(x)  # alphas from which on there are no weights
        if not bool((self.largest > 0).all()):
            raise ValueError("some responses are unrelated to every feature; do any features vary between images?")

    def grid(self, alphas: Any, n_alphas: int, eps: float) -> Tensor:
        """[A, T], falling."""
        if not isinstance(alphas, str):
            values = as_alphas(alphas).to(self.x.device).sort(descending=True).values
            return values[:, None].repeat(1, self.neurons)
        if alphas != "auto" or n_alphas < 1 or not 0 < eps < 1:
            raise ValueError(
                f'alphas should be "auto" with n_alphas >= 1 and eps between 0 and 1, or numbers, got {alphas!r}, '
                f"{n_alphas} and {eps}"
            )
        powers = torch.linspace(0, 1, n_alphas, dtype=torch.float64, device=self.x.device)
        return self.largest * eps ** powers[:, None]

    def solve(
        self, train: Tensor, grid: Tensor, tol: float, max_sweeps: int, counted: _Counted
    ) -> Iterator[tuple[Tensor, slice, _Solved]]:
        """Paths of all neurons on each training set, train bool [S, n]: (its mask, some neurons, their path)."""
        per_neuron = 8 * len(grid) * self.features
        some = max(1, min(self.neurons, WEIGHTS_LIMIT // per_neuron))
        together = max(1, WEIGHTS_LIMIT // (per_neuron * some))
        if self.gram_form:
            together = min(together, max(1, GRAM_LIMIT // (8 * self.features**2)))
        for masks in torch.split(train, together):
            sets, cross, squares, centred = self._sets(masks)
            for start in range(0, self.neurons, some):
                block = slice(start, min(start + some, self.neurons))
                t = block.stop - block.start
                penalties = masks.sum(dim=1)[:, None, None] * grid[:, block].T
                weights, gaps, sweeps = functional.lasso_path(
                    sets,
                    torch.arange(len(masks), device=masks.device).repeat_interleave(t),
                    cross[:, block].flatten(0, 1),
                    squares[:, block].flatten(),
                    penalties.flatten(0, 1),
                    None if self.gram_form else centred[:, block].flatten(0, 1),
                    tol=tol,
                    max_sweeps=max_sweeps,
                )
                counted.add(gaps)
                for i, mask in enumerate(masks):
                    rows = slice(i * t, (i + 1) * t)
                    yield mask, block, _Solved(weights[rows].transpose(0, 1), gaps[rows].T, sweeps[rows].T)

    def _sets(self, masks: Tensor) -> tuple[LassoSets, Tensor, Tensor, Tensor]:
        """Training sets, X'y [S, T, P], y'y [S, T], and centred responses [S, T, n]."""
        inside = masks.double()
        count = inside.sum(dim=1, keepdim=True)
        means, response_means = inside @ self.x / count, inside @ self.y / count
        centred = (self.y - response_means[:, None]) * inside[..., None]
        squares = centred.square().sum(dim=1)
        varies = torch.stack([(self.raw[mask] != self.raw[mask][:1]).any(dim=0) for mask in masks])
        cross = torch.where(varies[:, None], centred.mT @ self.x, 0.0)
        if self.gram is not None:
            gram = torch.empty(len(masks), *self.gram.shape, dtype=torch.float64, device=self.x.device)
            for i, mask in enumerate(masks):
                others = self.x[~mask]
                gram[i].copy_(self.gram).addmm_(others.T, others, alpha=-1)
                gram[i].addr_(means[i], means[i], alpha=-float(count[i]))
                gram[i, ~varies[i]] = 0
                gram[i, :, ~varies[i]] = 0
            return LassoSets(len(self.x), gram.diagonal(dim1=1, dim2=2).contiguous(), gram), cross, squares, centred.mT
        diagonal = torch.where(varies, inside @ self.x.square() - count * means.square(), 0.0)
        sets = LassoSets(len(self.x), diagonal, columns=self.columns, mask=inside, means=means)
        return sets, cross, squares, centred.mT

    def scores(self, train: Tensor, block: slice, weights: Tensor, scoring: Scoring) -> Tensor:
        """Scores [A, t] of weights [A, t, P] for the images that are not in the training set."""
        mean = self.x[train].mean(dim=0)
        x, y = self.x[~train] - mean, self.y[~train, block] - self.y[train, block].mean(dim=0)
        predictions = (x @ weights.flatten(0, 1).T).view(len(x), *weights.shape[:2])
        return fold_scores(y, [predictions], scoring)
