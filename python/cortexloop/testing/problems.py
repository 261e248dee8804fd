"""Inputs for tests: small-integer problems whose every partial sum is exact in float32, and realistic random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.bank import ModelBank
from cortexloop.packing import WINOGRAD_ACROSS, WINOGRAD_ALONG, fold, winograd_matrix
from cortexloop.testing.cases import Case, ModelShape
from cortexloop.weights import IMAGE_MEAN, CompactWeights, LayerWeights, same_padding

INTEGER_MEAN = (116.0, 109.0, 100.0)
EXACT_LIMIT = float(2**24)
"""float32 holds every integer up to this: sums below it, in units of their common fraction, have no rounding."""

# Layer 0 with kernel 5 and stride 1 may run by Winograd over `WINOGRAD_ALONG` and `WINOGRAD_ACROSS` rows, its gradient
# by Winograd along rows alone. Of weights that are multiples of 1080 every product and every sum is then a multiple of
# 1/8 (tightest at the points +-2 along and across rows), along rows alone a multiple of 1.
_WINOGRAD_STEP = 1080.0
_WINOGRAD_UNITS = {True: 1 / 8, False: 1.0}


@dataclass(frozen=True)
class Inputs:
    """A problem: the same images as pixels and as recentred values, a bank, a cotangent and pairs.

    images_uint8: [B, H, W, 3] RGB. images: float32 [B, H, W, 3], recentred. cotangent: float32 [B, N].
    pairs: int64 [B], every model at least once if B >= N.
    """

    images_uint8: Tensor
    images: Tensor
    bank: ModelBank
    cotangent: Tensor
    pairs: Tensor


def _sparse(
    rng: np.random.Generator, shape: tuple[int, ...], inputs: tuple[int, ...], nonzeros: int, step: float
) -> NDArray[np.float32]:
    """Integers of +-step and 0 with at most `nonzeros` entries along the axes `inputs` (flattened) per output."""
    moved = [shape[i] for i in range(len(shape)) if i not in inputs]
    fan_in = int(np.prod([shape[i] for i in inputs]))
    fan_out = int(np.prod(moved))
    values = np.zeros((fan_out, fan_in), dtype=np.float32)
    for row in values:
        where = rng.choice(fan_in, size=min(nonzeros, fan_in), replace=False)
        row[where] = rng.choice([-1.0, 1.0, 1.0], size=where.size) * step
    full = values.reshape(*moved, *(shape[i] for i in inputs))
    order = [i for i in range(len(shape)) if i not in inputs] + list(inputs)
    return np.ascontiguousarray(full.transpose(np.argsort(order)))


def _unit_norm(n: int, bias: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Batch norm that only adds: gamma / sqrt(0.75 + 0.25) = 1, split bias = bias - mean + beta."""
    half = np.floor(bias / 2)
    return {
        "bias": half.astype(np.float32),
        "gamma": np.ones(n, np.float32),
        "beta": (bias - half + 1).astype(np.float32),
        "mean": np.ones(n, np.float32),
        "variance": np.full(n, 0.75, np.float32),
    }


def _exact_model(rng: np.random.Generator, name: str, shape: ModelShape, height: int, width: int) -> CompactWeights:
    layers: list[LayerWeights] = []
    channels, h, w = 3, height, width
    winograd = shape.kernels[0] == 5 and shape.strides[0] == 1
    # Taps outside a tiny image are never used: many weights keep such a model alive, large images need few.
    area = height * width
    taps, mixed = (24, 10**9) if area <= 4 else (8, 10**9) if area <= 64 else (2, 3)
    unit = _WINOGRAD_STEP if winograd else 1.0
    for index, (o, k, stride) in enumerate(zip(shape.filters, shape.kernels, shape.strides, strict=True)):
        norm = _unit_norm(o, (rng.integers(-1, 3, size=o) * unit).astype(np.float32))
        if index == 0:
            kernel = _sparse(rng, (k, k, 3, o), (0, 1, 2), taps, unit)
            layers.append(LayerWeights(stride=stride, epsilon=0.25, kernel=kernel, **norm))
        else:
            depthwise = _sparse(rng, (k, k, channels), (0, 1), max(2, taps // 2), 1.0)
            pointwise = _sparse(rng, (channels, o), (0,), mixed, 1.0)
            layers.append(LayerWeights(stride=stride, epsilon=0.25, depthwise=depthwise, pointwise=pointwise, **norm))
        channels = o
        h, w = same_padding(h, k, stride)[0], same_padding(w, k, stride)[0]
    readout = np.zeros((h, w, channels), np.float32)
    where = rng.choice(readout.size, size=min(24, readout.size), replace=False)
    readout.reshape(-1)[where] = rng.choice([-2.0, -1.0, 1.0, 2.0], size=where.size)
    return CompactWeights(name, tuple(layers), readout, float(rng.integers(-5, 6)), height, width, INTEGER_MEAN)


def _transforms(points: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Absolute values of B^T [n, n] and A^T [n - 4, n] of Winograd with 5 taps over n points."""
    n = len(points)
    finite = [p for p in points if np.isfinite(p)]
    b, a = np.zeros((n, n)), np.zeros((n - 4, n))
    for p, point in enumerate(points):
        polynomial = np.poly([q for q in finite if q != point])[::-1]
        b[p, : len(polynomial)] = np.abs(polynomial)
        a[:, p] = np.arange(n - 4) == n - 5 if np.isinf(point) else np.abs(point) ** np.arange(n - 4)
    return b, a


_ONE_ROW = (np.eye(5), np.eye(5), np.ones((1, 5)))  # "transforms" of plain convolution across rows: five rows summed


def _winograd_bound(kernel: NDArray[np.float64], x: Tensor, *, across: bool) -> float:
    """The largest sum of absolute values inside a first layer by Winograd, in units of its common fraction.

    kernel: [5, 5, C, O]; x: padded input [B, C, H, W]; across: transformed across rows, too. Tiles of every alignment
    are counted, so any tiling is covered.
    """
    b_x, a_x = _transforms(WINOGRAD_ALONG)
    g_y, (b_y, a_y) = _ONE_ROW[0], _ONE_ROW[1:]
    if across:
        g_y, (b_y, a_y) = winograd_matrix(WINOGRAD_ACROSS), _transforms(WINOGRAD_ACROSS)
    weights = np.abs(np.einsum("qi,pj,ijco->qpoc", g_y, winograd_matrix(WINOGRAD_ALONG), kernel))
    windows = torch.from_numpy(np.einsum("qy,px->qpyx", b_y, b_x).reshape(-1, 1, b_y.shape[1], b_x.shape[1]))
    rows = F.pad(x.abs(), (7, 7, 5, 5)).flatten(0, 1)[:, None]  # [B * C, 1, H + 10, W + 14]
    points = F.conv2d(rows, windows)
    points = points.reshape(*x.shape[:2], len(b_y), len(b_x), *points.shape[2:])
    products = torch.einsum("bcqpyx,qpoc->bqpoyx", points, torch.from_numpy(weights))
    factors = torch.from_numpy(np.einsum("rq,ip->riqp", a_y, a_x))
    outputs = torch.einsum("bqpoyx,riqp->brioyx", products, factors)
    return float(torch.maximum(products.max(), outputs.max())) / _WINOGRAD_UNITS[across]


class _TooLargeError(AssertionError):
    """A sum could reach beyond what float32 holds exactly."""


def _check_exact(model: CompactWeights, images: Tensor, cotangent: Tensor) -> bool:
    """Assert that no order of summation can round: every sum of absolute values stays below the limit.

    images: float64 [B, H, W, 3] integers; cotangent: float64 [B] integers. Returns whether any gradient reaches the
    images.
    """

    def check(total: Tensor, unit: float, where: str) -> None:
        largest = float(total.max()) / unit if total.numel() else 0.0
        if largest >= EXACT_LIMIT:
            raise _TooLargeError(f"{model.name} {where}: sums reach {largest:.3g} units, exact below {EXACT_LIMIT}")

    x = images.permute(0, 3, 1, 2)
    saved: list[tuple[Tensor, Tensor | None, Tensor, LayerWeights]] = []
    unit = 1.0
    for index, layer in enumerate(model.layers):
        mixing, bias = fold(layer)
        k, stride = layer.kernel_size, layer.stride
        top, bottom = same_padding(x.shape[2], k, stride)[1:]
        left, right = same_padding(x.shape[3], k, stride)[1:]
        padded = F.pad(x, (left, right, top, bottom))
        b = torch.from_numpy(bias)[:, None, None]
        if layer.kernel is not None:
            spatial = torch.from_numpy(mixing).permute(3, 2, 0, 1)
            pointwise = None
            if k == 5 and stride == 1:
                bound = _winograd_bound(mixing, padded, across=True)
                if bound >= EXACT_LIMIT:
                    raise _TooLargeError(f"{model.name}: the transformed first layer: sums reach {bound:.3g} units")
                unit = 8.0  # 1080 = 8 * 135: the power of two in every output of this layer
            y = F.conv2d(padded, spatial, stride=stride)
            check(F.conv2d(padded.abs(), spatial.abs(), stride=stride) + b.abs(), unit, f"layer {index}")
        else:
            assert layer.depthwise is not None
            spatial = torch.from_numpy(layer.depthwise.astype(np.float64)).permute(2, 0, 1)[:, None]
            pointwise = torch.from_numpy(mixing).T[:, :, None, None]
            y = F.conv2d(padded, spatial, stride=stride, groups=x.shape[1])
            bounds = F.conv2d(padded.abs(), spatial.abs(), stride=stride, groups=x.shape[1])
            check(F.conv2d(bounds, pointwise.abs()) + b.abs(), unit, f"layer {index}")
            y = F.conv2d(y, pointwise)
        y = F.relu(y + b)
        saved.append((spatial, pointwise, y, layer))
        x = y
    readout = torch.from_numpy(model.readout.astype(np.float64)).permute(2, 0, 1)
    check((x.abs() * readout.abs()).sum(dim=(1, 2, 3)) + abs(model.readout_bias), unit, "readout")

    # Backwards with absolute values: an upper bound of every partial sum of the gradient.
    grad = cotangent.abs()[:, None, None, None] * readout.abs()
    sizes = [(model.height, model.width), *model.map_sizes()[:-1]]
    for index in range(len(saved) - 1, -1, -1):
        spatial, pointwise, y, layer = saved[index]
        grad = torch.where(y > 0, grad, 0)
        if pointwise is not None:
            grad = torch.einsum("bohw,oc->bchw", grad, pointwise[:, :, 0, 0].abs())
        h, w = sizes[index]
        k, stride = layer.kernel_size, layer.stride
        if index == 0 and k == 5 and stride == 1:
            flipped = fold(layer)[0][::-1, ::-1].transpose(0, 1, 3, 2)
            bound = _winograd_bound(flipped, F.pad(grad, (2, 2, 2, 2)), across=False)
            if bound >= EXACT_LIMIT:
                raise _TooLargeError(f"{model.name}: the transformed gradient: sums reach {bound:.3g} units")
        extra = [
            s + sum(same_padding(s, k, stride)[1:]) - ((g - 1) * stride + k)
            for s, g in zip((h, w), grad.shape[2:], strict=True)
        ]
        groups = 1 if pointwise is None else spatial.shape[0]
        full = F.conv_transpose2d(grad, spatial.abs(), stride=stride, output_padding=extra, groups=groups)
        top, left = same_padding(h, k, stride)[1], same_padding(w, k, stride)[1]
        grad = full[:, :, top : top + h, left : left + w]
        check(grad, unit if index == 0 else 1.0, f"gradient of layer {index}")
    return bool(torch.any(grad != 0))


def _pairs(rng: np.random.Generator, batch: int, models: int) -> Tensor:
    return torch.from_numpy(rng.permutation(np.arange(batch) % models).astype(np.int64))


def exact_inputs(case: Case) -> Inputs:
    """Small integers: every backend has to give the same bits, whatever its order of summation.

    Images are the integer mean plus -1..1; folded weights are sparse integers (multiples of 1080 in a first layer of
    kernel 5 and stride 1, for Winograd); the cotangent holds -2..2 with zeros. That every partial sum is exact in
    float32 is asserted here with the actual values, not assumed.
    """
    for attempt in range(50):
        try:
            inputs = _exact_attempt(case, np.random.default_rng([case.seed, 1080, attempt]))
        except _TooLargeError:
            continue  # draw again
        if inputs is not None:
            return inputs
    raise AssertionError(f"{case}: every draw gave sums too large for float32 or a model without a gradient")


def _exact_attempt(case: Case, rng: np.random.Generator) -> Inputs | None:
    """One draw; None if a model answers no image with a gradient, since a test on it would show nothing."""
    offsets = rng.integers(-1, 2, size=(case.batch, case.height, case.width, 3))
    pixels = (offsets + np.array(INTEGER_MEAN)).astype(np.uint8)
    models = [_exact_model(rng, f"model{i}", s, case.height, case.width) for i, s in enumerate(case.models)]
    cotangent = rng.choice([-2, -1, 0, 1, 2], size=(case.batch, len(models)))
    cotangent[rng.integers(case.batch)] = rng.choice([-2, -1, 1, 2], size=len(models))
    images = torch.from_numpy(offsets.astype(np.float32))
    weight = torch.from_numpy(cotangent.astype(np.float64))
    if not all(_check_exact(model, images.double(), weight[:, n]) for n, model in enumerate(models)):
        return None
    return Inputs(
        torch.from_numpy(pixels), images, ModelBank(models), weight.float(), _pairs(rng, case.batch, len(models))
    )


def _random_model(rng: np.random.Generator, name: str, shape: ModelShape, height: int, width: int) -> CompactWeights:
    """Weights in the ranges of the published models: maps of order 1 behind the first layer, live and dead units."""
    layers: list[LayerWeights] = []
    channels, h, w = 3, height, width

    def normal(*size: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal(size) * scale).astype(np.float32)

    for index, (o, k, stride) in enumerate(zip(shape.filters, shape.kernels, shape.strides, strict=True)):
        fan_in = k * k * 3 if index == 0 else k * k
        variance = 3000.0 if index == 0 else 0.5  # pixels have a standard deviation near 60
        norm = {
            "bias": normal(o, scale=0.1),
            "gamma": rng.uniform(0.5, 1.5, o).astype(np.float32),
            "beta": normal(o, scale=0.3),
            "mean": normal(o, scale=0.1),
            "variance": (variance * rng.uniform(0.5, 2, o)).astype(np.float32),
        }
        if index == 0:
            kernel = normal(k, k, 3, o, scale=fan_in**-0.5)
            layers.append(LayerWeights(stride=stride, epsilon=1e-3, kernel=kernel, **norm))
        else:
            depthwise = normal(k, k, channels, scale=fan_in**-0.5)
            pointwise = normal(channels, o, scale=channels**-0.5)
            layers.append(LayerWeights(stride=stride, epsilon=1e-3, depthwise=depthwise, pointwise=pointwise, **norm))
        channels = o
        h, w = same_padding(h, k, stride)[0], same_padding(w, k, stride)[0]
    readout = normal(h, w, channels, scale=(h * w * channels) ** -0.5)
    return CompactWeights(name, tuple(layers), readout, float(rng.normal()), height, width, IMAGE_MEAN)


def random_inputs(case: Case) -> Inputs:
    """Natural ranges: pixels 0..255 with spatial structure, weights scaled as in the published models."""
    rng = np.random.default_rng([case.seed, 112])
    coarse = rng.uniform(0, 255, size=(case.batch, -(-case.height // 4), -(-case.width // 4), 3))
    smooth = np.kron(coarse, np.ones((1, 4, 4, 1)))[:, : case.height, : case.width]
    pixels = np.clip(smooth + rng.normal(0, 20, size=smooth.shape), 0, 255).astype(np.uint8)
    models = [_random_model(rng, f"model{i}", s, case.height, case.width) for i, s in enumerate(case.models)]
    bank = ModelBank(models)
    images = torch.from_numpy(pixels.astype(np.float32)) - bank.weights[:3]
    cotangent = torch.from_numpy(rng.standard_normal((case.batch, len(models))).astype(np.float32))
    return Inputs(torch.from_numpy(pixels), images, bank, cotangent, _pairs(rng, case.batch, len(models)))


def without_kinks(inputs: Inputs, *, band: float = 2e-6) -> Tensor:
    """Which images keep clear of every ReLU's kink in every model: bool [B].

    Where a pre-activation lies within `band` times the largest one of its map around 0, rounding alone may flip the
    gate, and gradients of two correct programs differ by a whole unit. Those images say nothing about a gradient.
    """
    clear = torch.ones(len(inputs.images), dtype=torch.bool)
    for model in inputs.bank.models:
        x = inputs.images.double().permute(0, 3, 1, 2)
        for layer in model.layers:
            mixing, bias = fold(layer)
            k, stride = layer.kernel_size, layer.stride
            top, bottom = same_padding(x.shape[2], k, stride)[1:]
            left, right = same_padding(x.shape[3], k, stride)[1:]
            x = F.pad(x, (left, right, top, bottom))
            if layer.kernel is not None:
                x = F.conv2d(x, torch.from_numpy(mixing).permute(3, 2, 0, 1), stride=stride)
            else:
                assert layer.depthwise is not None
                depthwise = torch.from_numpy(layer.depthwise.astype(np.float64)).permute(2, 0, 1)[:, None]
                x = F.conv2d(x, depthwise, stride=stride, groups=x.shape[1])
                x = F.conv2d(x, torch.from_numpy(mixing).T[:, :, None, None])
            x = x + torch.from_numpy(bias)[:, None, None]
            size = x.abs()
            clear &= ~(size < band * size.amax(dim=(1, 2, 3), keepdim=True)).flatten(1).any(dim=1)
            x = F.relu(x)
    return clear
