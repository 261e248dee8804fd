"""Non-negative factorization of many small matrices in plain torch, float32 or float64, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of matrices worked on together (both orders of each): on a CPU few, to stay in the cache.
_CPU_BYTES = 5_000_000
_GPU_BYTES = 2_000_000_000


class NmfOperators:
    """Cyclic coordinate descent; several matrices run side by side, and as one ends, the next takes its place."""

    @torch.no_grad()
    def nmf(
        self,
        matrices: Tensor,
        w: Tensor,
        h: Tensor,
        signed: bool,
        l1: tuple[float, float],
        l2: tuple[float, float],
        tolerance: float,
        max_iterations: int,
    ) -> Tensor:
        count, n, _ = matrices.shape
        m = h.shape[2]
        iterations = torch.zeros(count, dtype=torch.int64)
        budget = _CPU_BYTES if matrices.device.type == "cpu" else _GPU_BYTES
        slots = max(1, min(count, budget // (2 * n * m * matrices.element_size())))
        x, xt = matrices.new_empty(slots, n, m), matrices.new_empty(slots, m, n)
        a, b = torch.empty_like(w[:slots]), torch.empty_like(h[:slots])
        first = matrices.new_zeros(slots)
        held, done = [-1] * slots, [0] * slots  # the matrix in each slot, and its iterations so far
        waiting = iter(range(count))

        def start(slot: int) -> bool:
            for problem in waiting:
                x[slot] = split_signs(matrices[problem]) if signed else matrices[problem]
                xt[slot] = x[slot].T
                a[slot], b[slot] = w[problem], h[problem]
                held[slot], done[slot] = problem, 0
                return True
            return False

        active = sum(start(slot) for slot in range(slots))
        while active:
            violation = sweep(a, b @ b.mT, torch.bmm(b, xt), l1[0], l2[0])
            violation += sweep(b, a @ a.mT, torch.bmm(a, x), l1[1], l2[1])
            new = torch.tensor([iteration == 0 for iteration in done[:active]], device=first.device)
            first = torch.where(new, violation, first)
            ended = (~(violation > tolerance * first)).tolist()
            keep = []
            for slot in range(active):
                done[slot] += 1
                if ended[slot] or done[slot] == max_iterations:
                    w[held[slot]], h[held[slot]] = a[slot], b[slot]
                    iterations[held[slot]] = done[slot]
                    if not start(slot):
                        continue
                keep.append(slot)
            if len(keep) < active:
                x, xt, a, b, first = x[keep], xt[keep], a[keep], b[keep], first[keep]
                held, done = [held[slot] for slot in keep], [done[slot] for slot in keep]
                active = len(keep)
        return iterations


def split_signs(m: Tensor) -> Tensor:
    """[..., C] to [..., 2 C]: the positive and the negative part, both non-negative."""
    return torch.cat([m.clamp(min=0), (-m).clamp(min=0)], dim=-1)


def sweep(a: Tensor, gram: Tensor, product: Tensor, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """One pass of coordinate descent over the rows of a >= 0 [k, R, n], in place.

    Minimises 1/2 a' G a - P a + l1 |a| + l2/2 |a|^2 of every column, G `gram` [k, R, R] and P `product` [k, R, n].

    Returns:
        [k] the sum of |projected gradient|, each entry's taken just before its update.
    """
    if l2:
        gram = gram + l2 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    violation = a.new_zeros(a.shape[0])
    curvature = torch.diagonal(gram, dim1=1, dim2=2)
    step = torch.where(curvature > 0, 1.0 / torch.where(curvature > 0, curvature, 1.0), 0.0)
    for t in range(a.shape[1]):
        gradient = torch.baddbmm(product[:, t : t + 1], gram[:, t : t + 1], a, beta=-1)[:, 0]
        if l1:
            gradient += l1
        row = a[:, t]
        violation += torch.where(row == 0, gradient.clamp(max=0), gradient).abs().sum(-1)
        torch.clamp(torch.addcmul(row, gradient, step[:, t : t + 1], value=-1), min=0, out=row)
    return violation
