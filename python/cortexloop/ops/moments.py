"""The operator that lets one batch of features join running moments; it writes to its last three arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cortexloop import _device
from cortexloop.backends.registry import Problem, select

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device) -> None:
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} should be {wanted}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} should be on {device} like the features, got {x.device}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} should have shape {list(shape)}, got {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name} should be contiguous, got strides {list(x.stride())}")


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
    backend: str = "auto",
) -> None:
    """Update `mean`, `m2` and `cross` with one batch, in place (Chan, Golub & LeVeque 1983).

    With xb the weighted mean of the batch, d = xb - mean and f = before * batch / (before + batch):

        cross += sum_i centred_i (x_i - xb) + f * shift * d
        m2    += sum_i w_i (x_i - xb)^2 + f * d^2
        mean  += d * batch / (before + batch)

    Every column of features is computed by itself in a fixed order: on a CPU, bits depend neither on threads nor on
    other columns. No gradients.

    Args:
        features: [B, D], B and D at least 1; float32, float16, bfloat16, or float64 (reference only); finite.
        weights: float32 [B], at least 0: the weight of each image, such as its number of trials. None: ones.
        centred: float32 [B, T], w_i * (y_i - weighted mean of y over this batch), of T responses y.
        shift: float32 [T], mean of y over this batch minus its mean over everything before.
        before, batch: total weight before, and of this batch (the sum of `weights`, more than 0).
        mean: float64 [D], weighted means so far.
        m2: float64 [D], weighted sums of squared deviations from the mean so far.
        cross: float32 [T, D], weighted sums of products of deviations so far.
        backend: "auto" or a name.

    Raises:
        TypeError, ValueError: a tensor that is not as described; it is named.
        BackendError: the backend named cannot run it.
    """
    if features.ndim != 2 or features.shape[0] < 1 or features.shape[1] < 1:
        raise ValueError(f"features should be [B, D] with B and D at least 1, got {list(features.shape)}")
    (images, columns), device = features.shape, features.device
    if centred.ndim != 2 or centred.shape[1] < 1:
        raise ValueError(f"centred should be [B, T] with T at least 1, got {list(centred.shape)}")
    neurons = centred.shape[1]
    f32, f64 = (torch.float32,), (torch.float64,)
    _check("features", features, FEATURE_DTYPES, (images, columns), device)
    if weights is not None:
        _check("weights", weights, f32, (images,), device)
    _check("centred", centred, f32, (images, neurons), device)
    _check("shift", shift, f32, (neurons,), device)
    _check("mean", mean, f64, (columns,), device)
    _check("m2", m2, f64, (columns,), device)
    _check("cross", cross, f32, (neurons, columns), device)
    if not (math.isfinite(before) and before >= 0):
        raise ValueError(f"before should be a weight of at least 0, got {before}")
    if not (math.isfinite(batch) and batch > 0):
        raise ValueError(f"batch should be a weight above 0, got {batch}")
    problem = Problem(
        op="feature_moments", device=device.type, index=_device.index(device), dtype=features.dtype, batch=images
    )
    select(problem, backend).feature_moments(features, weights, centred, shift, before, batch, mean, m2, cross)
