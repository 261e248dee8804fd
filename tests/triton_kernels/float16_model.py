"""What the Triton kernels compute in fast precision, in plain torch: float16 wherever they round to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import cortexloop as cl
from cortexloop.backends.reference.bank import unpack
from cortexloop.backends.triton.layout import Scale
from cortexloop.backends.triton.plan import BankPlan

Tensor = torch.Tensor


def rounded(x: Tensor) -> Tensor:
    """To float16 and back; infinite beyond its range."""
    return x.half().float()


def float16_responses(images: Tensor, bank: cl.ModelBank) -> Tensor:
    """[B, N] from recentred float32 images [B, H, W, 3], with sums in float32."""
    scales = BankPlan(bank.table).scales(bank.weights)
    responses = []
    for n, row in enumerate(bank.table.tolist()):
        model = unpack(bank.weights, row, torch.float32)
        x = rounded(images.permute(0, 3, 1, 2).contiguous())
        for index, layer in enumerate(model.layers):
            scale = scales[n, index]
            mixing = layer.spatial if layer.pointwise is None else layer.pointwise
            weights = rounded(mixing * scale[Scale.WEIGHTS])
            if layer.pointwise is None:
                z = F.conv2d(layer.pad(x), weights, stride=layer.stride)
            else:
                z = F.conv2d(rounded(layer.convolve(x) * scale[Scale.SPREAD]), weights)
            z = z * scale[Scale.RESULT] + (layer.bias * scale[Scale.MAP])[:, None, None]
            x = rounded(F.relu(z))
        responses.append((x * model.readout).sum(dim=(1, 2, 3)) * scales[n, 0, Scale.LAST] + model.readout_bias)
    return torch.stack(responses, dim=1)
