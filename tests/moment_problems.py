"""Batches that join running moments: some with answers that need no rounding, some realistic; and the answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """mean, m2: float64 [D]; cross: float32 [T, D]."""

    mean: Tensor
    m2: Tensor
    cross: Tensor

    def clone(self) -> State:
        return State(self.mean.clone(), self.m2.clone(), self.cross.clone())

    def to(self, device: torch.device) -> State:
        return State(self.mean.to(device), self.m2.to(device), self.cross.to(device))

    def equals(self, other: State) -> bool:
        """The same bits."""
        return all(torch.equal(x, y) for x, y in zip(vars(self).values(), vars(other).values(), strict=True))


@dataclass(frozen=True)
class MomentProblem:
    """The arguments of `ops.feature_moments`; `state` is what they join."""

    features: Tensor
    weights: Tensor | None
    centred: Tensor
    shift: Tensor
    before: float
    batch: float
    state: State

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float, float]:
        return self.features, self.weights, self.centred, self.shift, self.before, self.batch

    def to(self, device: torch.device) -> MomentProblem:
        weights = None if self.weights is None else self.weights.to(device)
        tensors = (self.features.to(device), weights, self.centred.to(device), self.shift.to(device))
        return MomentProblem(*tensors, self.before, self.batch, self.state.to(device))


def exact_moments(
    images: int,
    columns: int,
    neurons: int,
    *,
    dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    times_before: int = 3,
) -> MomentProblem:
    """Small integers whose batch means are integers: every sum is exact in float32, whatever its order.

    Args:
        times_before: weight before over that of the batch: 0, 1 or 3, so that shares are powers of two.
    """
    rng = np.random.default_rng([images, columns, neurons, weighted])
    weights = rng.choice([1.0, 1.0, 1.0, 0.0, 2.0, 3.0], images) if weighted else np.ones(images)
    weights[-1] = 1.0
    total = float(weights.sum())
    x = rng.integers(-4, 5, (images, columns)).astype(np.float64)
    x[:, ::5] = rng.integers(-4, 5, x[:, ::5].shape[1])  # constant
    light = np.flatnonzero(weights == 1.0)
    for column in x.T:  # until the weighted sum is a multiple of the total weight
        rest = float((weights @ column + total // 2) % total - total // 2)
        for step in range(int(abs(rest))):
            column[light[step % light.size]] -= np.sign(rest)
    assert not ((weights @ x) % total).any()
    assert np.abs(x).max() <= 8

    def integers(*shape: int) -> Tensor:
        return torch.from_numpy(rng.integers(-5, 6, shape).astype(np.float32))

    state = State(integers(columns).double(), integers(columns).double().abs(), integers(neurons, columns))
    if times_before == 0:
        state = State(*(torch.zeros_like(x) for x in vars(state).values()))
    return MomentProblem(
        features=torch.from_numpy(x).to(dtype),
        weights=torch.from_numpy(weights.astype(np.float32)) if weighted else None,
        centred=integers(images, neurons),
        shift=integers(neurons),
        before=times_before * total,
        batch=total,
        state=state,
    )


def random_moments(
    images: int,
    columns: int,
    neurons: int,
    *,
    dtype: torch.dtype = torch.float32,
    weighted: bool = False,
    seed: int = 0,
) -> MomentProblem:
    """Rectified features with means of their own and a few large ones, responses that follow some of them."""
    rng = np.random.default_rng([seed, images, columns, neurons])
    x = rng.normal(rng.normal(0, 1, columns), rng.gamma(1, 1, columns) + 0.05, (images, columns))
    x[:, ::2] = np.maximum(x[:, ::2], 0)
    x[:, 1::7] += 30
    features = torch.from_numpy(x).to(dtype)
    y = rng.normal(5, 2, (images, neurons)) + x[:, np.arange(neurons) % columns]
    weights = rng.integers(1, 9, images).astype(np.float64) if weighted else np.ones(images)
    total = float(weights.sum())
    centred = weights[:, None] * (y - weights @ y / total)
    state = State(
        torch.from_numpy(x.mean(axis=0) + rng.normal(0, 0.1, columns)),
        torch.from_numpy(rng.gamma(2, images, columns)),
        torch.from_numpy(rng.normal(0, images**0.5, (neurons, columns))).float(),
    )
    return MomentProblem(
        features=features,
        weights=torch.from_numpy(weights).float() if weighted else None,
        centred=torch.from_numpy(centred).float(),
        shift=torch.from_numpy(rng.normal(0, 0.2, neurons)).float(),
        before=2.5 * total,
        batch=total,
        state=state,
    )


def answer(problem: MomentProblem, dtype: torch.dtype = torch.float64) -> State:
    """The state afterwards, every step in `dtype`."""
    p = problem
    x, centred, shift = (t.to(dtype) for t in (p.features, p.centred, p.shift))
    mean, m2, cross = (t.to(dtype) for t in vars(p.state).values())
    w = torch.ones(x.shape[0], dtype=dtype, device=x.device) if p.weights is None else p.weights.to(dtype)
    centre = (w @ x) / p.batch
    d = centre - mean
    factor = p.before * p.batch / (p.before + p.batch)
    return State(
        mean + d * (p.batch / (p.before + p.batch)),
        m2 + w @ (x - centre).square() + factor * d.square(),
        cross + centred.mT @ (x - centre) + factor * shift[:, None] * d,
    )
