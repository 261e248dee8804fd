"""Operators on populations of codes: counter-based random numbers, sampling, weighted sums. n problems at once.

Each number depends on its own indices only, and sums run in one fixed order, so results have the same bits for any
number of threads, any split of problems into batches and, in float32 on a CPU, every backend. They carry no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import _device
from cortexloop.backends.registry import Backend, Problem, select

Factors = tuple[Tensor, Tensor]


def _backend(device: torch.device, dtype: torch.dtype, n: int) -> Backend:
    return select(Problem(op="sample_codes", device=device.type, index=_device.index(device), dtype=dtype, batch=n))


def normals(seed: int, stream: int, step: int, problems: Tensor, rows: int, columns: int) -> Tensor:
    """N(0, 1), float32 [n, rows, columns]: entry (i, r, c) follows from (seed, stream, step, problems[i], r, c) alone.

    Philox 4x32-10 (Salmon et al. 2011) with Box-Muller on 24-bit uniforms; the largest magnitude is 5.77.

    Args:
        seed: 0 to 2^64 - 1. stream: 0 to 255, what the numbers are for. step: 0 to 2^32 - 1, the generation.
        problems: int64 [n], each 0 to 2^32 - 1.
    """
    backend = _backend(problems.device, torch.float32, problems.shape[0])
    return backend.random_rows(True, seed, stream, step, problems, rows, columns)


def uniforms(seed: int, stream: int, step: int, problems: Tensor, rows: int, columns: int) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1), float32 [n, rows, columns]; arguments as for `normals`."""
    backend = _backend(problems.device, torch.float32, problems.shape[0])
    return backend.random_rows(False, seed, stream, step, problems, rows, columns)


def sample_codes(
    seed: int,
    stream: int,
    step: int,
    problems: Tensor,
    rows: int,
    mean: Tensor,
    scale: Tensor,
    diagonal: Tensor | None = None,
    factors: Factors | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """mean + scale * (diagonal * z (I + left^T right)), z = `normals`; [n, rows, dim].

    Args:
        mean: [n, dim]; scale: [n]; diagonal: [n, dim] or None for ones; factors: (left, right), each [n, rank, dim].
        out: where to write the codes, contiguous; new memory if None.
    """
    backend = _backend(mean.device, mean.dtype, mean.shape[0])
    return backend.sample_codes(seed, stream, step, problems, rows, mean, scale, diagonal, factors, out)


def code_moments(codes: Tensor, weights: Tensor, centre: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(sum_r weights[r] codes[r], sum_r weights[r] (codes[r] - centre)^2 or None without centre), each [n, dim].

    Args:
        codes: [n, rows, dim]; weights: [n, rows], rows of weight 0 are not read; centre: [n, dim].
    """
    return _backend(codes.device, codes.dtype, codes.shape[0]).code_moments(codes, weights, centre)


def low_rank_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (I + left^T right), [n, dim]; left and right [n, rank, dim]."""
    return _backend(x.device, x.dtype, x.shape[0]).low_rank_product(x, left, right)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Sums over the last axis of x * y, [n]; x and y [n, dim]."""
    return _backend(x.device, x.dtype, x.shape[0]).row_dots(x, y)
