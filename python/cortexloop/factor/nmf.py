"""Non-negative factorizations of many small matrices at once: NMF by coordinate descent, and semi-NMF.

Matrices are [positions, channels]; a batch of them has a leading axis of neurons. Left factors (masks) are kept as
[R, positions] and right ones (vectors) as [R, channels]: a product of R rows with a matrix then reads that matrix once,
row by row, three to seven times faster than the other orders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes of matrices worked on together on a CPU (both orders of each): few enough to stay in a core's share of the
# cache, many enough to spread the cost of a call over several neurons.
_CPU_BYTES = 10_000_000
_GPU_BYTES = 2_000_000_000
_EXACT_SVD_UP_TO = 256  # positions; above, a few rounds of subspace iteration are faster than all eigenvectors
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
    init: str,
    seeds: list[int],
    max_iterations: int,
    tolerance: float,
    penalty: Penalty,
    prepare: Callable[[Tensor], Tensor] = split_signs,
) -> tuple[Tensor, Tensor, Tensor]:
    """X ~ W H with W, H >= 0 for every matrix, by cyclic coordinate descent (HALS).

    One iteration sweeps once over the columns of W, then over the rows of H, each entry going to the minimum of the
    objective given the others. It ends when the sum of projected gradients falls to `tolerance` of that of the first
    iteration (Cichocki & Phan 2009; the rule of scikit-learn's solver "cd", whose steps and iteration counts this
    reproduces). Several neurons run side by side; as one ends, the next takes its place.

    Args:
        matrices: [T, n, C].
        init: "nndsvda", "nndsvd" (Boutsidis & Gallopoulos 2008) or "random".
        seeds: [T], for "random".
        prepare: [n, C] -> X [n, m], non-negative, done when a neuron's turn comes.

    Returns:
        W as [T, R, n], H as [T, R, m] and the number of iterations [T].
    """
    count, n, _ = matrices.shape
    m = prepare(matrices[0]).shape[-1]
    masks = matrices.new_zeros(count, rank, n)
    vectors = matrices.new_zeros(count, rank, m)
    iterations = torch.zeros(count, dtype=torch.int64)
    budget = _CPU_BYTES if matrices.device.type == "cpu" else _GPU_BYTES
    slots = max(1, min(count, budget // (2 * n * m * matrices.element_size())))
    x, xt = matrices.new_empty(slots, n, m), matrices.new_empty(slots, m, n)
    w, h = matrices.new_empty(slots, rank, n), matrices.new_empty(slots, rank, m)
    first = matrices.new_zeros(slots)
    scale = matrices.new_zeros(count)
    w_terms, h_terms = penalty.terms(m), penalty.terms(n)
    held = [-1] * slots  # which neuron a slot works on
    done = [0] * slots  # its iterations so far
    waiting = iter(range(count))

    def start(slot: int) -> bool:
        """The next neuron that has anything to factorize; one of zeros stays 0."""
        for neuron in waiting:
            matrix = prepare(matrices[neuron])
            mean = matrix.mean()
            if mean > 0:
                scale[neuron] = mean / mean.clamp(*_MEANS)
                x[slot] = matrix / scale[neuron]
                xt[slot] = x[slot].T
                w[slot], h[slot] = initial(x[slot], rank, init, seeds[neuron])
                held[slot], done[slot] = neuron, 0
                return True
        return False

    active = sum(start(slot) for slot in range(slots))  # slots are filled from the first on
    x, xt, w, h, first = x[:active], xt[:active], w[:active], h[:active], first[:active]
    while active:
        violation = sweep(w, h @ h.mT, torch.bmm(h, xt), *w_terms)
        violation += sweep(h, w @ w.mT, torch.bmm(w, x), *h_terms)
        new = torch.tensor([iteration == 0 for iteration in done[:active]], device=first.device)
        first = torch.where(new, violation, first)
        ended = ((violation <= tolerance * first) | (first == 0)).tolist()
        keep = []
        for slot in range(active):
            done[slot] += 1
            if ended[slot] or done[slot] == max_iterations:
                neuron = held[slot]
                masks[neuron], vectors[neuron] = w[slot], h[slot] * scale[neuron]
                iterations[neuron] = done[slot]
                if not start(slot):
                    continue
            keep.append(slot)
        if len(keep) < active:
            x, xt, w, h, first = x[keep], xt[keep], w[keep], h[keep], first[keep]
            held, done = [held[slot] for slot in keep], [done[slot] for slot in keep]
            active = len(keep)
    return masks, vectors, iterations


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


def initial(x: Tensor, rank: int, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """Non-negative factors [R, n] and [R, m] to start from, of one matrix x [n, m] >= 0 that is not 0.

    Non-negative double SVD: of each pair of singular vectors, the positive or the negative parts, whichever weigh
    more. "nndsvda" replaces zeros, which coordinate descent would leave slowly, by the mean of x.
    """
    mean = x.mean()
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        shapes = ((rank, x.shape[0]), (rank, x.shape[1]))
        w, h = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        level = torch.sqrt(mean / rank)
        return level * w.abs().to(x), level * h.abs().to(x)
    u = leading_vectors(x @ x.mT, rank).to(x.dtype).mT  # [R, n]
    v = u @ x  # [R, m] times the singular value
    strength = v.norm(dim=1)
    v = v / strength.clamp(min=torch.finfo(x.dtype).tiny)[:, None]
    sides = [(u.clamp(min=0), v.clamp(min=0)), ((-u).clamp(min=0), (-v).clamp(min=0))]
    weights = [a.norm(dim=1) * b.norm(dim=1) for a, b in sides]
    negative = (weights[1] > weights[0])[:, None]
    w, h = torch.where(negative, sides[1][0], sides[0][0]), torch.where(negative, sides[1][1], sides[0][1])
    weight = torch.maximum(*weights)
    tiny = torch.finfo(x.dtype).tiny
    level = torch.sqrt(strength * weight)[:, None]
    w, h = (level * part / part.norm(dim=1, keepdim=True).clamp(min=tiny) for part in (w, h))
    fill = mean if init == "nndsvda" else torch.zeros_like(mean)
    return torch.where(w < _TINY, fill, w), torch.where(h < _TINY, fill, h)


def leading_vectors(gram: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of symmetric matrices [..., n, n] >= 0, as columns, float64 [..., n, rank]."""
    gram = gram.double()
    n = gram.shape[-1]
    if n <= _EXACT_SVD_UP_TO:
        return torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
    width = min(n, rank + 10)
    q = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gram)
    q = q.expand(*gram.shape[:-2], n, width)
    for _ in range(15):
        q = torch.linalg.qr(gram @ q).Q
    inner = torch.linalg.eigh(q.mT @ gram @ q)
    return (q @ inner.eigenvectors)[..., -rank:].flip(-1)


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
            sweep(moved, weights, product)
        moved = moved / moved.norm(dim=2, keepdim=True).clamp(min=1e-30)  # the vectors take up the scale
        h = torch.where(active[:, None, None], moved, h)
        iterations[active] = done
    return h.to(matrices.dtype), (_inverse(h) @ (h @ m)).to(matrices.dtype), iterations.cpu()


def _inverse(h: Tensor) -> Tensor:
    """The pseudo-inverse of h h' [T, R, R]: a mask that has become 0 has no vector."""
    return torch.linalg.pinv(h @ h.mT, hermitian=True, rtol=1e-10)
