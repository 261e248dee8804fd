"""`cortexloop::bank_forward` and `cortexloop::bank_input_gradient`: many models, many images, one call.

    images   [B, H, W, 3] ("NHWC") or [B, 3, H, W] ("NCHW"), contiguous; uint8 RGB 0..255, or recentred float32/float64
    weights  float32 [n], table int64 [N, fields]: a packed bank, constants
    pairs    int64 [B] or None: image i with model pairs[i] only
    result   float32 (float64 for float64 images) [B, N], or [B] with pairs

Checks that need values rather than shapes (`pairs` in range) live here, where tensors are real even if compiled.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cortexloop import _device
from cortexloop.backends.reference import BACKEND as REFERENCE
from cortexloop.backends.registry import Backend, BankShape, Problem, bank_shape, select
from cortexloop.ops._library import define_op


def problem(
    op: str,
    images: Tensor,
    bank: BankShape,
    *,
    layout: str = "NHWC",
    precision: str = "exact",
) -> Problem:
    """Describe a call for the backends."""
    return Problem(
        op=op,
        device=images.device.type,
        index=_device.index(images.device),
        dtype=images.dtype,
        batch=images.shape[0],
        layout=layout,
        precision=precision,
        bank=bank,
    )


_ranges: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()
_ranges_lock = threading.Lock()


def _check_range(pairs: Tensor, models: int) -> None:
    """Check that pairs, int64 [B], lie in a bank of so many models.

    On a GPU this has to wait for the values, so it is done once for each content of a tensor, and not while a graph is
    being captured. (An assertion on the device would not wait, but a failed one makes the whole process lose its GPU.)

    Raises:
        ValueError: a pair outside the bank.
    """
    if not len(pairs):
        return
    key = None
    if _device.on_gpu(pairs.device):
        if not pairs.is_inference():  # whose versions torch does not count
            key = pairs._version, models
            with _ranges_lock:
                if _ranges.get(pairs) == key:
                    return
        if _device.capturing(pairs.device):
            return
    low, high = torch.stack(torch.aminmax(pairs)).tolist()
    if not 0 <= low <= high < models:
        wrong = int(torch.nonzero((pairs < 0) | (pairs >= models))[0, 0])
        raise ValueError(
            f"pairs should lie in 0..{models - 1} (the bank has {models} models), "
            f"got {int(pairs[wrong])} for image {wrong}"
        )
    if key is not None:
        with _ranges_lock:
            _ranges[pairs] = key


def _select(
    op: str,
    images: Tensor,
    weights: Tensor,
    table: Tensor,
    pairs: Tensor | None,
    layout: str,
    precision: str,
    backend: str,
) -> Backend:
    """Check what every backend relies on, then choose one.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: wrong shapes, devices, options, or a pair outside the bank.
        BackendError: the named backend cannot run this.
    """
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'layout should be "NHWC" or "NCHW", got {layout!r}')
    if precision not in ("exact", "fast"):
        raise ValueError(f'precision should be "exact" or "fast", got {precision!r}')
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise TypeError(f"images should be torch.uint8, torch.float32 or torch.float64, got {images.dtype}")
    if weights.dtype != torch.float32 or weights.ndim != 1:
        raise TypeError(f"weights should be torch.float32 [n], got {weights.dtype} {list(weights.shape)}")
    bank = bank_shape(table)
    expected = (bank.height, bank.width, 3) if layout == "NHWC" else (3, bank.height, bank.width)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"images should be [B, {', '.join(map(str, expected))}] ({layout}), got {list(images.shape)}")
    for name, tensor in (("images", images), ("weights", weights), ("table", table), ("pairs", pairs)):
        if tensor is None:
            continue
        if tensor.device != images.device:
            raise ValueError(f"{name} should be on the device of the images, {images.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} should be contiguous, got strides {list(tensor.stride())}")
    if pairs is not None:
        if pairs.dtype != torch.int64:
            raise TypeError(f"pairs should be torch.int64, got {pairs.dtype}")
        if tuple(pairs.shape) != (images.shape[0],):
            raise ValueError(f"pairs should hold one model per image, [{images.shape[0]}], got {list(pairs.shape)}")
        _check_range(pairs, bank.models)
    return select(problem(op, images, bank, layout=layout, precision=precision), backend)


def evaluate_forward(
    images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str, backend: str
) -> Tensor:
    """The operator itself. NumPy callers take it directly: no graph follows them, and torch's dispatcher costs 8 us."""
    chosen = _select("bank_forward", images, weights, table, pairs, layout, precision, backend)
    return chosen.bank_forward(images, weights, table, pairs, layout, precision)


def _response_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def _forward_fake(
    images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str, backend: str
) -> Tensor:
    shape = (images.shape[0], table.shape[0]) if pairs is None else (images.shape[0],)
    return images.new_empty(shape, dtype=_response_dtype(images))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weights, table, pairs, ctx.layout, _, ctx.backend = inputs
    if weights.requires_grad:
        raise NotImplementedError(
            "the packed weights of a bank are constants without a derivative; "
            "train the module (cortexloop.models.CompactModel) and pack it again"
        )
    ctx.save_for_backward(images, weights, table, pairs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    images, weights, table, pairs = ctx.saved_tensors
    grad_images, _ = bank_input_gradient(images, weights, table, pairs, grad.contiguous(), ctx.layout, ctx.backend)
    return grad_images, None, None, None, None, None, None


def evaluate_gradient(
    images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str, backend: str
) -> tuple[Tensor, Tensor]:
    """The operator itself, as `evaluate_forward`."""
    chosen = _select("bank_input_gradient", images, weights, table, pairs, layout, "exact", backend)
    shape = (images.shape[0], table.shape[0]) if pairs is None else (images.shape[0],)
    if cotangent.dtype != _response_dtype(images):
        raise TypeError(f"cotangent should be {_response_dtype(images)}, got {cotangent.dtype}")
    if tuple(cotangent.shape) != shape or cotangent.device != images.device or not cotangent.is_contiguous():
        raise ValueError(
            f"cotangent should be a contiguous {list(shape)} tensor on {images.device}, "
            f"got {list(cotangent.shape)} with strides {list(cotangent.stride())} on {cotangent.device}"
        )
    return chosen.bank_input_gradient(images, weights, table, pairs, cotangent, layout)


def _gradient_fake(
    images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str, backend: str
) -> tuple[Tensor, Tensor]:
    grad = images.new_empty(images.shape, dtype=_response_dtype(images))
    return grad, images.new_empty(cotangent.shape, dtype=_response_dtype(images))


bank_input_gradient = define_op("bank_input_gradient", evaluate_gradient, fake=_gradient_fake)
bank_forward = define_op(
    "bank_forward", evaluate_forward, fake=_forward_fake, setup_context=_setup_context, backward=_backward
)


def bank_activations(
    images: Tensor, weights: Tensor, table: Tensor, layer: int, kind: str, layout: str
) -> list[Tensor]:
    """One map [B, h, w, C] per model, from the reference backend. For analysis; not an operator."""
    return [REFERENCE.bank_activations(images, weights, row, layer, kind, layout) for row in table.tolist()]
