"""`cortexloop::bank_pullback`: the derivative of one model's last map, for many cotangents of each image.

images      [B, H, W, 3] ("NHWC") or [B, 3, H, W] ("NCHW"), contiguous; uint8 RGB 0..255, or recentred float
weights     float32 [n], table int64 [1, fields]: a packed bank of one model, constants
cotangents  [B, K, h, w, Cp], float32 (float64 for float64 images), contiguous; Cp is C rounded up as it is packed
result      [B, K, ...image], the dtype of the cotangents
"""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop.backends.registry import bank_shape, select
from cortexloop.ops._library import define_op
from cortexloop.ops.bank import problem
from cortexloop.packing import LayerField, ModelField, layer_fields, padded


def _pullback(images: Tensor, weights: Tensor, table: Tensor, cotangents: Tensor, layout: str, backend: str) -> Tensor:
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'layout should be "NHWC" or "NCHW", got {layout!r}')
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise TypeError(f"images should be torch.uint8, torch.float32 or torch.float64, got {images.dtype}")
    bank = bank_shape(table)
    if bank.models != 1:
        raise ValueError(f"the derivative of a map is that of one model, got a bank of {bank.models}")
    expected = (bank.height, bank.width, 3) if layout == "NHWC" else (3, bank.height, bank.width)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"images should be [B, {', '.join(map(str, expected))}] ({layout}), got {list(images.shape)}")
    row = table[0].tolist()
    last = layer_fields(row, row[ModelField.DEPTH] - 1)
    f = LayerField
    maps = (last[f.OUT_HEIGHT], last[f.OUT_WIDTH], padded(last[f.OUT_CHANNELS]))
    if cotangents.ndim != 5 or cotangents.shape[0] != images.shape[0] or tuple(cotangents.shape[2:]) != maps:
        wanted = f"[{images.shape[0]}, K, {', '.join(map(str, maps))}]"
        raise ValueError(f"cotangents should be {wanted}, got {list(cotangents.shape)}")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    if cotangents.dtype != dtype:
        raise TypeError(f"cotangents should be {dtype}, got {cotangents.dtype}")
    for name, tensor in (("images", images), ("weights", weights), ("table", table), ("cotangents", cotangents)):
        if tensor.device != images.device:
            raise ValueError(f"{name} should be on the device of the images, {images.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} should be contiguous, got strides {list(tensor.stride())}")
    chosen = select(problem("bank_pullback", images, bank, layout=layout), backend)
    return chosen.bank_pullback(images, weights, table, cotangents, layout)


def _fake(images: Tensor, weights: Tensor, table: Tensor, cotangents: Tensor, layout: str, backend: str) -> Tensor:
    return cotangents.new_empty(*cotangents.shape[:2], *images.shape[1:])


bank_pullback = define_op("bank_pullback", _pullback, fake=_fake)
