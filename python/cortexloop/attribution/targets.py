"""What is attributed: responses of the models of a bank, or of linear readouts of any features."""

from __future__ import annotations

import abc
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cortexloop.attribution.weights import FactorsLike, ReadoutWeights
from cortexloop.bank import ModelBank
from cortexloop.features import BankFeatures, FeatureSource, ModuleFeatures
from cortexloop.functional import input_gradient, responses
from cortexloop.images import recenter
from cortexloop.weights import SharedCompactWeights


class Target(abc.ABC):
    """N responses to an image, and their gradients.

    Images are floating levels 0..255, [B, H, W, 3]; `neurons` are positions, int64. With `paired`, image i goes with
    neurons[i] only, else every image with each of the neurons.

    Attributes:
        neurons: N.
        device: where images have to be.
        dtype: of the images that it works on.
        zero: levels R, G, B that the network sees as 0.
    """

    neurons: int
    device: torch.device
    dtype: torch.dtype
    zero: tuple[float, float, float]

    @abc.abstractmethod
    def responses(self, levels: Tensor, neurons: Tensor, paired: bool) -> Tensor:
        """[B, K], or [B] if paired."""

    @abc.abstractmethod
    def gradients(self, levels: Tensor, neurons: Tensor, paired: bool) -> Tensor:
        """d response / d level: [B, K, H, W, 3], or [B, H, W, 3] if paired."""

    @abc.abstractmethod
    def memory(self, height: int, width: int) -> tuple[int, int]:
        """Bytes that gradients take for each image, and for each image and neuron (the result included)."""


def as_target(target: Target | ModelBank) -> Target:
    """A target, from itself or a bank.

    Raises:
        TypeError: neither.
    """
    if isinstance(target, ModelBank):
        return BankTarget(target)
    if not isinstance(target, Target):
        raise TypeError(f"give a ModelBank, or a Readout of some features, got {type(target).__name__}")
    return target


class BankTarget(Target):
    """The models of a bank, on the fast kernels: each (image, model) is a gradient of its own.

    Args:
        bank: N models.
        backend: see `responses`. "auto" takes the reference for float64 images, which only it computes.
    """

    def __init__(self, bank: ModelBank, *, backend: str = "auto") -> None:
        self.bank, self.backend = bank, backend
        self.neurons, self.device, self.dtype = len(bank), bank.device, torch.float32
        self.zero = bank.image_mean
        self._selected: tuple[tuple[int, ...], ModelBank] | None = None

    def responses(self, levels: Tensor, neurons: Tensor, paired: bool) -> Tensor:
        shown, backend = recenter(levels, self.bank.image_mean), self._backend(levels)
        if paired:
            return responses(shown, self.bank, pairs=neurons, backend=backend)
        if torch.equal(neurons.cpu(), torch.arange(self.neurons)):
            return responses(shown, self.bank, backend=backend)
        return responses(shown, self._some(neurons), backend=backend)

    def _backend(self, levels: Tensor) -> str:
        return "reference" if self.backend == "auto" and levels.dtype == torch.float64 else self.backend

    def gradients(self, levels: Tensor, neurons: Tensor, paired: bool) -> Tensor:
        shown = recenter(levels, self.bank.image_mean)
        if paired:
            return self._paired(shown, neurons)
        count = len(neurons)
        each = self._paired(shown.repeat_interleave(count, dim=0), neurons.repeat(len(shown)))
        return each.view(len(shown), count, *shown.shape[1:])

    def _some(self, neurons: Tensor) -> ModelBank:
        """A bank of these models; the last one asked for is kept, since chunks ask for the same."""
        names = tuple(neurons.tolist())
        if self._selected is None or self._selected[0] != names:
            unique = sorted(set(names))
            if len(unique) != len(names):
                raise ValueError("a neuron is listed twice")
            self._selected = (names, self.bank.select(list(names)))
        return self._selected[1]

    def _paired(self, shown: Tensor, neurons: Tensor) -> Tensor:
        ones = torch.ones(len(shown), dtype=shown.dtype, device=shown.device)
        return input_gradient(shown, self.bank, ones, pairs=neurons, backend=self._backend(shown))

    def memory(self, height: int, width: int) -> tuple[int, int]:
        image = height * width * 3 * 4
        return 3 * image, 4 * image


class _Factors(NamedTuple):
    """See `FactorsLike`."""

    masks: Tensor
    vectors: Tensor


class Readout(Target):
    """Linear readouts of features: response n = sum(weights[n] * features) + bias[n].

    All neurons of an image share the forward pass of the network, see `FeatureSource.linearize`.

    Args:
        source: the features.
        weights: [N, C, H, W], or factors (see `ReadoutWeights`); None if the features are vectors (H = W = 1), each
            entry of which is then a neuron: a module's own outputs.
        bias: [N], default 0.
        zero: levels that the network sees as 0; needed only for sources of other kinds than this package's own.

    Raises:
        TypeError, ValueError: weights or bias that do not fit the source.
    """

    def __init__(
        self,
        source: FeatureSource,
        weights: Tensor | FactorsLike | None = None,
        bias: Tensor | None = None,
        *,
        zero: tuple[float, float, float] | None = None,
    ) -> None:
        shape = source.feature_shape()
        if weights is None:
            if shape[1:] != (1, 1):
                raise ValueError(f"features of {source.name} are maps {list(shape)}: give weights of the readout")
            weights = torch.eye(shape[0])[:, :, None, None]
        self.source = source
        self.device, self.dtype = source.device, source.dtype
        self.weights = ReadoutWeights(weights, shape, self.dtype, self.device)
        self.neurons = self.weights.neurons
        self.bias = torch.zeros(self.neurons, dtype=self.dtype, device=self.device)
        if bias is not None:
            if tuple(bias.shape) != (self.neurons,) or not bool(torch.isfinite(bias).all()):
                raise ValueError(f"bias should be [{self.neurons}] finite numbers, got {list(bias.shape)}")
            self.bias = bias.detach().to(self.device, self.dtype)
        self.zero = zero_level(source) if zero is None else zero
        self._memory: tuple[tuple[int, int], tuple[int, int]] | None = None

    @classmethod
    def of_shared(cls, weights: SharedCompactWeights, *, device: torch.device | str = "cpu") -> Readout:
        """All neurons of a shared compact model, its trunk on the bank's kernels.

        Raises:
            ValueError: a model without ReLUs, which banks do not hold.
        """
        mixing, spatial = (torch.from_numpy(np.asarray(a, np.float64)) for a in (weights.mixing, weights.spatial))
        bias = torch.from_numpy(np.asarray(weights.spatial_bias, np.float64))
        bias = bias + torch.from_numpy(np.asarray(weights.mixing_bias, np.float64)) * spatial.sum((0, 1))
        factors = _Factors(spatial.permute(2, 0, 1)[:, None], mixing.T[:, None])
        return cls(BankFeatures.of_weights(weights, device=device), factors, bias)

    def responses(self, levels: Tensor, neurons: Tensor, paired: bool) -> Tensor:
        with torch.no_grad():
            features = self.source.differentiable(levels)
        weights = self.weights.rows(neurons).to(features.dtype)
        form = "bchw,bchw->b" if paired else "bchw,kchw->bk"
        return torch.einsum(form, features, weights) + self.bias[neurons]

    def gradients(self, levels: Tensor, neurons: Tensor, paired: bool) -> Tensor:
        linear = self.source.linearize(levels)
        weights = self.weights.rows(neurons).to(linear.features.dtype)
        if paired:
            return linear.pullback(weights[:, None])[:, 0]
        return linear.pullback(weights[None].expand(len(levels), *weights.shape))

    def memory(self, height: int, width: int) -> tuple[int, int]:
        if self._memory is None or self._memory[0] != (height, width):
            self._memory = (height, width), linear_memory(self.source, height, width)
        return self._memory[1]


def linear_memory(source: FeatureSource, height: int, width: int) -> tuple[int, int]:
    """Bytes of a linearization for each image, and for each image and cotangent."""
    image = height * width * 3 * 4
    channels, rows, columns = source.feature_shape()
    maps = channels * rows * columns * 4
    size = 2 if source.dtype == torch.float64 else 1
    return source.graph_bytes(height, width) + size * 4 * (image + maps), size * (3 * image + 4 * maps)


def zero_level(source: FeatureSource) -> tuple[float, float, float]:
    """The levels R, G, B that a source's network sees as 0.

    Raises:
        TypeError: a source of another kind.
    """
    if isinstance(source, BankFeatures):
        return source.bank.image_mean
    if isinstance(source, ModuleFeatures):
        preprocess = source.preprocess
        mean = [m / preprocess.scale for m in preprocess.mean]
        r, g, b = mean if preprocess.channels == "RGB" else mean[::-1]
        return r, g, b
    raise TypeError(f"which levels does the network of a {type(source).__name__} see as 0? Give zero=(r, g, b)")
