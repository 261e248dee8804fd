"""Non-negative factorization of many small matrices: a plain function that writes to its second and third argument."""

from __future__ import annotations

from torch import Tensor

from cortexloop import _device
from cortexloop.backends.registry import Problem, select


def nmf(
    matrices: Tensor,
    w: Tensor,
    h: Tensor,
    *,
    signed: bool,
    l1: tuple[float, float] = (0.0, 0.0),
    l2: tuple[float, float] = (0.0, 0.0),
    tolerance: float,
    max_iterations: int,
    backend: str = "auto",
) -> Tensor:
    """Factorize T matrices from the start in w and h, in place; int64 [T] iterations in host memory.

    What is minimised, and when a matrix is done, is in csrc/include/cortexloop/nmf.h. All contiguous, of one floating
    dtype and on one device.

    Args:
        matrices: [T, n, C]; of either sign if `signed`, else at least 0.
        w: [T, R, n], h: [T, R, C], or [T, R, 2 C] if `signed`; at least 0.
        l1, l2: penalties of w and of h.
    """
    device = matrices.device
    problem = Problem(
        op="nmf", device=device.type, index=_device.index(device), dtype=matrices.dtype, batch=len(matrices)
    )
    return select(problem, backend).nmf(matrices, w, h, signed, l1, l2, tolerance, max_iterations)
