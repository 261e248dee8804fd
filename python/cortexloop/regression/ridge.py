"""Ridge regression of all neurons on shared features, alpha by leave-one-out or folds, one eigendecomposition for each.

Minimises |y - Xw - b|^2 + alpha |w|^2 for every neuron. With the centred features' Gram matrix X'X = V L V' (primal,
[P, P]) or kernel XX' = U L U' (dual, [n, n]), whichever is smaller, every alpha and neuron is a column of one product.
Leave-one-out residuals in closed form: Allen's PRESS (1974); Golub, Heath & Wahba (1979).
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.regression.data import Matrix, Unusable, as_alphas, as_pair
from cortexloop.regression.folds import Folds, assign_folds
from cortexloop.regression.model import LinearModel, Scoring
from cortexloop.regression.scoring import assemble, check_scoring, fold_scores, spread
from cortexloop.regression.spectra import spectrum

ALPHAS = tuple(10.0**k for k in range(-4, 6))


def ridge(
    features: Matrix,
    responses: Matrix,
    alphas: Any = ALPHAS,
    folds: Folds | None = None,
    *,
    groups: NDArray[Any] | Tensor | None = None,
    seed: int = 0,
    per_target_alpha: bool = True,
    standardize: bool = False,
    scoring: Scoring = "r2",
    unusable: Unusable = "error",
) -> LinearModel:
    """Fit all neurons; alpha by cross-validation, then weights from all images.

    Equivalent to scikit-learn's `RidgeCV(alphas, alpha_per_target=True)` without folds, and to one
    `GridSearchCV(Ridge(), {"alpha": alphas})` per neuron with the same folds.

    Args:
        features: [n, P], any floating dtype; computed with in float64, on their device. P may exceed n.
        responses: [n, T], one column per neuron.
        alphas: positive regularisation strengths to choose from; the first of equally good ones is taken.
        folds: None for leave-one-out in closed form; a number of folds; or the fold of each image [n].
        groups: [n], images of one group are held out together (with a number of folds).
        seed: of the folds.
        per_target_alpha: each neuron has its own alpha; else all have the one with the best mean score.
        standardize: divide features by their standard deviation over the images of each fit (constant ones stay; in
            leave-one-out, over all images). The weights returned are for features as given.
        scoring: "r2": mean over folds of the coefficient of determination; "mse": of the mean squared error, times -1.
            (Leave-one-out: of all images together; the choice of each neuron's alpha is the same.)
        unusable: what to do about constant or NaN responses: "error", or "exclude" and list in `excluded`.

    Raises:
        TypeError: not arrays or tensors of numbers.
        ValueError: shapes that do not fit together, fewer than 2 images, values that are not finite, alphas that are
            not positive, unusable responses, groups without folds, or responses that are constant within a fold.
    """
    check_scoring(scoring)
    x, y, usable = as_pair(features, responses, unusable)
    grid = as_alphas(alphas).to(x.device)
    if folds is None and groups is not None:
        raise ValueError("groups are held out together, leave-one-out would split them; say folds=5 or another number")
    used = y[:, usable]
    whole = spectrum(x, used, standardize)
    if folds is None:
        held_out = torch.empty(0, dtype=torch.int64)
        scores = whole.leave_one_out(grid)
        scores = 1 - scores * len(x) / spread(used) if scoring == "r2" else -scores
    else:
        held_out = assign_folds(len(x), folds, groups=groups, seed=seed)
        scores = torch.stack(
            [
                fold_scores(used[test], whole.without(test).predictions(grid), scoring)
                for test in (held_out == f for f in range(int(held_out.max()) + 1))
            ]
        ).mean(dim=0)
    compared = scores if per_target_alpha else scores.mean(dim=1, keepdim=True)
    alpha = grid[compared.argmax(dim=0)].expand(used.shape[1])
    weights = whole.weights(alpha)
    return assemble(
        responses=responses,
        usable=usable,
        weights=weights,
        intercept=whole.intercept(weights),
        alpha=alpha,
        scores=scores,
        alphas=grid,
        folds=held_out,
        kind="ridge",
        scoring=scoring,
    )
