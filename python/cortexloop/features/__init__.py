"""Features of images: a layer of any torch module, or of one model of a bank, as a `FeatureSource`.

    source = features.ModuleFeatures(resnet, "layer3.5", preprocess=features.Preprocess.imagenet(224))
    maps = source(images)                                   # uint8 [B, 224, 224, 3] -> float32 [B, C, h, w]

May import: `functional` and leaves; torch and NumPy.
"""

from __future__ import annotations

from cortexloop.features.bank import BankFeatures
from cortexloop.features.base import FeatureSource, Linearization
from cortexloop.features.checkpoints import load_robust_checkpoint
from cortexloop.features.layers import find_layer
from cortexloop.features.module import ModuleFeatures
from cortexloop.features.preprocess import Preprocess

__all__ = [
    "BankFeatures",
    "FeatureSource",
    "Linearization",
    "ModuleFeatures",
    "Preprocess",
    "find_layer",
    "load_robust_checkpoint",
]
