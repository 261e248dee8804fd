"""Lasso of many neurons on shared features."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from cortexloop import ops
from cortexloop.ops import LassoSets


def lasso_path(
    sets: LassoSets,
    set_of: Tensor,
    cross: Tensor,
    squares: Tensor,
    penalties: Tensor,
    responses: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_sweeps: int = 10000,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise 1/2 |y - Xw|^2 + penalty |w|_1 for N problems (neurons on training sets) and A penalties each.

    Equivalent to scikit-learn's `lasso_path` on centred data with alphas = penalties / n. `cortexloop.regression.lasso`
    prepares the sets.

    Args:
        sets: S training sets of P features, with Gram matrices or with columns.
        set_of: int64 [N], the set of each problem.
        cross: X'y of the centred data, float64 [N, P].
        squares: y'y, float64 [N].
        penalties: float64 [N, A], positive; each starts where the one before ended, so give them falling.
        responses: with columns only: y, centred over the images of the set and 0 at others, float64 [N, images].
        tol: a problem is done when its duality gap is at most tol * y'y.
        max_sweeps: at most, for each penalty.
        backend: "auto" or a name.

    Returns:
        Weights [N, A, P], gaps / y'y [N, A], and sweeps taken, int64 [N, A].

    Raises:
        TypeError: another dtype than float64 (int64 for set_of).
        ValueError: shapes or devices that do not fit together, a set that does not exist, penalties that are not
            positive, a negative tolerance, no sweeps.
        BackendError: the backend cannot run it.
    """
    n, p = _shape(cross, "cross", 2)
    s = len(sets.diagonal)
    a = _shape(penalties, "penalties", 2)[1]
    images = operator.index(sets.images)
    if (sets.gram is None) == (sets.columns is None):
        raise ValueError("sets should have either gram or columns")
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("diagonal", sets.diagonal, (s, p)),
        ("squares", squares, (n,)),
        ("penalties", penalties, (n, a)),
    ]
    if sets.gram is not None:
        expected.append(("gram", sets.gram, (s, p, p)))
    else:
        expected += [
            ("columns", sets.columns, (p, images)),
            ("mask", sets.mask, (s, images)),
            ("means", sets.means, (s, p)),
            ("responses", responses, (n, images)),
        ]
    for name, tensor, shape in expected:
        if tensor is None:
            raise ValueError(f"{name} is needed where sets have columns")
        if tensor.dtype != torch.float64:
            raise TypeError(f"{name} should be torch.float64, got {tensor.dtype}")
        if tuple(tensor.shape) != shape or tensor.device != cross.device:
            raise ValueError(
                f"{name} should be {list(shape)} on {cross.device}, got {list(tensor.shape)} on {tensor.device}"
            )
    if cross.dtype != torch.float64 or set_of.dtype != torch.int64:
        raise TypeError(f"cross should be torch.float64 and set_of torch.int64, got {cross.dtype} and {set_of.dtype}")
    if tuple(set_of.shape) != (n,) or set_of.device != cross.device:
        raise ValueError(f"set_of should be [{n}] on {cross.device}, got {list(set_of.shape)} on {set_of.device}")
    if n and not 0 <= int(set_of.min()) <= int(set_of.max()) < s:
        raise ValueError(f"set_of should be 0 to {s - 1}, got {int(set_of.min())} to {int(set_of.max())}")
    if images < 1:
        raise ValueError(f"images of the sets should be at least 1, got {images}")
    if a < 1 or not bool((torch.isfinite(penalties) & (penalties > 0)).all()):
        raise ValueError("penalties should be positive finite numbers, at least one for each problem")
    if not tol >= 0 or operator.index(max_sweeps) < 1:
        raise ValueError(f"tol should be at least 0 and max_sweeps at least 1, got {tol} and {max_sweeps}")
    return ops.lasso_path(
        LassoSets(images, sets.diagonal.contiguous(), *map(_contiguous, sets[2:])),
        set_of.contiguous(),
        cross.contiguous(),
        squares.contiguous(),
        penalties.contiguous(),
        None if sets.gram is not None else _contiguous(responses),
        tolerance=float(tol),
        max_sweeps=max_sweeps,
        backend=backend,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _shape(x: Tensor, name: str, axes: int) -> tuple[int, ...]:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} should be a torch tensor, got {type(x).__name__}")
    if x.ndim != axes:
        raise ValueError(f"{name} should have {axes} axes, got shape {list(x.shape)}")
    return tuple(x.shape)
