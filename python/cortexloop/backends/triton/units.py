"""What the Triton kernels share: which unit a program works on, reading the tables, blocks of a product.

A unit is one image of the round with one model. Its maps lie one after the other in `maps`, channels last, channels
padded to multiples of 16 with zeros. A program computes a tile of pixels of one unit:

    product   unit = image * count + position; `members` int32 [count] lists the models of the launch
    PAIRED    unit = image; its model is pairs[first + image]; `members` int32 [N] marks the models the launch serves

so that one launch serves models of different sizes and channel counts. Kernel size, stride and blocks of channels are
compiled in; models that differ there come in launches of their own. Programs beyond their model's tiles return at once.

    maps      float32 (FAST: float16) [image of the round, stride]; int64 between units, int32 within one
    table     int64 [N, layers, Field]; heads: int64 [N, Head]; scales: float32 [N, layers, Scale] (see `layout.py`)
    pairs     int64 [B]; first: number of the round's first image in the batch
    count     models of the launch (pairs: 1); tiles: programs per unit; layers: layers in the table; models: N
    layer     the layer computed; stride: numbers of maps per image; origin: the first model's UNIT
"""

import triton
import triton.language as tl

from cortexloop.backends.triton.layout import Field, Head

UNSPECIALISED = [
    "first", "count", "tiles", "layers", "models", "layer",
    "height", "width", "top", "left", "rows", "columns",
]  # fmt: skip
"""Arguments whose value should not make Triton compile again."""

FIELDS = tl.constexpr(len(Field))
IN_HEIGHT = tl.constexpr(int(Field.IN_HEIGHT))
IN_WIDTH = tl.constexpr(int(Field.IN_WIDTH))
IN_CHANNELS = tl.constexpr(int(Field.IN_CHANNELS))
IN_PADDED = tl.constexpr(int(Field.IN_PADDED))
OUT_HEIGHT = tl.constexpr(int(Field.OUT_HEIGHT))
OUT_WIDTH = tl.constexpr(int(Field.OUT_WIDTH))
OUT_PADDED = tl.constexpr(int(Field.OUT_PADDED))
PAD_TOP = tl.constexpr(int(Field.PAD_TOP))
PAD_LEFT = tl.constexpr(int(Field.PAD_LEFT))
SPATIAL = tl.constexpr(int(Field.SPATIAL))
MIXING = tl.constexpr(int(Field.MIXING))
BIAS = tl.constexpr(int(Field.BIAS))
INPUT = tl.constexpr(int(Field.INPUT))
OUTPUT = tl.constexpr(int(Field.OUTPUT))
GRADIENT = tl.constexpr(int(Field.GRADIENT))

HEADS = tl.constexpr(len(Head))
UNIT = tl.constexpr(int(Head.UNIT))
LAST_MAP = tl.constexpr(int(Head.LAST_MAP))
LAST_SIZE = tl.constexpr(int(Head.LAST_SIZE))
READOUT = tl.constexpr(int(Head.READOUT))
READOUT_BIAS = tl.constexpr(int(Head.READOUT_BIAS))


@triton.jit
def unit_of(unit, members, pairs, first, count, PAIRED: tl.constexpr):
    """(image of the round, model, whether the launch serves this model)."""
    if PAIRED:
        image = unit
        model = tl.load(pairs + first + unit).to(tl.int32)
        served = tl.load(members + model) != 0
    else:
        image = unit // count
        model = tl.load(members + unit % count)
        served = count > 0
    return image, model, served


@triton.jit
def unit_start(heads, model, image, stride, origin, PAIRED: tl.constexpr):
    """Where the unit's maps begin, int64, a multiple of 16."""
    start = image.to(tl.int64) * stride
    if not PAIRED:
        start += tl.load(heads + model * HEADS + UNIT) - origin
    return tl.multiple_of(start, 16)


@triton.jit
def number(row, FIELD: tl.constexpr):
    """A size in the table."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def channels(row, FIELD: tl.constexpr):
    """A padded channel count in the table."""
    return tl.multiple_of(tl.load(row + FIELD).to(tl.int32), 16)


@triton.jit
def section(row, FIELD: tl.constexpr):
    """The offset of a section or map in the table, int64."""
    return tl.multiple_of(tl.load(row + FIELD), 16)


@triton.jit
def pixels_of(tile, across, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns [TILE_H * TILE_W] of a tile's pixels; `across`: tiles side by side."""
    p = tl.arange(0, TILE_H * TILE_W)
    return (tile // across) * TILE_H + p // TILE_W, (tile % across) * TILE_W + p % TILE_W


@triton.jit
def response_index(image, model, first, models, PAIRED: tl.constexpr):
    """Where the unit's response and cotangent are in [B, N], or [B] with pairs."""
    index = first + image.to(tl.int64)
    if not PAIRED:
        index = index * models + model
    return index
