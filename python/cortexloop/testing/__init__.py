"""What a new backend needs to prove itself: problems with exact answers, realistic problems, and the comparison.

May import: `functional`, `models`, `bank`, `packing`, `weights`.
"""

from __future__ import annotations

from cortexloop.testing.cases import CASES, LARGE_CASES, PAIRED_CASES, Case, ModelShape
from cortexloop.testing.compare import FACTOR, assert_matches_reference, error_ratio
from cortexloop.testing.problems import Inputs, exact_inputs, random_inputs, without_kinks
from cortexloop.testing.resnet import SmallResNet

__all__ = [
    "CASES",
    "FACTOR",
    "LARGE_CASES",
    "PAIRED_CASES",
    "Case",
    "Inputs",
    "ModelShape",
    "SmallResNet",
    "assert_matches_reference",
    "error_ratio",
    "exact_inputs",
    "random_inputs",
    "without_kinks",
]
