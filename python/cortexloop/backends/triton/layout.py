"""Where everything lies that the Triton kernels read and write. Imports no Triton.

A unit is one image with one model. Its maps lie one after the other, channels last, channels padded to multiples of 16
with zeros. Offsets count numbers, from the start of the packed weights or of the unit's maps.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from cortexloop.packing import LANES, LayerField, ModelField, layer_fields, padded
from cortexloop.weights import KERNEL_SIZES, STRIDES, same_padding

LARGEST = 2**31
"""Offsets within a map are int32."""


class Field(IntEnum):
    """Columns of one layer of one model in the device table."""

    IN_HEIGHT = 0
    IN_WIDTH = 1
    IN_CHANNELS = 2
    IN_PADDED = 3
    OUT_HEIGHT = 4
    OUT_WIDTH = 5
    OUT_PADDED = 6
    PAD_TOP = 7
    PAD_LEFT = 8
    SPATIAL = 9  # weights: depthwise kernel [k, k, IN_PADDED]
    MIXING = 10  # weights: [inputs, OUT_PADDED]: pointwise kernel; first layer: full kernel, inputs (row, column, RGB)
    BIAS = 11  # weights: [OUT_PADDED]
    INPUT = 12  # maps: [in_h, in_w, IN_PADDED]; none in the first layer
    OUTPUT = 13  # maps: post-ReLU, [out_h, out_w, OUT_PADDED]
    GRADIENT = 14  # maps: of what feeds MIXING, [out_h, out_w, IN_PADDED]; first layer: planes [inputs, out_h, out_w]


class Head(IntEnum):
    """Columns of one model in the device table."""

    UNIT = 0  # where the model's maps begin among those of all models for one image
    LAST_MAP = 1  # maps
    LAST_SIZE = 2
    READOUT = 3  # weights
    READOUT_BIAS = 4  # weights


class Scale(IntEnum):
    """Powers of two of one layer of one model: they keep float16 in range and change no digit.

    A stored map is MAP times the true one. What feeds the product is multiplied by SPREAD and the product's weights by
    WEIGHTS; RESULT undoes both and the input's MAP, and applies MAP. LAST: 1 / MAP of the last layer, in every row.
    """

    SPREAD = 0
    WEIGHTS = 1
    RESULT = 2
    MAP = 3
    LAST = 4


def _layer_reason(row: NDArray[np.int64], index: int, height: int, width: int, channels: int) -> str | None:
    """Why the kernels do not take this layer; its input has the given size."""
    f = layer_fields(row, index)
    k, stride, out = f[LayerField.KERNEL_SIZE], f[LayerField.STRIDE], f[LayerField.OUT_CHANNELS]
    if k not in KERNEL_SIZES or stride not in STRIDES:
        return f"has a kernel of size {k} and a stride of {stride}, the kernels take {KERNEL_SIZES} and {STRIDES}"
    if f[LayerField.IN_CHANNELS] != channels or out < 1:
        return f"has {f[LayerField.IN_CHANNELS]} input and {out} output channels behind {channels}"
    out_h, top, _ = same_padding(height, k, stride)
    out_w, left, _ = same_padding(width, k, stride)
    found = tuple(f[LayerField[name]] for name in ("OUT_HEIGHT", "OUT_WIDTH", "PAD_TOP", "PAD_LEFT"))
    if found != (out_h, out_w, top, left):
        return 'does not have "same" padding'
    widest = max(padded(out), k * k * 3 if index == 0 else padded(channels))
    if out_h * out_w * widest >= LARGEST:
        size = f"{out_h} x {out_w} x {widest}"
        return f"has maps of {size} numbers, the kernels take fewer than {LARGEST}; use smaller images"
    return None


def unsupported_table(table: NDArray[np.int64]) -> str | None:
    """None where the kernels take the models of a table [N, columns], else one sentence why not."""
    size = int(table[0, ModelField.HEIGHT]), int(table[0, ModelField.WIDTH])
    for n, row in enumerate(table):
        depth = int(row[ModelField.DEPTH])
        if not 1 <= depth <= (len(row) - len(ModelField)) // len(LayerField):
            return f"model {n} has {depth} layers, which its table row cannot hold"
        height, width, channels = int(row[ModelField.HEIGHT]), int(row[ModelField.WIDTH]), 3
        if (height, width) != size or min(size) < 1:
            return f"model {n} takes images of {height} x {width}, the first model of {size[0]} x {size[1]}"
        if (height + 8) * (width + 8) * 4 >= LARGEST:  # with the zeros around it
            return f"images of {height} x {width} pixels are too large for the Triton kernels; use smaller images"
        for index in range(depth):
            reason = _layer_reason(row, index, height, width, channels)
            if reason is not None:
                return f"layer {index} of model {n} {reason}"
            f = layer_fields(row, index)
            height, width = f[LayerField.OUT_HEIGHT], f[LayerField.OUT_WIDTH]
            channels = f[LayerField.OUT_CHANNELS]
    return None


def _up(numbers: int) -> int:
    return -(-numbers // LANES) * LANES


def lay_out(table: NDArray[np.int64], *, gradient: bool) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int], int]:
    """Lay out the maps of every model.

    Args:
        table: packed table that `unsupported_table` takes.
        gradient: with room for the gradients.

    Returns:
        (layers int64 [N, layers, Field], heads int64 [N, Head], numbers per unit [N], numbers of weights referred to).

    Raises:
        ValueError: a section of negative offset.
    """
    depth = int(table[:, ModelField.DEPTH].max())
    layers = np.full((len(table), depth, len(Field)), -1, dtype=np.int64)
    heads = np.zeros((len(table), len(Head)), dtype=np.int64)
    sizes: list[int] = []
    extent = 3

    def used(offset: int, size: int) -> int:
        nonlocal extent
        if offset < 0:
            raise ValueError(f"the table refers to section {offset} of the weights; it was not made by this version")
        extent = max(extent, offset + size)
        return offset

    for n, row in enumerate(table):
        height, width, channels = int(row[ModelField.HEIGHT]), int(row[ModelField.WIDTH]), 3
        end, previous = 0, -1
        for index in range(int(row[ModelField.DEPTH])):
            packed, f = layer_fields(row, index), layers[n, index]
            k, out_h, out_w = (packed[LayerField[name]] for name in ("KERNEL_SIZE", "OUT_HEIGHT", "OUT_WIDTH"))
            out_p, inputs = padded(packed[LayerField.OUT_CHANNELS]), k * k * 3 if index == 0 else channels
            f[Field.IN_HEIGHT], f[Field.IN_WIDTH], f[Field.IN_CHANNELS] = height, width, channels
            f[Field.IN_PADDED], f[Field.OUT_PADDED] = padded(channels), out_p
            f[Field.OUT_HEIGHT], f[Field.OUT_WIDTH] = out_h, out_w
            f[Field.PAD_TOP], f[Field.PAD_LEFT] = packed[LayerField.PAD_TOP], packed[LayerField.PAD_LEFT]
            if index > 0:
                f[Field.SPATIAL] = used(packed[LayerField.SPATIAL], k * k * padded(channels))
            mixing = packed[LayerField.SPATIAL if index == 0 else LayerField.POINTWISE]
            f[Field.MIXING] = used(mixing, inputs * out_p)
            f[Field.BIAS] = used(packed[LayerField.BIAS], out_p)
            f[Field.INPUT], f[Field.OUTPUT] = previous, end
            previous = end
            end += out_h * out_w * out_p
            if gradient:
                f[Field.GRADIENT] = end
                end += _up(out_h * out_w * (inputs if index == 0 else padded(channels)))
            height, width, channels = out_h, out_w, packed[LayerField.OUT_CHANNELS]
        last = height * width * padded(channels)
        heads[n, Head.UNIT], heads[n, Head.LAST_MAP], heads[n, Head.LAST_SIZE] = sum(sizes), previous, last
        heads[n, Head.READOUT] = used(int(row[ModelField.READOUT]), last)
        heads[n, Head.READOUT_BIAS] = used(int(row[ModelField.READOUT_BIAS]), 1)
        sizes.append(end)
    return layers, heads, sizes, extent


PIXEL_BOUND = 256.0
FLOAT16_BOUND = 2.0**15
LARGEST_SHIFT = 24


def _fit(bound: float) -> float:
    """The power of two that brings `bound` just below FLOAT16_BOUND; beyond 2^+-24 float16 may overflow or round."""
    if bound <= 0:
        return 1.0
    return float(2.0 ** np.clip(np.floor(np.log2(FLOAT16_BOUND / bound)), -LARGEST_SHIFT, LARGEST_SHIFT))


def float16_scales(
    table: NDArray[np.int64], layers: NDArray[np.int64], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scales [N, layers, Scale] from bounds of every map: no image of pixels, recentred, can overflow float16.

    The bounds are intervals carried through the layers: for the largest and smallest value of each channel, every input
    at the end of its interval that is worst. Images beyond -256..256 may reach infinity, which the response then shows.
    """
    scales = np.ones((*layers.shape[:2], len(Scale)), dtype=np.float64)
    for n, row in enumerate(table):
        low, high = np.full(3, -PIXEL_BOUND), np.full(3, PIXEL_BOUND)
        before = 1.0
        depth = int(row[ModelField.DEPTH])
        for index in range(depth):
            f, scale = layers[n, index], scales[n, index]
            k, channels = int(layer_fields(row, index)[LayerField.KERNEL_SIZE]), int(f[Field.IN_CHANNELS])
            out_p, in_p = int(f[Field.OUT_PADDED]), int(f[Field.IN_PADDED])
            if index > 0:
                spatial = (
                    weights[f[Field.SPATIAL] :][: k * k * in_p].reshape(k * k, in_p)[:, :channels].astype(np.float64)
                )
                ends = spatial * low, spatial * high
                low, high = np.minimum(*ends).sum(axis=0), np.maximum(*ends).sum(axis=0)
                scale[Scale.SPREAD] = _fit(before * float(np.maximum(-low, high).max()))
            else:
                low, high = np.tile(low, k * k), np.tile(high, k * k)
            mixing = weights[f[Field.MIXING] :][: len(low) * out_p].reshape(-1, out_p).astype(np.float64)
            bias = weights[f[Field.BIAS] :][:out_p].astype(np.float64)
            high = np.maximum(mixing * low[:, None], mixing * high[:, None]).sum(axis=0) + bias
            high = np.maximum(high, 0)[: int(layer_fields(row, index)[LayerField.OUT_CHANNELS])]
            low = np.zeros_like(high)
            scale[Scale.WEIGHTS] = _fit(float(np.abs(mixing).max()) * FLOAT16_BOUND)
            scale[Scale.MAP] = _fit(float(high.max()))
            scale[Scale.RESULT] = scale[Scale.MAP] / (scale[Scale.SPREAD] * scale[Scale.WEIGHTS] * before)
            before = scale[Scale.MAP]
        scales[n, :, Scale.LAST] = 1 / before
    return scales.astype(np.float32)
