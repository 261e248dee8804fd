"""Evolution strategies with adapted step size and covariance, in forms that cost O(population x dim) a generation.

Row vectors throughout: x = m + sigma z A with z ~ N(0, I), C = A^T A.
"""

from __future__ import annotations

import abc
import hashlib
import math
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cortexloop import ops
from cortexloop.evolve import streams
from cortexloop.evolve.optimiser import Optimiser, Selection, keep, positive, whole
from cortexloop.evolve.recombination import RankWeights
from cortexloop.evolve.sums import SplitMatrix


def default_population(dim: int) -> int:
    """4 + floor(3 log2 dim), 40 for dim 4096, as Wang & Ponce chose it (the canonical choice has ln for log2)."""
    return 4 + math.floor(3 * math.log2(dim))


def expected_length(dim: int) -> float:
    """Expected length of a N(0, I) vector, sqrt(N) (1 - 1 / (4 N) + 1 / (21 N^2))."""
    return math.sqrt(dim) * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))


class _StepSizeAdaptation(Optimiser):
    """Mean, step size and the path that adapts it; subclasses say what A is."""

    STATE: ClassVar[tuple[str, ...]] = ("_mean", "_sigma", "_path_sigma")

    def __init__(
        self,
        dim: int,
        *,
        population: int | None,
        sigma: float,
        start: ArrayLike | Tensor | None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=default_population(dim) if population is None else population, **common)
        self.sigma = positive("sigma", sigma)
        self._mean = self.code_per_problem("start", start)
        self._sigma = torch.full((self.n,), self.sigma, dtype=torch.float64, device=self.device)
        self._path_sigma = torch.zeros(self.n, self._path_length(), dtype=self.dtype, device=self.device)
        self._weights = {self.population: RankWeights(self.population, self.population / 2, self.device)}

    def _path_length(self) -> int:
        return self.dim

    def _settings(self) -> dict[str, Any]:
        return {"sigma": self.sigma}

    @property
    def centre(self) -> Tensor:
        """The mean of the search distribution, [n, dim]."""
        return self._mean

    @property
    def step_size(self) -> Tensor:
        """sigma, float64 [n]."""
        return self._sigma.clone()

    @property
    def mu_eff(self) -> float:
        """Variance effective selection mass of a fully shown generation."""
        return self._weights[self.population].mu_eff

    def _recombine(self, selection: Selection, centre: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(weighted mean [n, dim], weighted squared deviations from `centre` if given, mu_eff float64 [n])."""
        m = selection.codes.shape[1]
        if m not in self._weights:
            self._weights[m] = RankWeights(m, self.population / 2, self.device)  # a first generation of another size
        weights, mu_eff = self._weights[m].of(selection.rank, selection.shown)
        mean, second = ops.code_moments(selection.codes, weights.to(self.dtype), centre)
        return mean, second, mu_eff

    def _column(self, x: Tensor) -> Tensor:
        """float64 [n] as [n, 1] of the codes' dtype."""
        return x.to(self.dtype)[:, None]

    @abc.abstractmethod
    def _whiten(self, y: Tensor) -> Tensor:
        """y A^-1, [n, dim]."""

    def _as_counted(self, codes: Tensor, injected: int) -> Tensor:
        """Injected codes far outside the search distribution count as nearer ones in the same direction.

        A step longer than sqrt(N) + 2 N / (N + 2) in units of the distribution is shortened to that length, so that one
        code cannot blow up the step size (Hansen 2011, "Injecting external solutions into CMA-ES").
        """
        if injected == 0:
            return codes
        codes = codes.clone()
        sigma = self._column(self._sigma)
        n = self._path_length()
        longest = math.sqrt(n) + 2 * n / (n + 2)
        for k in range(injected):
            step = (codes[:, k] - self._mean) / sigma
            white = self._whiten(step)
            length = ops.row_dots(white, white).double().sqrt()
            shorten = (longest / length.clamp(min=longest)).to(self.dtype)
            codes[:, k] = torch.where((shorten < 1)[:, None], self._mean + sigma * shorten[:, None] * step, codes[:, k])
        return codes

    def _adapt(self, selection: Selection, white: Tensor, mu_eff: Tensor, c_sigma: float, damping: float) -> Tensor:
        """Update the step size from the whitened mean step [n, N]; the new path's squared length, float64 [n]."""
        gain = self._column((c_sigma * (2 - c_sigma) * mu_eff).sqrt())
        path = (1 - c_sigma) * self._path_sigma + gain * white
        squared = ops.row_dots(path, path).double()
        ratio = squared.sqrt() / expected_length(white.shape[1])
        sigma = self._sigma * ((c_sigma / damping) * (ratio - 1)).exp()
        self._path_sigma = keep(selection.active, path, self._path_sigma)
        self._sigma = keep(selection.active, sigma, self._sigma)
        return squared


def _published_damping(mu_eff: float, dim: int, c_sigma: float) -> float:
    return 1 + c_sigma + 2 * max(0.0, math.sqrt((mu_eff - 1) / (dim + 1)) - 1)


class CholeskyCMA(_StepSizeAdaptation):
    """CMA-ES with a Cholesky factor of the covariance, updated by rank one (Suttorp, Hansen & Igel 2009).

    The constants are those that Wang & Ponce (2022, "High-performance evolutionary algorithms for online neuron
    control") used in vivo.

    The factor is kept as what it is, the identity and one rank-one factor per update,

        A = s (I + V^T U),   A^-1 = s^-1 (I + Q^T V),

    so a generation costs O(population x dim x updates) and no dim x dim matrix exists. Exact: the same numbers as the
    dense recursion but for rounding. Where updates outnumber dimensions, they are multiplied out.

    Args:
        sigma: initial step size (3 for fc6 codes as published).
        start: mean of the first generation, [dim] or [n, dim]; zeros if None. The published code shows the start alone
            as the first generation: `first_generation=start[None]`.
        update_after: evaluations after which the covariance is updated; 10 populations if None, as published.
        population: 4 + floor(3 log2 dim) if None; 40 for dim 4096.
        dim, problems, seed, minimise, first_generation, device, dtype: see `Optimiser`. With `first_generation` the
            mean becomes their weighted mean, and nothing else is learnt from them, as published.

    Raises:
        ValueError, TypeError: bad arguments.
    """

    STATE: ClassVar[tuple[str, ...]] = (*_StepSizeAdaptation.STATE, "_path_c", "_scale", "_v", "_u", "_q")
    PARTS: ClassVar[tuple[str, ...]] = (*_StepSizeAdaptation.PARTS, "told", "updated", "dense")

    def __init__(
        self,
        dim: int,
        *,
        population: int | None = None,
        sigma: float = 3.0,
        start: ArrayLike | Tensor | None = None,
        update_after: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=population, sigma=sigma, start=start, **common)
        self.update_after = (
            10 * self.population if update_after is None else whole("update_after", update_after, 0, 2**62)
        )
        mu_eff = self.mu_eff
        self.c_c = 4 / (dim + 4)
        self.c_sigma = math.sqrt(mu_eff) / (math.sqrt(mu_eff) + math.sqrt(dim))
        self.c_1 = 2 / (dim + math.sqrt(2)) ** 2
        self.damping = _published_damping(mu_eff, dim, self.c_sigma)
        self._path_c = torch.zeros_like(self._mean)
        self._scale = torch.ones_like(self._sigma)
        self._v, self._u, self._q = (self._mean.new_zeros(self.n, 0, dim) for _ in range(3))
        self._told = 0
        self._updated = 0
        self._dense = False

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "update_after": self.update_after}

    def _fits(self, name: str, shape: torch.Size) -> bool:
        if name in ("_v", "_u", "_q"):
            return len(shape) == 3 and shape[0] == self.n and shape[2] == self.dim
        return super()._fits(name, shape)

    def state_dict(self) -> dict[str, Any]:
        """As `Optimiser.state_dict`, with the counts of evaluations and the form of the factor."""
        return {**super().state_dict(), "told": self._told, "updated": self._updated, "dense": self._dense}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Optimiser.load_state_dict`."""
        tensors = state.get("tensors", {})
        ranks = {tuple(tensors[name].shape) for name in ("_v", "_u", "_q") if name in tensors}
        if len(ranks) > 1:
            raise ValueError(f"the state's _v, _u and _q should have the same shape, got {sorted(ranks)}")
        super().load_state_dict(state)
        self._told, self._updated, self._dense = int(state["told"]), int(state["updated"]), bool(state["dense"])

    def _sample(self) -> Tensor:
        scale = (self._sigma * self._scale).to(self.dtype)
        factors = (self._v, self._u) if self._v.shape[1] else None
        return ops.sample_codes(
            self.seed,
            streams.CMA,
            self.generation,
            self._ids,
            self.population,
            self._mean,
            scale,
            factors=factors,
            out=self._room,
        )

    def _whiten(self, y: Tensor) -> Tensor:
        white = ops.low_rank_product(y, self._q, self._v) if self._v.shape[1] else y
        return white / self._column(self._scale)

    def _update(self, selection: Selection) -> None:
        mean, _, mu_eff = self._recombine(selection)
        active = selection.active
        if selection.first:
            self._mean = keep(active, mean, self._mean)
            return
        self._told += selection.codes.shape[1]
        step = (mean - self._mean) / self._column(self._sigma)
        white = self._whiten(step)
        gain = self._column((self.c_c * (2 - self.c_c) * mu_eff).sqrt())
        self._path_c = keep(active, (1 - self.c_c) * self._path_c + gain * step, self._path_c)
        self._adapt(selection, white, mu_eff, self.c_sigma, self.damping)
        self._mean = keep(active, mean, self._mean)
        if self._told - self._updated > self.update_after:
            self._updated = self._told
            self._append_factor(active)

    def _append_factor(self, active: Tensor) -> None:
        """C <- (1 - c_1) C + c_1 p_c^T p_c, as one more factor (I + beta v^T v) with v = p_c A^-1."""
        v = self._whiten(self._path_c)
        squared = ops.row_dots(v, v).double()
        learn = active & (squared > 0)  # a path of zeros has no direction to learn
        squared = torch.where(learn, squared, 1.0)
        r = (1 + squared * self.c_1 / (1 - self.c_1)).sqrt()
        beta = torch.where(learn, (r - 1) / squared / self._scale, 0.0)
        gamma = torch.where(learn, (1 - 1 / r) / squared, 0.0)
        q = ops.low_rank_product(v, self._v, self._q) if self._v.shape[1] else v
        u = (self._column(beta) * self._path_c)[:, None]
        q = (-self._column(gamma) * q)[:, None]
        self._scale = torch.where(learn, self._scale * math.sqrt(1 - self.c_1), self._scale)
        if self._dense:
            self._u = self._u + v[:, :, None] * u
            self._q = self._q + v[:, :, None] * q
            return
        self._v, self._u, self._q = (
            torch.cat(rows, dim=1) for rows in ((self._v, v[:, None]), (self._u, u), (self._q, q))
        )
        if self._v.shape[1] > self.dim:
            self._multiply_out()

    def _multiply_out(self) -> None:
        """The same A and A^-1 with dim factors, V = I; from here on updates are added to U and Q."""
        # Factor by factor: a matrix product sums in an order that depends on the number of threads.
        u, q = (self._v.new_zeros(self.n, self.dim, self.dim) for _ in range(2))
        for k in range(self._v.shape[1]):
            column = self._v[:, k, :, None]
            u = u + column * self._u[:, k, None]
            q = q + column * self._q[:, k, None]
        self._v = torch.eye(self.dim, dtype=self.dtype, device=self.device).expand(self.n, -1, -1).contiguous()
        self._u, self._q = u, q
        self._dense = True


class DiagonalCMA(_StepSizeAdaptation):
    """Separable CMA-ES: a diagonal covariance with rank-one and rank-mu updates (Ros & Hansen 2008).

    Learning rates as in Hansen's tutorial (2016), times (N + 2) / 3.

    Args:
        sigma: initial step size. start: mean of the first generation, [dim] or [n, dim]; zeros if None.
        population: 4 + floor(3 log2 dim) if None.
        dim, problems, seed, minimise, first_generation, device, dtype: see `Optimiser`.

    Raises:
        ValueError, TypeError: bad arguments.
    """

    STATE: ClassVar[tuple[str, ...]] = (*_StepSizeAdaptation.STATE, "_path_c", "_variance")

    def __init__(
        self,
        dim: int,
        *,
        population: int | None = None,
        sigma: float = 3.0,
        start: ArrayLike | Tensor | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=population, sigma=sigma, start=start, **common)
        mu_eff = self.mu_eff
        self.c_sigma = (mu_eff + 2) / (dim + mu_eff + 5)
        self.damping = _published_damping(mu_eff, dim, self.c_sigma)
        self.c_c = (4 + mu_eff / dim) / (dim + 4 + 2 * mu_eff / dim)
        faster = (dim + 2) / 3
        self.c_1 = min(1.0, faster * 2 / ((dim + 1.3) ** 2 + mu_eff))
        self.c_mu = min(1 - self.c_1, faster * 2 * (mu_eff - 2 + 1 / mu_eff) / ((dim + 2) ** 2 + mu_eff))
        self._path_c = torch.zeros_like(self._mean)
        self._variance = torch.ones_like(self._mean)

    @property
    def variance(self) -> Tensor:
        """The diagonal of C, [n, dim]."""
        return self._variance.clone()

    def _sample(self) -> Tensor:
        return ops.sample_codes(
            self.seed,
            streams.CMA,
            self.generation,
            self._ids,
            self.population,
            self._mean,
            self._sigma.to(self.dtype),
            diagonal=self._deviation(),
            out=self._room,
        )

    def _deviation(self) -> Tensor:
        return self._variance.double().sqrt().to(self.dtype)

    def _whiten(self, y: Tensor) -> Tensor:
        return y / self._deviation()

    def _update(self, selection: Selection) -> None:
        mean, second, mu_eff = self._recombine(selection, centre=self._mean)
        active = selection.active
        if selection.first:
            self._mean = keep(active, mean, self._mean)
            return
        assert second is not None
        step = (mean - self._mean) / self._column(self._sigma)
        spread = second / self._column(self._sigma * self._sigma)
        squared = self._adapt(selection, self._whiten(step), mu_eff, self.c_sigma, self.damping)
        # A long path stalls the rank-one update (h_sigma of the tutorial).
        decayed = 1 - (1 - self.c_sigma) ** (2 * (self.generation + 1))
        stall = squared >= decayed * ((1.4 + 2 / (self.dim + 1)) * expected_length(self.dim)) ** 2
        moving = self._column((~stall).double())
        gain = self._column((self.c_c * (2 - self.c_c) * mu_eff).sqrt())
        path = (1 - self.c_c) * self._path_c + moving * gain * step
        lost = self._column(stall.double() * self.c_1 * self.c_c * (2 - self.c_c))
        variance = (1 - self.c_1 - self.c_mu + lost) * self._variance + self.c_1 * (path * path) + self.c_mu * spread
        self._path_c = keep(active, path, self._path_c)
        self._variance = keep(active, variance, self._variance)
        self._mean = keep(active, mean, self._mean)


class HessianCMA(_StepSizeAdaptation):
    """CMA-ES in the eigenspace of a generator's metric, with a fixed covariance: x = m + sigma z diag(lambda^-e) V^T.

    Steps are long where the image hardly changes and short where it changes much (Wang & Ponce 2021, "The geometry of
    deep generative image models"). Published settings: fc6 with cutoff 800 or 500, sigma 0.8, e = 1/5; BigGAN with
    sigma 0.2, e = 1/2.5.

    Args:
        eigenvalues: [K], all above 0. eigenvectors: [dim, K], columns orthonormal to 1e-3.
        exponent: e. cutoff: how many eigenvectors, from the largest eigenvalue on; all if None.
        sigma, start, population and the rest: as for `CholeskyCMA`; the number of eigenvectors is the dimension there.

    Raises:
        ValueError, TypeError: bad arguments.
    """

    def __init__(
        self,
        dim: int,
        *,
        eigenvalues: ArrayLike | Tensor,
        eigenvectors: ArrayLike | Tensor,
        exponent: float = 0.2,
        cutoff: int | None = None,
        population: int | None = None,
        sigma: float = 0.8,
        start: ArrayLike | Tensor | None = None,
        **common: Any,
    ) -> None:
        values = torch.as_tensor(eigenvalues, dtype=torch.float64).flatten()
        vectors = torch.as_tensor(eigenvectors, dtype=torch.float64)
        if vectors.shape != (dim, len(values)) or not 1 <= len(values) <= dim:
            raise ValueError(
                f"eigenvectors should be [{dim}, K] for K eigenvalues, K at most {dim}, got {list(vectors.shape)} and "
                f"{len(values)} eigenvalues"
            )
        if not bool(((values > 0) & values.isfinite()).all()):
            raise ValueError("eigenvalues should be finite and above 0; leave out those that are not (cutoff)")
        if not bool(((vectors.T @ vectors - torch.eye(len(values), dtype=torch.float64)).abs() < 1e-3).all()):
            raise ValueError("the columns of eigenvectors should be orthonormal")
        self.cutoff = len(values) if cutoff is None else whole("cutoff", cutoff, 1, len(values))
        self.exponent = positive("exponent", exponent, zero=True)
        kept = values.argsort(descending=True, stable=True)[: self.cutoff]
        if population is None:
            population = default_population(self.cutoff)
        super().__init__(dim, population=population, sigma=sigma, start=start, **common)
        self.c_sigma = math.sqrt(self.mu_eff) / (math.sqrt(self.mu_eff) + math.sqrt(self.cutoff))
        self.damping = _published_damping(self.mu_eff, self.cutoff, self.c_sigma)
        scale = values[kept] ** -self.exponent
        a = scale[:, None] * vectors[:, kept].T
        self._digest = hashlib.sha256(a.contiguous().cpu().numpy().tobytes()).hexdigest()
        self._a = SplitMatrix(a.to(self.device))  # [cutoff, dim]
        self._inverse = SplitMatrix((vectors[:, kept] / scale).to(self.device))  # [dim, cutoff]

    def _path_length(self) -> int:
        return self.cutoff

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "exponent": self.exponent, "cutoff": self.cutoff, "metric_sha256": self._digest}

    def _sample(self) -> Tensor:
        z = ops.normals(self.seed, streams.CMA, self.generation, self._ids, self.population, self.cutoff)
        steps = self._a.multiply(z).to(self.dtype)
        return self._mean[:, None] + self._column(self._sigma)[..., None] * steps

    def _whiten(self, y: Tensor) -> Tensor:
        return self._inverse.multiply(y).to(self.dtype)

    def _update(self, selection: Selection) -> None:
        mean, _, mu_eff = self._recombine(selection)
        if not selection.first:
            step = (mean - self._mean) / self._column(self._sigma)
            self._adapt(selection, self._whiten(step), mu_eff, self.c_sigma, self.damping)
        self._mean = keep(selection.active, mean, self._mean)
