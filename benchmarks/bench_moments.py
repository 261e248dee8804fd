"""Streaming moments of features and responses on a CPU against torch, with the machine's own ceilings beside them.

    python benchmarks/bench_moments.py [--only update,accuracy] [--threads 1,2] [--record]

A part runs in a process of its own with a fixed number of threads; within it, candidate and peers alternate. Before
any clock starts, the correlations of every contender are compared with two passes in float64; a contender that is wrong
gets no number, and if it is ours, the run fails. Contenders that sum without centring are right on the features they
are timed on (mean below the standard deviation); the part "accuracy" shows what becomes of them elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import cortexloop as cl
import runner
from bench_bank import WrongResultError, isa
from cortexloop.factor.moments import FeatureMoments
from record import Contender, Row, measure, provenance, quantiles

SHAPE, NEURONS = (1024, 14, 14), 64
OURS, OURS_BF16, CHECKED = "cortexloop", "cortexloop, bfloat16 features", "cortexloop, features checked for NaN"
RAW = "torch, raw sums (addmm)"
CENTRED = "torch, centred batches"
PUBLISHED = "published form (three passes)"
PRODUCT, COPY = "ceiling: torch.mm alone", "ceiling: copy of the covariances"
LIMIT = 1e-4  # largest error of a correlation that still counts as right


# --- contenders: each takes batches and gives the correlations [T, D] of all it has taken -----------------------------


@dataclass
class Sums:
    """A way to accumulate moments."""

    take: Callable[[Tensor, Tensor], None]
    correlation: Callable[[], Tensor]


def ours(shape: tuple[int, int, int], neurons: int, dtype: torch.dtype = torch.float32, check: bool = False) -> Sums:
    moments = FeatureMoments(shape, neurons)

    def take(x: Tensor, y: Tensor) -> None:
        moments.update(x if x.dtype == dtype else x.to(dtype), y, check=check)

    return Sums(take, lambda: moments.correlation().flatten(1))


class RawSums:
    """Sums of x, x^2 and y x in float32, as one writes them down in torch."""

    def __init__(self, shape: tuple[int, int, int], neurons: int) -> None:
        d = int(np.prod(shape))
        self.n = 0
        self.x, self.xx, self.xy = torch.zeros(d), torch.zeros(d), torch.zeros(neurons, d)
        self.y, self.yy = torch.zeros(neurons), torch.zeros(neurons)

    def take(self, x: Tensor, y: Tensor) -> None:
        flat = x.flatten(1)
        self.n += len(flat)
        self.x += flat.sum(0)
        self.xx += flat.square().sum(0)
        self.xy.addmm_(y.mT, flat)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)

    def correlation(self) -> Tensor:
        mx, my = self.x / self.n, self.y / self.n
        sx, sy = (self.xx / self.n - mx**2).sqrt(), (self.yy / self.n - my**2).sqrt()
        return (self.xy / self.n - my[:, None] * mx) / sy[:, None] / sx


class PublishedSums(RawSums):
    """The same sums as published code forms them: one pass over the features for each, products by einsum."""

    def take(self, x: Tensor, y: Tensor) -> None:
        self.n += len(x)
        self.x += x.sum(dim=0).flatten()
        self.xx += (x**2).sum(dim=0).flatten()
        self.xy += torch.einsum("bt,bchw->tchw", y, x).flatten(1)
        self.y += y.sum(dim=0)
        self.yy += (y**2).sum(dim=0)


class CentredSums:
    """What the kernel computes (Chan, Golub & LeVeque 1983), in float32 torch."""

    def __init__(self, shape: tuple[int, int, int], neurons: int) -> None:
        d = int(np.prod(shape))
        self.n = 0
        self.x, self.xx, self.xy = torch.zeros(d), torch.zeros(d), torch.zeros(neurons, d)
        self.y, self.yy = torch.zeros(neurons), torch.zeros(neurons)

    def take(self, x: Tensor, y: Tensor) -> None:
        flat, b = x.flatten(1), len(x)
        mean_x, mean_y = flat.mean(0), y.mean(0)
        fx, fy = flat - mean_x, y - mean_y
        dx, dy = mean_x - self.x, mean_y - self.y
        f = self.n * b / (self.n + b)
        self.xy.addmm_(fy.mT, fx)
        self.xy.addr_(dy, dx, alpha=f)
        self.xx += fx.square().sum(0) + f * dx.square()
        self.yy += fy.square().sum(0) + f * dy.square()
        self.x += dx * (b / (self.n + b))
        self.y += dy * (b / (self.n + b))
        self.n += b

    def correlation(self) -> Tensor:
        return self.xy / self.xx.sqrt() / self.yy.sqrt()[:, None]


def summed(kind: type[RawSums] | type[CentredSums], shape: tuple[int, int, int], neurons: int) -> Sums:
    made = kind(shape, neurons)
    return Sums(made.take, made.correlation)


# --- the gate ---------------------------------------------------------------------------------------------------------


def drawn(n: int, shape: tuple[int, int, int], neurons: int, mean: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features with standard deviation 1 and a mean, [n, C, H, W]; responses that follow some of them, [n, T]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator)
    y = 10 + 3 * torch.randn(n, neurons, generator=generator) + 2 * x.flatten(1)[:, :neurons]
    return x.add_(mean), y


def right(x: Tensor, y: Tensor) -> Tensor:
    """Correlations in float64, centred before anything is multiplied."""
    f, r = x.flatten(1).double(), y.double()
    f, r = f - f.mean(0), r - r.mean(0)
    return (r.mT @ f) / f.square().sum(0).sqrt() / r.square().sum(0).sqrt()[:, None]


def errors(sums: Sums, x: Tensor, y: Tensor, batch: int = 64) -> NDArray[np.float64]:
    """Error of every correlation; one that is not a number counts as 1."""
    for part in range(0, len(x), batch):
        sums.take(x[part : part + batch], y[part : part + batch])
    error = (sums.correlation().double() - right(x, y)).abs()
    return torch.where(torch.isfinite(error), error, 1.0).clamp(max=1.0).numpy()


def check(name: str, sums: Sums) -> bool:
    """Whether a contender is right on a small problem like the timed one.

    Raises:
        WrongResultError: it is ours and is not.
    """
    limit = LIMIT if name != OURS_BF16 else 0.05  # rounding the features
    worst = float(errors(sums, *drawn(256, (16, 5, 5), 8, 0.5)).max())
    if worst <= limit:
        return True
    sentence = f"{name}: largest error of a correlation is {worst:.3g}, at most {limit:g} is right"
    if name in (OURS, OURS_BF16, CHECKED):
        raise WrongResultError(sentence)
    print(f"no number for {sentence}", file=sys.stderr)
    return False


# --- the parts: each returns rows -------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[tuple[int, int, int], int], Sums]] = {
    OURS: lambda shape, neurons: ours(shape, neurons),
    CHECKED: lambda shape, neurons: ours(shape, neurons, check=True),
    OURS_BF16: lambda shape, neurons: ours(shape, neurons, torch.bfloat16),
    CENTRED: lambda shape, neurons: summed(CentredSums, shape, neurons),
    RAW: lambda shape, neurons: summed(RawSums, shape, neurons),
    PUBLISHED: lambda shape, neurons: summed(PublishedSums, shape, neurons),
}


def _row(name: str, case: str, batch: int, direction: str, threads: int, **values: Any) -> Row:
    mine = name.startswith("cortexloop")
    where: dict[str, Any] = dict(provenance())
    return Row(
        case=case,
        batch=batch,
        op="feature_moments",
        direction=direction,
        backend=name,
        version=str(cl.__version__ if mine else torch.__version__),
        isa=isa() if mine else "",
        threads=threads,
        **{**values, **where},
    )


def part_update(threads: int, budget: float) -> list[Row]:
    """One batch of the features of a ResNet-50's third stage and 64 neurons."""
    d = int(np.prod(SHAPE))
    case = f"features {'x'.join(map(str, SHAPE))}, {NEURONS} neurons"
    rows = []
    for batch in (64, 128, 256):
        x, y = drawn(batch, SHAPE, NEURONS, 0.5)
        half = x.bfloat16()
        contenders = []
        for name, make in MAKERS.items():
            if not check(name, make((16, 5, 5), 8)):
                continue
            sums, shown = make(SHAPE, NEURONS), half if name == OURS_BF16 else x

            def run(sums: Sums = sums, shown: Tensor = shown, y: Tensor = y) -> None:
                sums.take(shown, y)

            contenders.append(Contender(name, run, lambda: np.empty(0)))
        flat, responses, out, other = x.flatten(1), y.mT.contiguous(), torch.empty(NEURONS, d), torch.ones(NEURONS, d)

        def product(a: Tensor = responses, b: Tensor = flat, out: Tensor = out) -> None:
            torch.mm(a, b, out=out)

        def copy(out: Tensor = out, other: Tensor = other) -> None:
            out.copy_(other)

        contenders += [Contender(PRODUCT, product, lambda: np.empty(0)), Contender(COPY, copy, lambda: np.empty(0))]
        times = measure(contenders, budget=budget, min_rounds=3, max_rounds=30)
        for contender in contenders:
            seconds = times[contender.name]
            q50, q20, q80 = quantiles(seconds * 1e3)
            ratio, ratio_q20, ratio_q80 = quantiles(seconds / times[OURS])
            rows.append(
                _row(
                    contender.name, case, batch, "update", threads, metric="time", unit="ms/batch",
                    q50=q50, q20=q20, q80=q80, rounds=len(seconds),
                    ratio_to=OURS, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80,
                )
            )  # fmt: skip
    return rows


def part_accuracy(threads: int, budget: float) -> list[Row]:
    """Errors of the correlations after 1024 images, for features whose mean is far above their standard deviation."""
    rows = []
    for mean in (0.0, 10.0, 1e3, 1e4):
        x, y = drawn(1024, (32, 4, 4), 8, mean, seed=3)
        for name in (OURS, CENTRED, RAW, PUBLISHED):
            error = errors(MAKERS[name]((32, 4, 4), 8), x, y)
            rows.append(
                _row(
                    name, f"mean {mean:g} standard deviations", 64, "accuracy", threads,
                    metric="largest error of a correlation", unit="1", q50=float(error.max()),
                    q20=float(np.quantile(error, 0.2)), q80=float(np.quantile(error, 0.8)), rounds=1,
                    ratio_to="", ratio="", ratio_q20="", ratio_q80="",
                )
            )  # fmt: skip
    return rows


PARTS: dict[str, Callable[[int, float], list[Row]]] = {"update": part_update, "accuracy": part_accuracy}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, __doc__, PARTS, budget=8.0, untimed=("accuracy",)))
