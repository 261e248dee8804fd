"""Input gradient of the model bank, from the maps that the forward left in `maps`. Layouts: see `units.py`.

With a_l the post-ReLU maps, d_l what feeds the products (`MIXING`) of layer l, and g the gradients:

    g(z_l)  = (a_l > 0) * g(a_l),   g(a_last) = cotangent * readout,   g(a_l) = depthwise_(l+1)^T g(d_(l+1))
    g(d_l)  = MIXING_l^T g(z_l)     one kernel per layer: g(z_l) stays in registers
    g(x)    = sum over the models of the taps' planes, g(d_0)[i, j, c] shifted to where tap (i, j) had read

A unit whose cotangent is 0 is left out: it adds nothing, not even 0 * infinity.
"""

import triton
import triton.language as tl

from cortexloop.backends.triton.units import (
    FIELDS,
    GRADIENT,
    HEADS,
    IN_CHANNELS,
    IN_PADDED,
    MIXING,
    OUT_HEIGHT,
    OUT_PADDED,
    OUT_WIDTH,
    OUTPUT,
    PAD_LEFT,
    PAD_TOP,
    READOUT,
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


@triton.jit
def _add_transposed(acc, g, weights, o, outputs, first_row, rows, N: tl.constexpr):
    """acc[p, j] + sum_i g[p, i] * weights[first_row + j, o[i]] for `rows` rows of `outputs` numbers."""
    j = first_row + tl.arange(0, N)
    b = tl.load(weights + j[None, :] * outputs + o[:, None], mask=(j < rows)[None, :], other=0.0)
    return tl.dot(g, b, acc, input_precision="ieee")


@triton.jit
def _store_gradient(acc, out, pixel, inside, n, columns, planes, first_column, FIRST: tl.constexpr, N: tl.constexpr):
    """Columns first_column + j < n of out: channels last, or (FIRST) planes [n, planes] of one tap and colour each."""
    j = first_column + tl.arange(0, N)
    mask = inside[:, None] & (j < n)[None, :]
    if FIRST:
        at = j[None, :] * planes + pixel[:, None]
    else:
        at = pixel[:, None] * columns + j[None, :]
    tl.store(out + at, acc, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _layer_gradient_kernel(
    maps, weights, table, heads, scales, members, pairs, first, count, tiles, layers, models, layer,
    stride: tl.int64, origin: tl.int64, cotangent,
    K: tl.constexpr, STRIDE: tl.constexpr, LAST: tl.constexpr, TAPS: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, PAIRED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g(d_l) of one layer from g(d_(l+1)), or from the readout if LAST. K, STRIDE: of layer l + 1 (LAST: 1 and 1).

    TAPS: K * K * 3 of layer 0, whose result goes to planes [TAPS, h, w]; 0: any other layer.
    The pixels of a tile have equal remainders by STRIDE, so that the taps that reach them are the same for all.
    """
    pid = tl.program_id(0)
    image, model, served = unit_of(pid // tiles, members, pairs, first, count, PAIRED)
    if not served:
        return
    weight = tl.load(cotangent + response_index(image, model, first, models, PAIRED))
    if weight == 0.0:
        return
    row = table + (model * layers + layer) * FIELDS
    height, width, outputs = number(row, OUT_HEIGHT), number(row, OUT_WIDTH), channels(row, OUT_PADDED)
    if TAPS:
        rows = TAPS
        n = TAPS
    else:
        rows = number(row, IN_CHANNELS)
        n = channels(row, IN_PADDED)
    blocks = 1 if REST else tl.cdiv(n, MAIN)
    across = tl.cdiv(tl.cdiv(width, STRIDE), TILE_W)
    tile = pid % tiles
    remainder = tile % (STRIDE * STRIDE)
    tile = tile // (STRIDE * STRIDE)
    first_column = (tile % blocks) * MAIN
    tile = tile // blocks
    if tile >= tl.cdiv(tl.cdiv(height, STRIDE), TILE_H) * across:
        return
    y, x = pixels_of(tile, across, TILE_H, TILE_W)
    y = y * STRIDE + remainder // STRIDE
    x = x * STRIDE + remainder % STRIDE
    inside = (y < height) & (x < width)
    pixel = y * width + x
    unit = maps + unit_start(heads, model, image, stride, origin, PAIRED)
    activity = unit + section(row, OUTPUT)
    mixing = weights + section(row, MIXING)
    if LAST:
        readout = weights + section(heads + model * HEADS, READOUT)
    else:
        above = row + FIELDS
        up_height, up_width = number(above, OUT_HEIGHT), number(above, OUT_WIDTH)
        upper = unit + section(above, GRADIENT)
        spatial = weights + section(above, SPATIAL)
        pad_top, pad_left = number(above, PAD_TOP), number(above, PAD_LEFT)
        first_i = (remainder // STRIDE + pad_top) % STRIDE
        first_j = (remainder % STRIDE + pad_left) % STRIDE
    acc = tl.zeros((TILE_H * TILE_W, MAIN), tl.float32)
    rest = tl.zeros((TILE_H * TILE_W, REST if REST else 16), tl.float32)
    for start in range(0, outputs, BLOCK):
        o = start + tl.arange(0, BLOCK)
        at = pixel[:, None] * outputs + o[None, :]
        if LAST:
            g = weight * tl.load(readout + at, mask=inside[:, None], other=0.0)
        else:
            g = tl.zeros((TILE_H * TILE_W, BLOCK), tl.float32)
            for step_i in range(0, K, STRIDE):
                i = first_i + step_i
                up_y = (y + pad_top - i) // STRIDE
                row_inside = inside & (y + pad_top >= i) & (up_y < tl.where(i < K, up_height, 0))
                for step_j in tl.static_range(0, K, STRIDE):
                    j = first_j + step_j
                    up_x = (x + pad_left - j) // STRIDE
                    mask = row_inside & (x + pad_left >= j) & (up_x < tl.where(j < K, up_width, 0))
                    source = upper + ((up_y * up_width + up_x) * outputs)[:, None] + o[None, :]
                    value = tl.load(source, mask=mask[:, None], other=0.0)
                    taken = tl.where((i < K) & (j < K), outputs, 0)
                    w = tl.load(spatial + (i * K + j) * outputs + o, mask=o < taken, other=0.0)
                    g += value * w[None, :]
        a = tl.load(activity + at, mask=inside[:, None], other=0.0)
        g = tl.where(a > 0.0, g, 0.0)
        acc = _add_transposed(acc, g, mixing, o, outputs, first_column, rows, MAIN)
        if REST:
            rest = _add_transposed(rest, g, mixing, o, outputs, MAIN, rows, REST)
    out = unit + section(row, GRADIENT)
    _store_gradient(acc, out, pixel, inside, n, n, height * width, first_column, TAPS > 0, MAIN)
    if REST:
        _store_gradient(rest, out, pixel, inside, n, n, height * width, MAIN, TAPS > 0, REST)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _image_gradient_kernel(
    maps, weights, table, heads, scales, members, pairs, first, count, tiles, layers, models, layer,
    stride: tl.int64, origin: tl.int64, cotangent, out, height, width,
    K: tl.constexpr, STRIDE: tl.constexpr, ADD: tl.constexpr, PAIRED: tl.constexpr, PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[image] = (ADD: what is there) + sum over the models of the launch, in their order, of g(x).

    K, STRIDE: of layer 0. out: float32 [B, H, W, 3], or [B, 3, H, W] if PLANAR.
    """
    pid = tl.program_id(0)
    image, model, served = unit_of(pid // tiles, members, pairs, first, 1, PAIRED)
    if not served:
        return
    at = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    size = height * width * 3
    x = at % width
    y = (at // width) % height
    c = at // (width * height)
    target = out + (first + image.to(tl.int64)) * size
    if PLANAR:
        target += at
    else:
        target += (y * width + x) * 3 + c
    if ADD:
        total = tl.load(target, mask=at < size, other=0.0)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
    for position in range(0, count):
        if not PAIRED:
            model = tl.load(members + position)
        weight = tl.load(cotangent + response_index(image, model, first, models, PAIRED))
        if weight != 0.0:
            row = table + model * layers * FIELDS
            in_height, in_width = number(row, OUT_HEIGHT), number(row, OUT_WIDTH)
            top = y + number(row, PAD_TOP)
            left = x + number(row, PAD_LEFT)
            planes = maps + unit_start(heads, model, image, stride, origin, PAIRED) + section(row, GRADIENT)
            one = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(K):
                from_y = (top - i) // STRIDE
                row_inside = (at < size) & (top >= i) & ((top - i) % STRIDE == 0) & (from_y < in_height)
                for j in tl.static_range(K):
                    from_x = (left - j) // STRIDE
                    mask = row_inside & (left >= j) & ((left - j) % STRIDE == 0) & (from_x < in_width)
                    plane = (i * K + j) * 3 + c
                    one += tl.load(planes + (plane * in_height + from_y) * in_width + from_x, mask=mask, other=0.0)
            total += one
    tl.store(target, total, mask=at < size)
