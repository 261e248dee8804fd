"""Forward of the model bank: recentred images, first layer, separable layers, readout. Layouts: see `units.py`."""

import triton
import triton.language as tl

from cortexloop.backends.triton.layout import Scale
from cortexloop.backends.triton.units import (
    BIAS,
    FIELDS,
    HEADS,
    IN_CHANNELS,
    IN_HEIGHT,
    IN_PADDED,
    IN_WIDTH,
    INPUT,
    LAST_MAP,
    LAST_SIZE,
    MIXING,
    OUT_HEIGHT,
    OUT_PADDED,
    OUT_WIDTH,
    OUTPUT,
    PAD_LEFT,
    PAD_TOP,
    READOUT,
    READOUT_BIAS,
    SPATIAL,
    UNSPECIALISED,
    channels,
    number,
    pixels_of,
    response_index,
    section,
    unit_of,
    unit_start,
)

SCALES = tl.constexpr(len(Scale))
SPREAD = tl.constexpr(int(Scale.SPREAD))
WEIGHTS = tl.constexpr(int(Scale.WEIGHTS))
RESULT = tl.constexpr(int(Scale.RESULT))
MAP = tl.constexpr(int(Scale.MAP))
LAST = tl.constexpr(int(Scale.LAST))


@triton.jit(do_not_specialize=[*UNSPECIALISED, "blocks"])
def _recentre_kernel(
    images, weights, out, first, height, width, top, left, rows, columns, blocks,
    PIXELS: tl.constexpr, PLANAR: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i, y, x, c] = image first + i, recentred, with zeros around it (zero padding follows recentring).

    images: [B, H, W, 3], or [B, 3, H, W] if PLANAR; PIXELS: uint8, from which weights[0:3], the mean, is subtracted.
    out: [round, rows, columns, DEPTH]; the image lies at (top, left), numbers beyond the three colours are 0.
    """
    pid = tl.program_id(0)
    image = (pid // blocks).to(tl.int64)
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    c = at % DEPTH
    x = (at // DEPTH) % columns - left
    y = at // (DEPTH * columns) - top
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (c < 3)
    if PLANAR:
        offset = (c * height + y) * width + x
    else:
        offset = (y * width + x) * 3 + c
    value = tl.load(images + (first + image) * (height * width * 3) + offset, mask=inside, other=0).to(tl.float32)
    if PIXELS:
        value = tl.where(inside, value - tl.load(weights + c, mask=c < 3, other=0.0), 0.0)
    size = rows * columns * DEPTH
    tl.store(out + image * size + at, value.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _add_product(acc, a, weights, row, inputs, columns, first_column, scale, FAST: tl.constexpr, N: tl.constexpr):
    """acc[p, j] + sum_i a[p, i] * weights[row[i], first_column + j] for `inputs` rows of `columns` numbers."""
    j = first_column + tl.arange(0, N)
    mask = (row < inputs)[:, None] & (j < columns)[None, :]
    b = tl.load(weights + row[:, None] * columns + j[None, :], mask=mask, other=0.0)
    if FAST:
        acc = tl.dot(a, (b * scale).to(tl.float16), acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _store_activity(
    acc, out, bias, pixel, inside, columns, first_column, result, scale, FAST: tl.constexpr, N: tl.constexpr
):
    """out[pixel[p], first_column + j] = max(0, acc[p, j] + bias[j]); NaN stays NaN."""
    j = first_column + tl.arange(0, N)
    b = tl.load(bias + j, mask=j < columns, other=0.0)
    if FAST:
        z = acc * result + (b * scale)[None, :]
    else:
        z = acc + b[None, :]
    z = tl.where(z < 0.0, 0.0, z)
    mask = inside[:, None] & (j < columns)[None, :]
    tl.store(out + pixel[:, None] * columns + j[None, :], z.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _first_layer_kernel(
    maps, weights, table, heads, scales, members, pairs, first, count, tiles, layers, models, layer,
    stride: tl.int64, origin: tl.int64, images, top, left, rows, columns,
    DEPTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    FAST: tl.constexpr, PAIRED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a[y, x, o] = max(0, bias[o] + sum_ijc kernel[i, j, c, o] * image[STRIDE * y + i - pad, STRIDE * x + j - pad, c]).

    A matrix product over the taps: K rows of K * DEPTH neighbouring numbers of the bordered image.
    images: [round, rows, columns, DEPTH] from `_recentre_kernel`. DEPTH is 3, or 4 for float16: pixels of 8 bytes load
    at once, and tensor cores have time for products with 0.
    """
    pid = tl.program_id(0)
    image, model, served = unit_of(pid // tiles, members, pairs, first, count, PAIRED)
    if not served:
        return
    row = table + model * layers * FIELDS
    height, width, n = number(row, OUT_HEIGHT), number(row, OUT_WIDTH), channels(row, OUT_PADDED)
    blocks = 1 if REST else tl.cdiv(n, MAIN)
    across = tl.cdiv(width, TILE_W)
    tile = pid % tiles
    first_column = (tile % blocks) * MAIN
    tile = tile // blocks
    if tile >= tl.cdiv(height, TILE_H) * across:
        return
    y, x = pixels_of(tile, across, TILE_H, TILE_W)
    inside = (y < height) & (x < width)
    corner = ((y * STRIDE + top - number(row, PAD_TOP)) * columns + x * STRIDE + left - number(row, PAD_LEFT)) * DEPTH
    source = images + image.to(tl.int64) * (rows * columns * DEPTH)
    mixing = weights + section(row, MIXING)
    scale = 1.0
    result = 1.0
    gain = 1.0
    if FAST:
        model_scales = scales + model * layers * SCALES
        scale = tl.load(model_scales + WEIGHTS)
        result = tl.load(model_scales + RESULT)
        gain = tl.load(model_scales + MAP)
    acc = tl.zeros((TILE_H * TILE_W, MAIN), tl.float32)
    rest = tl.zeros((TILE_H * TILE_W, REST if REST else 16), tl.float32)
    for start in range(0, K * K * DEPTH, BLOCK):
        tap = start + tl.arange(0, BLOCK)
        offset = (tap // (K * DEPTH)) * (columns * DEPTH) + tap % (K * DEPTH)
        mask = inside[:, None] & (tap < K * K * DEPTH)[None, :]
        a = tl.load(source + corner[:, None] + offset[None, :], mask=mask, other=0.0)
        taken = tl.where(tap % DEPTH < 3, (tap // DEPTH) * 3 + tap % DEPTH, K * K * 3)
        acc = _add_product(acc, a, mixing, taken, K * K * 3, n, first_column, scale, FAST, MAIN)
        if REST:
            rest = _add_product(rest, a, mixing, taken, K * K * 3, n, MAIN, scale, FAST, REST)
    out = maps + unit_start(heads, model, image, stride, origin, PAIRED) + section(row, OUTPUT)
    bias = weights + section(row, BIAS)
    pixel = y * width + x
    _store_activity(acc, out, bias, pixel, inside, n, first_column, result, gain, FAST, MAIN)
    if REST:
        _store_activity(rest, out, bias, pixel, inside, n, MAIN, result, gain, FAST, REST)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _separable_layer_kernel(
    maps, weights, table, heads, scales, members, pairs, first, count, tiles, layers, models, layer,
    stride: tl.int64, origin: tl.int64,
    K: tl.constexpr, STRIDE: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, FAST: tl.constexpr,
    PAIRED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a[y, x, o] = max(0, bias[o] + sum_c pointwise[c, o] * d[y, x, c]),
    d[y, x, c] = sum_ij depthwise[i, j, c] * input[STRIDE * y + i - pad, STRIDE * x + j - pad, c].

    d stays in registers, BLOCK channels at a time.
    """
    pid = tl.program_id(0)
    image, model, served = unit_of(pid // tiles, members, pairs, first, count, PAIRED)
    if not served:
        return
    row = table + (model * layers + layer) * FIELDS
    height, width, n = number(row, OUT_HEIGHT), number(row, OUT_WIDTH), channels(row, OUT_PADDED)
    blocks = 1 if REST else tl.cdiv(n, MAIN)
    across = tl.cdiv(width, TILE_W)
    tile = pid % tiles
    first_column = (tile % blocks) * MAIN
    tile = tile // blocks
    if tile >= tl.cdiv(height, TILE_H) * across:
        return
    y, x = pixels_of(tile, across, TILE_H, TILE_W)
    inside = (y < height) & (x < width)
    in_height, in_width = number(row, IN_HEIGHT), number(row, IN_WIDTH)
    inputs, in_padded = number(row, IN_CHANNELS), channels(row, IN_PADDED)
    top = y * STRIDE - number(row, PAD_TOP)
    left = x * STRIDE - number(row, PAD_LEFT)
    unit = maps + unit_start(heads, model, image, stride, origin, PAIRED)
    source = unit + section(row, INPUT)
    spatial = weights + section(row, SPATIAL)
    mixing = weights + section(row, MIXING)
    spread = 1.0
    scale = 1.0
    result = 1.0
    gain = 1.0
    if FAST:
        model_scales = scales + (model * layers + layer) * SCALES
        spread = tl.load(model_scales + SPREAD)
        scale = tl.load(model_scales + WEIGHTS)
        result = tl.load(model_scales + RESULT)
        gain = tl.load(model_scales + MAP)
    acc = tl.zeros((TILE_H * TILE_W, MAIN), tl.float32)
    rest = tl.zeros((TILE_H * TILE_W, REST if REST else 16), tl.float32)
    for start in range(0, in_padded, BLOCK):
        c = start + tl.arange(0, BLOCK)
        d = tl.zeros((TILE_H * TILE_W, BLOCK), tl.float32)
        for i in range(K):
            row_inside = inside & (top + i >= 0) & (top + i < in_height)
            taps = source + (((top + i) * in_width + left) * in_padded)[:, None] + c[None, :]
            for j in tl.static_range(K):
                mask = row_inside & (left + j >= 0) & (left + j < in_width)
                value = tl.load(taps + j * in_padded, mask=mask[:, None], other=0.0)
                w = tl.load(spatial + (i * K + j) * in_padded + c)
                d += value.to(tl.float32) * w[None, :]
        if FAST:
            a = (d * spread).to(tl.float16)
        else:
            a = d
        acc = _add_product(acc, a, mixing, c, inputs, n, first_column, scale, FAST, MAIN)
        if REST:
            rest = _add_product(rest, a, mixing, c, inputs, n, MAIN, scale, FAST, REST)
    out = unit + section(row, OUTPUT)
    bias = weights + section(row, BIAS)
    pixel = y * width + x
    _store_activity(acc, out, bias, pixel, inside, n, first_column, result, gain, FAST, MAIN)
    if REST:
        _store_activity(rest, out, bias, pixel, inside, n, MAIN, result, gain, FAST, REST)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _readout_kernel(
    maps, weights, table, heads, scales, members, pairs, first, count, tiles, layers, models, layer,
    stride: tl.int64, origin: tl.int64, out,
    FAST: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[unit] = readout_bias + sum readout * last map; each lane sums every BLOCK-th number, then the lanes."""
    image, model, served = unit_of(tl.program_id(0), members, pairs, first, count, PAIRED)
    if not served:
        return
    head = heads + model * HEADS
    last = maps + unit_start(heads, model, image, stride, origin, PAIRED) + section(head, LAST_MAP)
    readout = weights + section(head, READOUT)
    size = number(head, LAST_SIZE)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(last + at, mask=at < size, other=0.0).to(tl.float32)
        acc += value * tl.load(readout + at, mask=at < size, other=0.0)
    total = tl.sum(acc, axis=0)
    if FAST:
        total *= tl.load(scales + model * layers * SCALES + LAST)
    total += tl.load(weights + tl.load(head + READOUT_BIAS))
    tl.store(out + response_index(image, model, first, models, PAIRED), total)
