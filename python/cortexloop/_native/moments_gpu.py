"""The wrapper of `_cuda.feature_moments`: checked device pointers."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import _device, _native
from cortexloop._native import pointer
from cortexloop._native.moments import FEATURE_CODES


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
    """Update `mean`, `m2` (float64 [D]) and `cross` (float32 [T, D]) in place, on the current stream; does not wait.

    features: float32, float16 or bfloat16 [B, D]; weights: float32 [B]; centred: float32 [B, T]; shift: float32 [T].
    All on one device.
    """
    (images, columns), neurons, device = features.shape, centred.shape[1], features.device
    if features.dtype not in FEATURE_CODES:
        raise TypeError(f"features should be torch.float32, torch.float16 or torch.bfloat16, got {features.dtype}")
    _native.cuda().feature_moments(
        pointer(features, "features", features.dtype, (images, columns), device),
        FEATURE_CODES[features.dtype],
        0 if weights is None else pointer(weights, "weights", torch.float32, (images,), device),
        pointer(centred, "centred", torch.float32, (images, neurons), device),
        pointer(shift, "shift", torch.float32, (neurons,), device),
        before,
        batch,
        images,
        columns,
        neurons,
        pointer(mean, "mean", torch.float64, (columns,), device),
        pointer(m2, "m2", torch.float64, (columns,), device),
        pointer(cross, "cross", torch.float32, (neurons, columns), device),
        _device.index(device),
        _device.stream_address(device),
    )
