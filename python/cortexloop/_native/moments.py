"""The wrapper of the running moments of features."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import _native

FEATURE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def feature_moments(
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
    """Let a batch join `mean`, `m2` (float64 [D]) and `cross` (float32 [T, D]); arguments as for `ops.feature_moments`.

    Raises:
        TypeError, ValueError: a tensor is not what the kernel can address.
    """
    images, columns = features.shape
    neurons = centred.shape[1]
    if features.dtype not in FEATURE_CODES:
        raise TypeError(f"features should be torch.float32, torch.float16 or torch.bfloat16, got {features.dtype}")
    f32, f64 = torch.float32, torch.float64
    _native.cpu().feature_moments(
        _native.pointer(features, "features", features.dtype, (images, columns)),
        FEATURE_CODES[features.dtype],
        0 if weights is None else _native.pointer(weights, "weights", f32, (images,)),
        _native.pointer(centred, "centred", f32, (images, neurons)),
        _native.pointer(shift, "shift", f32, (neurons,)),
        before,
        batch,
        images,
        columns,
        neurons,
        _native.pointer(mean, "mean", f64, (columns,)),
        _native.pointer(m2, "m2", f64, (columns,)),
        _native.pointer(cross, "cross", f32, (neurons, columns)),
    )
