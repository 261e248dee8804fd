"""Optimisers find optima: CMA in as many evaluations as pycma needs, the others as their rules predict."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_optimisers import NAMES, small

from cortexloop.evolve.cma import CholeskyCMA, DiagonalCMA
from cortexloop.evolve.gradient import FDGD, NES
from cortexloop.evolve.optimiser import Optimiser
from cortexloop.evolve.sphere import SphereCMA

Array = NDArray[np.float64]
RUNS = 24


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sphere(x: Array) -> Array:
    return (x * x).sum(-1)


def ellipsoid(x: Array) -> Array:
    """Condition number 1000."""
    return (1e3 ** np.linspace(0, 1, x.shape[-1]) * x * x).sum(-1)


def rosenbrock(x: Array) -> Array:
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def first_hits(best: list[Array], target: float, population: int) -> Array:
    """Evaluations until the best value of a generation is below the target; best: [generations][runs]."""
    reached = np.stack(best) < target
    assert reached.any(0).all(), "all runs should reach the target"
    return (reached.argmax(0) + 1) * population


def our_evaluations(optimiser: Optimiser, function: Callable[[Array], Array], target: float, generations: int) -> Array:
    """Of each problem; the optimiser maximises minus the function, or minimises it."""
    best: list[Array] = []
    while len(best) < generations and not (best and (np.min(best, axis=0) < target).all()):
        values = function(optimiser.ask().double().numpy())
        optimiser.tell(values if optimiser.minimise else -values)
        best.append(values.min(1))
    return first_hits(best, target, optimiser.population)


@functools.cache
def pycma_evaluations(
    function: Callable[[Array], Array],
    dim: int,
    start: float,
    sigma: float,
    population: int,
    target: float,
    generations: int,
    variant: str,
) -> Array:
    """Of each seed, minimising (there is nothing else); without pycma's stopping rules."""
    cma = pytest.importorskip("cma", reason="the comparison needs the package cma (pycma)")
    never = {"tolfun": 0, "tolx": 0, "tolfunhist": 0, "tolstagnation": 10**9, "tolflatfitness": 10**9}
    found = []
    for seed in range(1, RUNS + 1):
        settings = {"popsize": population, "seed": seed, "verbose": -9, **never, **VARIANTS[variant]}
        strategy = cma.CMAEvolutionStrategy(np.full(dim, start), sigma, settings)
        best: list[Array] = []
        while len(best) < generations and not (best and best[-1][0] < target):
            codes = np.array(strategy.ask())
            values = function(codes)
            strategy.tell(codes, values)
            best.append(values.min()[None])
        found.append(first_hits(best, target, population)[0])
    return np.array(found)


def rank_one(dim: int, **keywords: Any) -> CholeskyCMA:
    """The covariance is updated in every generation: the published schedule is for thousands of dimensions."""
    return CholeskyCMA(dim, update_after=0, **keywords)


VARIANTS: dict[str, dict[str, Any]] = {
    "diagonal": {"CMA_diagonal": True, "CMA_active": False},
    "rank-one": {"CMA_rankmu": 0, "CMA_active": False},
}


@pytest.mark.parametrize("minimise", [True, False], ids=["minimise", "maximise"])
@pytest.mark.parametrize(
    ("make", "variant", "function", "dim", "population", "start", "sigma", "target", "generations"),
    [
        (DiagonalCMA, "diagonal", sphere, 20, 16, 1.0, 0.5, 1e-6, 400),
        (DiagonalCMA, "diagonal", ellipsoid, 8, 10, 1.0, 0.5, 1e-6, 400),
        (rank_one, "rank-one", sphere, 20, 16, 1.0, 0.5, 1e-6, 400),
        (rank_one, "rank-one", ellipsoid, 8, 10, 1.0, 0.5, 1e-6, 800),
        (rank_one, "rank-one", rosenbrock, 8, 16, 0.0, 0.3, 1e-2, 1500),
    ],
    ids=["diagonal-sphere", "diagonal-ellipsoid", "cholesky-sphere", "cholesky-ellipsoid", "cholesky-rosenbrock"],
)
def test_as_many_evaluations_as_pycma(
    make: Callable[..., Optimiser],
    variant: str,
    function: Callable[[Array], Array],
    dim: int,
    population: int,
    start: float,
    sigma: float,
    target: float,
    generations: int,
    minimise: bool,
):
    """Geometric means over seeds agree within three standard errors of their ratio and 15 per cent.

    The 15 per cent are for constants that are not the same: for 20 dimensions and 16 codes pycma's step size learns at
    a rate of 0.246 with a damping of 1.26, here those are 0.229 and 1.23 (diagonal) or 0.330 and 1.33 (Cholesky), and
    the learning rates of a diagonal covariance differ. That makes 0 to 11 per cent fewer evaluations here. Half the
    rate or twice the damping is more than this margin, on one of the functions; what is finer is for the steps that
    are worked by hand.
    """
    optimiser = make(
        dim, problems=RUNS, population=population, start=np.full(dim, start), sigma=sigma, minimise=minimise
    )
    ours = np.log(our_evaluations(optimiser, function, target, generations))
    theirs = np.log(pycma_evaluations(function, dim, start, sigma, population, target, generations, variant))
    error = math.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / RUNS)
    assert abs(ours.mean() - theirs.mean()) < 3 * error + math.log(1.15)
    assert 1 / 3 < ours.std(ddof=1) / theirs.std(ddof=1) < 3, "as reliable from seed to seed"


@pytest.mark.parametrize("schedule", ["exp", "lin", "inv"])
@pytest.mark.parametrize("minimise", [False, True])
def test_sphere_cma_turns_to_the_best_direction(schedule: str, minimise: bool, rng: np.random.Generator):
    """A linear function on the sphere has its optimum in one direction."""
    dim = 40
    best = rng.normal(size=(8, dim))
    best /= np.linalg.norm(best, axis=1, keepdims=True)
    optimiser = SphereCMA(dim, problems=8, schedule=schedule, generations=60, minimise=minimise, radius=10.0)
    for _ in range(60):
        optimiser.tell((optimiser.ask().double().numpy() @ best[..., None])[..., 0])
    cosine = (optimiser.centre.double().numpy() * best).sum(1) / 10 * (-1 if minimise else 1)
    # "inv" ends with angles of 24 degrees, the others with 7.
    assert (cosine > (0.8 if schedule == "inv" else 0.98)).all()


@pytest.mark.parametrize("make", [NES, FDGD])
@pytest.mark.parametrize("minimise", [False, True])
def test_expected_step_is_along_the_gradient(make: type[NES] | type[FDGD], minimise: bool):
    """Over many problems with the same start: of a quadratic the mean step is known."""
    dim, runs, rate, curvature = 200, 400, 0.01, np.linspace(0.5, 1.5, 200)
    optimiser = make(dim, problems=runs, learning_rate=rate, start=np.ones(dim), minimise=minimise)
    optimiser.tell(-(optimiser.ask().double().numpy() ** 2) @ curvature)
    steps = optimiser.centre.double().numpy() - 1
    # E[z z^T] = I; FDGD divides by the square of the mean of |z|, nearly 2 / pi, and not by that of z^2.
    gain = 1.0 if make is NES else math.pi / 2
    gradient = rate * gain * -2 * curvature * (-1 if minimise else 1)
    error = steps.std(0, ddof=1) / math.sqrt(runs)
    off = (steps.mean(0) - gradient) / error
    assert np.abs(off).max() < 4.5
    assert np.mean(off**2) == pytest.approx(1.0, abs=0.4)


def test_the_radius_of_nes_shrinks_at_a_peak_and_grows_in_a_trough():
    """Over many problems: E[score (z^2 - 1)] / r = 2 r curvature for the mean over genes."""
    dim, runs, rate = 50, 4000, 0.01
    for sign in (-1, 1):
        optimiser = NES(dim, problems=runs, radius_learning_rate=rate)
        optimiser.tell(sign * (optimiser.ask().double().numpy() ** 2).sum(-1))
        change = optimiser.search_radius.numpy() - 1.25
        expected = rate * sign * 2 * 1.25
        error = change.std(ddof=1) / math.sqrt(runs)
        assert change.mean() == pytest.approx(expected, abs=4 * error)
        assert error < 0.1 * abs(expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("minimise", [False, True])
def test_every_optimiser_gets_better(name: str, minimise: bool):
    """In every one of ten problems, also where a quarter of the codes is not shown and scores are noisy."""
    rng = np.random.default_rng(1)
    # The radius learns from scores of hundreds here, in few dimensions; as published it would jump.
    keywords = {"radius_learning_rate": 0.001, "baseline": True} if name == "nes" else {}
    optimiser = small(name, 20, problems=10, population=20, minimise=minimise, seed=1, **keywords)
    target = np.ones(20)
    clean = []
    for _ in range(80):
        codes = optimiser.ask().double().numpy()
        values = ((codes - target) ** 2).sum(-1)
        clean.append(values.mean(1))
        noisy = values + rng.normal(size=values.shape)
        noisy[rng.random(values.shape) < 0.25] = np.nan
        optimiser.tell(noisy if minimise else -noisy)
    assert (np.mean(clean[-5:], axis=0) < np.mean(clean[:2], axis=0)).all()
