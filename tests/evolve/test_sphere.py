"""SphereCMA against its equations in NumPy float64, and what it makes of codes that were not shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_optimisers import run, same_bits, scores_of

import cortexloop as cl
from cortexloop import ops
from cortexloop.evolve import streams
from cortexloop.evolve.sphere import SCHEDULES, SphereCMA, schedule_angles

Array = NDArray[np.float64]


@pytest.fixture
def float64() -> Iterator[None]:
    """The C++ kernels take float32 only."""
    with cl.use_backend("reference"):
        yield


def normal_numbers(seed: int, generation: int, problem: int, rows: int, columns: int) -> Array:
    found = ops.normals(seed, streams.SPHERE, generation, torch.tensor([problem]), rows, columns)
    return found[0].double().numpy()


def to_norm(x: Array, norm: float) -> Array:
    return norm * x / np.linalg.norm(x, axis=-1, keepdims=True)


def rank_weights(scores: Array, mu: float) -> Array:
    """A weight for every code: ln(mu + 1/2) - ln(rank) for the first floor(mu) ranks that were shown, to sum 1."""
    w = np.zeros(len(scores))
    shown = np.flatnonzero(~np.isnan(scores))
    for rank, place in enumerate(shown[np.argsort(-scores[shown], kind="stable")], start=1):
        if rank <= math.floor(mu):
            w[place] = math.log(mu + 0.5) - math.log(rank)
    return w / w.sum()


def slerp(a: Array, b: Array, t: float) -> Array:
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def exponential_map(x: Array, tangents: Array) -> Array:
    """x [dim] of any norm, tangents [m, dim] as angles."""
    length = np.linalg.norm(tangents, axis=1, keepdims=True)
    norm = np.linalg.norm(x)
    return norm * (np.cos(length) * x / norm + np.sin(length) * tangents / length)


@pytest.mark.parametrize("learning_rate", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("dim", "population", "parents"), [(3, 6, None), (40, 9, 5)])
def test_by_hand(
    schedule: str,
    learning_rate: float,
    dim: int,
    population: int,
    parents: int | None,
    float64: None,
    rng: np.random.Generator,
):
    radius, problem, planned = 7.0, 9, 8
    ours = SphereCMA(
        dim,
        population=population,
        parents=parents,
        radius=radius,
        learning_rate=learning_rate,
        schedule=schedule,
        generations=planned,
        problems=[problem],
        seed=2,
        dtype=torch.float64,
    )
    mu = population // 2 if parents is None else parents
    codes = to_norm(normal_numbers(2, 0, problem, population, dim), radius)
    basis = None
    for generation in range(11):
        assert np.abs(ours.ask()[0].numpy() - codes).max() < 1e-9, generation
        scores = -np.abs(codes - 1.0) @ np.linspace(1, 2, dim)
        scores[rng.permutation(len(codes))[: rng.integers(0, 4)]] = np.nan
        ours.tell(scores[None])
        if basis is None:
            basis = to_norm(rank_weights(scores, len(codes) / 2) @ codes, radius)
        elif not np.isnan(scores[1:]).all():
            target = to_norm(rank_weights(scores[1:], mu) @ codes[1:], radius)
            basis = slerp(basis, target, learning_rate)
        assert np.abs(ours.centre[0].numpy() - basis).max() < 1e-9
        # The first samples around a basis have the first angle; after the plan the last one stays.
        degrees = schedule_angles(schedule, planned)[min(generation, planned - 1)]
        u = normal_numbers(2, generation + 1, problem, population + 1, dim)[1:]
        tangents = u - (u @ basis / radius)[:, None] * basis / radius
        codes = np.vstack([basis, exponential_map(basis, degrees / 180 * math.pi / math.sqrt(dim) * tangents)])
        assert ours.angle == pytest.approx(degrees)


def test_published_settings():
    ours = SphereCMA(4096)
    assert (ours.population, ours.parents, ours.radius, ours.learning_rate) == (40, 20, 300.0, 1.5)
    assert ours.ask().shape == (1, 40, 4096)
    ours.tell(scores_of(ours, ours.ask()))
    assert ours.ask().shape == (1, 41, 4096)
    assert ours.angle == 50.0


def test_schedules():
    exp, lin, inv = (np.array(schedule_angles(schedule, 75)) for schedule in SCHEDULES)
    assert (exp[0], exp[-1], lin[0], lin[-1]) == pytest.approx((50, 7.33, 50, 7.33))
    assert np.ptp(np.diff(np.log(exp))) < 1e-12
    assert np.ptp(np.diff(lin)) < 1e-12
    assert inv == pytest.approx(15 + 1 / (0.0017 * np.arange(1, 76) + 0.0146))
    assert (inv[0], inv[-1]) == pytest.approx((76.35, 22.04), abs=0.01)
    assert schedule_angles("exp", 1) == [50.0]
    assert schedule_angles("lin", 3, 60.0, 20.0) == pytest.approx([60.0, 40.0, 20.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dim", [2, 3, 64, 4096])
def test_codes_stay_on_the_sphere_at_the_angle_of_the_schedule(schedule: str, dim: int):
    ours = SphereCMA(dim, problems=2, schedule=schedule, generations=4)
    for generation in range(6):
        codes = ours.ask()
        norm = codes.double().norm(dim=2)
        assert (norm / 300 - 1).abs().max() < 2e-6
        if generation > 0:
            assert torch.equal(codes[:, 0], ours.centre)
            cosine = (codes[:, 1:].double() * ours.centre[:, None].double()).sum(2) / 9e4
            angles = cosine.clamp(-1, 1).arccos().rad2deg()
            # |T| has the root mean square sqrt(dim - 1) mu.
            expected = ours.angle * math.sqrt((dim - 1) / dim)
            spread = 5 / math.sqrt(angles.numel() * (dim - 1)) + 0.02
            if expected < 60:  # a longer way comes round again, in few dimensions
                assert angles.square().mean().sqrt() == pytest.approx(expected, rel=spread)
        ours.tell(scores_of(ours, codes))
        assert (ours.centre.double().norm(dim=1) / 300 - 1).abs().max() < 2e-6


def test_the_basis_is_not_ranked():
    """Neither its score nor that it was not shown matters, and alone it changes nothing."""
    best, worst, missing = (SphereCMA(6, population=8, radius=2.0) for _ in range(3))
    for ours, score in ((best, 1e6), (worst, -1e6), (missing, np.nan)):
        ours.tell(scores_of(ours, ours.ask()))
        scores = scores_of(ours, ours.ask())
        scores[:, 0] = score
        ours.tell(scores)
    assert torch.equal(best.centre, worst.centre)
    assert torch.equal(best.centre, missing.centre)
    assert best.best.scores.tolist() == [1e6]
    before = best.centre.clone()
    scores = np.full((1, 9), np.nan)
    scores[:, 0] = 3.0
    best.ask()
    best.tell(scores)
    assert torch.equal(best.centre, before)


def test_injected_codes_are_brought_to_the_radius_and_ranked():
    plain, ours = (SphereCMA(3, population=6, radius=2.0, parents=1, learning_rate=1.0) for _ in range(2))
    for optimiser in (plain, ours):
        optimiser.tell(scores_of(optimiser, optimiser.ask()))
    ours.inject([[0.0, 0.0, 10.0]])
    assert ours.ask()[0, 0].tolist() == [0.0, 0.0, 2.0]
    assert torch.equal(ours.ask()[:, 1:], plain.ask()[:, 1:])
    ours.tell([[5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ours.centre[0].numpy() == pytest.approx([0.0, 0.0, 2.0], abs=1e-6)
    for codes in ([[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]):
        with pytest.raises(ValueError, match="codes should have no code of zeros"):
            SphereCMA(3).inject(codes)


def test_a_problem_that_never_had_a_score_stays_at_its_beginning():
    """It draws from the whole sphere until something is shown, while others go on."""
    both = SphereCMA(30, problems=2, population=40)
    alone = SphereCMA(30, problems=1, population=40)
    for _ in range(2):
        scores = scores_of(both, both.ask())
        scores[1] = np.nan
        both.tell(scores)
        alone.ask()
        alone.tell(scores[:1])
    codes = both.ask()
    assert torch.equal(codes[:1], alone.ask())
    assert (codes.double().norm(dim=2) / 300 - 1).abs().max() < 2e-6
    unit = codes[1].double() / 300
    assert (unit @ unit.T - torch.eye(41)).abs().max() < 0.8, "in no common direction"
    assert not both.centre[1].any()
    scores = scores_of(both, codes)
    both.tell(scores)
    expected = to_norm(rank_weights(scores[1], 41 / 2) @ codes[1].double().numpy(), 300)
    assert both.centre[1].numpy() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_a_first_generation_is_brought_to_the_radius():
    ours = SphereCMA(2, population=4, radius=5.0, first_generation=[[3.0, 4.0], [30.0, 40.0], [0.0, 1.0]])
    assert ours.ask()[0].numpy() == pytest.approx(np.array([[3.0, 4.0], [3.0, 4.0], [0.0, 5.0]]), rel=1e-6)
    ours.tell([[0.0, 1.0, np.nan]])
    assert ours.centre[0].numpy() == pytest.approx([3.0, 4.0], rel=1e-6)
    with pytest.raises(ValueError, match="first_generation should have no code of zeros"):
        SphereCMA(2, first_generation=np.zeros((1, 2)))


def test_degenerate_means_leave_the_basis(float64: None):
    """Parents on opposite sides, and a mean opposite to the basis, have no great circle."""
    ours = SphereCMA(2, population=2, parents=1, radius=1.0, first_generation=[[1.0, 0.0]], dtype=torch.float64)
    ours.ask()
    ours.tell([[1.0]])
    assert ours.centre.tolist() == [[1.0, 0.0]]
    ours.inject([[-1.0, 0.0]])
    ours.ask()
    ours.tell([[5.0, 0.0, 0.0]])
    assert ours.centre.tolist() == [[1.0, 0.0]]
    ours.inject([[1.0, 0.0]])
    ours.ask()
    ours.tell([[5.0, 0.0, 0.0]])
    assert ours.centre.tolist() == [[1.0, 0.0]]
    pair = SphereCMA(2, population=2, parents=2, radius=1.0, first_generation=np.eye(2)[:1], dtype=torch.float64)
    pair.ask()
    pair.tell([[1.0]])
    assert pair.ask().isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "sentence", "kind"),
    [
        ({"dim": 1}, "dim should be from 2 to", ValueError),
        ({"parents": 0}, "parents should be from 1 to 6, got 0", ValueError),
        ({"parents": 7}, "parents should be from 1 to 6, got 7", ValueError),
        ({"radius": 0}, "radius should be a finite number above 0, got 0", ValueError),
        ({"learning_rate": -1.0}, "learning_rate should be a finite number above 0", ValueError),
        ({"schedule": "cosine"}, "schedule should be one of 'exp', 'lin', 'inv', got 'cosine'", ValueError),
        ({"generations": 0}, "generations should be from 1 to", ValueError),
        ({"generations": 7.5}, "generations should be a whole number", TypeError),
        ({"angles": 50.0}, "angles should be the first and the last angle in degrees, got 50.0", TypeError),
        ({"angles": (50.0,)}, "angles should be the first and the last angle", TypeError),
        ({"angles": "ab"}, "angles should be the first and the last angle", TypeError),
        ({"angles": (50.0, 0.0)}, "angles should be a finite number above 0", ValueError),
        ({"angles": (91.0, 5.0)}, "angles should be up to 90 degrees, got 91.0 and 5.0", ValueError),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], sentence: str, kind: type[Exception]):
    with pytest.raises(kind, match=sentence):
        SphereCMA(**{"dim": 5, "population": 6, **arguments})


def test_parts_that_fit_in_cache_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = run(SphereCMA(20, problems=3, population=10), 3)
    for products in (1, 130):
        monkeypatch.setattr("cortexloop.evolve.sphere.PRODUCTS", products)
        assert same_bits(run(SphereCMA(20, problems=3, population=10), 3), whole)
