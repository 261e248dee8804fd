"""Readouts of feature maps: responses of many neurons at once, in one pass over the features."""

from __future__ import annotations

from typing import overload

import numpy as np
import torch
from torch import Tensor

from cortexloop import ops
from cortexloop.functional.bank import NumpyArray, as_tensor

_DTYPES = (torch.float32, torch.float64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(**arrays: NumpyArray | Tensor) -> list[Tensor]:
    """All arguments as contiguous tensors; the first are the features, whose kind, dtype and device the others share.

    Raises:
        TypeError: NumPy arrays and torch tensors mixed, or a wrong dtype.
        ValueError: different devices, or NaN or infinity in a NumPy array.
    """
    features = arrays["features"]
    tensors: list[Tensor] = []
    for name, array in arrays.items():
        if not isinstance(array, (np.ndarray, Tensor)):
            raise TypeError(f"{name} should be a NumPy array or a torch tensor, got {type(array).__name__}")
        if isinstance(array, Tensor) != isinstance(features, Tensor):
            raise TypeError(
                f"{name} should be of the kind of the features, {type(features).__name__}, got {type(array).__name__}"
            )
        if isinstance(array, np.ndarray):
            if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
                raise TypeError(f"{name} should be float32 or float64, got {array.dtype}; convert with .astype")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds NaN or infinity; exclude what they come from")
            array = as_tensor(array)
        if array.dtype not in _DTYPES:
            raise TypeError(f"{name} should be float32 or float64, got {_name(array.dtype)}; convert with .float()")
        if tensors and array.dtype != tensors[0].dtype:
            wanted = _name(tensors[0].dtype)
            raise TypeError(f"{name} should be {wanted} like the features, got {_name(array.dtype)}; convert one")
        if tensors and array.device != tensors[0].device:
            raise ValueError(f"{name} should be on {tensors[0].device} like the features, got {array.device}; move one")
        tensors.append(array.contiguous())
    return tensors


def _check_map(features: Tensor) -> None:
    shape = list(features.shape)
    if len(shape) == 3:
        raise ValueError(f"features should be [B, C, H, W], got {shape}; add a batch axis: features[None]")
    if len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(f"features should be [B, C, H, W] with C, H, W at least 1, got {shape}")


@overload
def factorized_readout(features: Tensor, masks: Tensor, vectors: Tensor, *, backend: str = "auto") -> Tensor: ...


@overload
def factorized_readout(
    features: NumpyArray, masks: NumpyArray, vectors: NumpyArray, *, backend: str = "auto"
) -> NumpyArray: ...


def factorized_readout(
    features: NumpyArray | Tensor,
    masks: NumpyArray | Tensor,
    vectors: NumpyArray | Tensor,
    *,
    backend: str = "auto",
) -> NumpyArray | Tensor:
    """Responses of neurons whose weights are sums of R outer products, mask x feature vector.

        response[b, t] = sum_r sum_c vectors[t, r, c] sum_hw masks[t, r, h, w] features[b, c, h, w]

    All neurons in one pass over the features; the weights [T, C, H, W] are never stored. Differentiable once in every
    argument; gradients that nobody asked for are not computed. Bits depend neither on the number of threads nor on the
    other images of the batch.

    Args:
        features: [B, C, H, W], float32, or float64 (computed by the reference backend). Arrays that are not contiguous
            are copied. NaN: an error in NumPy arrays; torch tensors are not inspected, NaN propagates.
        masks: [T, R, H, W], where neuron t looks. vectors: [T, R, C], what for. Kind and dtype of the features.
        backend: "auto" takes the fastest that can run this; a name insists on it.

    Returns:
        [B, T] of the features' kind and dtype.

    Raises:
        TypeError: NumPy and torch mixed, or a dtype that is not the features' or neither float32 nor float64.
        ValueError: wrong shapes or devices, or NaN in a NumPy array.
        BackendError: the named backend cannot run this.

    Warns:
        BackendWarning: "auto" fell through to a slower backend; once per distinct reason.

    Source: factors of a covariance, Wang & Ponce (2023); one factor, Klindt et al. (2017), and "mixing" and "spatial
    pool" of Cowley, Stan, Pillow & Smith.

    Equivalent to:
        torch.einsum("bchw,trhw,trc->bt", features, masks, vectors)
    """
    x, m, v = _tensors(features=features, masks=masks, vectors=vectors)
    _check_map(x)
    _, channels, height, width = x.shape
    if m.ndim != 4 or m.shape[1] < 1 or tuple(m.shape[2:]) != (height, width):
        raise ValueError(
            f"masks should be [T, R, {height}, {width}] (neurons, factors, and the map of the features), "
            f"got {list(m.shape)}"
        )
    if tuple(v.shape) != (*m.shape[:2], channels):
        raise ValueError(
            f"vectors should be {[*m.shape[:2], channels]} (neurons and factors of the masks, channels of the "
            f"features), got {list(v.shape)}"
        )
    result: Tensor = ops.factorized_readout(x, m, v, backend)
    return result if isinstance(features, Tensor) else result.numpy()


@overload
def point_readout(
    features: Tensor, positions: Tensor, vectors: Tensor, *, align_corners: bool = True, backend: str = "auto"
) -> Tensor: ...


@overload
def point_readout(
    features: NumpyArray,
    positions: NumpyArray,
    vectors: NumpyArray,
    *,
    align_corners: bool = True,
    backend: str = "auto",
) -> NumpyArray: ...


def point_readout(
    features: NumpyArray | Tensor,
    positions: NumpyArray | Tensor,
    vectors: NumpyArray | Tensor,
    *,
    align_corners: bool = True,
    backend: str = "auto",
) -> NumpyArray | Tensor:
    """Responses of neurons that each look at one point of the map, between pixels by bilinear interpolation.

        response[b, t] = sum_c vectors[t, c] features[b, c] at positions[(b,) t]

    Outside of the map there are zeros. Differentiable once in every argument; by a position, the derivative at the
    exact centre of a pixel is the one towards larger positions. Bits depend neither on threads nor on other images.

    Args:
        features: [B, C, H, W], as for `factorized_readout`.
        positions: [T, 2], or [B, T, 2] with a position for each image: (x, y), both -1 to 1 from left to right and from
            top to bottom; positions further out are allowed and find zeros.
        vectors: [T, C], the weight of each channel.
        align_corners: -1 and 1 are the centres of the outermost pixels (True, as published readouts have it), or their
            outer edges (False).
        backend: "auto" takes the fastest that can run this; a name insists on it.

    Returns:
        [B, T] of the features' kind and dtype.

    Raises, Warns: as `factorized_readout`.

    Source: Lurz et al. (2021), "Generalization in data-driven models of primary visual cortex".

    Equivalent to (positions [B, T, 2]):
        sampled = torch.nn.functional.grid_sample(features, positions[:, :, None], align_corners=align_corners)
        torch.einsum("bct,tc->bt", sampled[..., 0], vectors)
    """
    x, p, v = _tensors(features=features, positions=positions, vectors=vectors)
    _check_map(x)
    batch, channels = x.shape[:2]
    if v.ndim != 2 or v.shape[1] != channels:
        raise ValueError(f"vectors should be [T, {channels}] (neurons, channels of the features), got {list(v.shape)}")
    neurons = v.shape[0]
    if tuple(p.shape) not in ((neurons, 2), (batch, neurons, 2)):
        raise ValueError(
            f"positions should be [{neurons}, 2], or [{batch}, {neurons}, 2] with one set per image, "
            f"got {list(p.shape)}"
        )
    result: Tensor = ops.point_readout(x, p, v, align_corners, backend)
    return result if isinstance(features, Tensor) else result.numpy()
