"""Folding and packing: from the raw parameters of many models to one float32 buffer and one integer table.

This file is the only place that decides the packed layout; `csrc/include/cortexloop/bank.h` mirrors the field numbers
and the reference backend reads the same sections back. A leaf: NumPy and `cortexloop.weights` only.

Buffer sections start at multiples of 16 floats. "Padded" (`p`) channel counts are multiples of 16 with zeros behind the
real channels, so that every instruction set reads whole vectors and padded channels stay exactly zero.

    buffer[0:3]   image mean (R, G, B)
    spatial       layer 0: full kernel [k, k, 3, Op]; others: depthwise kernel [k, k, Cp]
    pointwise     [C, Op], batch norm folded (layer 0: none)
    bias          [Op], batch norm folded
    winograd      layer 0 with k = 5 and stride 1: kernel transformed along and across rows [8, 6, 3, Op]
    transposed    for the gradient; pointwise transposed [O, Cp]; layer 0: the kernel as [O, k, Tp], Tp = k * 3 padded
    winograd_transposed   for the gradient of a layer 0 with a winograd section, in place of `transposed`: the
                  kernel flipped along x and transformed [8, O, 16], 15 columns (row, colour) and a zero
    pairs         pointwise in bfloat16, channel pairs interleaved: [ceil(C / 2), Op, 2], two to a float slot
    pixel_pairs   depthwise kernel of a stride-2 layer in bfloat16, pixel pairs interleaved: [k, (k + 1) / 2, Cp, 2];
                  the first pair starts at the even map column at or before the first tap of an output pixel
    readout       [H_last, W_last, Op]
    readout_bias  [1]
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from cortexloop.weights import CompactWeights, LayerWeights, same_padding

LANES = 16


class ModelField(IntEnum):
    """Columns of a table row that describe the model; the layers' columns follow."""

    DEPTH = 0
    HEIGHT = 1
    WIDTH = 2
    READOUT = 3
    READOUT_BIAS = 4
    COST = 5  # multiply-adds per image, for scheduling


class LayerField(IntEnum):
    """Columns of one layer; layer l starts at column `len(ModelField) + l * len(LayerField)`. -1: section absent."""

    KERNEL_SIZE = 0
    STRIDE = 1
    IN_CHANNELS = 2
    OUT_CHANNELS = 3
    OUT_HEIGHT = 4
    OUT_WIDTH = 5
    PAD_TOP = 6
    PAD_LEFT = 7
    SPATIAL = 8
    POINTWISE = 9
    BIAS = 10
    TRANSPOSED = 11
    WINOGRAD = 12
    PAIRS = 13
    WINOGRAD_TRANSPOSED = 14
    PIXEL_PAIRS = 15


def padded(channels: int) -> int:
    """Channel count rounded up to whole vectors."""
    return -(-channels // LANES) * LANES


def fold(layer: LayerWeights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fold batch norm in float64: (full kernel [k, k, 3, O] or pointwise [C, O], bias [O]).

    y = gamma * (W x + b - mean) / sqrt(variance + eps) + beta = (s W) x + (b - mean) s + beta, s = gamma / sqrt(...).
    """
    scale = layer.gamma.astype(np.float64) / np.sqrt(layer.variance.astype(np.float64) + layer.epsilon)
    mixing = layer.kernel if layer.kernel is not None else layer.pointwise
    assert mixing is not None
    bias = (layer.bias.astype(np.float64) - layer.mean.astype(np.float64)) * scale + layer.beta.astype(np.float64)
    return mixing.astype(np.float64) * scale, bias


WINOGRAD_ALONG = (0.0, 1.0, -1.0, np.inf, 2.0, -2.0, 0.5, -0.5)
WINOGRAD_ACROSS = (0.0, 1.0, -1.0, 2.0, -2.0, np.inf)
"""Interpolation points along image rows (4 outputs of a 5-tap kernel) and across them (2 outputs)."""


def winograd_matrix(points: Sequence[float]) -> NDArray[np.float64]:
    """The Toom-Cook kernel transform G [points, 5] of y = A^T ((G w) * (B^T x)), for 5 taps.

    A^T and B^T are in the C++ kernels. Kernels are transformed in float64; weights that are multiples of 1080 transform
    to short binary fractions for the points used here, which the exact tests rely on.
    """
    g = np.zeros((len(points), 5))
    for row, a in zip(g, points, strict=True):
        if np.isinf(a):
            row[4] = 1.0
        else:
            row[:] = a ** np.arange(5) / np.prod([a - b for b in points if b != a and np.isfinite(b)])
    return g


def to_bfloat16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16, ties to even, as bit patterns."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _bfloat16_pairs(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """[..., 2 n, C] in bfloat16, neighbours along the last but one axis interleaved: [..., n, C] float slots."""
    bits = to_bfloat16_bits(x.astype(np.float32)).reshape(*x.shape[:-2], -1, 2, x.shape[-1])
    return np.ascontiguousarray(bits.swapaxes(-1, -2)).view(np.float32)[..., 0]


class _Buffer:
    """Sections appended one after the other, each at a multiple of LANES floats."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.float32]] = []
        self.size = 0

    def add(self, values: NDArray[np.floating] | Sequence[float]) -> int:
        flat = np.ascontiguousarray(values, dtype=np.float32).ravel()
        offset = self.size
        self.parts.append(np.pad(flat, (0, padded(flat.size) - flat.size)))
        self.size += padded(flat.size)
        return offset

    def array(self) -> NDArray[np.float32]:
        return np.concatenate(self.parts)


def _pad_last(x: NDArray[np.float64]) -> NDArray[np.float64]:
    width = [(0, 0)] * (x.ndim - 1) + [(0, padded(x.shape[-1]) - x.shape[-1])]
    return np.pad(x, width)


def _pack_layer(buffer: _Buffer, layer: LayerWeights, height: int, width: int) -> tuple[dict[LayerField, int], int]:
    """Append one layer's sections; return its table fields and its multiply-adds."""
    k, stride, c, o = layer.kernel_size, layer.stride, layer.in_channels, layer.out_channels
    out_h, pad_top, _ = same_padding(height, k, stride)
    out_w, pad_left, _ = same_padding(width, k, stride)
    mixing, bias = fold(layer)
    f = LayerField
    fields = {
        f.KERNEL_SIZE: k,
        f.STRIDE: stride,
        f.IN_CHANNELS: c,
        f.OUT_CHANNELS: o,
        f.OUT_HEIGHT: out_h,
        f.OUT_WIDTH: out_w,
        f.PAD_TOP: pad_top,
        f.PAD_LEFT: pad_left,
        f.BIAS: buffer.add(_pad_last(bias)),
        f.POINTWISE: -1,
        f.TRANSPOSED: -1,
        f.WINOGRAD: -1,
        f.WINOGRAD_TRANSPOSED: -1,
        f.PIXEL_PAIRS: -1,
        f.PAIRS: -1,
    }
    if layer.kernel is not None:
        fields[f.SPATIAL] = buffer.add(_pad_last(mixing))
        if k == 5 and stride == 1:
            along, across = winograd_matrix(WINOGRAD_ALONG), winograd_matrix(WINOGRAD_ACROSS)
            tiles = np.einsum("pj,qi,ijco->pqco", along, across, mixing)
            fields[f.WINOGRAD] = buffer.add(_pad_last(tiles))
            columns = np.einsum("pj,ijco->poic", along, mixing[:, ::-1]).reshape(len(along), o, 15)
            fields[f.WINOGRAD_TRANSPOSED] = buffer.add(_pad_last(columns))
        else:
            taps = mixing.transpose(3, 0, 1, 2).reshape(o, k, k * 3)
            fields[f.TRANSPOSED] = buffer.add(_pad_last(taps))
        macs = out_h * out_w * k * k * 3 * o
    else:
        assert layer.depthwise is not None
        fields[f.SPATIAL] = buffer.add(_pad_last(layer.depthwise.astype(np.float64)))
        fields[f.POINTWISE] = buffer.add(_pad_last(mixing))
        fields[f.TRANSPOSED] = buffer.add(_pad_last(mixing.T))
        even = np.pad(_pad_last(mixing), ((0, c % 2), (0, 0)))
        fields[f.PAIRS] = buffer.add(_bfloat16_pairs(even[None]))
        if stride == 2:
            columns = _pad_last(layer.depthwise.astype(np.float64))
            before = pad_left % 2
            taps = np.pad(columns, ((0, 0), (before, 1 - before), (0, 0)))
            fields[f.PIXEL_PAIRS] = buffer.add(_bfloat16_pairs(taps))
        macs = out_h * out_w * c * (k * k + o)
    return fields, macs


def pack(models: Sequence[CompactWeights]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pack models of one input size and image mean: (buffer float32 [n], table int64 [N, fields]).

    Raises:
        ValueError: no models, or models of different input sizes or image means.
    """
    if not models:
        raise ValueError("a bank needs at least one model, got none")
    first = models[0]
    for model in models[1:]:
        if (model.height, model.width) != (first.height, first.width):
            raise ValueError(
                f"all models of a bank take images of one size: {first.name!r} takes {first.height} x {first.width}, "
                f"{model.name!r} takes {model.height} x {model.width}; make one bank per size"
            )
        if model.image_mean != first.image_mean:
            raise ValueError(
                f"all models of a bank share one image mean: {first.name!r} has {first.image_mean}, "
                f"{model.name!r} has {model.image_mean}; make one bank per mean"
            )
    buffer = _Buffer()
    buffer.add(first.image_mean)
    depth = max(len(m.layers) for m in models)
    table = np.zeros((len(models), len(ModelField) + depth * len(LayerField)), dtype=np.int64)
    for row, model in zip(table, models, strict=True):
        h, w = model.height, model.width
        cost = 0
        for index, layer in enumerate(model.layers):
            fields, macs = _pack_layer(buffer, layer, h, w)
            start = len(ModelField) + index * len(LayerField)
            for field, value in fields.items():
                row[start + field] = value
            h, w = fields[LayerField.OUT_HEIGHT], fields[LayerField.OUT_WIDTH]
            cost += macs
        m = ModelField
        row[m.DEPTH], row[m.HEIGHT], row[m.WIDTH] = len(model.layers), model.height, model.width
        row[m.READOUT] = buffer.add(_pad_last(model.readout.astype(np.float64)))
        row[m.READOUT_BIAS] = buffer.add([model.readout_bias])
        row[m.COST] = cost + model.readout.size
    return buffer.array(), table


def layer_fields(row: Sequence[int] | NDArray[np.int64], layer: int) -> dict[LayerField, int]:
    """The fields of one layer of a table row."""
    start = len(ModelField) + layer * len(LayerField)
    return {field: int(row[start + field]) for field in LayerField}
