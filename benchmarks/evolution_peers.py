"""Other packages' evolution optimisers: each as strong as its own documentation makes it.

One step is `ask` and `tell` for all problems. Scores cost nothing and are the same for everybody, so a step's time is
the optimiser's own. Every peer takes scores in its own kind (list, tensor, jax array), made before the clock starts.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Objective = Callable[[Any], Any]
"""From codes [..., m, dim] to scores [..., m], both in the peer's own kind; where a peer minimises, already negated."""


@dataclass(frozen=True)
class Peer:
    """An optimiser of some package, working on one or several problems.

    Attributes:
        name: goes into the recorded row as `backend`.
        package: distribution whose version is recorded.
        step: one generation of every problem; calls the objective once per problem, or once if it is batched.
        native: from higher-is-better scores [m] (batched: [n, m]) to what `step` expects from its objective.
        batched: the objective is called once, with codes [n, m, dim].
        centre: [n, dim] the mean after the last step, where it has to be the log-rank weighted mean of the better half.
        generations: steps that belong together, because the package spreads some of its work over them.
    """

    name: str
    package: str
    step: Callable[[Objective], None]
    native: Callable[[NDArray[np.float64]], Any]
    batched: bool = False
    centre: Callable[[], NDArray[np.float64]] | None = None
    generations: int = 1


# --- pycma ----------------------------------------------------------------------------------------------------------


def _pycma(name: str, problems: int, dim: int, population: int, sigma: float, options: dict[str, Any]) -> Peer:
    import cma

    options = {"popsize": population, "verbose": -9, **options}
    strategies = [
        cma.CMAEvolutionStrategy(np.zeros(dim), sigma, {**options, "seed": problem + 1}) for problem in range(problems)
    ]

    def step(objective: Objective) -> None:
        for strategy in strategies:
            codes = strategy.ask()
            strategy.tell(codes, objective(codes))

    # pycma decomposes the covariance once in this many generations; whole periods hold one decomposition each
    period = math.ceil(getattr(strategies[0].sm, "lazy_update_gap", 1))
    return Peer(
        name,
        "cma",
        step,
        lambda scores: list(-scores),
        centre=lambda: np.stack([strategy.mean for strategy in strategies]),
        generations=max(1, period),
    )


def pycma_full(problems: int, dim: int, population: int, sigma: float) -> Peer:
    """Full covariance with its default, lazy eigendecomposition (float64)."""
    return _pycma("pycma, full covariance", problems, dim, population, sigma, {})


def pycma_diagonal(problems: int, dim: int, population: int, sigma: float) -> Peer:
    """`CMA_diagonal`, what its documentation advises for many dimensions."""
    return _pycma("pycma, diagonal", problems, dim, population, sigma, {"CMA_diagonal": True})


def pycma_vd(problems: int, dim: int, population: int, sigma: float) -> Peer:
    """VD-CMA: diagonal plus one direction, linear in time and memory."""
    from cma.restricted_gaussian_sampler import GaussVDSampler

    return _pycma("pycma, VD-CMA", problems, dim, population, sigma, GaussVDSampler.extend_cma_options())


# --- EvoTorch -------------------------------------------------------------------------------------------------------


def _torch_scores(scores: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(scores, dtype=np.float32))


def _evotorch(name: str, problems: int, dim: int, make: Callable[[Any], Any], centre: bool) -> Peer:
    """A loop over searchers, one per problem; the objective is what EvoTorch calls the fitness function."""
    import evotorch

    logging.getLogger("evotorch").setLevel(logging.WARNING)
    objectives: list[Objective] = [lambda codes: codes.new_zeros(len(codes))]

    def fitness(codes: torch.Tensor) -> torch.Tensor:
        return objectives[0](codes)

    searchers = []
    for _ in range(problems):
        # the problem's own record of its best and worst solutions is left out: it costs a sixth of a step
        problem = evotorch.Problem(
            "max", fitness, vectorized=True, solution_length=dim, initial_bounds=(-1, 1), store_solution_stats=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EvoTorch copies the start in a way that torch advises against
            searchers.append(make(problem))

    def step(objective: Objective) -> None:
        objectives[0] = objective
        for searcher in searchers:
            searcher.step()

    return Peer(
        name,
        "evotorch",
        step,
        _torch_scores,
        centre=(lambda: np.stack([s.m.numpy().astype(np.float64) for s in searchers])) if centre else None,
    )


def evotorch_cma(problems: int, dim: int, population: int, sigma: float, *, separable: bool) -> Peer:
    """`CMAES`, full (with its default limit on decompositions) or separable, float32."""
    from evotorch.algorithms import CMAES

    def make(problem: Any) -> Any:
        start = torch.zeros(dim)
        return CMAES(problem, stdev_init=sigma, popsize=population, center_init=start, separable=separable)

    name = "EvoTorch CMAES, separable" if separable else "EvoTorch CMAES, full covariance"
    return _evotorch(name, problems, dim, make, centre=True)


def evotorch_snes(problems: int, dim: int, population: int, sigma: float) -> Peer:
    """Separable natural evolution strategy."""
    from evotorch.algorithms import SNES

    def make(problem: Any) -> Any:
        return SNES(problem, stdev_init=sigma, popsize=population, center_init=torch.zeros(dim))

    return _evotorch("EvoTorch SNES", problems, dim, make, centre=False)


def evotorch_cem(problems: int, dim: int, population: int, sigma: float) -> Peer:
    """Cross-entropy method, functional form: all problems in one batch."""
    from evotorch.algorithms.functional import cem, cem_ask, cem_tell

    start = torch.zeros(problems, dim)
    state = [cem(center_init=start, stdev_init=sigma, parenthood_ratio=0.5, objective_sense="max")]

    def step(objective: Objective) -> None:
        codes = cem_ask(state[0], popsize=population)
        state[0] = cem_tell(state[0], codes, objective(codes))

    return Peer("EvoTorch functional CEM, batched", "evotorch", step, _torch_scores, batched=True)


def evotorch_pgpe(problems: int, dim: int, population: int, sigma: float) -> Peer:
    """PGPE, functional form: all problems in one batch; mirrored samples, so half the random numbers."""
    from evotorch.algorithms.functional import pgpe, pgpe_ask, pgpe_tell

    state = [
        pgpe(
            center_init=torch.zeros(problems, dim),
            center_learning_rate=sigma * 10,
            stdev_learning_rate=0.1,
            stdev_init=sigma,
            objective_sense="max",
        )
    ]

    def step(objective: Objective) -> None:
        codes = pgpe_ask(state[0], popsize=population)
        state[0] = pgpe_tell(state[0], codes, objective(codes))

    return Peer("EvoTorch functional PGPE, batched", "evotorch", step, _torch_scores, batched=True)


# --- evosax ---------------------------------------------------------------------------------------------------------


def evosax(algorithm: str, problems: int, dim: int, population: int, sigma: float, *, form: str = "loop") -> Peer:
    """An algorithm of evosax in float32: `ask` and `tell` compiled, buffers donated, results waited for.

    Args:
        algorithm: name of its class, such as "Sep_CMA_ES".
        form: "loop" over the problems (all asked before the first is told, so that they may overlap), "vmap" over the
            problems, or "map": `jax.lax.map`, one compiled loop over the problems, which stays within the caches.
    """
    import jax
    import jax.numpy as jnp
    from evosax.algorithms import algorithms

    keywords = {"std_schedule": lambda step: sigma} if algorithm == "SimpleGA" else {}
    optimiser = algorithms[algorithm](population_size=population, solution=jnp.zeros(dim), **keywords)
    params = optimiser.default_params
    if hasattr(params, "std_init"):
        params = params.replace(std_init=jnp.asarray(sigma))

    def init(key: Any) -> Any:
        if algorithm == "SimpleGA":  # starts from codes whose scores are known
            first = sigma * jax.random.normal(key, (population, dim))
            return optimiser.init(key, first, jnp.zeros(population), params)
        return optimiser.init(key, jnp.zeros(dim), params)

    def ask(key: Any, state: Any) -> tuple[Any, Any, Any]:
        key, draw = jax.random.split(key)
        codes, state = optimiser.ask(draw, state, params)
        return key, codes, state

    def tell(key: Any, codes: Any, scores: Any, state: Any) -> Any:
        return optimiser.tell(key, codes, scores, state, params)[0]  # without the metrics, which cost time

    keys = jax.random.split(jax.random.key(0), problems)
    step, states = _jax_loop(ask, tell, init, keys) if form == "loop" else _jax_batch(ask, tell, init, keys, form)

    def centre() -> NDArray[np.float64]:
        means = [state.mean for state in states]
        return np.concatenate([np.atleast_2d(np.asarray(mean, dtype=np.float64)) for mean in means])

    kind = {"loop": "", "vmap": ", jax.vmap", "map": ", jax.lax.map"}[form]
    return Peer(
        f"evosax {algorithm}{kind}",
        "evosax",
        step,
        lambda scores: jnp.asarray(-scores, dtype=jnp.float32),
        batched=form != "loop",
        centre=centre if "CMA" in algorithm else None,
    )


def _jax_loop(ask: Any, tell: Any, init: Any, keys: Any) -> tuple[Callable[[Objective], None], list[Any]]:
    """One call each for `ask` and `tell` per problem."""
    import jax

    ask, tell = jax.jit(ask), jax.jit(tell, donate_argnums=3)
    own_keys = list(keys)
    states = [init(key) for key in own_keys]

    def step(objective: Objective) -> None:
        asked = [ask(key, state) for key, state in zip(own_keys, states, strict=True)]
        jax.block_until_ready(asked)
        for index, (key, codes, state) in enumerate(asked):
            own_keys[index] = key
            states[index] = tell(key, codes, objective(codes), state)
        jax.block_until_ready(states)

    return step, states


def _jax_batch(ask: Any, tell: Any, init: Any, keys: Any, form: str) -> tuple[Callable[[Objective], None], list[Any]]:
    """One call each for `ask` and `tell`; the memory of the last codes is donated to the next ones."""
    import jax
    import jax.numpy as jnp

    def mapped(function: Any) -> Any:
        if form == "vmap":
            return jax.vmap(function)
        return lambda *arguments: jax.lax.map(lambda one: function(*one), arguments)

    batched_ask, batched_tell = mapped(ask), mapped(tell)
    ask = jax.jit(lambda keys, state, old_codes: batched_ask(keys, state), donate_argnums=2, keep_unused=True)
    tell = jax.jit(batched_tell, donate_argnums=3)
    states = [jax.vmap(init)(keys)]
    held = [keys, jnp.zeros_like(jax.eval_shape(batched_ask, keys, states[0])[1])]

    def step(objective: Objective) -> None:
        held[0], codes, state = ask(held[0], states[0], held[1])
        codes.block_until_ready()
        states[0] = jax.block_until_ready(tell(held[0], codes, objective(codes), state))
        held[1] = codes

    return step, states


# --- an evolution in plain torch --------------------------------------------------------------------------------------


class PlainEvolution:
    """One closed-loop evolution as it is commonly written: optimiser, generator and network, one line after another.

    The optimiser is the Cholesky CMA-ES with its two dense matrices, in float32 (published implementations in NumPy use
    float64, which is slower). The network gets float images; nothing is rounded to 8 bits.

    Args:
        network: images [m, 3, H, W] recentred -> [m, 1].
        generator: codes [m, dim] -> images [m, 3, H, W] in [0, 1].
        image_mean: [3] what recentring subtracts, on the scale of 0 to 255.
    """

    batch = 4  # images at once; 40 take up to four times as long, as then every map comes fresh from the system

    def __init__(
        self,
        network: torch.nn.Module,
        generator: Callable[[torch.Tensor], torch.Tensor],
        image_mean: Sequence[float],
        dim: int,
        population: int,
        sigma: float,
    ) -> None:
        self.network, self.generator = network, generator
        self.image_mean = torch.tensor(image_mean, dtype=torch.float32)[:, None, None]
        self.dim, self.population, self.sigma = dim, population, sigma
        self.parents = population // 2
        weights = math.log(self.parents + 0.5) - torch.arange(1, self.parents + 1).log()
        self.weights = weights / weights.sum()
        self.mu_eff = float(1 / self.weights.square().sum())
        self.c_c = 4 / (dim + 4)
        self.c_1 = 2 / (dim + 2**0.5) ** 2
        self.c_s = self.mu_eff**0.5 / (self.mu_eff**0.5 + dim**0.5)
        self.damping = 1 + self.c_s + 2 * max(0.0, ((self.mu_eff - 1) / (dim + 1)) ** 0.5 - 1)
        self.expected_length = dim**0.5 * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))
        self.mean, self.path_s, self.path_c = (torch.zeros(dim) for _ in range(3))
        self.factor, self.inverse = torch.eye(dim), torch.eye(dim)
        self.since_update = 0

    def scores(self, codes: torch.Tensor) -> torch.Tensor:
        """[m] responses to the images of codes [m, dim]."""
        parts = codes.split(self.batch)
        return torch.cat([self.network(self.generator(part) * 255 - self.image_mean)[:, 0] for part in parts])

    @torch.no_grad()
    def step(self) -> None:
        """One generation."""
        z = torch.randn(self.population, self.dim)
        codes = self.mean + self.sigma * (z @ self.factor)
        self.update(z, codes, self.scores(codes))

    def update(self, z: torch.Tensor, codes: torch.Tensor, scores: torch.Tensor) -> None:
        """Learn from the scores of codes = mean + sigma z A."""
        best = scores.argsort(descending=True)[: self.parents]
        chosen = self.weights @ z[best]
        self.mean = self.weights @ codes[best]
        self.path_s = (1 - self.c_s) * self.path_s + (self.c_s * (2 - self.c_s) * self.mu_eff) ** 0.5 * chosen
        step = chosen @ self.factor
        self.path_c = (1 - self.c_c) * self.path_c + (self.c_c * (2 - self.c_c) * self.mu_eff) ** 0.5 * step
        self.sigma *= math.exp(self.c_s / self.damping * (float(self.path_s.norm()) / self.expected_length - 1))
        self.since_update += self.population
        if self.since_update > 10 * self.population:
            self.since_update = 0
            v = self.path_c @ self.inverse
            n = float(v @ v)
            r = (1 + n * self.c_1 / (1 - self.c_1)) ** 0.5
            self.factor = (1 - self.c_1) ** 0.5 * (self.factor + (r - 1) / n * torch.outer(v, self.path_c))
            self.inverse -= (1 - 1 / r) / n * torch.outer(self.inverse @ v, v)
            self.inverse /= (1 - self.c_1) ** 0.5


class PlainCosines:
    """The images of `FourierGenerator` by the definition of its cosine transform: two matrix products and a mixture.

    Args:
        axis, row, column, amplitude: [dim] which colour axis and frequency a coefficient belongs to, and its factor.
        axes: [3, 3] colour axes, rows in RGB.
    """

    def __init__(
        self,
        height: int,
        width: int,
        axis: NDArray[np.integer[Any]],
        row: NDArray[np.integer[Any]],
        column: NDArray[np.integer[Any]],
        amplitude: NDArray[np.floating[Any]],
        axes: NDArray[np.floating[Any]],
    ) -> None:
        self.height, self.width = height, width
        self.place = torch.as_tensor((axis * height + row) * width + column)
        self.amplitude = torch.as_tensor(amplitude, dtype=torch.float32)
        self.axes = torch.as_tensor(axes, dtype=torch.float32)
        self.rows, self.columns = self.cosines(height), self.cosines(width)

    @staticmethod
    def cosines(n: int) -> torch.Tensor:
        """[n, n] orthonormal DCT-II, one frequency per row."""
        k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        basis = (math.pi * k * (x + 0.5) / n).cos() * (2 / n) ** 0.5
        basis[0] /= 2**0.5
        return basis.float()

    def __call__(self, codes: torch.Tensor) -> torch.Tensor:
        spectrum = codes.new_zeros(len(codes), 3 * self.height * self.width)
        spectrum[:, self.place] = codes * self.amplitude
        fields = self.rows.T @ spectrum.view(-1, 3, self.height, self.width) @ self.columns
        return torch.einsum("ac,mahw->mchw", self.axes, fields).sigmoid()
