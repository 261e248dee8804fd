"""Factorizing the covariance of a neuron with a feature map into a few pairs of a mask and a feature vector."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from cortexloop.factor._checks import Array, floats, listed
from cortexloop.factor.factors import Factors
from cortexloop.factor.nmf import Penalty, batched_nmf, batched_semi_nmf

Method = Literal["posneg_nmf", "semi_nmf", "svd"]
Init = Literal["nndsvda", "nndsvd", "random"]
Solver = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

_NEGLIGIBLE = 1e-6  # of the largest factor's norm: below it, a factor is what rounding leaves
_CPU_BYTES = 8_000_000  # of matrices at a time; temporary copies of them are then reused memory, in the cache
_GPU_BYTES = 1_000_000_000


@overload
def factorize(
    tensor: Array,
    method: Method = ...,
    *,
    rank: int = ...,
    ranks: None = ...,
    border: int = ...,
    seed: int = ...,
    init: Init = ...,
    restarts: int = ...,
    max_iterations: int = ...,
    tolerance: float = ...,
    alpha: float = ...,
    l1_ratio: float = ...,
) -> Factors: ...


@overload
def factorize(
    tensor: Array,
    method: Method = ...,
    *,
    rank: int = ...,
    ranks: Sequence[int],
    border: int = ...,
    seed: int = ...,
    init: Init = ...,
    restarts: int = ...,
    max_iterations: int = ...,
    tolerance: float = ...,
    alpha: float = ...,
    l1_ratio: float = ...,
) -> dict[int, Factors]: ...


def factorize(
    tensor: Array,
    method: Method = "posneg_nmf",
    *,
    rank: int = 3,
    ranks: Sequence[int] | None = None,
    border: int = 1,
    seed: int = 0,
    init: Init = "nndsvda",
    restarts: int = 1,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
    alpha: float = 0.0,
    l1_ratio: float = 0.0,
) -> Factors | dict[int, Factors]:
    """Masks h >= 0 and signed vectors w with M[c, y, x] ~ sum_f w[f, c] h[f, y, x], for all neurons at once.

    - "posneg_nmf" (Wang & Ponce): the positive and negative parts of M, stacked along channels where M has negative
      entries at all, are factorized by NMF; a vector is its positive minus its negative half.
    - "semi_nmf" (Ding, Li & Jordan 2010): masks non-negative, vectors free; no stacking, so the vectors of one factor
      need not be positive and negative by turns.
    - "svd": the best approximation of this rank, masks of either sign: a bound for the other two.

    Every mask is then given unit Euclidean norm, its vector the scale, and the factors are sorted by norm.

    Args:
        tensor: [T, C, H, W], finite; covariances of T neurons with a feature map, see `threshold`.
        rank: factors per neuron, at most min(C, positions).
        ranks: several ranks at once; the result is then a dict by rank.
        border: rows and columns left out at each side, where zero padding in a network makes spurious correlations.
            Published: 1 for ResNet-50 layer3, VGG conv4_3 and AlexNet conv4, 3 for ResNet-50 layer2.
        seed: of init "random"; the other starts draw nothing.
        init, max_iterations, tolerance: of the NMF, as in scikit-learn's NMF(solver="cd"). As there, the start (and so
            the local minimum found) depends a little on the unit of the tensor. Semi-NMF ends when an iteration
            explains less than tolerance / 100 more.
        restarts: starts per neuron for init "random"; the one that explains most is kept.
        alpha, l1_ratio: penalty of "posneg_nmf", as scikit-learn's alpha_W = alpha_H = alpha.

    Returns:
        `Factors` (or a dict of them); neurons whose tensor is 0 have only empty factors.

    Raises:
        TypeError, ValueError: not a finite tensor of that shape, an unknown method, a border without positions left,
            or a rank that is less than 1 or too large.

    Warns:
        RuntimeWarning: factors that came out empty, as the tensor has a lower rank than asked for.
    """
    m = floats(tensor, "tensor", 4)
    if method not in get_args(Method):
        raise ValueError(f"method should be one of {get_args(Method)}, got {method!r}")
    if init not in get_args(Init):
        raise ValueError(f"init should be one of {get_args(Init)}, got {init!r}")
    if restarts < 1 or max_iterations < 1 or tolerance < 0 or alpha < 0 or not 0 <= l1_ratio <= 1:
        raise ValueError(
            "restarts and max_iterations should be at least 1, tolerance and alpha at least 0 and l1_ratio in 0..1, "
            f"got {restarts}, {max_iterations}, {tolerance}, {alpha}, {l1_ratio}"
        )
    inner = cropped(m, border)
    wanted = [rank] if ranks is None else list(ranks)
    most = min(m.shape[1], inner.shape[2] * inner.shape[3])
    if not wanted or min(wanted) < 1 or max(wanted) > most:
        raise ValueError(
            f"rank should lie in 1..{most}, the smaller of {m.shape[1]} channels and {inner.shape[2]} x "
            f"{inner.shape[3]} positions inside the border, got {wanted[0] if len(wanted) == 1 else wanted}"
        )
    restarts = restarts if init == "random" else 1
    solvers: dict[int, Solver] = {}
    every: dict[str, Any] = {"method": method, "border": border}
    for r in wanted:
        if method == "posneg_nmf":
            start: dict[str, Any] = {"init": init, "seed": seed, "restarts": restarts}
            stop: dict[str, Any] = {"max_iterations": max_iterations, "tolerance": tolerance}
            solvers[r] = partial(_posneg, rank=r, penalty=Penalty(alpha, l1_ratio), **start, **stop)
            every |= {**stop, "init": init, "alpha": alpha, "l1_ratio": l1_ratio}
            every |= start if init == "random" else {}
        elif method == "semi_nmf":
            every |= {"max_iterations": max_iterations, "tolerance": tolerance}
            solvers[r] = partial(batched_semi_nmf, rank=r, max_iterations=max_iterations, tolerance=tolerance)
        else:
            solvers[r] = partial(_svd, rank=r)
    parts: dict[int, list[tuple[Tensor, ...]]] = {r: [] for r in solvers}
    for part in torch.split(inner, _at_a_time(inner)):
        matrices = part.flatten(2).mT.contiguous()  # [T, n, C]
        for r, solve in solvers.items():
            masks, vectors, iterations = solve(matrices)
            masks, vectors = in_order(masks, vectors)
            parts[r].append((masks, vectors, iterations, *reconstruction_quality(matrices, masks, vectors)))
    found = {r: _assembled(m, parts[r], border, {**every, "rank": r}) for r in solvers}
    return found[rank] if ranks is None else found


def factorize_layers(
    tensors: Mapping[str, Array], method: Method = "posneg_nmf", **options: object
) -> dict[str, Factors]:
    """`factorize` for several layers, those of one shape (and type) in one batch.

    Args:
        tensors: name of a layer -> [T, C, H, W]; the number of neurons may differ.
        options: of `factorize`, without `ranks`.

    Raises:
        ValueError: as `factorize`, or `ranks` is among the options.
    """
    if "ranks" in options:
        raise ValueError("factorize_layers takes one rank; call it once per rank")
    checked = {name: floats(tensor, f"the tensor of {name!r}", 4) for name, tensor in tensors.items()}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in checked.items():
        groups.setdefault((*tensor.shape[1:], tensor.dtype, tensor.device), []).append(name)
    found: dict[str, Factors] = {}
    for names in groups.values():
        together: Factors = factorize(torch.cat([checked[name] for name in names]), method, **options)  # type: ignore[call-overload]
        start = 0
        for name in names:
            found[name] = together.select(range(start, start + len(checked[name])))
            start += len(checked[name])
    return {name: found[name] for name in tensors}


def cropped(maps: Tensor, border: int) -> Tensor:
    """A view of maps [..., H, W] without `border` rows and columns at each side.

    Raises:
        ValueError: nothing is left, or a negative border.
    """
    h, w = maps.shape[-2:]
    if border < 0 or 2 * border >= min(h, w):
        raise ValueError(
            f"border should be at least 0 and leave positions of a map of {h} x {w}, got {border}; "
            "for such a small map use border=0"
        )
    return maps[..., border : h - border, border : w - border]


def reconstruction_quality(matrices: Tensor, masks: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How well masks [T, R, n] and vectors [T, R, C] approximate matrices [T, n, C].

    Returns:
        1 - |M - Mhat|^2 / |M|^2, 1 - |M - Mhat| / |M|, and the Pearson correlation over elements, float64 [T] each; 0
        where a denominator is 0.
    """
    size = matrices.shape[1] * matrices.shape[2]
    difference = torch.baddbmm(matrices, masks.mT, vectors, alpha=-1).flatten(1)
    rest = torch.linalg.vector_norm(difference, dim=1).double().square()
    total = torch.linalg.vector_norm(matrices.flatten(1), dim=1).double().square()
    m_sum = matrices.sum((1, 2)).double()
    h, v = masks.double(), vectors.double()
    fit_square = ((h @ h.mT) * (v @ v.mT)).sum((1, 2))
    fit_sum = (h.sum(2) * v.sum(2)).sum(1)
    product = (total + fit_square - rest) / 2
    defined = total > 0
    explained = torch.where(defined, 1.0 - rest / total.clamp(min=1e-300), 0.0)
    published = torch.where(defined, 1.0 - (1.0 - explained).clamp(min=0).sqrt(), 0.0)
    spread = (total - m_sum.square() / size).clamp(min=0) * (fit_square - fit_sum.square() / size).clamp(min=0)
    covariance = product - m_sum * fit_sum / size
    # What is left of a constant by rounding is not a spread.
    varies = spread > 1e-12 * total * fit_square
    correlation = torch.where(varies, covariance / spread.clamp(min=1e-300).sqrt(), 0.0).clamp(-1.0, 1.0)
    return explained, published, correlation


def in_order(masks: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Masks [T, R, n] of unit norm, vectors [T, R, C] with the scale, by falling norm, negligible factors exactly 0."""
    size = masks.norm(dim=2)
    norm = size * vectors.norm(dim=2)
    content = (norm > _NEGLIGIBLE * norm.amax(dim=1, keepdim=True))[..., None]
    safe = torch.where(content, size[..., None], 1.0)
    masks = torch.where(content, masks / safe, 0.0)
    vectors = torch.where(content, vectors * safe, 0.0)
    order = torch.where(content[..., 0], norm, 0.0).argsort(dim=1, descending=True, stable=True)[..., None]
    return masks.take_along_dim(order, 1), vectors.take_along_dim(order, 1)


def _posneg(
    matrices: Tensor,
    *,
    rank: int,
    init: str,
    seed: int,
    restarts: int,
    max_iterations: int,
    tolerance: float,
    penalty: Penalty,
) -> tuple[Tensor, Tensor, Tensor]:
    """NMF of the parts of each sign; matrices without negative entries are not stacked, as published."""
    count, n, channels = matrices.shape
    masks, vectors = matrices.new_empty(count, rank, n), matrices.new_empty(count, rank, channels)
    iterations = torch.empty(count, dtype=torch.int64)
    signed = matrices.amin((1, 2)) < 0
    for stacked in (False, True):
        chosen = torch.nonzero(signed == stacked)[:, 0]
        if len(chosen) == 0:
            continue
        tries = chosen.repeat_interleave(restarts)
        w, h, steps = batched_nmf(
            matrices if len(chosen) == count and restarts == 1 else matrices[tries],
            rank,
            signed=stacked,
            init=init,
            seeds=[seed + restart for _ in range(len(chosen)) for restart in range(restarts)],
            max_iterations=max_iterations,
            tolerance=tolerance,
            penalty=penalty,
        )
        v = h[..., :channels] - h[..., channels:] if stacked else h
        if restarts > 1:
            explained = reconstruction_quality(matrices[tries], w, v)[0].view(-1, restarts)
            best = torch.arange(len(chosen), device=tries.device) * restarts + explained.argmax(1)
            w, v, steps = w[best], v[best], steps[best.cpu()]
        masks[chosen], vectors[chosen], iterations[chosen.cpu()] = w, v, steps
    return masks, vectors, iterations


def _svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated SVD by the Gram matrix over positions in float64; the larger signed part of a mask is positive."""
    m = matrices.double()
    u = torch.linalg.eigh(m @ m.mT).eigenvectors[..., -rank:].flip(-1).mT  # [T, R, n]
    sign = torch.where(u.clamp(min=0).norm(dim=2) >= u.clamp(max=0).norm(dim=2), 1.0, -1.0)[..., None]
    u = u * sign.to(u)
    return u.to(matrices.dtype), (u @ m).to(matrices.dtype), torch.zeros(len(m), dtype=torch.int64)


def _at_a_time(inner: Tensor) -> int:
    """Neurons whose matrices stay in the cache of a CPU, and whose copies fit in the memory of a GPU."""
    size = inner[0].numel() * inner.element_size() if len(inner) else 1
    return max(1, (_CPU_BYTES if inner.device.type == "cpu" else _GPU_BYTES) // size)


def _assembled(tensor: Tensor, parts: Sequence[tuple[Tensor, ...]], border: int, settings: dict[str, Any]) -> Factors:
    masks, vectors, iterations, explained, published, correlation = (
        torch.cat(values) for values in zip(*parts, strict=True)
    )
    count, _, h, w = tensor.shape
    full = tensor.new_zeros(count, masks.shape[1], h, w)
    cropped(full, border).copy_(masks.view(count, masks.shape[1], h - 2 * border, w - 2 * border))
    factors = Factors(
        masks=full,
        vectors=vectors.contiguous(),
        method=str(settings["method"]),
        border=border,
        explained=explained,
        explained_published=published,
        correlation=correlation,
        iterations=iterations,
        settings=settings,
    )
    content = factors.norms > 0
    short = torch.nonzero(content.any(1) & ~content.all(1))[:, 0]
    if len(short):
        warnings.warn(
            f"the tensors of neurons {listed(short)} have a lower rank than {masks.shape[1]}: their last factors are "
            "empty (see Factors.empty)",
            RuntimeWarning,
            stacklevel=3,
        )
    return factors
