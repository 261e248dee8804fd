"""Derivative of the last map in plain torch: one forward pass of each image, then all its cotangents at once."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop.backends.reference.bank import math_dtype, recentred, unpack


class PullbackOperators:
    """Images of any device, uint8, float32 or float64."""

    def bank_pullback(self, images: Tensor, weights: Tensor, table: Tensor, cotangents: Tensor, layout: str) -> Tensor:
        model = unpack(weights, table[0].tolist(), math_dtype(images))
        channels = model.readout.shape[0]
        grads = torch.empty(*cotangents.shape[:2], *images.shape[1:], dtype=cotangents.dtype, device=images.device)
        for image, rows, out in zip(images, cotangents, grads, strict=True):
            maps = model.maps(recentred(image[None], weights, layout))
            grad = rows[..., :channels].permute(0, 3, 1, 2).to(math_dtype(images))
            for layer, x, output in zip(reversed(model.layers), reversed(maps[:-1]), reversed(maps[1:]), strict=True):
                grad = layer.backward(grad, output, x.shape[2], x.shape[3])
            out.copy_(grad.permute(0, 2, 3, 1) if layout == "NHWC" else grad)
        return grads
