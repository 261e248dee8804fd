"""Factorized encoding models: where and what a neuron reads from the feature maps of a network (Wang & Ponce).

    moments = FeatureMoments(...)                           # streaming covariance of features and responses
    factors = factorize(threshold(moments).tensor, rank=3)  # masks [T, R, H, W], vectors [T, R, C]
    model = FactorModel.fit(source, images, responses, train=train)

May import: `functional`, `features`, `readouts`, `regression`, `metrics`, `io`, NumPy, torch.
"""

from __future__ import annotations

from cortexloop.factor.baselines import Baseline
from cortexloop.factor.controls import (
    Control,
    channel_permutation,
    keep_only,
    mask_transplant,
    patch_shuffle,
    remove,
    sign_flip,
    target,
)
from cortexloop.factor.factorize import factorize, factorize_layers
from cortexloop.factor.factors import Factors
from cortexloop.factor.gaussian import Gaussians, fit_gaussians
from cortexloop.factor.images import OptimalImages, optimal_images
from cortexloop.factor.joint import JointFit, fit_joint
from cortexloop.factor.model import FactorModel
from cortexloop.factor.moments import FeatureMoments
from cortexloop.factor.nonlinearity import Softplus, fit_softplus
from cortexloop.factor.receptive import Agreement, back_projected, compare_fields, feature_field, overlap
from cortexloop.factor.scores import factor_features, mask_features, score, vector_features
from cortexloop.factor.thresholds import Thresholded, threshold

__all__ = [
    "Agreement",
    "Baseline",
    "Control",
    "FactorModel",
    "Factors",
    "FeatureMoments",
    "Gaussians",
    "JointFit",
    "OptimalImages",
    "Softplus",
    "Thresholded",
    "back_projected",
    "channel_permutation",
    "compare_fields",
    "factor_features",
    "factorize",
    "factorize_layers",
    "feature_field",
    "fit_gaussians",
    "fit_joint",
    "fit_softplus",
    "keep_only",
    "mask_features",
    "mask_transplant",
    "optimal_images",
    "overlap",
    "patch_shuffle",
    "remove",
    "score",
    "sign_flip",
    "target",
    "threshold",
    "vector_features",
]
