"""Non-negative factorization by the compiled module `_cpu`: checked pointers in, memory written."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import cpu, pointer


def nmf(
    matrices: Tensor,
    w: Tensor,
    h: Tensor,
    signed: bool,
    l1: tuple[float, float],
    l2: tuple[float, float],
    tolerance: float,
    max_iterations: int,
    iterations: Tensor,
) -> None:
    """Factorize T matrices, float32 [T, n, C]: w [T, R, n], h [T, R, C or 2 C], iterations int64 [T] are set."""
    problems, rows, columns = matrices.shape
    rank = w.shape[1]
    cpu().nmf(
        pointer(matrices, "matrices", torch.float32, (problems, rows, columns)),
        problems,
        rows,
        columns,
        rank,
        signed,
        l1[0],
        l2[0],
        l1[1],
        l2[1],
        tolerance,
        max_iterations,
        pointer(w, "w", torch.float32, (problems, rank, rows)),
        pointer(h, "h", torch.float32, (problems, rank, columns * (2 if signed else 1))),
        pointer(iterations, "iterations", torch.int64, (problems,)),
    )
