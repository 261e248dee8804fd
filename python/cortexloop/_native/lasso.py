"""The lasso of the compiled module `_cpu`: checked pointers in, memory written."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import cpu, pointer


def _optional(x: Tensor | None, name: str, shape: tuple[int, ...]) -> int:
    return 0 if x is None else pointer(x, name, torch.float64, shape)


def lasso_path(
    images: int,
    gram: Tensor | None,
    columns: Tensor | None,
    mask: Tensor | None,
    means: Tensor | None,
    diagonal: Tensor,
    set_of: Tensor,
    responses: Tensor | None,
    cross: Tensor,
    squares: Tensor,
    penalties: Tensor,
    tolerance: float,
    max_sweeps: int,
    weights: Tensor,
    gaps: Tensor,
    sweeps: Tensor,
) -> None:
    """Write the solutions of N problems along A penalties: weights [N, A, P], gaps and (int64) sweeps [N, A].

    images: of all sets together. Training sets as `cortexloop.backends.lasso_sets.LassoSets`; set_of int64 [N]; the
    rest float64: responses [N, images], cross [N, P], squares [N], penalties [N, A].
    """
    n, a = penalties.shape
    s, p = diagonal.shape
    cpu().lasso_path(
        _optional(gram, "gram", (s, p, p)),
        _optional(columns, "columns", (p, images)),
        _optional(mask, "mask", (s, images)),
        _optional(means, "means", (s, p)),
        pointer(diagonal, "diagonal", torch.float64, (s, p)),
        s,
        p,
        images,
        pointer(set_of, "set_of", torch.int64, (n,)),
        _optional(responses, "responses", (n, images)),
        pointer(cross, "cross", torch.float64, (n, p)),
        pointer(squares, "squares", torch.float64, (n,)),
        pointer(penalties, "penalties", torch.float64, (n, a)),
        n,
        a,
        tolerance,
        max_sweeps,
        pointer(weights, "weights", torch.float64, (n, a, p)),
        pointer(gaps, "gaps", torch.float64, (n, a)),
        pointer(sweeps, "sweeps", torch.int64, (n, a)),
    )
