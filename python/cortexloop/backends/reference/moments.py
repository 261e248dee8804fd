"""Streaming cross-moments of features and responses in plain torch: float64 inside, any device, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Features in float64 at a time: 32 MB, whatever the batch."""


class MomentOperators:
    """One batch joins running means, variances and covariances (Chan, Golub & LeVeque 1983)."""

    @torch.no_grad()
    def feature_moments(
        self,
        features: Tensor,
        weights: Tensor | None,
        centred: Tensor,
        shift: Tensor,
        before: float,
        batch: float,
        mean: Tensor,
        m2: Tensor,
        cross: Tensor,
    ) -> None:
        share = batch / (before + batch)
        factor = before * share
        responses = centred.double().mT
        jump = factor * shift.double()[:, None]
        w = None if weights is None else weights.double()
        columns = max(1, CHUNK // features.shape[0])
        for start in range(0, features.shape[1], columns):
            part = slice(start, start + columns)
            x = features[:, part].double()
            centre = (x.sum(0) if w is None else w @ x) / batch
            x -= centre
            d = centre - mean[part]
            cross[:, part] = (cross[:, part].double() + (responses @ x + jump * d)).float()
            squares = x.square()
            m2[part] += (squares.sum(0) if w is None else w @ squares) + factor * d.square()
            mean[part] += d * share
