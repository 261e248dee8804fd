"""Evolution strategy on a sphere: explores by angle, with a planned decay instead of an adapted step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cortexloop import ops
from cortexloop.evolve import streams
from cortexloop.evolve.optimiser import Optimiser, Selection, keep, positive, whole
from cortexloop.evolve.recombination import RankWeights

SCHEDULES = ("exp", "lin", "inv")
PRODUCTS = 2**20  # numbers in a temporary tensor
TINY = 1e-30  # divisors are at least this: below what a length in use can be, above what float32 makes of 0


def schedule_angles(schedule: str, generations: int, first: float = 50.0, last: float = 7.33) -> list[float]:
    """Typical angle in degrees between the basis and its samples, for each planned generation.

    "exp" and "lin" go from `first` to `last` by equal ratios and by equal steps. "inv" is 15 + 1 / (0.0017 g + 0.0146)
    for g = 1, 2, ...: 76 at first, 22 at the 75th.

    Raises:
        ValueError: no schedule of that name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule should be one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    if schedule == "inv":
        return [15 + 1 / (0.0017 * g + 0.0146) for g in range(1, generations + 1)]
    done = [g / max(generations - 1, 1) for g in range(generations)]
    if schedule == "lin":
        return [first + (last - first) * t for t in done]
    return [first * (last / first) ** t for t in done]


class SphereCMA(Optimiser):
    """Evolution on a sphere of codes (Wang & Ponce 2022, "High-performance evolutionary algorithms for online neuron
    control"; there ZOHA_Sphere_lr_euclid).

    A generation is the basis x and samples around it, at angles that follow N(0, I) in the tangent space:

        T = mu_g (u - <u, x> x),   code = R (cos|T| x + sin|T| T / |T|),   u ~ N(0, I),   |x| = 1
        m = sum of w_i code_(i), over the parents by rank;  x moves along the great circle to m, and on to
        `learning_rate` times that angle

    mu_g is the schedule's angle in radians over sqrt(dim). The first generation is N(0, I) brought to the radius, or
    `first_generation` brought to the radius; its weighted mean, with half of the codes as parents, is the first basis.
    Every code has the norm `radius`.

    From the second generation on `ask` gives `population` + 1 codes: the basis comes first, as published, so that its
    score can be followed, and is left out of the ranking. A generation in which it alone was shown changes nothing.
    Injected codes are brought to the radius; in the first place they stand for the basis and are ranked like all
    others. A problem of which nothing was shown yet goes on with codes like those of the first generation.

    Args:
        population: samples per generation.
        parents: how many of them are recombined; half of the population if None (20 of 40 as published).
        radius: norm of the codes, R.
        learning_rate: above 0; 1 goes to the mean, above 1 beyond (2 in the MATLAB version).
        schedule: "exp", "lin" or "inv", see `schedule_angles`.
        angles: first and last angle of "exp" and "lin", in degrees above 0 and up to 90.
        generations: how many the schedule is planned for, at most 10^6; later ones keep the last angle.
        dim (at least 2), problems, seed, minimise, first_generation, device, dtype: see `Optimiser`.

    Raises:
        ValueError, TypeError: bad arguments; a code of zeros among those to be brought to the radius.
    """

    STATE: ClassVar[tuple[str, ...]] = ("_direction",)

    def __init__(
        self,
        dim: int,
        *,
        population: int | None = 40,
        parents: int | None = None,
        radius: float = 300.0,
        learning_rate: float = 1.5,
        schedule: str = "exp",
        angles: Sequence[float] = (50.0, 7.33),
        generations: int = 75,
        **common: Any,
    ) -> None:
        super().__init__(whole("dim", dim, 2, 2**31 - 1), population=40 if population is None else population, **common)
        self.parents = self.population // 2 if parents is None else whole("parents", parents, 1, self.population)
        self.radius = positive("radius", radius)
        self.learning_rate = positive("learning_rate", learning_rate)
        self.schedule = schedule
        self.generations = whole("generations", generations, 1, 10**6)
        self.angles = _two_angles(angles)
        self._degrees = schedule_angles(schedule, self.generations, *self.angles)
        self._direction = torch.zeros(self.n, self.dim, dtype=self.dtype, device=self.device)
        """The basis over the radius; zeros until a first generation has a score."""
        self._weights: dict[tuple[int, float], RankWeights] = {}
        if self._first is not None:
            self._first = self._to_radius("first_generation", self._first)

    def _settings(self) -> dict[str, Any]:
        return {
            "parents": self.parents,
            "radius": self.radius,
            "learning_rate": self.learning_rate,
            "schedule": self.schedule,
            "angles": list(self.angles),
            "generations": self.generations,
        }

    @property
    def centre(self) -> Tensor:
        """The basis, [n, dim]: norm `radius`; zeros before the first scores."""
        return self.radius * self._direction

    @property
    def angle(self) -> float:
        """Degrees between the basis and typical samples of the coming generation; the first has no basis (90)."""
        if self.generation == 0:
            return 90.0
        return self._degrees[min(self.generation, self.generations) - 1]

    def inject(self, codes: ArrayLike | Tensor) -> None:
        """As `Optimiser.inject`; the codes are brought to the radius."""
        super().inject(self._to_radius("codes", self.codes_like("codes", codes)))

    def _to_radius(self, name: str, codes: Tensor) -> Tensor:
        rows = codes.flatten(0, 1)
        length = _length(rows)
        if not bool((length > 0).all()):
            raise ValueError(f"{name} should have no code of zeros: it cannot be brought to the radius")
        return (rows * (self.radius / length).to(self.dtype)[:, None]).view_as(codes)

    def _sampled(self) -> int:
        return self.population + (self.generation > 0)

    @property
    def _started(self) -> Tensor:
        """Whether there is a basis, bool [n]."""
        return _length(self._direction) > 0

    def _sample(self) -> Tensor:
        x = self._direction
        # u (I - x^T x): tangent to the sphere, and u itself where there is no basis.
        tangents = None if self.generation == 0 else (x[:, None], -x[:, None])
        codes = ops.sample_codes(
            self.seed,
            streams.SPHERE,
            self.generation,
            self._ids,
            self._sampled(),
            torch.zeros_like(x),
            x.new_ones(self.n),
            factors=tangents,
            out=self._room,
        )
        length = _length(codes.flatten(0, 1)).view(self.n, -1)
        if self.generation == 0:
            return codes.mul_((self.radius / length.clamp(min=TINY)).to(self.dtype)[..., None])
        started = self._started[:, None]
        angle = math.radians(self.angle) / math.sqrt(self.dim) * length
        across = torch.where(started, angle.sin(), 1.0) * self.radius / length.clamp(min=TINY)
        codes.mul_(across.to(self.dtype)[..., None])
        along = (angle.cos() * self.radius).to(self.dtype)[..., None]
        # By rows, so that the products stay in cache: memory for all of them at once would cost more than they do.
        rows = max(1, PRODUCTS // x.numel())
        for start in range(0, codes.shape[1], rows):
            part = slice(start, start + rows)
            codes[:, part].add_(along[:, part] * x[:, None])
        codes[:, 0] = torch.where(started, self.radius * x, codes[:, 0])
        return codes

    def _ranks(self, m: int, parents: float) -> RankWeights:
        if (m, parents) not in self._weights:
            self._weights[m, parents] = RankWeights(m, parents, self.device)
        return self._weights[m, parents]

    def _parent_weights(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """(weights float64 [n, m], whether any weighs more than 0, bool [n])."""
        m = selection.codes.shape[1]
        start, _ = self._ranks(m, max(1.0, m / 2)).of(selection.rank, selection.shown)
        if self.generation == 0:
            return start, selection.active
        if self._injected is not None:
            weights, _ = self._ranks(m, self.parents).of(selection.rank, selection.shown)
            shown = selection.shown
        else:
            basis, samples = selection.rank[:, :1], selection.rank[:, 1:]
            shown = selection.shown - (~selection.scores[:, 0].isnan()).long()
            weights, _ = self._ranks(m - 1, self.parents).of(samples - (basis < samples).long(), shown)
            weights = torch.nn.functional.pad(weights, (1, 0))
        started = self._started
        return (
            torch.where(started[:, None], weights, start),
            torch.where(started, shown > 0, selection.active),
        )

    def _update(self, selection: Selection) -> None:
        weights, active = self._parent_weights(selection)
        mean, _ = ops.code_moments(selection.codes, weights.to(self.dtype))
        mean = self._unit(mean)
        x = self._direction
        along = ops.row_dots(x, mean)
        tangent = mean - along[:, None] * x
        cosine, sine = along.double(), _length(tangent)
        # Half-angle form of atan2, 0 where the mean is x or opposite to it.
        angle = 2 * (sine / ((cosine * cosine + sine * sine).sqrt() + cosine).clamp(min=TINY)).atan()
        angle = angle * torch.where(self._started, self.learning_rate, 1.0)  # no basis is 90 degrees from anything
        ahead = (angle.sin() / sine.clamp(min=TINY)).to(self.dtype)
        moved = self._unit(angle.cos().to(self.dtype)[:, None] * x + ahead[:, None] * tangent)
        self._direction = keep(active, moved, x)

    def _unit(self, x: Tensor) -> Tensor:
        return x * (1 / _length(x).clamp(min=TINY)).to(self.dtype)[:, None]


def _length(x: Tensor) -> Tensor:
    """Norms of rows [n, dim], float64 [n]."""
    return ops.row_dots(x, x).double().sqrt()


def _two_angles(values: Sequence[float]) -> tuple[float, float]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or len(values) != 2:
        raise TypeError(f"angles should be the first and the last angle in degrees, got {values!r}")
    first, last = (positive("angles", value) for value in values)
    if max(first, last) > 90:
        raise ValueError(f"angles should be up to 90 degrees, got {first} and {last}")
    return first, last
