"""Non-negative factorization of many small matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import ops


def nmf(
    matrices: Tensor,
    w: Tensor,
    h: Tensor,
    *,
    signed: bool = False,
    l1: tuple[float, float] = (0.0, 0.0),
    l2: tuple[float, float] = (0.0, 0.0),
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """X ~ w' h with w, h >= 0 for every matrix, by cyclic coordinate descent (HALS) from a given start.

    Minimises 1/2 |X - w' h|^2 + l1[0] |w| + l2[0]/2 |w|^2 + l1[1] |h| + l2[1]/2 |h|^2. With `signed`, X is the positive
    and the negative part of a matrix side by side. One iteration sweeps once over w, then h; it ends when the sum of
    projected gradients falls to `tolerance` of that of the first iteration (Cichocki & Phan 2009): the steps and the
    rule of scikit-learn's NMF(solver="cd"). Neurons share nothing.

    Args:
        matrices: [T, n, C], float32 or float64 (plain torch), finite.
        w: [T, R, n] and h: [T, R, C], or [T, R, 2 C] with `signed`: where to start, at least 0. They stay as they are.

    Returns:
        w, h, and the iterations taken, int64 [T] in host memory.

    Raises:
        TypeError, ValueError: shapes, types or devices do not fit, negative entries where there should be none, or
            penalties, tolerance or max_iterations out of range.

    Equivalent to:
        >>> x, w, h = torch.rand(1, 6, 5), torch.rand(1, 2, 6), torch.rand(1, 2, 5)
        >>> found_w, found_h, _ = nmf(x, w, h)
        >>> bool((x - found_w.mT @ found_h).norm() <= (x - w.mT @ h).norm())
        True
    """
    if matrices.ndim != 3 or w.ndim != 3 or h.ndim != 3:
        raise ValueError(
            f"matrices, w and h should have 3 axes, got {list(matrices.shape)}, {list(w.shape)} and {list(h.shape)}"
        )
    count, n, columns = matrices.shape
    rank = w.shape[1]
    width = 2 * columns if signed else columns
    if tuple(w.shape) != (count, rank, n) or tuple(h.shape) != (count, rank, width) or 0 in (rank, n, columns):
        raise ValueError(
            f"for matrices {[count, n, columns]}, w should be {[count, 'R', n]} and h {[count, 'R', width]}, R at "
            f"least 1, got {list(w.shape)} and {list(h.shape)}"
        )
    if matrices.dtype not in (torch.float32, torch.float64) or {w.dtype, h.dtype} != {matrices.dtype}:
        raise TypeError(
            f"matrices, w and h should all be float32 or all float64, got {matrices.dtype}, {w.dtype} and {h.dtype}"
        )
    if {w.device, h.device} != {matrices.device}:
        raise ValueError(f"w and h should be on {matrices.device} like the matrices, got {w.device} and {h.device}")
    if not signed and bool((matrices < 0).any()):
        raise ValueError("matrices have negative entries; say signed=True to factorize their parts of each sign")
    if bool((w < 0).any()) or bool((h < 0).any()):
        raise ValueError("w and h should not be negative where descent starts")
    if min(*l1, *l2, tolerance) < 0 or max_iterations < 1:
        raise ValueError(
            f"penalties and tolerance should not be negative and max_iterations at least 1, got {l1}, {l2}, "
            f"{tolerance} and {max_iterations}"
        )
    w, h = w.detach().clone().contiguous(), h.detach().clone().contiguous()
    iterations = ops.nmf(
        matrices.detach().contiguous(),
        w,
        h,
        signed=signed,
        l1=l1,
        l2=l2,
        tolerance=tolerance,
        max_iterations=max_iterations,
        backend=backend,
    )
    return w, h, iterations
