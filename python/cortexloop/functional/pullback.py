"""The derivative of a model's last map with respect to images, for many cotangents at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexloop import _device, ops
from cortexloop.bank import ModelBank
from cortexloop.functional.bank import check_images
from cortexloop.packing import ModelField, padded


def pullback(
    images: Tensor, bank: ModelBank, cotangents: Tensor, *, layout: str = "NHWC", backend: str = "auto"
) -> Tensor:
    """J^T h: the gradient of sum(cotangent * last map) with respect to each image, for K cotangents of each.

    The last map is that of `activations(images, bank, depth - 1)`, after its ReLU. All cotangents of an image share one
    forward pass: a backward pass needs nothing of it but the signs of the pre-activations.

    Args:
        images: torch tensor as `responses` takes it, on the bank's device.
        bank: a bank of one model; its readout plays no part.
        cotangents: [B, K, h, w, C], float32 (float64 for float64 images).
        layout: of the images, "NHWC" or "NCHW".
        backend: "auto" takes the fastest that can run this; a name insists on it.

    Returns:
        [B, K, H, W, 3], or [B, K, 3, H, W]; the dtype of the cotangents, per grey level.

    Raises:
        TypeError, ValueError: as for `responses`; more than one model; cotangents of another shape, dtype or device.
        BackendError: the named backend cannot run this.

    Equivalent to (for each k):
        torch.autograd.grad((cotangents[:, k] * activations(images, bank, depth - 1)[0]).sum(), images)
    """
    tensor = check_images(images, bank, layout).detach()
    if len(bank) != 1:
        raise ValueError(f"the derivative of a map is that of one model; select one of the bank's {len(bank)}")
    height, width = bank.models[0].map_sizes()[-1]
    channels = bank.models[0].filters[-1]
    shape = (height, width, channels)
    if not isinstance(cotangents, Tensor):
        raise TypeError(f"cotangents should be a torch tensor, got {type(cotangents).__name__}")
    if cotangents.ndim != 5 or cotangents.shape[0] != len(tensor) or tuple(cotangents.shape[2:]) != shape:
        wanted = f"[{len(tensor)}, K, {height}, {width}, {channels}]"
        raise ValueError(f"cotangents should be {wanted}, got {list(cotangents.shape)}")
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if cotangents.dtype != dtype:
        raise TypeError(f"cotangents should be {dtype}, got {cotangents.dtype}")
    padding = padded(channels) - channels
    whole = F.pad(cotangents.detach(), (0, padding)) if padding else cotangents.detach()
    if _device.on_gpu(tensor.device) and backend == "auto":
        return _as_readouts(tensor, bank, whole, layout)
    result: Tensor = ops.bank_pullback(tensor, bank.weights, bank.table, whole.contiguous(), layout, backend)
    return result


def _as_readouts(images: Tensor, bank: ModelBank, cotangents: Tensor, layout: str) -> Tensor:
    """The same from `bank_input_gradient`, which GPUs have kernels for: each cotangent is a model's readout.

    The models share the sections of their layers in the packed buffer, so only the readouts are written; the forward
    pass is done for each of them.
    """
    batch, count = cotangents.shape[:2]
    start = padded(bank.weights.numel())
    gap = bank.weights.new_zeros(start - bank.weights.numel())
    weights = torch.cat([bank.weights, gap, cotangents.float().flatten()])
    table = bank.table.repeat(batch * count, 1)
    pairs = torch.arange(batch * count, device=images.device)
    table[:, ModelField.READOUT] = start + pairs * cotangents[0, 0].numel()
    shown = images.repeat_interleave(count, dim=0)
    ones = torch.ones(len(pairs), dtype=cotangents.dtype, device=images.device)
    grads, _ = ops.bank_input_gradient(shown, weights, table, pairs, ones, layout, "auto")
    result: Tensor = grads.view(batch, count, *images.shape[1:])
    return result
