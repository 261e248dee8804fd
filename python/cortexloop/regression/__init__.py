"""Linear readouts of features, fitted for all neurons together: Ridge, Lasso, and what makes features fewer.

    model = ridge(features, responses)              # [n, P], [n, T] -> LinearModel; alphas by leave-one-out
    model = lasso(features, responses, folds=5)
    fewer = PCA(750).fit(features).transform(features)

Computations run on the features' device in float64. May import: `functional`, torch.
"""

from __future__ import annotations

from cortexloop.regression.folds import assign_folds
from cortexloop.regression.lasso import ConvergenceWarning, LassoPath, lasso, lasso_path
from cortexloop.regression.model import LinearModel
from cortexloop.regression.pca import PCA
from cortexloop.regression.projection import SparseRandomProjection, johnson_lindenstrauss
from cortexloop.regression.ridge import ridge

__all__ = [
    "PCA",
    "ConvergenceWarning",
    "LassoPath",
    "LinearModel",
    "SparseRandomProjection",
    "assign_folds",
    "johnson_lindenstrauss",
    "lasso",
    "lasso_path",
    "ridge",
]
