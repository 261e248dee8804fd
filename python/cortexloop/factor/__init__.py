"""Factorized encoding models: where and what a neuron reads from the feature maps of a network (Wang & Ponce).

    moments = FeatureMoments(...)                          # streaming covariance of features and responses
    factors = factorize(threshold(moments).tensor, rank=3)  # masks [T, R, H, W], vectors [T, R, C]
    model = FactorModel.fit(source, images, responses, train=train)

May import: `functional`, `features`, `readouts`, `regression`, `metrics`, `io`, NumPy, torch.
"""

from __future__ import annotations

from cortexloop.factor.factorize import factorize, factorize_layers
from cortexloop.factor.factors import Factors

__all__ = ["Factors", "factorize", "factorize_layers"]
