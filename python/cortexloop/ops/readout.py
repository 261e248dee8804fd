"""Readouts of feature maps: `cortexloop::factorized_readout`, `cortexloop::point_readout`, and their gradients.

    features   [B, C, H, W]; all tensors contiguous, on one device, of one dtype: float32, or float64 (reference only)
    masks      [T, R, H, W], vectors [T, R, C]: neuron t weighs feature (c, h, w) by sum_r vectors * masks
    positions  [T, 2], or [B, T, 2] for one set per image: (x, y), each neuron's point in the map; vectors [T, C]
    result     [B, T]

The gradients are operators without a derivative of their own. Those not asked for are empty tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cortexloop import _device
from cortexloop.backends.registry import Backend, Gradients, Problem, select
from cortexloop.ops._library import define_op

Three = tuple[Tensor, Tensor, Tensor]


def _select(op: str, features: Tensor, others: dict[str, tuple[Tensor, tuple[int, ...]]], backend: str) -> Backend:
    """Check what every backend relies on, then choose one. `others`: the other tensors and their shapes.

    Raises:
        TypeError: tensors of different dtypes.
        ValueError: wrong shapes or devices, or a tensor that is not contiguous.
        BackendError: the named backend cannot run this.
    """
    for name, (x, shape) in {"features": (features, tuple(features.shape)), **others}.items():
        if x.dtype != features.dtype:
            raise TypeError(f"{name} should be {features.dtype} like the features, got {x.dtype}")
        if x.device != features.device:
            raise ValueError(f"{name} should be on {features.device} like the features, got {x.device}")
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} should be {list(shape)}, got {list(x.shape)}")
        if not x.is_contiguous():
            raise ValueError(f"{name} should be contiguous, got strides {list(x.stride())}")
    problem = Problem(
        op=op,
        device=features.device.type,
        index=_device.index(features.device),
        dtype=features.dtype,
        batch=features.shape[0],
    )
    return select(problem, backend)


def _check_map(features: Tensor) -> None:
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise ValueError(f"features should be [B, C, H, W] with C, H, W at least 1, got {list(features.shape)}")


def _select_factorized(
    features: Tensor, masks: Tensor, vectors: Tensor, backend: str, **more: tuple[Tensor, tuple[int, ...]]
) -> Backend:
    _check_map(features)
    if masks.ndim != 4 or masks.shape[1] < 1:
        raise ValueError(f"masks should be [T, R, H, W] with R at least 1, got {list(masks.shape)}")
    _, channels, height, width = features.shape
    neurons, rank = masks.shape[:2]
    others = {"masks": (masks, (neurons, rank, height, width)), "vectors": (vectors, (neurons, rank, channels))}
    return _select("factorized_readout", features, {**others, **more}, backend)


def _select_point(
    features: Tensor, positions: Tensor, vectors: Tensor, backend: str, **more: tuple[Tensor, tuple[int, ...]]
) -> Backend:
    _check_map(features)
    batch, channels = features.shape[:2]
    if vectors.ndim != 2:
        raise ValueError(f"vectors should be [T, C], got {list(vectors.shape)}")
    neurons = vectors.shape[0]
    shape = (neurons, 2) if positions.ndim == 2 else (batch, neurons, 2)
    others = {"vectors": (vectors, (neurons, channels)), "positions": (positions, shape)}
    return _select("point_readout", features, {**others, **more}, backend)


def _tensors(like: Tensor, gradients: Gradients) -> Three:
    """Gradients with an empty tensor in place of each that was not asked for."""
    first, second, third = (like.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return first, second, third


def _wanted_only(gradients: Three, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True))


def _empty_gradients(inputs: Three, wanted: tuple[bool, ...]) -> Three:
    first, second, third = (x.new_empty(x.shape if asked else (0,)) for x, asked in zip(inputs, wanted, strict=True))
    return first, second, third


# --- factorized readout -----------------------------------------------------------------------------------------------


def _factorized(features: Tensor, masks: Tensor, vectors: Tensor, backend: str = "auto") -> Tensor:
    return _select_factorized(features, masks, vectors, backend).factorized_readout(features, masks, vectors)


def _factorized_fake(features: Tensor, masks: Tensor, vectors: Tensor, backend: str = "auto") -> Tensor:
    return features.new_empty(features.shape[0], masks.shape[0])


def _factorized_gradient(
    features: Tensor,
    masks: Tensor,
    vectors: Tensor,
    cotangent: Tensor,
    for_features: bool,
    for_masks: bool,
    for_vectors: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (features.shape[0], masks.shape[0])
    chosen = _select_factorized(features, masks, vectors, backend, cotangent=(cotangent, shape))
    wanted = (for_features, for_masks, for_vectors)
    return _tensors(features, chosen.factorized_readout_gradient(features, masks, vectors, cotangent, wanted))


def _factorized_gradient_fake(
    features: Tensor,
    masks: Tensor,
    vectors: Tensor,
    cotangent: Tensor,
    for_features: bool,
    for_masks: bool,
    for_vectors: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients((features, masks, vectors), (for_features, for_masks, for_vectors))


factorized_readout_gradient = define_op(
    "factorized_readout_gradient", _factorized_gradient, fake=_factorized_gradient_fake
)


def _factorized_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _factorized_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(ctx.needs_input_grad[:3])
    gradients = factorized_readout_gradient(*ctx.saved_tensors, grad.contiguous(), *wanted, ctx.backend)
    return (*_wanted_only(gradients, wanted), None)


factorized_readout = define_op(
    "factorized_readout",
    _factorized,
    fake=_factorized_fake,
    setup_context=_factorized_context,
    backward=_factorized_backward,
)


# --- point readout ----------------------------------------------------------------------------------------------------


def _point(
    features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool = True, backend: str = "auto"
) -> Tensor:
    chosen = _select_point(features, positions, vectors, backend)
    return chosen.point_readout(features, positions, vectors, align_corners)


def _point_fake(
    features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool = True, backend: str = "auto"
) -> Tensor:
    return features.new_empty(features.shape[0], vectors.shape[0])


def _point_gradient(
    features: Tensor,
    positions: Tensor,
    vectors: Tensor,
    align_corners: bool,
    cotangent: Tensor,
    for_features: bool,
    for_positions: bool,
    for_vectors: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (features.shape[0], vectors.shape[0])
    chosen = _select_point(features, positions, vectors, backend, cotangent=(cotangent, shape))
    wanted = (for_features, for_positions, for_vectors)
    found = chosen.point_readout_gradient(features, positions, vectors, align_corners, cotangent, wanted)
    return _tensors(features, found)


def _point_gradient_fake(
    features: Tensor,
    positions: Tensor,
    vectors: Tensor,
    align_corners: bool,
    cotangent: Tensor,
    for_features: bool,
    for_positions: bool,
    for_vectors: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients((features, positions, vectors), (for_features, for_positions, for_vectors))


point_readout_gradient = define_op("point_readout_gradient", _point_gradient, fake=_point_gradient_fake)


def _point_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.align_corners, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _point_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(ctx.needs_input_grad[:3])
    cotangent = grad.contiguous()
    gradients = point_readout_gradient(*ctx.saved_tensors, ctx.align_corners, cotangent, *wanted, ctx.backend)
    return (*_wanted_only(gradients, wanted), None, None)


point_readout = define_op(
    "point_readout", _point, fake=_point_fake, setup_context=_point_context, backward=_point_backward
)
