"""The metric of a generator: how much its image changes with a step in each direction of the code."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import ops
from cortexloop.evolve.generators import Generator
from cortexloop.evolve.optimiser import MAX_SEED, whole

OVERSAMPLING = 8
AT_ONCE = 64
"""Images whose Jacobian is applied together; bounds memory."""


def pixel_metric(
    generator: Generator, codes: Tensor, *, rank: int, iterations: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues and eigenvectors of mean over codes of J^T J / (3 H W), J = d image / d code.

    For a small step dz the images differ by a mean squared pixel difference of dz^T (J^T J / 3 H W) dz. It is what
    `HessianCMA` takes; Wang & Ponce (2021, "The geometry of deep generative image models") use a perceptual distance in
    place of pixels. By randomised subspace iteration (Halko, Martinsson & Tropp 2011): no dim x dim matrix is made.

    Args:
        generator: has to be differentiable.
        codes: [k, dim], where to average; more codes cost more.
        rank: number of eigenpairs, at most dim. Those at the end are the least accurate.
        iterations: rounds of subspace iteration.
        seed: of the random start.

    Returns:
        (eigenvalues float64 [rank], largest first; eigenvectors float64 [dim, rank], orthonormal columns).

    Raises:
        ValueError: codes of another length, or a rank above dim. RuntimeError: the generator is not differentiable.
    """
    rank = whole("rank", rank, 1, generator.dim)
    iterations = whole("iterations", iterations, 0, 1000)
    seed = whole("seed", seed, 0, MAX_SEED)
    if codes.ndim != 2 or codes.shape[1] != generator.dim or not len(codes):
        raise ValueError(f"codes should be [k, {generator.dim}] with k >= 1, got {list(codes.shape)}")
    codes = codes.detach().float()
    width = min(generator.dim, rank + OVERSAMPLING)
    ids = torch.zeros(1, dtype=torch.int64, device=codes.device)
    basis = ops.normals(seed, 0, 0, ids, width, generator.dim)[0].T.double()  # [dim, width]
    for _ in range(iterations + 1):
        basis = torch.linalg.qr(_apply(generator, codes, torch.linalg.qr(basis).Q)).Q
    small = basis.T @ _apply(generator, codes, basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = torch.arange(width - 1, width - 1 - rank, -1, device=codes.device)
    return values[order].clamp(min=0), (basis @ vectors)[:, order]


def _apply(generator: Generator, codes: Tensor, directions: Tensor) -> Tensor:
    """mean_k J_k^T J_k / (3 H W) directions; directions float64 [dim, r]."""
    parts = []
    for chunk in torch.split(directions.T.float(), AT_ONCE):
        total = torch.zeros_like(chunk, dtype=torch.float64)
        for code in codes:
            total += _gram(generator, code, chunk).double()
        parts.append(total / (len(codes) * 3 * generator.height * generator.width))
    return torch.cat(parts).T


def _gram(generator: Generator, code: Tensor, directions: Tensor) -> Tensor:
    """J^T J v for each row v of directions [r, dim]."""
    with torch.enable_grad():
        points = code.expand(len(directions), -1).clone().requires_grad_()
        images = generator(points)
        # J v as the derivative of J^T u with respect to u, which it is linear in: no forward-mode rules are needed.
        cotangent = torch.zeros_like(images, requires_grad=True)
        (pulled,) = torch.autograd.grad(images, points, cotangent, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, cotangent, directions, retain_graph=True)
        (gram,) = torch.autograd.grad(images, points, pushed.detach())
    return gram
