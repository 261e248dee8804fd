"""Non-negative factorizations of many small matrices at once: the start of NMF, and semi-NMF.

Matrices are [positions, channels]; a batch of them has a leading axis of neurons. Left factors (masks) are [R,
positions] and right ones (vectors) [R, channels].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop.functional import nmf

_START_BYTES = 20_000_000  # of matrices whose start is computed together
_EXACT_SVD_UP_TO = 100  # positions; above, subspace iteration is faster than all eigenvectors
_TINY = 1e-6  # entries of the initial factors that count as 0, as published; so the start depends on the unit
# Matrices of a mean outside are scaled to it. Below, all entries of the start would count as 0; above, the mean that
# fills zeros dwarfs the singular vectors, whose scale is its square root, and descent ends in worse minima (explained
# 0.43 instead of 0.59 at a mean of 1e5).
_MEANS = (1e-5, 1.0)


@dataclass(frozen=True)
class Penalty:
    """Added to half the squared error: m alpha (l1_ratio |W|_1 + (1 - l1_ratio)/2 |W|^2) and n alpha (...) of H."""

    alpha: float = 0.0
    l1_ratio: float = 0.0

    def terms(self, count: int) -> tuple[float, float]:
        """The l1 and l2 weight of a factor whose other side has `count` rows."""
        return count * self.alpha * self.l1_ratio, count * self.alpha * (1.0 - self.l1_ratio)


def split_signs(m: Tensor) -> Tensor:
    """[..., C] to [..., 2 C]: the positive and the negative part, both non-negative."""
    return torch.cat([m.clamp(min=0), (-m).clamp(min=0)], dim=-1)


def batched_nmf(
    matrices: Tensor,
    rank: int,
    *,
    signed: bool,
    init: str,
    seeds: list[int],
    max_iterations: int,
    tolerance: float,
    penalty: Penalty,
) -> tuple[Tensor, Tensor, Tensor]:
    """X ~ W H with W, H >= 0 for every matrix, see `functional.nmf`; one of zeros gives zeros.

    Args:
        matrices: [T, n, C].
        signed: X is `split_signs` of the matrix; else the matrix itself.
        init: "nndsvda", "nndsvd" (Boutsidis & Gallopoulos 2008) or "random". seeds: [T], for "random".

    Returns:
        W as [T, R, n], H as [T, R, C or 2 C] and the number of iterations [T].
    """
    count, n, columns = matrices.shape
    width = 2 * columns if signed else columns
    masks, vectors = matrices.new_zeros(count, rank, n), matrices.new_zeros(count, rank, width)
    iterations = torch.zeros(count, dtype=torch.int64)
    mean = matrices.abs().sum((1, 2)) / (n * width)
    scale = mean / mean.clamp(*_MEANS)
    present = torch.nonzero(mean > 0)[:, 0]
    if len(present) == 0:
        return masks, vectors, iterations
    scaled = matrices[present] / scale[present, None, None]
    w, h = initial(scaled, rank, signed, init, [seeds[t] for t in present.tolist()])
    w_terms, h_terms = penalty.terms(width), penalty.terms(n)
    w, h, steps = nmf(
        scaled,
        w,
        h,
        signed=signed,
        l1=(w_terms[0], h_terms[0]),
        l2=(w_terms[1], h_terms[1]),
        tolerance=tolerance,
        max_iterations=max_iterations,
        backend="reference" if scaled.dtype == torch.float64 else "auto",
    )
    # Positions and channels of zeros have an exact optimum at 0, which rounding may miss by a hair.
    size = scaled.abs()
    w = torch.where(size.amax(2)[:, None] > 0, w, 0.0)
    h = torch.where(size.amax(1)[:, None] > 0, h.view(len(h), -1, columns), 0.0).view_as(h)
    masks[present], vectors[present] = w, h * scale[present, None, None]
    iterations[present.cpu()] = steps
    return masks, vectors, iterations


def initial(matrices: Tensor, rank: int, signed: bool, init: str, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Non-negative factors [T, R, n] and [T, R, m] to start from, of matrices [T, n, C] that are not 0.

    Non-negative double SVD: of each pair of singular vectors, the positive or the negative parts, whichever weigh
    more. "nndsvda" replaces zeros, which coordinate descent would leave slowly, by the mean.
    """
    count, n, columns = matrices.shape
    width = 2 * columns if signed else columns
    mean = matrices.abs().sum((1, 2), keepdim=True) / (n * width)
    if init == "random":
        drawn = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randn(rank * (n + width), generator=generator, dtype=torch.float64).abs())
        both = torch.stack(drawn).to(matrices) * torch.sqrt(mean[:, 0] / rank)
        return both[:, : rank * n].view(count, rank, n), both[:, rank * n :].view(count, rank, width)
    w, h = matrices.new_empty(count, rank, n), matrices.new_empty(count, rank, width)
    step = max(1, _START_BYTES // (n * width * matrices.element_size()))
    for start in range(0, count, step):
        part = slice(start, start + step)
        w[part], h[part] = _double_svd(matrices[part], rank, signed)
    fill = mean if init == "nndsvda" else torch.zeros_like(mean)
    return torch.where(w < _TINY, fill, w), torch.where(h < _TINY, fill, h)


def _double_svd(x: Tensor, rank: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Of X, or of the parts of each sign side by side: (|X| + X) / 2 and (|X| - X) / 2."""
    tiny = torch.finfo(x.dtype).tiny
    size = x.abs() if signed else x
    gram = (size @ size.mT + x @ x.mT) / 2 if signed else x @ x.mT
    u = leading_vectors(gram, rank).to(x.dtype).mT  # [k, R, n]
    v = u @ x  # [k, R, m], times the singular value
    if signed:
        both = u @ size
        v = torch.cat([both + v, both - v], dim=2) / 2
    strength = v.norm(dim=2, keepdim=True)
    v = v / strength.clamp(min=tiny)
    sides = [(u.clamp(min=0), v.clamp(min=0)), ((-u).clamp(min=0), (-v).clamp(min=0))]
    weights = [a.norm(dim=2, keepdim=True) * b.norm(dim=2, keepdim=True) for a, b in sides]
    negative = weights[1] > weights[0]
    w, h = torch.where(negative, sides[1][0], sides[0][0]), torch.where(negative, sides[1][1], sides[0][1])
    level = torch.sqrt(strength * torch.maximum(*weights))
    w, h = (level * part / part.norm(dim=2, keepdim=True).clamp(min=tiny) for part in (w, h))
    return w, h


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of symmetric matrices [..., n, n] >= 0, as columns, float64 [..., n, rank]."""
    gram = gram.double()
    n = gram.shape[-1]
    if n <= _EXACT_SVD_UP_TO:
        exact: Tensor = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
        return exact
    width = min(n, rank + 10)
    q = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gram)
    q = q.expand(*gram.shape[:-2], n, width)
    twice = gram @ gram
    for _ in range(8):
        q = torch.linalg.qr(twice @ q).Q
    inner = torch.linalg.eigh(q.mT @ gram @ q)
    found: Tensor = (q @ inner.eigenvectors)[..., -rank:].flip(-1)
    return found


def batched_semi_nmf(
    matrices: Tensor, rank: int, *, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """M ~ H' V with masks H >= 0 and vectors V of either sign (Ding, Li & Jordan 2010), for every matrix.

    The best vectors for given masks are a least-squares solution, so that the objective depends on M only by its Gram
    matrix over positions: iterations cost as little as for a matrix [n, n], whatever the number of channels. Masks move
    by coordinate descent as in `batched_nmf`, from the larger signed parts of the singular vectors, until an iteration
    explains less than `tolerance` / 100 more of |M|^2.

    Args:
        matrices: [T, n, C].

    Returns:
        H [T, R, n], V [T, R, C], iterations [T].
    """
    m = matrices.double()
    gram = m @ m.mT
    unit = torch.diagonal(gram, dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(torch.float64).tiny)
    gram = gram / unit[:, None, None]
    u = leading_vectors(gram, rank).mT  # [T, R, n]
    positive, negative = u.clamp(min=0), (-u).clamp(min=0)
    larger = positive.norm(dim=2, keepdim=True) >= negative.norm(dim=2, keepdim=True)
    h = torch.where(larger, positive, negative) + 0.1 / u.shape[2] ** 0.5
    iterations = torch.zeros(len(m), dtype=torch.int64, device=m.device)
    active = torch.ones(len(m), dtype=torch.bool, device=m.device)
    total = torch.diagonal(gram, dim1=1, dim2=2).sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    before = torch.full_like(total, -torch.inf)
    for done in range(1, max_iterations + 1):
        hg = h @ gram  # [T, R, n]
        inverse = _inverse(h)
        explained = (inverse * (hg @ h.mT)).sum((1, 2)) / total
        active = active & (explained - before > 0.01 * tolerance)
        if not bool(active.any()):
            break
        before = explained
        weights, product = inverse @ (hg @ h.mT) @ inverse, inverse @ hg  # V V' and V M'
        moved = h.clone()
        for _ in range(3):
            _sweep(moved, weights, product)
        moved = moved / moved.norm(dim=2, keepdim=True).clamp(min=1e-30)  # the vectors take up the scale
        h = torch.where(active[:, None, None], moved, h)
        iterations[active] = done
    return h.to(matrices.dtype), (_inverse(h) @ (h @ m)).to(matrices.dtype), iterations.cpu()


def _inverse(h: Tensor) -> Tensor:
    """The pseudo-inverse of h h' [T, R, R]: a mask that has become 0 has no vector."""
    inverse: Tensor = torch.linalg.pinv(h @ h.mT, hermitian=True, rtol=1e-10)
    return inverse


def _sweep(h: Tensor, gram: Tensor, product: Tensor) -> None:
    """One pass of coordinate descent on 1/2 h' G h - P h over the rows of h >= 0 [T, R, n], in place."""
    curvature = torch.diagonal(gram, dim1=1, dim2=2)[..., None]
    for r in range(h.shape[1]):
        gradient = (gram[:, r : r + 1] @ h)[:, 0] - product[:, r]
        positive = curvature[:, r] > 0
        step = torch.where(positive, gradient / torch.where(positive, curvature[:, r], 1.0), 0.0)
        h[:, r] = (h[:, r] - step).clamp(min=0)
