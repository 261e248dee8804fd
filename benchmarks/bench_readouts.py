"""Readouts of feature maps on a CPU: forward, and forward with backward, against neuralpredictors and plain torch.

    python benchmarks/bench_readouts.py [--only factorized,shared,points,pooled] [--threads 1,2] [--record]

Each part runs in a process of its own with a fixed number of threads; within a part, candidate and peers alternate. All
are modules with the same weights; backward asks for the gradients of the features and of all parameters. Before any
clock starts, responses and gradients are compared with float64: a contender that is wrong gets no number, and if it is
ours, the run fails.
"""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import cortexloop as cl
import runner
from bench_bank import WrongResultError, isa
from cortexloop import readouts
from record import Contender, Row, measure, provenance, quantiles

OURS = "cortexloop"
LIMIT = 1e-4
"""Largest error of responses and gradients, relative to their root mean square; float32 stays below 1e-5."""


# --- plain torch ------------------------------------------------------------------------------------------------------


class PlainFactors(nn.Module):
    """A factorized readout by matrix products, in the order `first`: "masks", "vectors", or the product of both."""

    def __init__(self, like: readouts.FactorizedReadout, first: str) -> None:
        super().__init__()
        self.first = first
        self.masks = nn.Parameter(like.masks.detach().clone())
        self.vectors = nn.Parameter(like.vectors.detach().clone())
        self.bias = nn.Parameter(like.bias.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T]."""
        x, m, v = features.flatten(2), self.masks.flatten(2), self.vectors
        if self.first == "weights":
            return F.linear(x.flatten(1), torch.einsum("trc,trs->tcs", v, m).flatten(1), self.bias)
        if self.first == "masks":
            per_factor = ((x @ m.flatten(0, 1).mT) * v.flatten(0, 1).mT).sum(1)
        else:
            per_factor = ((v.flatten(0, 1) @ x) * m.flatten(0, 1)).sum(2)
        return per_factor.unflatten(1, v.shape[:2]).sum(2) + self.bias


class PlainPoints(nn.Module):
    """`grid_sample` and a weighted sum over channels, at fixed positions."""

    def __init__(self, like: readouts.GaussianReadout) -> None:
        super().__init__()
        self.mu = nn.Parameter(like.mu.detach().clone())
        self.vectors = nn.Parameter(like.vectors.detach().clone())
        self.bias = nn.Parameter(like.bias.detach().clone())

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T]."""
        grid = self.mu.expand(len(features), -1, -1)[:, :, None]
        sampled = F.grid_sample(features, grid, align_corners=True)[..., 0]
        return torch.einsum("bct,tc->bt", sampled, self.vectors) + self.bias


# --- contenders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A module, its package, the names of its parameters that ours call `names`, and whether it draws positions."""

    name: str
    package: str
    module: nn.Module
    sampling: bool = False


def scatter(module: nn.Module, spread: float = 0.6) -> Any:
    """Parameters N(0, spread^2)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return module


def maps(batch: int, shape: tuple[int, int, int]) -> Tensor:
    """Feature maps after a ReLU."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2)).relu_()


def outcome(module: nn.Module, features: Tensor, backward: bool) -> list[NDArray[np.float64]]:
    """Responses and, with `backward`, the gradient by the features; positions drawn from a fixed seed."""
    torch.manual_seed(3)
    leaf = features.clone().requires_grad_(backward)
    response = module(leaf)
    if not backward:
        return [response.detach().double().numpy()]
    response.square().sum().backward()
    assert leaf.grad is not None
    return [response.detach().double().numpy(), leaf.grad.double().numpy()]


def error(got: Sequence[NDArray[np.float64]], exact: Sequence[NDArray[np.float64]]) -> float:
    """Largest root mean square error, relative to that of the values."""
    ratios = (np.sqrt(np.square(a - b).mean() / np.square(b).mean()) for a, b in zip(got, exact, strict=True))
    return float(max(ratios))


def checked(entries: Sequence[Entry], features: Tensor, backward: bool) -> list[Entry]:
    """Those that agree with ours in float64 on a few images; sampling ones share their seeds.

    Raises:
        WrongResultError: ours does not agree with the first of the plain formulations in float64.
    """
    few = features[:3]
    right = []
    for entry in entries:
        yardstick = next(e for e in reversed(entries) if e.sampling == entry.sampling and e.package != OURS)
        exact = outcome(_double(yardstick.module), few.double(), backward)
        if entry.sampling:  # float32 noise is other noise than float64's: compare at the same positions
            exact = outcome(yardstick.module, few, backward)
        off = error(outcome(entry.module, few, backward), exact)
        if off <= LIMIT:
            right.append(entry)
            continue
        sentence = f"{entry.name}: error {off:.3g}, at most {LIMIT:g} is right"
        if entry.package == OURS:
            raise WrongResultError(sentence)
        print(f"no number for {sentence}", file=sys.stderr)
    return right


def _double(module: nn.Module) -> nn.Module:
    """A copy in float64."""
    import copy

    return copy.deepcopy(module).double()


def contender(entry: Entry, features: Tensor, backward: bool) -> Contender:
    """What is timed: the module, and with `backward` all gradients of the sum of its responses."""
    leaf = features.detach().requires_grad_(backward)

    def run() -> Tensor:
        if not backward:
            with torch.no_grad():
                response: Tensor = entry.module(leaf)
                return response
        leaf.grad = None
        entry.module.zero_grad(set_to_none=True)
        response = entry.module(leaf)
        response.backward(torch.ones_like(response))
        return response

    return Contender(entry.name, run, lambda: run().detach().double().numpy())


def rows_of(case: str, entries: Sequence[Entry], features: Tensor, threads: int, budget: float) -> list[Row]:
    """Both directions of a case; ratios are to the first entry, ours."""
    rows = []
    for direction, backward in (("forward", False), ("forward and backward", True)):
        taking_part = checked(entries, features, backward)
        times = measure([contender(e, features, backward) for e in taking_part], budget=budget, min_rounds=3)
        first = times[taking_part[0].name]
        for entry in taking_part:
            seconds = times[entry.name]
            q50, q20, q80 = quantiles(seconds * 1e3)
            ratio, ratio_q20, ratio_q80 = quantiles(seconds / first)
            where: dict[str, Any] = dict(provenance())
            rows.append(
                Row(
                    case=case, batch=len(features), op="readout", direction=direction, backend=entry.name,
                    version=cl.__version__ if entry.package == OURS else importlib.metadata.version(entry.package),
                    isa=isa() if entry.package == OURS else "", threads=threads, metric="time", unit="ms/batch",
                    q50=q50, q20=q20, q80=q80, rounds=len(seconds), ratio_to=taking_part[0].name, ratio=ratio,
                    ratio_q20=ratio_q20, ratio_q80=ratio_q80, **where,
                )
            )  # fmt: skip
    return rows


# --- the parts: each returns rows -------------------------------------------------------------------------------------


def plain_factors(ours: readouts.FactorizedReadout) -> list[Entry]:
    """The three orders of summation in plain torch."""
    orders = {"masks": "masks first", "vectors": "vectors first", "weights": "weights, then one product"}
    return [Entry(f"torch, {what}", "torch", PlainFactors(ours, first)) for first, what in orders.items()]


def part_factorized(threads: int, budget: float) -> list[Row]:
    """Factor models on the features of a ResNet's third layer: 64 neurons of rank 3, a batch and a single image."""
    shape = (1024, 14, 14)
    ours = scatter(readouts.FactorizedReadout(shape, 64, rank=3))
    entries = [Entry(OURS, OURS, ours), *plain_factors(ours)]
    case = "1024 x 14 x 14, 64 neurons, rank 3"
    return [row for batch in (64, 1) for row in rows_of(case, entries, maps(batch, shape), threads, budget)]


def part_shared(threads: int, budget: float) -> list[Row]:
    """The readout of the shared compact model: rank 1, 219 neurons; with FullFactorized2d, which is of rank 1."""
    from neuralpredictors.layers.readouts import FullFactorized2d

    shape = (100, 28, 28)
    ours = scatter(readouts.FactorizedReadout(shape, 219))
    theirs = FullFactorized2d(shape, 219, True, normalize=False)
    with torch.no_grad():
        theirs.spatial.copy_(ours.masks[:, 0])
        theirs._features.copy_(ours.vectors[:, 0])
        theirs.bias.copy_(ours.bias)
    entries = [
        Entry(OURS, OURS, ours),
        Entry("neuralpredictors FullFactorized2d", "neuralpredictors", theirs),
        *plain_factors(ours),
    ]
    return rows_of("100 x 28 x 28, 219 neurons, rank 1", entries, maps(64, shape), threads, budget)


def part_points(threads: int, budget: float) -> list[Row]:
    """The Gaussian readout of the data-driven V4 core: 1,244 neurons, in evaluation and in training."""
    from neuralpredictors.layers.readouts import FullGaussian2d

    rows = []
    for shape in ((96, 92, 92), (96, 46, 46)):
        theirs = scatter(FullGaussian2d(shape, 1244, True, init_sigma=0.3), 0.3)
        with torch.no_grad():
            theirs._mu.clamp_(-1, 1)
        ours = readouts.GaussianReadout.from_neuralpredictors(theirs.state_dict(), shape)
        features = maps(16, shape)
        case = f"{shape[0]} x {shape[1]} x {shape[2]}, 1244 points"
        fixed = [
            Entry(OURS, OURS, ours.eval()),
            Entry("neuralpredictors FullGaussian2d", "neuralpredictors", theirs.eval()),
            Entry("torch, grid_sample", "torch", PlainPoints(ours)),
        ]
        rows += rows_of(case, fixed, features, threads, budget)
        ours.train()
        theirs.train()
        drawn = [
            Entry(OURS, OURS, ours, sampling=True),
            Entry("neuralpredictors FullGaussian2d", "neuralpredictors", theirs, sampling=True),
        ]
        rows += rows_of(f"{case}, drawn anew", drawn, features, threads, budget)
    return rows


def part_pooled(threads: int, budget: float) -> list[Row]:
    """PointPooled2d of published V1 models: two pooling steps, 458 neurons."""
    from neuralpredictors.layers.readouts import PointPooled2d

    shape = (32, 70, 70)
    theirs = scatter(PointPooled2d(list(shape), 458, 2, True, 2, 0.1), 0.4)
    with torch.no_grad():
        theirs.grid.clamp_(-1, 1)
    ours = readouts.PointPooledReadout.from_neuralpredictors(theirs.state_dict(), shape, kernel=2)
    entries = [Entry(OURS, OURS, ours), Entry("neuralpredictors PointPooled2d", "neuralpredictors", theirs)]
    return rows_of("32 x 70 x 70, 458 points, 2 poolings", entries, maps(64, shape), threads, budget)


PARTS: dict[str, Callable[[int, float], list[Row]]] = {
    "factorized": part_factorized,
    "shared": part_shared,
    "points": part_points,
    "pooled": part_pooled,
}


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of neuralpredictors, on import and on construction
    sys.exit(runner.main(__file__, __doc__, PARTS, budget=2.0))
