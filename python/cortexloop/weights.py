"""The parameters of one compact model as plain NumPy arrays: the form that readers produce and banks pack.

A leaf: it imports NumPy and nothing of cortexloop, so that every folder may use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_MEAN: tuple[float, float, float] = (116.222, 109.270, 100.381)
"""RGB mean (R, G, B; 0..255) subtracted from every pixel: the only preprocessing of the published compact models."""

BATCH_NORM_EPSILON = 1e-3
"""Epsilon of every batch normalisation in the published models (Keras' default, not PyTorch's)."""

KERNEL_SIZES = (1, 3, 5, 7)
STRIDES = (1, 2)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int, int]:
    """TensorFlow's "same" padding of one axis: (output size, zeros before, zeros after)."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return out, total // 2, total - total // 2


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Convolution, batch normalisation and ReLU of one layer. All arrays are float32 (or float64) and never written.

    The first layer of a model is a full convolution (`kernel`), every other is separable (`depthwise`, `pointwise`).
    """

    stride: int
    epsilon: float
    bias: NDArray[np.floating]  # [C_out], added before batch normalisation
    gamma: NDArray[np.floating]  # [C_out]
    beta: NDArray[np.floating]  # [C_out]
    mean: NDArray[np.floating]  # [C_out], moving mean
    variance: NDArray[np.floating]  # [C_out], moving variance
    kernel: NDArray[np.floating] | None = None  # [k, k, 3, C_out], first layer only
    depthwise: NDArray[np.floating] | None = None  # [k, k, C_in], other layers
    pointwise: NDArray[np.floating] | None = None  # [C_in, C_out], other layers

    @property
    def kernel_size(self) -> int:
        spatial = self.kernel if self.kernel is not None else self.depthwise
        assert spatial is not None
        return int(spatial.shape[0])

    @property
    def in_channels(self) -> int:
        spatial = self.kernel if self.kernel is not None else self.depthwise
        assert spatial is not None
        return int(spatial.shape[2])

    @property
    def out_channels(self) -> int:
        return int(self.bias.shape[0])


@dataclass(frozen=True, eq=False)
class CompactWeights:
    """One compact model: layers of convolution + batch normalisation + ReLU, then a linear readout of the last map.

    Source: Cowley, Stan, Pillow & Smith, "Compact deep neural network models of visual cortex".

    Raises:
        ValueError: from `validate()`, which every reader calls, naming the tensor, the expected and the given shape.
    """

    name: str
    layers: tuple[LayerWeights, ...]
    readout: NDArray[np.floating]  # [H_last, W_last, C_last]
    readout_bias: float
    height: int = 112
    width: int = 112
    image_mean: tuple[float, float, float] = IMAGE_MEAN

    @property
    def filters(self) -> tuple[int, ...]:
        """Number of filters of each layer, [K0, K1, ...]."""
        return tuple(layer.out_channels for layer in self.layers)

    def map_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each layer's output map."""
        sizes = []
        h, w = self.height, self.width
        for layer in self.layers:
            h = same_padding(h, layer.kernel_size, layer.stride)[0]
            w = same_padding(w, layer.kernel_size, layer.stride)[0]
            sizes.append((h, w))
        return sizes

    def validate(self) -> CompactWeights:
        """Check every shape and that every number is finite; return self."""

        def fail(what: str, expected: object, got: object) -> None:
            raise ValueError(f"model {self.name!r}: {what} should be {expected}, got {got}")

        if not self.layers:
            fail("number of layers", "at least 1", 0)
        if self.height < 1 or self.width < 1:
            fail("input size", "at least 1 x 1", f"{self.height} x {self.width}")
        if len(self.image_mean) != 3 or not np.all(np.isfinite(self.image_mean)):
            fail("image_mean", "three finite numbers", self.image_mean)
        channels = 3
        for i, layer in enumerate(self.layers):
            where = f"layer {i}"
            if layer.stride not in STRIDES:
                fail(f"{where} stride", f"one of {STRIDES}", layer.stride)
            if not layer.epsilon > 0 or not np.isfinite(layer.epsilon):
                fail(f"{where} batch-norm epsilon", "a positive number", layer.epsilon)
            if layer.bias.ndim != 1 or layer.bias.shape[0] < 1:
                fail(f"{where} bias", "a non-empty vector", layer.bias.shape)
            out = layer.out_channels
            spatial = layer.kernel if i == 0 else layer.depthwise
            if spatial is None or (layer.pointwise is None) != (i == 0) or (layer.kernel is None) != (i > 0):
                fail(where, "a full kernel" if i == 0 else "a depthwise and a pointwise kernel", "something else")
                raise AssertionError("unreachable")
            if spatial.ndim < 1 or spatial.shape[0] not in KERNEL_SIZES:
                fail(f"{where} kernel size", f"one of {KERNEL_SIZES}", spatial.shape)
            k = spatial.shape[0]
            expected = (k, k, channels, out) if i == 0 else (k, k, channels)
            if spatial.shape != expected:
                fail(f"{where} {'kernel' if i == 0 else 'depthwise kernel'}", expected, spatial.shape)
            if layer.pointwise is not None and layer.pointwise.shape != (channels, out):
                fail(f"{where} pointwise kernel", (channels, out), layer.pointwise.shape)
            for label in ("gamma", "beta", "mean", "variance"):
                value = getattr(layer, label)
                if value.shape != (out,):
                    fail(f"{where} {label}", (out,), value.shape)
            for label in ("kernel", "depthwise", "pointwise", "bias", "gamma", "beta", "mean", "variance"):
                value = getattr(layer, label)
                if value is not None and not np.all(np.isfinite(value)):
                    fail(f"{where} {label}", "finite", "NaN or infinity")
            if np.any(layer.variance + layer.epsilon <= 0):
                fail(f"{where} variance + epsilon", "positive", float(np.min(layer.variance + layer.epsilon)))
            channels = out
        expected_readout = (*self.map_sizes()[-1], channels)
        if self.readout.shape != expected_readout:
            fail("readout", expected_readout, self.readout.shape)
        if not np.all(np.isfinite(self.readout)) or not np.isfinite(self.readout_bias):
            fail("readout", "finite", "NaN or infinity")
        return self


@dataclass(frozen=True, eq=False)
class SharedCompactWeights:
    """A shared compact model: the trunk of a compact model, then one factorised readout for many neurons.

    Response of neuron n, from the last map A [H_last, W_last, C_last]:
    `spatial_bias[n] + sum_hw spatial[h, w, n] * (mixing_bias[n] + sum_c A[h, w, c] * mixing[c, n])`.

    Raises:
        ValueError: from `validate()`, which every reader calls, naming the tensor, the expected and the given shape.
    """

    name: str
    layers: tuple[LayerWeights, ...]
    mixing: NDArray[np.floating]  # [C_last, N]
    mixing_bias: NDArray[np.floating]  # [N]
    spatial: NDArray[np.floating]  # [H_last, W_last, N]
    spatial_bias: NDArray[np.floating]  # [N]
    relu: bool = True  # False: the linear family, in which batch normalisation is followed by nothing
    height: int = 112
    width: int = 112
    image_mean: tuple[float, float, float] = IMAGE_MEAN

    @property
    def neurons(self) -> int:
        """Number of responses, N."""
        return int(self.mixing_bias.shape[0])

    def validate(self) -> SharedCompactWeights:
        """Check every shape and that every number is finite; return self."""
        for label, ndim in (("mixing", 2), ("mixing_bias", 1), ("spatial", 3), ("spatial_bias", 1)):
            value = getattr(self, label)
            if value.ndim != ndim:
                raise ValueError(f"model {self.name!r}: {label} should have {ndim} dimensions, got {value.shape}")
            if not np.all(np.isfinite(value)):
                raise ValueError(f"model {self.name!r}: {label} should be finite, got NaN or infinity")
        channels = int(self.layers[-1].bias.size) if self.layers else 0
        neurons = self.neurons
        if neurons < 1:
            raise ValueError(f"model {self.name!r}: number of neurons should be at least 1, got 0")
        expected = {"mixing": (channels, neurons), "spatial_bias": (neurons,)}
        expected["spatial"] = (*self.spatial.shape[:2], neurons)
        for label, shape in expected.items():
            if getattr(self, label).shape != shape:
                got = getattr(self, label).shape
                raise ValueError(f"model {self.name!r}: {label} should be {shape}, got {got}")
        # The trunk obeys the rules of a compact model whose readout covers the map that the spatial pool covers.
        map_shape = (*self.spatial.shape[:2], channels)
        readout = np.broadcast_to(np.float32(0), map_shape)
        CompactWeights(self.name, self.layers, readout, 0.0, self.height, self.width, self.image_mean).validate()
        return self
