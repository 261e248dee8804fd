"""Every optimiser at a size for tests, scores that are a function of the codes alone, and states as files hold them."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.evolve.catalogue import OPTIMISERS
from cortexloop.evolve.cma import HessianCMA
from cortexloop.evolve.optimiser import Optimiser

NAMES = (*OPTIMISERS, "cholesky-cma-dense", "hessian-cma")
"""The catalogue's, CMA with an update of the covariance in every generation, and CMA in the space of a metric."""


def small(name: str, dim: int = 12, **keywords: Any) -> Optimiser:
    """An optimiser with settings for codes of length 12 or so in place of 4096."""
    if name == "hessian-cma":
        return HessianCMA(dim, **metric(dim), **keywords)
    if name == "cholesky-cma-dense":
        return OPTIMISERS["cholesky-cma"](dim, update_after=0, **keywords)
    if name.startswith("sphere"):
        keywords = {"radius": 4.0, "generations": 6, **keywords}
    if name in ("nes", "fdgd"):
        keywords = {"learning_rate": 0.1, **keywords}
    return OPTIMISERS[name](dim, **keywords)


@functools.cache
def metric(dim: int) -> dict[str, Tensor]:
    """Two thirds of an orthonormal basis, with eigenvalues."""
    rng = np.random.default_rng(dim)
    vectors, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    count = max(1, 2 * dim // 3)
    return {
        "eigenvalues": torch.from_numpy(np.exp(rng.normal(size=count))),
        "eigenvectors": torch.from_numpy(vectors[:, :count].copy()),
    }


def scores_of(optimiser: Optimiser, codes: Tensor, *, missing: float = 0.0) -> NDArray[np.float64]:
    """[n, m]: nearness to a target, different for each problem; NaN for a random share of the codes.

    Each row is summed by itself, so that a score does not depend on which problems are asked about together.
    """
    target = np.linspace(-1, 2, optimiser.dim)
    scores = []
    for problem, rows in zip(optimiser.problems, codes.double().cpu().numpy(), strict=True):
        rng = np.random.default_rng((problem, optimiser.generation))
        off = rows - np.cos(problem) * target
        row = -np.array([(r * r).sum() for r in off])
        scores.append(np.where(rng.random(len(rows)) < missing, np.nan, row))
    return np.stack(scores)


def run(optimiser: Optimiser, generations: int, *, missing: float = 0.0) -> list[Tensor]:
    """Ask and tell; the codes of each generation and of the one after."""
    shown = []
    for _ in range(generations):
        codes = optimiser.ask()
        shown.append(codes.clone())
        optimiser.tell(scores_of(optimiser, codes, missing=missing))
    return [*shown, optimiser.ask().clone()]


def through_files(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a file: JSON for all but the tensors, bytes for those."""
    tensors = {name: tensor.cpu().numpy() for name, tensor in state["tensors"].items()}
    back = json.loads(json.dumps({key: value for key, value in state.items() if key != "tensors"}))
    read = {
        name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape).copy() for name, array in tensors.items()
    }
    return {**back, "tensors": {name: torch.from_numpy(array) for name, array in read.items()}}


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether two lists of generations are equal in every bit but the sign of zero."""
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
