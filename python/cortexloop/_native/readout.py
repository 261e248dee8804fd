"""The wrappers of the readouts of feature maps; arguments as for `cortexloop.ops`, all float32 and contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import _native


def _address(x: Tensor, name: str, shape: tuple[int, ...]) -> int:
    return _native.pointer(x, name, torch.float32, shape)


def _wanted(x: Tensor | None, name: str, shape: tuple[int, ...]) -> int:
    return 0 if x is None else _address(x, name, shape)


def _factorized(features: Tensor, masks: Tensor, vectors: Tensor) -> tuple[int, ...]:
    batch, channels, height, width = features.shape
    neurons, rank = masks.shape[:2]
    return (
        _address(features, "features", (batch, channels, height, width)),
        batch,
        _address(masks, "masks", (neurons, rank, height, width)),
        _address(vectors, "vectors", (neurons, rank, channels)),
        neurons,
        rank,
        channels,
        height * width,
    )


def factorized_readout(features: Tensor, masks: Tensor, vectors: Tensor, out: Tensor) -> None:
    """Write the responses to `out` [B, T]."""
    shape = (features.shape[0], masks.shape[0])
    _native.cpu().factorized_readout(*_factorized(features, masks, vectors), _address(out, "out", shape))


def factorized_readout_gradient(
    features: Tensor,
    masks: Tensor,
    vectors: Tensor,
    cotangent: Tensor,
    grad_features: Tensor | None,
    grad_masks: Tensor | None,
    grad_vectors: Tensor | None,
) -> None:
    """Write the gradients of sum(cotangent * responses) to those that are given."""
    _native.cpu().factorized_readout_gradient(
        *_factorized(features, masks, vectors),
        _address(cotangent, "cotangent", (features.shape[0], masks.shape[0])),
        _wanted(grad_features, "grad_features", tuple(features.shape)),
        _wanted(grad_masks, "grad_masks", tuple(masks.shape)),
        _wanted(grad_vectors, "grad_vectors", tuple(vectors.shape)),
    )


def _point(features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool) -> tuple[int | bool, ...]:
    batch, channels, height, width = features.shape
    neurons, shared = vectors.shape[0], positions.ndim == 2
    return (
        _address(features, "features", (batch, channels, height, width)),
        batch,
        channels,
        height,
        width,
        _address(positions, "positions", (neurons, 2) if shared else (batch, neurons, 2)),
        shared,
        _address(vectors, "vectors", (neurons, channels)),
        neurons,
        align_corners,
    )


def point_readout(features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool, out: Tensor) -> None:
    """Write the responses to `out` [B, T]."""
    shape = (features.shape[0], vectors.shape[0])
    _native.cpu().point_readout(*_point(features, positions, vectors, align_corners), _address(out, "out", shape))


def point_readout_gradient(
    features: Tensor,
    positions: Tensor,
    vectors: Tensor,
    align_corners: bool,
    cotangent: Tensor,
    grad_features: Tensor | None,
    grad_positions: Tensor | None,
    grad_vectors: Tensor | None,
) -> None:
    """Write the gradients of sum(cotangent * responses) to those that are given."""
    _native.cpu().point_readout_gradient(
        *_point(features, positions, vectors, align_corners),
        _address(cotangent, "cotangent", (features.shape[0], vectors.shape[0])),
        _wanted(grad_features, "grad_features", tuple(features.shape)),
        _wanted(grad_positions, "grad_positions", tuple(positions.shape)),
        _wanted(grad_vectors, "grad_vectors", tuple(vectors.shape)),
    )
