"""Responses, input gradients and activations of a model bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import _device, ops
from cortexloop.bank import ModelBank
from cortexloop.functional.pipeline import through_device
from cortexloop.packing import ModelField

NumpyArray = NDArray[Any]
Pairs = Sequence[int] | NumpyArray | Tensor
CHUNK = 256
"""NumPy images on their way to a GPU at a time."""

_IMAGE_DTYPES = (torch.uint8, torch.float32, torch.float64)


def as_tensor(array: NumpyArray) -> Tensor:
    """A tensor on the array's memory; a copy if it is read-only, not contiguous or not in native byte order."""
    dtype = array.dtype.newbyteorder("=")
    array = np.ascontiguousarray(array, dtype=dtype)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _check_numpy_images(images: NumpyArray) -> Tensor:
    if images.dtype.kind not in "uif" or images.dtype.itemsize > 8:
        raise TypeError(f"images should be uint8, float32 or float64, got {images.dtype}")
    if images.dtype.kind == "f" and images.ndim == 4:
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        if bad.size:
            raise ValueError(f"image {bad[0]} holds NaN or infinity ({bad.size} of {len(images)} images do)")
    if images.dtype.kind in "ui" and images.dtype != np.uint8:
        raise TypeError(_wrong_dtype(str(images.dtype)))
    return as_tensor(images)


def _wrong_dtype(name: str) -> str:
    advice = (
        "convert pixels 0..255 with .astype('uint8'), or recentre them yourself and give float32"
        if "int" in name
        else "convert to float32"
    )
    return f"images should be uint8 (RGB 0..255), or recentred float32 or float64, got {name}; {advice}"


def check_images(images: NumpyArray | Tensor, bank: ModelBank, layout: str) -> Tensor:
    """A contiguous tensor of images that the bank takes; arrays that are not contiguous are copied.

    NumPy arrays become tensors in host memory, wherever the bank is.

    Raises:
        TypeError: not an array, or a dtype that is neither pixels nor recentred values.
        ValueError: wrong layout or size, no batch axis, NaN in a NumPy array, or another device than the bank.
    """
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'layout should be "NHWC" or "NCHW", got {layout!r}')
    if not isinstance(images, (np.ndarray, Tensor)):
        raise TypeError(f"images should be a NumPy array or a torch tensor, got {type(images).__name__}")
    height, width = bank.height, bank.width
    expected = (height, width, 3) if layout == "NHWC" else (3, height, width)
    shape = tuple(images.shape)
    wanted = f"[B, {expected[0]}, {expected[1]}, {expected[2]}] for layout {layout!r}"
    if len(shape) == 3:
        raise ValueError(f"images should be {wanted}, got {list(shape)}; add a batch axis: images[None]")
    if len(shape) != 4:
        raise ValueError(f"images should be {wanted}, got {list(shape)}")
    if shape[1:] != expected:
        other = "NCHW" if layout == "NHWC" else "NHWC"
        swapped = (3, height, width) if layout == "NHWC" else (height, width, 3)
        channels = shape[3] if layout == "NHWC" else shape[1]
        if shape[1:] == swapped:
            advice = f'say layout="{other}"'
        elif channels == 3:
            size = shape[1:3] if layout == "NHWC" else shape[2:4]
            advice = (
                f"this is a bank of another input size: its models take {height} x {width} pixels, "
                f"these images have {size[0]} x {size[1]}"
            )
        else:
            advice = "expected three channels (R, G, B)"
        raise ValueError(f"images should be {wanted}, got {list(shape)}; {advice}")
    tensor = images if isinstance(images, Tensor) else _check_numpy_images(images)
    if tensor.dtype not in _IMAGE_DTYPES:
        raise TypeError(_wrong_dtype(str(tensor.dtype).removeprefix("torch.")))
    if isinstance(images, Tensor) and tensor.device != bank.device:
        raise ValueError(
            f"images are on {tensor.device}, the bank is on {bank.device}; "
            f"move one of them: bank.to({str(tensor.device)!r})"
        )
    return tensor.contiguous()


def _on_device(images: Tensor, bank: ModelBank) -> Tensor:
    """NumPy images where the bank is."""
    with _device.memory(bank.device, f"{len(images)} images"):
        return images.to(bank.device)


def check_pairs(pairs: Pairs | None, batch: int, bank: ModelBank) -> Tensor | None:
    """`pairs` as int64 [B] on the bank's device. That they lie in the bank is checked by the operator.

    Raises:
        TypeError: not integers.
        ValueError: not one per image.
    """
    if pairs is None:
        return None
    if isinstance(pairs, Tensor):
        if pairs.dtype == torch.bool or pairs.is_floating_point() or pairs.is_complex():
            raise TypeError(f"pairs should be integers (positions of models in the bank), got {pairs.dtype}")
        tensor = pairs.to(bank.device, torch.int64)
    else:
        array = np.asarray(pairs)
        if array.size == 0 and not isinstance(pairs, np.ndarray):
            array = array.astype(np.int64)  # an empty list has no integer type of its own
        if array.dtype.kind not in "iu":
            raise TypeError(f"pairs should be integers (positions of models in the bank), got {array.dtype}")
        tensor = torch.from_numpy(array.astype(np.int64)).to(bank.device)
    if tensor.ndim != 1 or tensor.shape[0] != batch:
        raise ValueError(f"pairs should hold one model position per image, [{batch}], got {list(tensor.shape)}")
    return tensor.contiguous()


@overload
def responses(
    images: Tensor,
    bank: ModelBank,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    precision: str = "exact",
    backend: str = "auto",
) -> Tensor: ...


@overload
def responses(
    images: NumpyArray,
    bank: ModelBank,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    precision: str = "exact",
    backend: str = "auto",
) -> NumpyArray: ...


def responses(
    images: NumpyArray | Tensor,
    bank: ModelBank,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    precision: str = "exact",
    backend: str = "auto",
) -> NumpyArray | Tensor:
    """Responses of every model of the bank to every image. Differentiable in float torch images.

    Args:
        images: [B, H, W, 3], or [B, 3, H, W] for layout "NCHW". uint8 is RGB 0..255 and recentred inside; float32 and
            float64 are recentred values already (about -116..155, see `recenter`) and are not checked for that.
            float64 is computed in float64 (by the reference backend). Arrays that are not contiguous, and read-only
            NumPy arrays, are copied. NaN: an error in a NumPy array; torch tensors are not inspected, NaN propagates.
        bank: N models; it has to be on the device of torch images. NumPy images are copied to the bank's device and
            the responses back, 256 images at a time while those before are computed (with pairs: all at once).
        pairs: [B] positions of models; image i is then shown to model pairs[i] only.
        layout: "NHWC" or "NCHW"; checked, never guessed.
        precision: "exact" (float32) or "fast" (reduced precision where the processor has it; see `explain`).
        backend: "auto" takes the fastest that can run this; a name insists on it.

    Returns:
        [B, N], or [B] with pairs, in the models' response units (published models: about z-scored). float32, or float64
        for float64 images. NumPy for NumPy, torch for torch.

    Raises:
        TypeError: images of another dtype, or pairs that are not integers.
        ValueError: wrong shape, layout, precision, device; NaN in a NumPy array; pairs outside the bank.
        BackendError: the named backend cannot run this.

    Warns:
        BackendWarning: "auto" fell through to a slower backend; once per distinct reason.

    Equivalent to (readable, unfused; `modules` are the bank's `cortexloop.models.CompactModel`):
        torch.stack([module(recenter(images)) for module in modules], dim=1)
    """
    tensor = check_images(images, bank, layout)
    index = check_pairs(pairs, tensor.shape[0], bank)

    def evaluate(x: Tensor) -> Tensor:
        return ops.evaluate_forward(x, bank.weights, bank.table, index, layout, precision, backend)

    if isinstance(images, Tensor):
        result: Tensor = ops.bank_forward(tensor, bank.weights, bank.table, index, layout, precision, backend)
        return result
    if tensor.device == bank.device:
        return evaluate(tensor).numpy()
    if index is not None or len(tensor) <= CHUNK:
        return evaluate(_on_device(tensor, bank)).cpu().numpy()
    return torch.cat(list(through_device(torch.split(tensor, CHUNK), evaluate, bank.device))).numpy()


def _check_cotangent(cotangent: NumpyArray | Tensor, shape: tuple[int, ...], images: Tensor) -> Tensor:
    if not isinstance(cotangent, (np.ndarray, Tensor)):
        raise TypeError(f"cotangent should be a NumPy array or a torch tensor, got {type(cotangent).__name__}")
    if tuple(cotangent.shape) != shape:
        what = "[B, N], one number per image and model" if len(shape) == 2 else "[B], one number per pair"
        raise ValueError(f"cotangent should be {list(shape)} ({what}), got {list(cotangent.shape)}")
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    tensor = cotangent if isinstance(cotangent, Tensor) else as_tensor(cotangent)
    if tensor.dtype != dtype:
        raise TypeError(
            f"cotangent should have the dtype of the responses, {str(dtype).removeprefix('torch.')}, "
            f"got {str(tensor.dtype).removeprefix('torch.')}"
        )
    if not isinstance(cotangent, Tensor):
        tensor = tensor.to(images.device)
    if tensor.device != images.device:
        raise ValueError(f"cotangent is on {tensor.device}, the images are on {images.device}")
    return tensor.contiguous()


@overload
def input_gradient(
    images: Tensor,
    bank: ModelBank,
    cotangent: Tensor,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    backend: str = "auto",
    return_responses: Literal[False] = False,
) -> Tensor: ...


@overload
def input_gradient(
    images: NumpyArray,
    bank: ModelBank,
    cotangent: NumpyArray,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    backend: str = "auto",
    return_responses: Literal[False] = False,
) -> NumpyArray: ...


@overload
def input_gradient(
    images: Tensor,
    bank: ModelBank,
    cotangent: Tensor,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    backend: str = "auto",
    return_responses: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def input_gradient(
    images: NumpyArray,
    bank: ModelBank,
    cotangent: NumpyArray,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    backend: str = "auto",
    return_responses: Literal[True],
) -> tuple[NumpyArray, NumpyArray]: ...


def input_gradient(
    images: NumpyArray | Tensor,
    bank: ModelBank,
    cotangent: NumpyArray | Tensor,
    *,
    pairs: Pairs | None = None,
    layout: str = "NHWC",
    backend: str = "auto",
    return_responses: bool = False,
) -> NumpyArray | Tensor | tuple[NumpyArray, NumpyArray] | tuple[Tensor, Tensor]:
    """d sum(cotangent * responses) / d images, in response units per grey level.

    Models whose cotangent is exactly 0 for an image cost nothing. The ReLU's derivative at 0 is 0. Always exact.

    Args:
        images, bank, pairs, layout, backend: as for `responses`; the images may be uint8.
        cotangent: [B, N], or [B] with pairs; float32 (float64 for float64 images), the kind of `images`.
        return_responses: also return the responses, which cost nothing extra.

    Returns:
        The gradient, shape of `images`, float32 (float64 for float64 images), or (gradient, responses). A constant:
        there is no second derivative.

    Raises:
        TypeError, ValueError: as for `responses`, or a cotangent of the wrong shape, dtype, kind or device.
        BackendError: the named backend cannot run this.

    Equivalent to:
        torch.autograd.grad((cotangent * responses(images, bank)).sum(), images)
    """
    if isinstance(images, Tensor) != isinstance(cotangent, Tensor):
        raise TypeError(
            f"images and cotangent should both be NumPy arrays or both torch tensors, "
            f"got {type(images).__name__} and {type(cotangent).__name__}"
        )
    tensor = _on_device(check_images(images, bank, layout), bank).detach()
    index = check_pairs(pairs, tensor.shape[0], bank)
    shape = (tensor.shape[0], len(bank)) if index is None else (tensor.shape[0],)
    weight = _check_cotangent(cotangent, shape, tensor).detach()
    gradient = ops.bank_input_gradient if isinstance(images, Tensor) else ops.evaluate_gradient
    grad, values = gradient(tensor, bank.weights, bank.table, index, weight, layout, backend)
    if not isinstance(images, Tensor):
        grad, values = grad.cpu().numpy(), values.cpu().numpy()
    return (grad, values) if return_responses else grad


@overload
def activations(
    images: Tensor, bank: ModelBank, layer: int, *, kind: str = "activity", layout: str = "NHWC"
) -> list[Tensor]: ...


@overload
def activations(
    images: NumpyArray, bank: ModelBank, layer: int, *, kind: str = "activity", layout: str = "NHWC"
) -> list[NumpyArray]: ...


def activations(
    images: NumpyArray | Tensor, bank: ModelBank, layer: int, *, kind: str = "activity", layout: str = "NHWC"
) -> list[NumpyArray] | list[Tensor]:
    """The maps of one layer of every model, for analysis (computed by the reference backend, an image at a time).

    Differentiable in float torch images; the ReLU's derivative at 0 is 0.

    Args:
        images, bank, layout: as for `responses`.
        layer: 0 is the first layer.
        kind: "activity" is the map after the ReLU; "depthwise" is the output of the depthwise convolution that feeds
            the layer's pointwise one, without bias (layers >= 1). Linear CKA between models (Kornblith et al. 2019, as
            used by Cowley et al.) takes "activity" of layer 0 and "depthwise" of the others.

    Returns:
        One array [B, h, w, C] per model, whatever the layout of the images; C differs from model to model. float32
        (float64 for float64 images). Memory: the result and one image's maps.

    Raises:
        ValueError: a model without that layer, "depthwise" of layer 0, or an unknown kind.
        TypeError, ValueError: as for `responses`.
    """
    tensor = _on_device(check_images(images, bank, layout), bank)
    if kind not in ("activity", "depthwise"):
        raise ValueError(f'kind should be "activity" or "depthwise", got {kind!r}')
    if layer < 0:
        raise ValueError(f"layer should be 0 or more, got {layer}")
    if layer == 0 and kind == "depthwise":
        raise ValueError('layer 0 is a full convolution without a depthwise part; ask for kind="activity"')
    for name, depth in zip(bank.names, bank.table[:, ModelField.DEPTH].tolist(), strict=True):
        if layer >= depth:
            raise ValueError(f"model {name!r} has {depth} layers (0..{depth - 1}), layer {layer} was asked for")
    maps = ops.bank_activations(tensor, bank.weights, bank.table, layer, kind, layout)
    return maps if isinstance(images, Tensor) else [m.cpu().numpy() for m in maps]
