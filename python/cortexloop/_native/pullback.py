"""Wrapper of `_cpu.bank_pullback`."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import CPU, cpu, image_arguments, pointer


def bank_pullback(
    images: Tensor, weights: Tensor, table: Tensor, cotangents: Tensor, layout: str, grads: Tensor
) -> None:
    """Write d sum(cotangent * last map) / d images to `grads`, float32 [B, K, ...image].

    images: uint8 or float32; cotangents: float32 [B, K, h, w, padded C] of the one model's last map.
    """
    if images.device != CPU:
        raise ValueError(f"images should be on cpu, got {images.device}")
    n, fields = table.shape
    batch, count = cotangents.shape[:2]
    cpu().bank_pullback(
        *image_arguments(images, layout),
        pointer(weights, "weights", torch.float32, (weights.numel(),)),
        weights.numel(),
        pointer(table, "table", torch.int64, (n, fields)),
        n,
        fields,
        pointer(cotangents, "cotangents", torch.float32, (images.shape[0], *cotangents.shape[1:])),
        count,
        pointer(grads, "grads", torch.float32, (batch, count, *images.shape[1:])),
    )
