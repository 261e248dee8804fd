"""The kernel of streaming moments: one launch per batch, every number updated by one program."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["images", "neurons", "sample"])
def _feature_moments_kernel(
    features_ptr, weights_ptr, centred_ptr, shift_ptr, mean_ptr, m2_ptr, cross_ptr,
    images, columns: tl.int64, neurons, sample,
    batch_high, batch_low, share_high, share_low, factor_high, factor_low,
    WEIGHTED: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_NEURONS: tl.constexpr,
):  # fmt: skip
    """BLOCK_COLUMNS columns of x join the running moments; see `ops.moments` for the formulas.

        features x [images, columns]; weights [images]; centred [images, neurons]; shift [neurons]
        mean, m2 float64 [columns]; cross float32 [neurons, columns]

    Sums run over x - origin, where origin is the mean of the first `sample` rows (at most BLOCK_ROWS, a power of two),
    so that a batch is read once per BLOCK_NEURONS responses and a constant column has no spread. Chunks of BLOCK_ROWS
    images are summed by themselves, products by tensor cores, and then added: columns in float64, products in float32.
    `_high` + `_low`: numbers of the host, which reach kernels in float32.
    """
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    rows = tl.arange(0, BLOCK_ROWS)
    zero = tl.full((), 0.0, tl.float64)
    batch = (zero + batch_high) + batch_low
    share = (zero + share_high) + share_low
    factor = (zero + factor_high) + factor_low

    first = tl.load(features_ptr + column, mask=inside, other=0.0).to(tl.float32)
    taken = rows < sample
    x = tl.load(
        features_ptr + rows.to(tl.int64)[:, None] * columns + column[None, :],
        mask=taken[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    origin = first + tl.sum(tl.where(taken[:, None], x - first[None, :], 0.0), axis=0) / (sample * 1.0)

    for neuron0 in range(0, neurons, BLOCK_NEURONS):
        neuron = neuron0 + tl.arange(0, BLOCK_NEURONS)
        known = neuron < neurons
        cross = tl.zeros((BLOCK_NEURONS, BLOCK_COLUMNS), dtype=tl.float32)
        sums = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float64)
        squares = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float64)
        rest = tl.zeros((BLOCK_NEURONS,), dtype=tl.float32)
        for start in range(0, images, BLOCK_ROWS):
            row = (start + rows).to(tl.int64)
            there = row < images
            x = tl.load(
                features_ptr + row[:, None] * columns + column[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            c = tl.load(
                centred_ptr + row[None, :] * neurons + neuron[:, None], mask=there[None, :] & known[:, None], other=0.0
            )
            x -= origin[None, :]
            if WEIGHTED:
                w = tl.load(weights_ptr + row, mask=there, other=0.0)
            else:
                w = there.to(tl.float32)
            weighted = w[:, None] * x
            sums += tl.sum(weighted, axis=0).to(tl.float64)
            squares += tl.sum(weighted * x, axis=0).to(tl.float64)
            rest += tl.sum(c, axis=1)
            # Subtracted: the compiler would let an addition grow inside of the tensor cores, which round toward zero.
            cross -= tl.dot(-c, x, input_precision=INPUT_PRECISION)
        mean = tl.load(mean_ptr + column, mask=inside, other=0.0)
        from_origin = sums / batch
        d = origin.to(tl.float64) + from_origin - mean
        shift = tl.load(shift_ptr + neuron, mask=known, other=0.0)
        cross += rest[:, None] * (-from_origin).to(tl.float32)[None, :]
        cross += shift[:, None] * (factor * d).to(tl.float32)[None, :]
        at = cross_ptr + neuron.to(tl.int64)[:, None] * columns + column[None, :]
        mask = known[:, None] & inside[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + cross, mask=mask)
        if neuron0 + BLOCK_NEURONS >= neurons:
            spread = squares - sums * from_origin
            spread = tl.where(spread < 0.0, 0.0, spread)  # below 0 by rounding only; NaN stays
            m2 = tl.load(m2_ptr + column, mask=inside, other=0.0)
            tl.store(m2_ptr + column, m2 + (spread + factor * d * d), mask=inside)
            tl.store(mean_ptr + column, mean + d * share, mask=inside)
