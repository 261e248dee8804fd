"""Factor models on a CPU: factorizing many neurons against a loop over scikit-learn, and predicting them all at once.

    python benchmarks/bench_factor.py [--only nmf,predict] [--threads 1,2] [--record]

Each part runs in a process of its own with a fixed number of threads; within a part, candidate and peers alternate.
Before any clock starts, results are compared: our factors have to explain as much as scikit-learn's, and predictions
have to equal a float64 sum; a candidate that is wrong gets no number.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

import cortexloop as cl
import runner
from bench_bank import WrongResultError, isa
from cortexloop.factor import Factors, factorize, score
from record import Contender, Row, measure, provenance, quantiles

OURS, SKLEARN = "cortexloop", "scikit-learn NMF, one neuron after another"
TENSOR, FACTORED = "torch, full weights, one neuron after another", "torch, masks and vectors, one neuron after another"
TOGETHER = "torch einsum, all neurons"
NEURONS, RANK = 64, 3
CHANNELS, SIZE, BORDER = 1024, 14, 1  # ResNet-50 layer3
PEER_NEURONS = 8
"""How many neurons a run of scikit-learn takes; times are per neuron. They take turns, so that all are seen."""
BATCH = 32


def covariances(neurons: int, channels: int = CHANNELS, size: int = SIZE) -> Tensor:
    """Thresholded covariances [T, C, H, W] float32 as models of neurons have them: three places and noise."""
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:size, :size]
    tensor = 0.02 * rng.standard_normal((neurons, channels, size, size)).astype(np.float32)
    for t in range(neurons):
        for _ in range(3):
            x0, y0, s = *rng.uniform(3, size - 4, 2), rng.uniform(1, 3)
            mask = np.exp(-((xx - x0) ** 2 + (yy - y0) ** 2) / (2 * s * s))
            vector = 0.1 * rng.standard_normal(channels) * (rng.random(channels) < 0.3)
            tensor[t] += (vector[:, None, None] * mask).astype(np.float32)
    tensor[np.abs(tensor) < 0.03] = 0.0
    return torch.from_numpy(tensor)


def sklearn_error(tensor: Tensor) -> float:
    """What the published code does for one neuron; squared error of the signed matrix."""
    inner = tensor[:, BORDER:-BORDER, BORDER:-BORDER]
    m = inner.flatten(1).T.numpy()
    model = NMF(RANK, init="nndsvda", random_state=0, max_iter=200, tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        w = model.fit_transform(np.concatenate([m.clip(0), (-m).clip(0)], axis=1))
    h = model.components_[:, : len(inner)] - model.components_[:, len(inner) :]
    return float(np.square(m - w @ h).sum())


def check_factors(tensors: Tensor, found: Factors) -> None:
    """Our factors explain as much as scikit-learn's.

    Raises:
        WrongResultError: they do not.
    """
    for t in range(PEER_NEURONS):
        total = float(tensors[t, :, BORDER:-BORDER, BORDER:-BORDER].double().square().sum())
        theirs = 1.0 - sklearn_error(tensors[t]) / total
        ours = float(found.explained[t]) if found.explained is not None else 0.0
        if ours < theirs - 1e-3:
            raise WrongResultError(f"factors of neuron {t} explain {ours:.5f}, scikit-learn's {theirs:.5f}")


def part_nmf(threads: int, budget: float) -> list[Row]:
    """Masks and vectors of 64 neurons, 144 positions x 2048 signed channels."""
    tensors = covariances(NEURONS)
    check_factors(tensors, factorize(tensors[:PEER_NEURONS], rank=RANK, border=BORDER))
    turn = [0]

    def peer() -> None:
        for _ in range(PEER_NEURONS):
            sklearn_error(tensors[turn[0] % NEURONS])
            turn[0] += 1

    rows = _timed(
        [(OURS, lambda: factorize(tensors, rank=RANK, border=BORDER), NEURONS), (SKLEARN, peer, PEER_NEURONS)],
        case=f"posneg NMF, {NEURONS} neurons, 144 x 2048, rank {RANK}",
        batch=NEURONS,
        op="factorize",
        direction="fit",
        unit="ms/neuron",
        threads=threads,
        budget=budget,
        rounds=(3, 6),
    )
    semi = _timed(
        [(OURS, lambda: factorize(tensors, "semi_nmf", rank=RANK, border=BORDER), NEURONS)],
        case=f"semi-NMF, {NEURONS} neurons, 144 x 1024, rank {RANK}",
        batch=NEURONS,
        op="factorize",
        direction="fit",
        unit="ms/neuron",
        threads=threads,
        budget=budget / 2,
        rounds=(3, 6),
    )
    return rows + semi


def part_predict(threads: int, budget: float) -> list[Row]:
    """Scores of 64 neurons of rank 3 for 32 feature maps of ResNet-50 layer3."""
    rng = np.random.default_rng(1)
    factors = factorize(covariances(NEURONS), "svd", rank=RANK, border=BORDER)
    features = torch.from_numpy(rng.gamma(1.0, 0.5, (BATCH, CHANNELS, SIZE, SIZE)).astype(np.float32))
    weights = factors.tensor().flatten(1)

    def full() -> Tensor:
        return torch.stack([(features.flatten(1) * row).sum(1) for row in weights], dim=1)

    def factored() -> Tensor:
        columns = []
        for masks, vectors in zip(factors.masks, factors.vectors, strict=True):
            maps = torch.einsum("bchw,rc->brhw", features, vectors)
            columns.append((maps * masks).sum((1, 2, 3)))
        return torch.stack(columns, dim=1)

    def together() -> Tensor:
        t, r, c = factors.vectors.shape
        maps = factors.vectors.reshape(t * r, c) @ features.flatten(2)
        return (maps.view(BATCH, t, r, -1) * factors.masks.flatten(2)).sum((2, 3))

    exact = features.double().flatten(1) @ weights.double().T
    for name, run in ((OURS, lambda: score(features, factors)), (TENSOR, full), (FACTORED, factored)):
        error = float((run().double() - exact).abs().max() / exact.std())
        if error > 1e-4:
            raise WrongResultError(f"scores of {name} differ by {error:.3g} standard deviations, at most 1e-4 is right")
    return _timed(
        [
            (OURS, lambda: score(features, factors), BATCH),
            (FACTORED, factored, BATCH),
            (TENSOR, full, BATCH),
            (TOGETHER, together, BATCH),
        ],
        case=f"{NEURONS} neurons of rank {RANK}, {CHANNELS} x {SIZE} x {SIZE}",
        batch=BATCH,
        op="factorized_readout",
        direction="forward",
        unit="ms/image",
        threads=threads,
        budget=budget,
        rounds=(5, 60),
    )


PARTS: dict[str, Callable[[int, float], list[Row]]] = {"nmf": part_nmf, "predict": part_predict}


def _timed(
    entries: Sequence[tuple[str, Callable[[], Any], int]], *, budget: float, rounds: tuple[int, int], **row: Any
) -> list[Row]:
    """Rows of contenders (name, run, units of work per run), interleaved; ratios are to the first."""
    contenders = [Contender(name, run, lambda: np.empty(0)) for name, run, _ in entries]
    times = measure(contenders, budget=budget, min_rounds=rounds[0], max_rounds=rounds[1])
    per_unit = {name: times[name] / units for name, _, units in entries}
    first = entries[0][0]
    rows = []
    for name, seconds in per_unit.items():
        q50, q20, q80 = quantiles(seconds * 1e3)
        ratio, ratio_q20, ratio_q80 = quantiles(seconds / per_unit[first])
        ours = name == OURS
        version = cl.__version__ if ours else sklearn.__version__ if name == SKLEARN else torch.__version__
        provided: dict[str, Any] = dict(provenance())
        rows.append(
            Row(
                backend=name, version=version, isa=isa() if ours else "", metric="time", q50=q50, q20=q20, q80=q80,
                rounds=len(seconds), ratio_to=first, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80,
                **row, **provided,
            )
        )  # fmt: skip
    return rows


def settle_memory() -> None:
    """Bring glibc's thresholds for giving memory back to their largest values for all; see bench_evolution."""
    block = torch.ones(31 << 18)
    del block


if __name__ == "__main__":
    sys.exit(runner.main(__file__, __doc__, PARTS, budget=8.0))
