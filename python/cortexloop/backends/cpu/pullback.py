"""Derivative of the last map on the CPU: allocate the gradients, hand the addresses to C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import pullback


class PullbackOperators:
    """uint8 and float32 images in host memory."""

    def bank_pullback(self, images: Tensor, weights: Tensor, table: Tensor, cotangents: Tensor, layout: str) -> Tensor:
        grads = torch.empty(*cotangents.shape[:2], *images.shape[1:])
        pullback.bank_pullback(images, weights, table, cotangents, layout, grads)
        return grads
