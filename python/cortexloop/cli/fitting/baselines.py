"""Readouts that factor models are compared with: penalized regressions on all features, reduced or not."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import regression

COMPONENTS = 300
"""Of PCA at most; never more than images to fit on."""


def predict_baseline(
    name: str, maps: Tensor, responses: Tensor, train: NDArray[np.int64], held: NDArray[np.int64], *, seed: int
) -> tuple[NDArray[np.float64], str]:
    """Fit one of `BASELINES` on `train` and predict `held`.

    Returns:
        Predictions [held, T], and what was done in words.
    """
    features = maps.flatten(1)
    rows, others = (torch.from_numpy(part).to(maps.device) for part in (train, held))
    x, z = features[rows], features[others]
    y = responses[torch.from_numpy(train)]
    if name in ("pca", "lasso"):
        components = min(COMPONENTS, len(train) - 1, x.shape[1])
        pca = regression.PCA(components).fit(x)
        x, z = pca.transform(x), pca.transform(z)
        what = f"{components} principal components of the images to fit on"
    elif name == "srp":
        projection = regression.SparseRandomProjection("auto", seed=seed).fit(x)
        x, z = projection.transform(x), projection.transform(z)
        what = f"{x.shape[1]:,} sparse random projections"
    else:
        what = f"all {x.shape[1]:,} features"
    if name == "lasso":
        model = regression.lasso(x, y, seed=seed)
        return _predicted(model, z), f"lasso on {what}, its strength by cross-validation"
    model = regression.ridge(x, y)
    return _predicted(model, z), f"ridge on {what}, its strength by leave-one-out"


def _predicted(model: regression.LinearModel, features: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = model.predict(features).double().cpu().numpy()
    return found
