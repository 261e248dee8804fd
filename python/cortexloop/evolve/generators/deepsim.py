"""The generators of Dosovitskiy & Brox: images from the activity of a layer of CaffeNet. Weights are not included."""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cortexloop import io
from cortexloop.evolve.generators.base import Generator
from cortexloop.evolve.optimiser import whole

RGB_MEAN = (123.0, 117.0, 104.0)
"""Mean colour that the networks' output is relative to, in levels 0..255."""

_SLOPE = 0.3  # of all leaky rectifiers


@dataclass(frozen=True)
class _Layer:
    """One layer: its name in the published Caffe networks, that in the torch translation of XDREAM, and its shape."""

    name: str
    alias: str
    kind: str  # "linear", "conv" or "up", the transposed convolution
    inputs: int
    outputs: int
    kernel: int = 0
    stride: int = 1
    padding: int = 1
    then: str = "leaky"

    @property
    def may_lack_bias(self) -> bool:
        """Whether the published bias is zero throughout, and some files leave it out."""
        return self.kind != "linear" and not self.name.startswith("R")

    def module(self) -> nn.Module:
        """The layer without its activation."""
        if self.kind == "linear":
            return nn.Linear(self.inputs, self.outputs)
        shape = (self.inputs, self.outputs, self.kernel, self.stride, self.padding)
        return nn.Conv2d(*shape) if self.kind == "conv" else nn.ConvTranspose2d(*shape)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters."""
        window = (self.kernel,) * 2 if self.kind != "linear" else ()
        ends = (self.inputs, self.outputs) if self.kind == "up" else (self.outputs, self.inputs)
        return {"weight": (*ends, *window), "bias": (self.outputs,)}


def _linear(name: str, alias: str, inputs: int) -> _Layer:
    return _Layer(name, alias, "linear", inputs, 4096)


def _conv(name: str, alias: str, inputs: int, outputs: int, kernel: int = 3, **rest: Any) -> _Layer:
    return _Layer(name, alias, "conv", inputs, outputs, kernel, **rest)


def _double(name: str, alias: str, inputs: int, outputs: int, **rest: Any) -> _Layer:
    """Transposed convolution to twice the size."""
    return _Layer(name, alias, "up", inputs, outputs, 4, 2, **rest)


def _same(name: str, alias: str, inputs: int, outputs: int) -> _Layer:
    """Transposed convolution that keeps the size."""
    return _Layer(name, alias, "up", inputs, outputs, 3)


def _rising(first: int) -> tuple[_Layer, ...]:
    """From 4 x 4 to 256 x 256 pixels, with `first` channels at the start."""
    return (
        _double("deconv5", "tconv5_0", first, 256),
        _same("conv5_1", "tconv5_1", 256, 512),
        _double("deconv4", "tconv4_0", 512, 256),
        _same("conv4_1", "tconv4_1", 256, 256),
        _double("deconv3", "tconv3_0", 256, 128),
        _same("conv3_1", "tconv3_1", 128, 128),
        _double("deconv2", "tconv2", 128, 64),
        _double("deconv1", "tconv1", 64, 32),
        _double("deconv0", "tconv0", 32, 3, then=""),
    )


def _fc(inputs: int) -> tuple[_Layer, ...]:
    return (
        _linear("defc7", "fc7", inputs),
        _linear("defc6", "fc6", 4096),
        _linear("defc5", "fc5", 4096),
        *_rising(256),
    )


_POOL5 = (
    _conv("Rconv6", "conv6", 256, 512),
    _conv("Rconv7", "conv7", 512, 512),
    _conv("Rconv8", "conv8", 512, 512, padding=0),
    *_rising(512),
)
_CONV = (
    _conv("Rconv6", "conv6", 384, 384, padding=0),
    _conv("Rconv7", "conv7", 384, 512, padding=0),
    _conv("Rconv8", "conv8", 512, 512, 2, padding=0),
    _double("deconv5", "tconv5_0", 512, 256),
    _same("conv5_1", "tconv5_1", 256, 256),
    _double("deconv4", "tconv4_0", 256, 128),
    _same("conv4_1", "tconv4_1", 128, 128),
    _double("deconv3", "tconv3_0", 128, 128),
    _same("conv3_1", "tconv3_1", 128, 128),
    _double("deconv2", "tconv2_0", 128, 64),
    _conv("conv2_1", "conv2_1", 64, 32),
    _double("deconv1", "tconv1_0", 32, 16),
    _conv("conv1_1", "conv1_1", 16, 3, then="tanh"),
)


def _norm(inputs: int, outputs: int, stride: int) -> tuple[_Layer, ...]:
    return (
        _conv("Rconv6", "conv6", inputs, outputs, stride=stride, padding=2),
        _conv("Rconv7", "conv7", outputs, 128),
        _conv("Rconv8", "conv8", 128, 128),
        _double("deconv4", "tconv4_0", 128, 128),
        _conv("conv4_1", "conv4_1", 128, 128),
        _double("deconv3", "tconv3_0", 128, 64),
        _conv("conv3_1", "conv3_1", 64, 64),
        _double("deconv2", "tconv2_0", 64, 32),
        _conv("conv2_1", "conv2_1", 32, 32),
        _double("deconv1", "tconv1_0", 32, 16, then=""),  # in the published network, too, no rectifier follows
        _conv("conv1_1", "conv1_1", 16, 3, then="tanh"),
    )


@dataclass(frozen=True)
class _Variant:
    layers: tuple[_Layer, ...]
    code: tuple[int, ...]
    side: int = 256


VARIANTS: dict[str, _Variant] = {
    "fc6": _Variant(_fc(4096), (4096,)),
    "fc6_eucl": _Variant(_fc(4096), (4096,)),
    "fc7": _Variant(_fc(4096), (4096,)),
    "fc8": _Variant(_fc(1000), (1000,)),
    "pool5": _Variant(_POOL5, (256, 6, 6)),
    "conv3": _Variant(_CONV, (384, 13, 13)),
    "conv4": _Variant(_CONV, (384, 13, 13)),
    "norm1": _Variant(_norm(96, 128, 2), (96, 27, 27), 240),
    "norm2": _Variant(_norm(256, 256, 1), (256, 13, 13), 240),
}
"""The layers of CaffeNet that there are generators for; "fc6_eucl" was trained with the Euclidean loss only."""


class DeePSimGenerator(Generator):
    """A published image generator ("DeePSiM", upconvolutional GAN): code = activity of a layer of CaffeNet.

    The networks make BGR images relative to a mean colour: rgb = clip(out[2, 1, 0] + (123, 117, 104), 0, 255) / 255.
    (P-XDREAM adds the mean without reversing the channels, so that red and blue are exchanged.) Those of "conv3",
    "conv4", "norm1" and "norm2" end in 255 tanh(.), which is relative to the same mean, as in Caffe and XDREAM.

    Published evolutions start from codes of zeros or of standard deviation 1, and end at norms of 170 to 420 ("fc6").

    Images are computed in passes of always `batch` codes, filled up with zeros, because in a pass of another size the
    sums of a layer have another order. Another number of threads may still change their last bits.

    Source: Dosovitskiy & Brox 2016, "Generating images with perceptual similarity metrics based on deep networks".
    Architectures after the published Caffe definitions. The weights have to be downloaded, say, from
    huggingface.co/binxu/DeePSim_DosovitskiyBrox2016.

    Args:
        weights: a file, see `io.load_state_dict`, or arrays by name. Layers may be named as in Caffe ("defc7.weight",
            also "defc7.1.weight") or as in XDREAM ("fc7.weight"), with any common prefix; biases of convolutions that
            are missing are zero.
        variant: one of `VARIANTS`.
        device: where the network is.
        dtype: torch.float32, or torch.bfloat16 or torch.float16 for half the memory and other bits.
        batch: codes per pass; None: 8 on a CPU, else 40.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown variant, or weights that are not this network's; the message names all that do not fit.
        TypeError: a dtype that is none of these.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | Mapping[str, NDArray[Any] | Tensor],
        variant: str = "fc6",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch: int | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant should be one of {', '.join(VARIANTS)}, got {variant!r}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"dtype should be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        kind = VARIANTS[variant]
        super().__init__(kind.side, kind.side, math.prod(kind.code))
        self.name, self.variant = f"deepsim-{variant}", variant
        self.batch = None if batch is None else whole("batch", batch, 1, 4096)
        arrays, self._source = _read(weights)
        where = "the weights" if self._source["weights"] is None else repr(self._source["weights"])
        self.network = _network(kind, _match(variant, arrays, where)).to(device, dtype)
        """The torch module, codes [b, dim] -> images [b, 3, height, width]; its parameters take no gradient."""

    def to(self, device: str | torch.device) -> DeePSimGenerator:
        """Move the network to a device, and return the generator itself."""
        self.network.to(device)
        return self

    def settings(self) -> dict[str, Any]:
        """What it takes to make this generator again, JSON-able; the weights by file name and SHA-256."""
        dtype = str(next(self.network.parameters()).dtype).removeprefix("torch.")
        return {"generator": self.name, **self._source, "dtype": dtype, "batch": self.batch}

    def _images(self, codes: Tensor) -> Tensor:
        like = next(self.network.parameters())
        batch = self.batch or (8 if like.device.type == "cpu" else 40)
        images = []
        for part in torch.split(codes.to(like.device, like.dtype), batch):
            filled = torch.cat((part, part.new_zeros(batch - len(part), self.dim)))
            images.append(self.network(filled)[: len(part)].to(codes.device))
        return torch.cat(images)


class _Colours(nn.Module):
    """BGR relative to the mean colour, in levels, to RGB in [0, 1]; `scale` is what 1 stands for."""

    mean: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("mean", torch.tensor(RGB_MEAN)[:, None, None])

    def forward(self, bgr: Tensor) -> Tensor:
        levels = bgr.to(torch.float32).flip(1) * self.scale + self.mean
        return levels.clamp(0, 255) / 255


def _network(variant: _Variant, state: dict[str, Tensor]) -> nn.Module:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.device("meta"):  # without memory: the parameters are those of `state`
        if len(variant.code) > 1:
            modules["code"] = nn.Unflatten(1, variant.code)
        for i, layer in enumerate(variant.layers):
            modules[layer.name] = layer.module()
            if layer.then == "leaky":
                modules[f"relu_{layer.name}"] = nn.LeakyReLU(_SLOPE, inplace=True)
            if layer.kind == "linear" and variant.layers[i + 1].kind != "linear":
                modules["map"] = nn.Unflatten(1, (256, 4, 4))
    last = variant.layers[-1].then == "tanh"
    network = nn.Sequential(modules)
    network.load_state_dict(state, assign=True)
    if last:
        network.append(nn.Tanh())
    network.append(_Colours(255.0 if last else 1.0))
    return network.eval().requires_grad_(False)


def _read(
    weights: str | os.PathLike[str] | Mapping[str, NDArray[Any] | Tensor],
) -> tuple[dict[str, NDArray[Any]], dict[str, str | None]]:
    """Arrays by name, and where they are from: file name (None without a file) and SHA-256."""
    if isinstance(weights, Mapping):
        arrays = {name: np.asarray(value) for name, value in weights.items()}
        digest = hashlib.sha256()
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return arrays, {"weights": None, "sha256": digest.hexdigest()}
    arrays = io.load_state_dict(weights)
    digest = hashlib.sha256()
    with open(weights, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return arrays, {"weights": Path(weights).name, "sha256": digest.hexdigest()}


def _match(variant: str, arrays: Mapping[str, NDArray[Any]], where: str) -> dict[str, Tensor]:
    """All parameters of a variant by their names in Caffe.

    Raises:
        ValueError: naming every parameter that is missing, unknown, there twice, or not as it should be.
    """
    layers = VARIANTS[variant].layers
    names = {name: layer.name for layer in layers for name in (layer.name, layer.alias)}
    given: dict[str, str] = {}
    problems = []
    for key in arrays:
        parts = [part for part in key.split(".") if not part.isdigit()]
        known = len(parts) > 1 and parts[-2] in names and parts[-1] in ("weight", "bias")
        target = f"{names[parts[-2]]}.{parts[-1]}" if known else ""
        if not known:
            problems.append(f"{key} is unknown")
        elif target in given:
            problems.append(f"{given[target]} and {key} are the same parameter")
        else:
            given[target] = key
    state: dict[str, Tensor] = {}
    for layer in layers:
        for leaf, shape in layer.shapes().items():
            target = f"{layer.name}.{leaf}"
            if target in given:
                array = arrays[given[target]]
                if array.shape != shape or array.dtype.kind != "f":
                    problems.append(
                        f"{given[target]} should be floating point {list(shape)}, is {array.dtype} {list(array.shape)}"
                    )
                elif not np.isfinite(array).all():
                    problems.append(f"{given[target]} holds NaN or infinity")
                else:
                    state[target] = torch.from_numpy(np.array(array, np.float32))
            elif leaf == "bias" and layer.may_lack_bias:
                state[target] = torch.zeros(shape)
            else:
                problems.append(f"{target} (or {layer.alias}.{leaf}) is missing")
    if problems:
        raise ValueError(f"{where} cannot be used as {variant} weights: {'; '.join(problems)}")
    return state
