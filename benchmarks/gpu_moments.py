"""One part of bench_gpu.py: a batch of features joins running cross-moments, against torch's products and the memory.

What the floors count: features once, cross read and written, at the rate of a copy; and three products of tf32 for each
of float32, at the rate of torch's own tf32 product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop import ops
from gpu_measure import GpuContender, measure, precision
from record import Row, quantiles
from report_gpu import BYTES_FLOOR, MOMENTS_OP

if TYPE_CHECKING:
    from bench_gpu import Setup

PRODUCTS_FLOOR = "floor, three tf32 products"
COLUMNS, NEURONS, BATCHES = 200_704, 64, (64, 512, 3000)  # layer 3 of a ResNet-50 at 224 x 224: 1024 x 14 x 14
CHECKED = 2000  # columns that are compared with float64
LIMIT, REDUCED_LIMIT = 1e-5, 1e-2  # root mean square error of the products, relative to theirs

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Sets of features [B, D] in memory larger than the L2 cache together, and what the responses give."""

    features: list[torch.Tensor]
    centred: torch.Tensor
    shift: torch.Tensor
    state: State

    @classmethod
    def of(cls, images: int, columns: int, neurons: int, device: torch.device, dtype: torch.dtype) -> Batch:
        torch.manual_seed(0)
        sets = 3 if images * columns < 1e8 else 2
        y = torch.randn(images, neurons, device=device, dtype=torch.float64)
        features = []
        for _ in range(sets):
            x = torch.randn(images, columns, device=device).relu_()
            x[:, : min(neurons, columns)] += y[:, :columns].float()
            features.append(x.to(dtype))
        state = (
            torch.zeros(columns, device=device, dtype=torch.float64),
            torch.zeros(columns, device=device, dtype=torch.float64),
            torch.zeros(neurons, columns, device=device),
        )
        return cls(features, (y - y.mean(0)).float(), torch.zeros(neurons, device=device), state)

    @property
    def images(self) -> int:
        return len(self.centred)

    def expected(self) -> NDArray[np.float64]:
        """float64 products of the first set with the responses, [T, CHECKED]."""
        x = self.features[0][:, :CHECKED].double()
        return (self.centred.double().mT @ (x - x.mean(0))).cpu().numpy()


def contender(
    name: str, batch: Batch, update: Callable[[torch.Tensor, State], Any], kind: str = "fp32"
) -> GpuContender:
    def run(i: int) -> Any:
        return update(batch.features[i % len(batch.features)], batch.state)

    def fetch() -> NDArray[np.float64]:
        fresh = tuple(torch.zeros_like(part) for part in batch.state)
        update(batch.features[0], fresh)  # type: ignore[arg-type]
        return fresh[2][:, :CHECKED].double().cpu().numpy()

    return GpuContender(name, run, fetch, lambda: precision(kind), reduced=kind == "tf32")


def ours(batch: Batch, engine: str) -> GpuContender:
    weight = float(batch.images)

    def update(x: torch.Tensor, state: State) -> None:
        ops.feature_moments(x, None, batch.centred, batch.shift, weight, weight, *state, backend=engine)

    return contender(f"cortexloop {engine}", batch, update)


def torch_moments(batch: Batch, kind: str) -> GpuContender:
    """The same update in torch. Deviations of responses sum to zero, so that features need no centring."""

    def update(x: torch.Tensor, state: State) -> None:
        mean, m2, cross = state
        variance, centre = torch.var_mean(x, dim=0, correction=0)
        d = centre.double() - mean
        cross.addmm_(batch.centred.mT, x)
        cross.addr_(batch.shift, d.float(), alpha=batch.images / 2)
        m2 += variance.double() * batch.images + d.square() * (batch.images / 2)
        mean += d / 2

    return contender(f"torch var_mean and addmm, {kind}", batch, update, kind)


def torch_product(batch: Batch, kind: str) -> GpuContender:
    """The product alone."""

    def update(x: torch.Tensor, state: State) -> None:
        state[2].addmm_(batch.centred.mT, x)

    return contender(f"torch addmm alone, {kind}", batch, update, kind)


def right(contenders: list[GpuContender], expected: NDArray[np.float64]) -> Iterator[tuple[GpuContender, float]]:
    """Those that are right, with their error.

    Raises:
        ValueError: one of ours is not.
    """
    for candidate in contenders:
        candidate.prepare()
        error = float(np.sqrt(np.mean((candidate.fetch() - expected) ** 2) / np.mean(expected**2)))
        if error <= (REDUCED_LIMIT if candidate.reduced else LIMIT):
            yield candidate, error
            continue
        sentence = f"{candidate.name}: the products are off by {error:.3g} of their root mean square"
        if candidate.name.startswith("cortexloop"):
            raise ValueError(sentence)
        print(f"no number for {sentence}", flush=True)


def rows_of(setup: Setup, batch: Batch, budget: float, contenders: list[GpuContender]) -> list[Row]:
    """Errors, floors, and microseconds per batch with each one's ratio to the floor of memory."""
    features = batch.features[0]
    images, columns = features.shape
    neurons = batch.centred.shape[1]
    dtype = str(features.dtype).removeprefix("torch.")
    case = f"D = {columns:,}, T = {neurons}, {dtype} features"
    common = {"op": MOMENTS_OP, "case": case, "batch": images, "direction": "update"}
    size = images * columns * features.element_size() + 2 * neurons * columns * 4 + 4 * columns * 8
    floors = {
        BYTES_FLOOR: size / setup.ceilings.copy,
        PRODUCTS_FLOOR: 3 * 2.0 * images * columns * neurons / setup.ceilings.tf32,
    }
    passed = list(right(contenders, batch.expected()))
    times = measure([found for found, _ in passed], setup.device, budget=budget, min_rounds=3, max_rounds=20)
    rows = [
        setup.provenance.row(**common, backend=name, metric="floor", unit="us", q50=seconds * 1e6)
        for name, seconds in floors.items()
    ]
    for found, error in passed:
        q50, q20, q80 = quantiles(times[found.name] * 1e6)
        ratio = q50 / (floors[BYTES_FLOOR] * 1e6)
        rows.append(
            setup.provenance.row(
                **common, backend=found.name, metric="time", unit="us", q50=q50, q20=q20, q80=q80,
                rounds=len(times[found.name]), ratio_to=BYTES_FLOOR, ratio=ratio,
                ratio_q20=ratio * q20 / q50, ratio_q80=ratio * q80 / q50,
            )
        )  # fmt: skip
        rows.append(setup.provenance.row(**common, backend=found.name, metric="relative error", unit="1", q50=error))
    return rows


def part_moments(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """Batches of three sizes in float32, and the middle one in float16."""
    columns, neurons, batches = (300, 5, (3, 8)) if setup.rehearsal else (COLUMNS, NEURONS, BATCHES)
    kinds = [(images, torch.float32) for images in batches] + [(batches[1], torch.float16)]
    for images, dtype in kinds:
        batch = Batch.of(images, columns, neurons, setup.device, dtype)
        contenders = [ours(batch, engine) for engine in setup.engines]
        if dtype == torch.float32:
            contenders += [make(batch, kind) for kind in ("fp32", "tf32") for make in (torch_moments, torch_product)]
        yield rows_of(setup, batch, budget / len(kinds), contenders)
        del batch, contenders
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
