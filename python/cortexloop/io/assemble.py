"""From named arrays in Keras' layouts to a validated `CompactWeights`: what all published formats have in common."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.weights import (
    BATCH_NORM_EPSILON,
    IMAGE_MEAN,
    STRIDES,
    CompactWeights,
    LayerWeights,
    same_padding,
)

PUBLISHED_STRIDES = (1, 2, 2, 1, 1)
PUBLISHED_SIZE = (112, 112)
MAX_DEPTH = 64
NORM_NAMES = ("gamma", "beta", "moving_mean", "moving_variance")


@dataclass(frozen=True)
class Geometry:
    """What most published formats leave out. None: the published value, or deduced from the size of the readout."""

    strides: tuple[int, ...] | None = None
    input_size: tuple[int, int] | None = None
    epsilons: tuple[float, ...] | None = None


def layer_keys(depth: int) -> list[list[str]]:
    """Tensor names of each layer in Keras' `get_weights()` order, then of the readout."""
    full = ["kernel", "bias", *NORM_NAMES]
    separable = ["depthwise_kernel", "pointwise_kernel", "bias", *NORM_NAMES]
    layers = [[f"layer{i}/{key}" for key in (separable if i else full)] for i in range(depth)]
    return [*layers, ["readout/kernel", "readout/bias"]]


def depth_of(names: Sequence[str] | Mapping[str, Any]) -> int:
    """Number of layers among tensor names such as `layer0/bias`; ValueError if there is none or far too many."""
    present = set(names)
    depth = next(i for i in itertools.count() if f"layer{i}/bias" not in present or i > MAX_DEPTH)
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"a model should have 1 to {MAX_DEPTH} layers named layer0, layer1, ..., got {depth}")
    return depth


def layers_from_tensors(
    tensors: Mapping[str, NDArray[Any]], strides: Sequence[int], epsilons: Sequence[float]
) -> tuple[LayerWeights, ...]:
    """Layers from Keras-layout tensors `layer<i>/<tensor>`: kernels HWIO, depthwise [k, k, C, 1].

    Raises:
        ValueError: a tensor is missing or has another number of dimensions or another type.
    """
    layers = []
    for i, (stride, epsilon) in enumerate(zip(strides, epsilons, strict=True)):
        arrays: dict[str, Any] = {
            name: float_tensor(tensors, f"layer{i}/{key}")
            for name, key in (("bias", "bias"), *zip(("gamma", "beta", "mean", "variance"), NORM_NAMES, strict=True))
        }
        if i == 0:
            arrays["kernel"] = float_tensor(tensors, "layer0/kernel")
        else:
            arrays["depthwise"] = drop_axes(tensors, f"layer{i}/depthwise_kernel", (3,))
            arrays["pointwise"] = drop_axes(tensors, f"layer{i}/pointwise_kernel", (0, 1))
        layers.append(LayerWeights(stride=stride, epsilon=epsilon, **arrays))
    return tuple(layers)


def compact_from_tensors(name: str, tensors: Mapping[str, NDArray[Any]], geometry: Geometry) -> CompactWeights:
    """A compact model from Keras-layout tensors; strides and input size as in `geometry`, or published, or deduced.

    Raises:
        ValueError: tensors are missing or do not fit together, or the strides cannot be told from the readout.
    """
    depth = depth_of(tensors)
    known = {key for keys in layer_keys(depth) for key in keys}
    unknown = sorted(set(tensors) - known - {"nums_filters"})
    if unknown:
        raise ValueError(f"model {name!r} has a tensor {unknown[0]!r}, which is not part of a compact model")
    epsilons = geometry.epsilons or (BATCH_NORM_EPSILON,) * depth
    trial = layers_from_tensors(tensors, (1,) * depth, epsilons)
    kernel = float_tensor(tensors, "readout/kernel")
    bias = float_tensor(tensors, "readout/bias")
    channels = trial[-1].bias.shape[0] if trial[-1].bias.ndim == 1 else 0
    if kernel.ndim != 2 or kernel.shape[1] != 1 or channels == 0 or kernel.shape[0] % channels or not kernel.size:
        raise ValueError(
            f"model {name!r}: readout kernel should be [height * width * {channels}, 1], got {kernel.shape}"
        )
    if bias.shape != (1,):
        raise ValueError(f"model {name!r}: readout bias should be (1,), got {bias.shape}")
    size = geometry.input_size or PUBLISHED_SIZE
    strides = _choose_strides(name, geometry.strides, depth, size, kernel.shape[0] // channels)
    layers = layers_from_tensors(tensors, strides, epsilons)
    h, w = _map_size(size, strides)
    return CompactWeights(
        name=name,
        layers=layers,
        readout=kernel.reshape(h, w, channels),
        readout_bias=float(bias[0]),
        height=size[0],
        width=size[1],
        image_mean=IMAGE_MEAN,
    ).validate()


def _map_size(size: tuple[int, int], strides: Sequence[int]) -> tuple[int, int]:
    """Size of the last map; with "same" padding it depends on the strides alone."""
    h, w = size
    for stride in strides:
        h, w = same_padding(h, 1, stride)[0], same_padding(w, 1, stride)[0]
    return h, w


def _choose_strides(
    name: str, given: tuple[int, ...] | None, depth: int, size: tuple[int, int], positions: int
) -> tuple[int, ...]:
    """The given strides, or the published ones if they fit, or the only ones whose last map has `positions` places."""
    where = f"model {name!r}, for images of {size[0]} x {size[1]}"
    if given is not None:
        if len(given) != depth or any(stride not in STRIDES for stride in given):
            raise ValueError(f"{where}: strides should be {depth} numbers among {STRIDES}, got {given}")
        if math.prod(_map_size(size, given)) != positions:
            h, w = _map_size(size, given)
            raise ValueError(
                f"{where}: strides {given} give a map of {h} x {w}, but the readout has {positions} "
                "positions; give the strides and input_size that the model was made for"
            )
        return given
    if depth == len(PUBLISHED_STRIDES) and math.prod(_map_size(size, PUBLISHED_STRIDES)) == positions:
        return PUBLISHED_STRIDES
    fitting = [m for m in range(depth + 1) if math.prod(_map_size(size, (2,) * m)) == positions]
    if not fitting:
        raise ValueError(f"{where}: no strides give the readout's {positions} positions; give input_size")
    if fitting in ([0], [depth]):
        return (2 if fitting[0] else 1,) * depth
    raise ValueError(f"{where}: the file does not tell the strides of its {depth} layers; give strides")


def float_tensor(tensors: Mapping[str, NDArray[Any]], key: str) -> NDArray[np.floating]:
    """A float32 or float64 tensor; ValueError if it is not there or of another type."""
    if key not in tensors:
        raise ValueError(f"the tensor {key!r} is missing")
    tensor = tensors[key]
    if tensor.dtype not in (np.float32, np.float64):
        raise ValueError(f"the tensor {key!r} should be float32 or float64, got {tensor.dtype}")
    return tensor


def drop_axes(tensors: Mapping[str, NDArray[Any]], key: str, axes: tuple[int, ...]) -> NDArray[np.floating]:
    """A four-dimensional tensor without its axes of length one; ValueError if it has another shape."""
    tensor = float_tensor(tensors, key)
    if tensor.ndim != 4 or any(tensor.shape[axis] != 1 for axis in axes):
        raise ValueError(f"the tensor {key!r} should have 4 axes, axis {axes} of length 1, got {tensor.shape}")
    return tensor.squeeze(axes)
