"""The layers that compact and shared compact models are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cortexloop.weights import (
    KERNEL_SIZES,
    STRIDES,
    CompactWeights,
    LayerWeights,
    SharedCompactWeights,
    same_padding,
)

KERAS_MOMENTUM = 0.01  # Keras' momentum 0.99 weighs the old value, torch's momentum weighs the new one


def glorot_uniform_(tensor: Tensor, fan_in: int, fan_out: int, generator: torch.Generator | None) -> None:
    """Fill in place with U(-b, b), b = sqrt(6 / (fan_in + fan_out)): the default of every Keras kernel."""
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    with torch.no_grad():
        tensor.uniform_(-bound, bound, generator=generator)


def pad_same(maps: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around maps [B, C, H, W] so that an unpadded convolution has TensorFlow's "same" output size."""
    _, top, bottom = same_padding(maps.shape[2], kernel, stride)
    _, left, right = same_padding(maps.shape[3], kernel, stride)
    return F.pad(maps, (left, right, top, bottom))


class Layer(nn.Module):
    """Convolution, batch normalisation and (unless `relu` is false) ReLU: [B, C_in, H, W] -> [B, C_out, h, w].

    `depthwise` is None in the first layer, where `convolution` is a full k x k kernel; in every other layer a
    depthwise k x k convolution without bias or activation precedes a 1 x 1 `convolution`.
    """

    depthwise: nn.Conv2d | None

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int, epsilon: float, *, separable: bool, relu: bool
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.separable, self.relu = kernel, stride, separable, relu
        if separable:
            self.depthwise = nn.Conv2d(c_in, c_in, kernel, stride=stride, groups=c_in, bias=False)
            self.convolution = nn.Conv2d(c_in, c_out, 1)
        else:
            self.depthwise = None
            self.convolution = nn.Conv2d(c_in, c_out, kernel, stride=stride)
        self.norm = nn.BatchNorm2d(c_out, eps=epsilon, momentum=KERAS_MOMENTUM)

    def initialize(self, generator: torch.Generator | None) -> None:
        """Keras' defaults: Glorot uniform kernels, zero biases, gamma 1, beta 0, mean 0, variance 1."""
        c_out, c_in, kernel, _ = self.convolution.weight.shape
        area = kernel * kernel
        glorot_uniform_(self.convolution.weight, area * c_in, area * c_out, generator)
        if self.depthwise is not None:  # Keras' kernel is [k, k, C_in, 1]: fans k*k*C_in and k*k
            area = self.kernel * self.kernel
            glorot_uniform_(self.depthwise.weight, area * c_in, area, generator)
        assert self.convolution.bias is not None
        nn.init.zeros_(self.convolution.bias)
        self.norm.reset_running_stats()
        nn.init.ones_(self.norm.weight)
        nn.init.zeros_(self.norm.bias)

    def depthwise_output(self, maps: Tensor) -> Tensor:
        """Output of the depthwise convolution alone [B, C_in, h, w]: no bias, no activation."""
        assert self.depthwise is not None
        filtered: Tensor = self.depthwise(pad_same(maps, self.kernel, self.stride))
        return filtered

    def forward(self, maps: Tensor) -> Tensor:
        if self.separable:
            maps = self.convolution(self.depthwise_output(maps))
        else:
            maps = self.convolution(pad_same(maps, self.kernel, self.stride))
        maps = self.norm(maps)
        return torch.relu(maps) if self.relu else maps  # torch.relu: derivative 0 at exactly 0

    def load(self, weights: LayerWeights) -> None:
        """Copy the arrays of `weights` (validated, of this layer's shapes) into the parameters."""
        assert self.convolution.bias is not None
        if self.depthwise is None:
            assert weights.kernel is not None
            copy_into(self.convolution.weight, weights.kernel.transpose(3, 2, 0, 1))
        else:
            assert weights.depthwise is not None
            assert weights.pointwise is not None
            copy_into(self.depthwise.weight, weights.depthwise.transpose(2, 0, 1)[:, None])
            copy_into(self.convolution.weight, weights.pointwise.T[:, :, None, None])
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        copy_into(self.convolution.bias, weights.bias)
        copy_into(self.norm.weight, weights.gamma)
        copy_into(self.norm.bias, weights.beta)
        copy_into(self.norm.running_mean, weights.mean)
        copy_into(self.norm.running_var, weights.variance)

    def to_weights(self) -> LayerWeights:
        """The parameters as NumPy arrays, in the dtype of the module."""
        assert self.convolution.bias is not None
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        kernel = depthwise = pointwise = None
        if self.depthwise is None:
            kernel = to_numpy(self.convolution.weight.permute(2, 3, 1, 0))
        else:
            depthwise = to_numpy(self.depthwise.weight[:, 0].permute(1, 2, 0))
            pointwise = to_numpy(self.convolution.weight[:, :, 0, 0].T)
        return LayerWeights(
            stride=self.stride,
            epsilon=self.norm.eps,
            bias=to_numpy(self.convolution.bias),
            gamma=to_numpy(self.norm.weight),
            beta=to_numpy(self.norm.bias),
            mean=to_numpy(self.norm.running_mean),
            variance=to_numpy(self.norm.running_var),
            kernel=kernel,
            depthwise=depthwise,
            pointwise=pointwise,
        )


class Trunk(nn.Module):
    """The stack of layers with its input contract: images [B, H, W, 3], recentred RGB -> maps [B, C, h, w]."""

    def __init__(
        self,
        filters: Sequence[int],
        kernel_sizes: Sequence[int] | int,
        strides: Sequence[int],
        epsilons: Sequence[float] | float,
        height: int,
        width: int,
        image_mean: Sequence[float],
        *,
        relu: bool = True,
    ) -> None:
        super().__init__()
        filters = tuple(filters)
        depth = len(filters)
        kernels = (kernel_sizes,) * depth if isinstance(kernel_sizes, int) else tuple(kernel_sizes)
        eps = (float(epsilons),) * depth if isinstance(epsilons, (int, float)) else tuple(map(float, epsilons))
        strides = tuple(strides)
        if depth < 1 or any(f < 1 for f in filters):
            raise ValueError(f"filters should be at least one positive number per layer, got {filters}")
        for what, given in (("kernel_sizes", kernels), ("strides", strides), ("epsilons", eps)):
            if len(given) != depth:
                raise ValueError(f"{what} should have one entry for each of the {depth} layers, got {given}")
        if any(k not in KERNEL_SIZES for k in kernels):
            raise ValueError(f"kernel sizes should be among {KERNEL_SIZES}, got {kernels}")
        if any(s not in STRIDES for s in strides):
            raise ValueError(f"strides should be among {STRIDES}, got {strides}")
        if any(not e > 0 for e in eps):
            raise ValueError(f"batch-norm epsilons should be positive, got {eps}")
        if height < 1 or width < 1:
            raise ValueError(f"input size should be at least 1 x 1, got {height} x {width}")
        if len(image_mean) != 3:
            raise ValueError(f"image_mean should be three numbers (R, G, B), got {tuple(image_mean)}")
        self.height, self.width = height, width
        self.image_mean = (float(image_mean[0]), float(image_mean[1]), float(image_mean[2]))
        layers = []
        c_in, h, w = 3, height, width
        for i in range(depth):
            layers.append(
                Layer(c_in, filters[i], kernels[i], strides[i], eps[i], separable=i > 0, relu=relu),
            )
            c_in = filters[i]
            h, w = same_padding(h, kernels[i], strides[i])[0], same_padding(w, kernels[i], strides[i])[0]
        self.layers = nn.ModuleList(layers)
        self.map_size = (h, w)
        self.channels = c_in

    @classmethod
    def like(cls, weights: CompactWeights | SharedCompactWeights, dtype: torch.dtype, *, relu: bool = True) -> Trunk:
        """A trunk with the shapes and the values of validated weights."""
        layers = weights.layers
        trunk = cls(
            [layer.out_channels for layer in layers],
            [layer.kernel_size for layer in layers],
            [layer.stride for layer in layers],
            [layer.epsilon for layer in layers],
            weights.height,
            weights.width,
            weights.image_mean,
            relu=relu,
        ).to(dtype)
        for layer, own in zip(trunk.stack(), layers, strict=True):
            layer.load(own)
        return trunk

    def stack(self) -> list[Layer]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def initialize(self, generator: torch.Generator | None) -> None:
        """Fresh Keras-default parameters in every layer."""
        for layer in self.stack():
            layer.initialize(generator)

    def forward(self, images: Tensor, depth: int | None = None) -> Tensor:
        """Maps [B, C, h, w] after the first `depth` layers (all of them by default).

        Raises:
            ValueError: the images are not [B, height, width, 3].
            TypeError: their dtype is not that of the parameters.
        """
        if images.ndim != 4 or images.shape[1:] != (self.height, self.width, 3):
            expected = f"[B, {self.height}, {self.width}, 3]"
            raise ValueError(f"images should be {expected}, recentred RGB, got shape {tuple(images.shape)}")
        dtype = self.stack()[0].convolution.weight.dtype
        if images.dtype != dtype:
            raise TypeError(f"images should be {dtype} as the model's parameters are, got {images.dtype}")
        maps = images.permute(0, 3, 1, 2)
        for layer in self.stack()[:depth]:
            maps = layer(maps)
        return maps

    def check_layer(self, layer: int, first: int) -> int:
        """Return `layer` if it is in first..depth-1, else raise ValueError."""
        if not first <= layer < len(self.layers):
            raise ValueError(f"layer should be in {first}..{len(self.layers) - 1}, got {layer}")
        return layer

    def activity(self, images: Tensor, layer: int) -> Tensor:
        """Output map of one layer, after its ReLU: [B, h, w, C]."""
        return self(images, self.check_layer(layer, 0) + 1).permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def depthwise_output(self, images: Tensor, layer: int) -> Tensor:
        """Output of one layer's depthwise convolution, before its pointwise one: [B, h, w, C_in]; layers 1 and on."""
        self.check_layer(layer, 1)
        return self.stack()[layer].depthwise_output(self(images, layer)).permute(0, 2, 3, 1)


def torch_dtype(weights: CompactWeights | SharedCompactWeights) -> torch.dtype:
    """torch.float64 if any array of the weights is float64, else torch.float32."""
    owners = (weights, *weights.layers)
    arrays = (value for owner in owners for value in vars(owner).values() if isinstance(value, np.ndarray))
    return torch.float64 if any(array.dtype == np.float64 for array in arrays) else torch.float32


def copy_into(tensor: Tensor, array: NDArray[np.floating]) -> None:
    """Copy a NumPy array of the same shape into a parameter or buffer."""
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.array(array)))


def to_numpy(tensor: Tensor) -> NDArray[np.floating]:
    """A contiguous NumPy copy; float16 and bfloat16, which weight files do not hold, become float32."""
    tensor = tensor.detach().cpu()
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    return np.array(tensor.numpy(), order="C")
