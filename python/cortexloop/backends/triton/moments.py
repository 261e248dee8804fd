"""Streaming moments on a GPU by Triton: one launch per batch, which updates its arguments in place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cortexloop import _device
from cortexloop.backends.triton.launch import launch
from cortexloop.backends.triton.moments_kernel import _feature_moments_kernel

FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = {"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "BLOCK_NEURONS": 64}
"""16 KB of float32 features and responses a stage; 64 x 64 sums and as many of the chunk on 256 threads."""


def input_precision(device: torch.device) -> str:
    """How products are made: three of tf32 for one of float32 on NVIDIA's tensor cores, float32 itself elsewhere."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def halves(x: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is x to 2^-48: kernels get no float64 from the host."""
    high = float(np.float32(x))
    return high, float(np.float32(x - high))


def launch_config(dtype: torch.dtype) -> dict[str, int | bool]:
    """Block sizes and compiler options. A third stage needs more registers with 16-bit features than there are."""
    stages = 3 if dtype == torch.float32 else 2
    return {**BLOCKS, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}


def moments_unsupported(dtype: torch.dtype) -> str | None:
    """None where the kernel takes these features, else one sentence why not."""
    if dtype in FEATURE_DTYPES:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"the Triton kernels take float32, float16 and bfloat16 features, these are {name}"


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
    """Update `mean`, `m2` and `cross` in place; arguments as for `ops.feature_moments`."""
    images, columns = features.shape
    share = batch / (before + batch)
    sample = 1 << (min(images, BLOCKS["BLOCK_ROWS"]).bit_length() - 1)
    with _device.selected(features.device):
        launch(
            _feature_moments_kernel,
            -(-columns // BLOCKS["BLOCK_COLUMNS"]),
            *(features, centred if weights is None else weights, centred, shift, mean, m2, cross),
            *(images, columns, centred.shape[1], sample),
            *(*halves(batch), *halves(share), *halves(before * share)),
            WEIGHTED=weights is not None,
            INPUT_PRECISION=input_precision(features.device),
            **launch_config(features.dtype),
        )
