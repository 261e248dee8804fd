"""CMA variants against recursions written out in NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_optimisers import metric, scores_of

import cortexloop as cl
from cortexloop import ops
from cortexloop.evolve.cma import CholeskyCMA, DiagonalCMA, HessianCMA, default_population, expected_length

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def float64_everywhere() -> Iterator[None]:
    """The C++ kernels take float32 only. One thread: matrices are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with cl.use_backend("reference"):
        yield
    torch.set_num_threads(before)


def log_rank_weights(shown: int, mu: float) -> Array:
    """ln(mu + 1/2) - ln i over the first floor(mu) ranks of those that were shown, to sum 1."""
    w = np.array([math.log(mu + 0.5) - math.log(i) for i in range(1, min(shown, math.floor(mu)) + 1)])
    return w / w.sum()


def normal_numbers(seed: int, generation: int, problem: int, rows: int, columns: int) -> Array:
    return ops.normals(seed, 0, generation, torch.tensor([problem]), rows, columns)[0].double().numpy()


def best_first(scores: Array) -> NDArray[np.int64]:
    """Positions of the codes that were shown."""
    shown = np.flatnonzero(~np.isnan(scores))
    return shown[np.argsort(-scores[shown], kind="stable")]


class DenseCholesky:
    """The published recursion with dim x dim matrices A and A^-1."""

    def __init__(self, dim: int, population: int, sigma: float, update_after: int) -> None:
        self.dim, self.population, self.sigma, self.update_after = dim, population, sigma, update_after
        w = log_rank_weights(population, population / 2)
        mu_eff = 1 / (w**2).sum()
        self.c_c, self.c_1 = 4 / (dim + 4), 2 / (dim + math.sqrt(2)) ** 2
        self.c_s = math.sqrt(mu_eff) / (math.sqrt(mu_eff) + math.sqrt(dim))
        self.damping = 1 + self.c_s + 2 * max(0, math.sqrt((mu_eff - 1) / (dim + 1)) - 1)
        self.chi = math.sqrt(dim) * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))
        self.mean, self.path_s, self.path_c = np.zeros(dim), np.zeros(dim), np.zeros(dim)
        self.a, self.inverse = np.eye(dim), np.eye(dim)
        self.evaluations = self.updated = self.updates = 0

    def codes(self, z: Array) -> Array:
        return self.mean + self.sigma * z @ self.a

    def tell(self, z: Array, scores: Array) -> None:
        order = best_first(scores)
        w = log_rank_weights(len(order), self.population / 2)
        mu_eff = 1 / (w**2).sum()
        parents = order[: len(w)]
        self.mean, z_mean = w @ self.codes(z)[parents], w @ z[parents]
        self.path_s = (1 - self.c_s) * self.path_s + math.sqrt(self.c_s * (2 - self.c_s) * mu_eff) * z_mean
        self.path_c = (1 - self.c_c) * self.path_c + math.sqrt(self.c_c * (2 - self.c_c) * mu_eff) * z_mean @ self.a
        self.sigma *= math.exp(self.c_s / self.damping * (np.linalg.norm(self.path_s) / self.chi - 1))
        self.evaluations += self.population
        if self.evaluations - self.updated > self.update_after:
            self.updated = self.evaluations
            self.updates += 1
            self.update_factor()

    def update_factor(self) -> None:
        v = self.path_c @ self.inverse
        n, keep = v @ v, math.sqrt(1 - self.c_1)
        r = math.sqrt(1 + n * self.c_1 / (1 - self.c_1))
        covariance = self.covariance()
        self.a = keep * (self.a + (r - 1) / n * np.outer(v, self.path_c))
        self.inverse = (self.inverse - (1 - 1 / r) / n * np.outer(self.inverse @ v, v)) / keep
        expected = (1 - self.c_1) * covariance + self.c_1 * np.outer(self.path_c[:20], self.path_c[:20])
        assert np.allclose(self.covariance(), expected, rtol=0, atol=1e-9 * np.abs(expected).max())

    def covariance(self) -> Array:
        return self.a[:, :20].T @ self.a[:, :20]  # a corner of it, where it is large


def slope(x: Array) -> Array:
    return -((x - 1) ** 2) @ np.linspace(1, 3, x.shape[1])


@pytest.mark.parametrize("update_after", [None, 0], ids=["as published", "every generation"])
@pytest.mark.parametrize("dim", [4, 20, 256])
def test_low_rank_form_is_the_dense_recursion(dim: int, update_after: int | None):
    problem = 77
    ours = CholeskyCMA(dim, problems=[5, problem], seed=3, update_after=update_after, dtype=torch.float64)
    dense = DenseCholesky(dim, default_population(dim), 3.0, 10 * ours.population if update_after is None else 0)
    for generation in range(75):
        z = normal_numbers(3, generation, problem, ours.population, dim)
        codes = ours.ask()
        expected = dense.codes(z)
        scale = max(1.0, np.abs(expected).max())
        assert np.abs(codes[1].numpy() - expected).max() < 1e-10 * scale, generation
        scores = slope(expected)
        ours.tell(np.stack([slope(codes[0].numpy()), scores]))
        dense.tell(z, scores)
        assert ours.step_size[1].item() == pytest.approx(dense.sigma, rel=1e-10)
    assert dense.updates == (6 if update_after is None else 75)


def test_low_rank_form_with_codes_that_were_not_shown(rng: np.random.Generator):
    """Weights and their effective mass are those of the codes that were shown."""
    dim, population = 6, 10
    ours = CholeskyCMA(dim, population=population, seed=1, update_after=0, dtype=torch.float64)
    dense = DenseCholesky(dim, population, 3.0, 0)
    for generation in range(20):
        z = normal_numbers(1, generation, 0, population, dim)
        scores = slope(dense.codes(z))
        scores[rng.permutation(population)[: rng.integers(0, population)]] = np.nan
        assert np.abs(ours.ask()[0].numpy() - dense.codes(z)).max() < 1e-9
        ours.tell(scores[None])
        dense.tell(z, scores)


@pytest.mark.parametrize(
    ("dim", "population", "mu_eff", "c_c", "c_s", "c_1", "damping", "chi"),
    [
        (4096, 40, 11.3095, 9.756e-4, 0.049923, 1.1913e-7, 1.049923, 63.9961),
        (256, 28, 8.1059, 1.538e-2, 0.151062, 3.0183e-5, 1.151062, 15.9844),
        (128, 25, 7.284, 3.030e-2, 0.192604, 1.1942e-4, 1.192604, 11.2916),
    ],
)
def test_published_constants(
    dim: int, population: int, mu_eff: float, c_c: float, c_s: float, c_1: float, damping: float, chi: float
):
    ours = CholeskyCMA(dim)
    assert ours.population == population
    found = (ours.mu_eff, ours.c_c, ours.c_sigma, ours.c_1, ours.damping, expected_length(dim))
    assert found == pytest.approx((mu_eff, c_c, c_s, c_1, damping, chi), rel=4e-4)
    assert ours.sigma == 3.0


@pytest.mark.parametrize("first", [None, 1, 30], ids=str)
def test_every_eleventh_generation_updates_the_covariance(first: int | None, rng: np.random.Generator):
    """Evaluations of a first generation that was given are not counted."""
    codes = None if first is None else rng.normal(size=(first, 8))
    ours = CholeskyCMA(8, first_generation=codes)
    ranks = []
    for _ in range(75 if first is None else 76):
        ours.tell(scores_of(ours, ours.ask()))
        ranks.append(ours.state_dict()["tensors"]["_v"].shape[1])
    changed = np.flatnonzero(np.diff(ranks)) + 1
    assert changed.tolist() == [10 + 11 * k + (first is not None) for k in range(6)]


@pytest.mark.parametrize("make", [CholeskyCMA, DiagonalCMA])
def test_first_generation_sets_the_mean_and_nothing_else(make: Callable[..., CholeskyCMA], rng: np.random.Generator):
    codes = rng.normal(size=(2, 7, 5))
    ours = make(5, problems=2, population=8, first_generation=codes, dtype=torch.float64)
    assert ours.ask().tolist() == codes.tolist()
    scores = rng.normal(size=(2, 7))
    scores[1, 2:] = np.nan  # two codes shown of four parents
    ours.tell(scores)
    for mine, rows, values in zip(ours.centre.numpy(), codes, scores, strict=True):
        order = best_first(values)
        w = log_rank_weights(len(order), 4)
        assert mine == pytest.approx(w @ rows[order[: len(w)]], rel=1e-12)
    state = ours.state_dict()["tensors"]
    assert not state["_path_sigma"].any()
    assert not state["_path_c"].any()
    assert ours.step_size.tolist() == [3.0, 3.0]
    assert ours.ask().shape == (2, 8, 5)


def test_start_alone_as_the_first_generation():
    """The published beginning: one code, which becomes the mean whatever its score."""
    start = np.arange(5.0)
    ours = CholeskyCMA(5, start=start, first_generation=start[None])
    assert ours.ask().tolist() == [[start.tolist()]]
    ours.tell([[-100.0]])
    assert ours.centre.tolist() == [start.tolist()]


def test_diagonal_cma_by_hand(rng: np.random.Generator):
    """The equations of Hansen's tutorial (2016) for a diagonal C, learning rates times (N + 2) / 3."""
    dim, population, problem, seed, sigma = 5, 9, 12, 4, 0.7
    start = rng.normal(size=dim)
    ours = DiagonalCMA(
        dim, problems=[problem], population=population, seed=seed, sigma=sigma, start=start, dtype=torch.float64
    )
    w_all = log_rank_weights(population, population / 2)
    mass = 1 / (w_all**2).sum()
    c_s, c_c = (mass + 2) / (dim + mass + 5), (4 + mass / dim) / (dim + 4 + 2 * mass / dim)
    c_1 = (dim + 2) / 3 * 2 / ((dim + 1.3) ** 2 + mass)
    c_mu = (dim + 2) / 3 * 2 * (mass - 2 + 1 / mass) / ((dim + 2) ** 2 + mass)
    assert c_1 + c_mu < 1
    damping = 1 + c_s + 2 * max(0, math.sqrt((mass - 1) / (dim + 1)) - 1)
    chi = expected_length(dim)
    mean, c, path_s, path_c = start, np.ones(dim), np.zeros(dim), np.zeros(dim)
    stalls = 0
    for generation in range(40):
        x = mean + sigma * np.sqrt(c) * normal_numbers(seed, generation, problem, population, dim)
        assert ours.ask()[0].numpy() == pytest.approx(x, rel=1e-9, abs=1e-9)
        # A long way off at first, so that the path becomes long.
        scores = -((x - 1000.0) ** 2) @ np.array([1.0, 4.0, 9.0, 1.0, 100.0])
        if generation % 3 == 1:
            scores[rng.permutation(population)[:6]] = np.nan
        order = best_first(scores)
        w = log_rank_weights(len(order), population / 2)
        mu_eff = 1 / (w**2).sum()
        y = (x[order[: len(w)]] - mean) / sigma
        y_mean = w @ y
        path_s = (1 - c_s) * path_s + math.sqrt(c_s * (2 - c_s) * mu_eff) * y_mean / np.sqrt(c)
        length = np.linalg.norm(path_s)
        norm = math.sqrt(1 - (1 - c_s) ** (2 * (generation + 1)))
        moving = float(length / norm < (1.4 + 2 / (dim + 1)) * chi)
        stalls += moving == 0
        path_c = (1 - c_c) * path_c + moving * math.sqrt(c_c * (2 - c_c) * mu_eff) * y_mean
        c = (
            (1 - c_1 - c_mu) * c
            + c_1 * (path_c**2 + (1 - moving) * c_c * (2 - c_c) * c)
            + c_mu * (w[:, None] * y**2).sum(0)
        )
        mean = mean + sigma * y_mean
        sigma *= math.exp(c_s / damping * (length / chi - 1))
        ours.tell(scores[None])
        assert ours.step_size.item() == pytest.approx(sigma, rel=1e-9)
        assert ours.variance[0].numpy() == pytest.approx(c, rel=1e-9)
        assert ours.centre[0].numpy() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert 0 < stalls < 40


def test_hessian_cma_by_hand(rng: np.random.Generator):
    dim, population, problem, seed, sigma, exponent, cutoff = 9, 6, 3, 8, 0.8, 0.4, 4
    parts = metric(dim)
    ours = HessianCMA(
        dim,
        **parts,
        exponent=exponent,
        cutoff=cutoff,
        population=population,
        problems=[problem],
        seed=seed,
        dtype=torch.float64,
    )
    values, vectors = (parts[name].numpy() for name in ("eigenvalues", "eigenvectors"))
    largest = np.argsort(-values)[:cutoff]
    a = np.diag(values[largest] ** -exponent) @ vectors[:, largest].T
    w_all = log_rank_weights(population, population / 2)
    mass = 1 / (w_all**2).sum()
    c_s = math.sqrt(mass) / (math.sqrt(mass) + math.sqrt(cutoff))
    damping = 1 + c_s + 2 * max(0, math.sqrt((mass - 1) / (cutoff + 1)) - 1)
    mean, path = np.zeros(dim), np.zeros(cutoff)
    for generation in range(30):
        z = normal_numbers(seed, generation, problem, population, cutoff)
        x = mean + sigma * z @ a
        assert ours.ask()[0].numpy() == pytest.approx(x, rel=1e-8, abs=1e-9)
        scores = slope(x)
        scores[rng.permutation(population)[: rng.integers(0, 4)]] = np.nan
        order = best_first(scores)
        w = log_rank_weights(len(order), population / 2)
        parents = order[: len(w)]
        path = (1 - c_s) * path + math.sqrt(c_s * (2 - c_s) / (w**2).sum()) * w @ z[parents]
        sigma *= math.exp(c_s / damping * (np.linalg.norm(path) / expected_length(cutoff) - 1))
        mean = w @ x[parents]
        ours.tell(scores[None])
        assert ours.step_size.item() == pytest.approx(sigma, rel=1e-8)


@pytest.mark.parametrize("make", [CholeskyCMA, DiagonalCMA])
def test_injected_codes_far_away_count_as_nearer_ones(make: Callable[..., CholeskyCMA]):
    """At most sqrt(N) + 2 N / (N + 2) standard deviations away, in the same direction."""
    dim, sigma, start = 10, 0.5, np.full(10, 2.0)
    direction = np.arange(1.0, dim + 1) / np.linalg.norm(np.arange(1.0, dim + 1))
    longest = math.sqrt(dim) + 2 * dim / (dim + 2)
    settings = {"sigma": sigma, "start": start, "population": 6, "dtype": torch.float64}
    far, nearer, near, near_too = (make(dim, **settings) for _ in range(4))
    for optimiser, distance in ((far, 1e6), (nearer, sigma * longest), (near, sigma * longest * 0.999)):
        optimiser.inject((start + distance * direction)[None])
        optimiser.ask()
        optimiser.tell([[10.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert torch.allclose(far.centre, nearer.centre, rtol=1e-9, atol=0)
    assert torch.allclose(far.step_size, nearer.step_size, rtol=1e-9, atol=0)
    assert not torch.allclose(near.centre, nearer.centre, rtol=1e-6, atol=0)
    # What is shown, and what is kept as the best, is the code as it was given.
    assert far.best.codes[0].numpy() == pytest.approx(start + 1e6 * direction)
    near_too.ask()
    near_too.tell([[10.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert not torch.equal(near_too.centre, near.centre)


@pytest.mark.parametrize(
    ("changed", "sentence", "kind"),
    [
        ({"eigenvalues": [1.0, 2.0]}, r"eigenvectors should be \[4, K\] for K eigenvalues", ValueError),
        ({"eigenvalues": [1.0, 0.0, 1.0]}, "eigenvalues should be finite and above 0", ValueError),
        ({"eigenvalues": [1.0, math.nan, 1.0]}, "eigenvalues should be finite and above 0", ValueError),
        ({"eigenvectors": 2 * np.eye(4)[:, :3]}, "columns of eigenvectors should be orthonormal", ValueError),
        ({"cutoff": 4}, "cutoff should be from 1 to 3, got 4", ValueError),
        ({"cutoff": 1.5}, "cutoff should be a whole number", TypeError),
        ({"exponent": -0.1}, "exponent should be a finite number of at least 0", ValueError),
    ],
)
def test_bad_metrics_are_refused(changed: dict[str, object], sentence: str, kind: type[Exception]):
    arguments = {"eigenvalues": np.ones(3), "eigenvectors": np.eye(4)[:, :3], **changed}
    with pytest.raises(kind, match=sentence):
        HessianCMA(4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence", "kind"),
    [
        ({"sigma": 0.0}, "sigma should be a finite number above 0, got 0.0", ValueError),
        ({"sigma": math.inf}, "sigma should be a finite number above 0", ValueError),
        ({"sigma": "3"}, "sigma should be a number", TypeError),
        ({"start": np.zeros(3)}, r"start should be \[4\] or \[2, 4\], got \[3\]", ValueError),
        ({"start": [0.0, 0.0, math.nan, 0.0]}, "start should be finite", ValueError),
        ({"start": [True] * 4}, "start should be real numbers", TypeError),
        ({"update_after": -1}, "update_after should be from 0", ValueError),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], sentence: str, kind: type[Exception]):
    with pytest.raises(kind, match=sentence):
        CholeskyCMA(4, problems=2, **arguments)


def test_a_state_whose_factors_do_not_fit_is_refused():
    ours = CholeskyCMA(4, update_after=0)
    ours.tell(scores_of(ours, ours.ask()))
    state = ours.state_dict()
    state["tensors"]["_u"] = state["tensors"]["_u"][:, :0]
    with pytest.raises(ValueError, match="_v, _u and _q should have the same shape"):
        CholeskyCMA(4, update_after=0).load_state_dict(state)
