"""NES and FDGD against their published rules in NumPy float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import ops
from cortexloop.evolve import streams
from cortexloop.evolve.gradient import FDGD, NES

Array = NDArray[np.float64]
both = pytest.mark.parametrize("make", [NES, FDGD])


@pytest.fixture
def float64() -> Iterator[None]:
    """The C++ kernels take float32 only."""
    with cl.use_backend("reference"):
        yield


def normal_numbers(stream: int, generation: int, problem: int, rows: int, columns: int) -> Array:
    return ops.normals(3, stream, generation, torch.tensor([problem]), rows, columns)[0].double().numpy()


def scores_with_gaps(codes: Array, missing: int, rng: np.random.Generator) -> Array:
    scores = 10.0 - ((codes - 1.0) ** 2) @ np.linspace(0.1, 1.0, codes.shape[1])
    scores[rng.permutation(len(codes))[:missing]] = np.nan
    return scores


GAPS = (0, 0, 1, 3, 0, 7, 8, 2, 0)


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("radius_learning_rate", [0.0, 0.05])
def test_nes_by_hand(radius_learning_rate: float, baseline: bool, float64: None, rng: np.random.Generator):
    """As published, sums over all codes of their scores; here only over those of complete pairs."""
    dim, population, problem, rate = 6, 8, 21, 0.3
    start = rng.normal(size=dim)
    ours = NES(
        dim,
        population=population,
        problems=[problem],
        seed=3,
        learning_rate=rate,
        radius_learning_rate=radius_learning_rate,
        minimum_radius=0.9,
        baseline=baseline,
        start=start,
        dtype=torch.float64,
    )
    centre, r, radii = start, 1.25, []
    for generation, missing in enumerate(GAPS):
        half = normal_numbers(streams.NES, generation, problem, population // 2, dim)
        z = np.vstack([half, -half])
        codes = centre + r * z
        assert np.abs(ours.ask()[0].numpy() - codes).max() < 1e-12
        scores = scores_with_gaps(codes, missing, rng)
        ours.tell(scores[None])
        complete = ~np.isnan(scores[: population // 2] + scores[population // 2 :])
        counted = np.concatenate([complete, complete])
        if counted.any():
            s, z = scores[counted], z[counted]
            level = s - s.mean() if baseline else s
            step_r = radius_learning_rate * (level[:, None] * (z**2 - 1)).mean() / r
            centre = centre + rate * (s[:, None] * z).mean(0) / r
            r = max(r + step_r, 0.9)
        radii.append(r)
        assert np.abs(ours.centre[0].numpy() - centre).max() < 1e-12
        assert ours.search_radius.tolist() == pytest.approx([r], rel=1e-12)
    if radius_learning_rate:
        assert len(set(radii)) > 4


def test_fdgd_by_hand(float64: None, rng: np.random.Generator):
    dim, population, problem, rate, radius = 6, 8, 2, 0.7, 0.4
    ours = FDGD(
        dim,
        population=population,
        problems=[problem],
        seed=3,
        learning_rate=rate,
        radius=radius,
        dtype=torch.float64,
    )
    centre = np.zeros(dim)
    for generation, missing in enumerate(GAPS):
        steps = radius * normal_numbers(streams.FDGD, generation, problem, population // 2, dim)
        codes = np.vstack([centre + steps, centre - steps])
        assert np.abs(ours.ask()[0].numpy() - codes).max() < 1e-12
        scores = scores_with_gaps(codes, missing, rng)
        ours.tell(scores[None])
        difference = (scores[:4] - scores[4:]) / 2
        counted = ~np.isnan(difference)
        if counted.any():
            gradient = (difference / np.abs(steps).mean(1) ** 2)[counted, None] * steps[counted]
            centre = centre + rate * gradient.mean(0)
        assert np.abs(ours.centre[0].numpy() - centre).max() < 1e-12


def test_published_settings():
    nes, fdgd = NES(4096), FDGD(4096)
    assert (nes.population, nes.radius, nes.learning_rate, nes.radius_learning_rate) == (20, 1.25, 1.75, 0.05)
    assert nes.minimum_radius == 0.01
    assert not nes.baseline
    assert (fdgd.population, fdgd.radius, fdgd.learning_rate) == (20, 1.25, 1.25)
    assert not nes.centre.any()


@both
def test_codes_lie_in_pairs_around_the_centre(make: type[NES] | type[FDGD], rng: np.random.Generator):
    start = rng.normal(size=(2, 50))
    ours = make(50, problems=2, start=start)
    codes = ours.ask().double()
    assert codes.shape == (2, 20, 50)
    assert ((codes[:, :10] + codes[:, 10:]) / 2).numpy() == pytest.approx(start[:, None].repeat(10, 1), abs=1e-6)
    assert (codes[:, :10] - codes[:, 10:]).std() == pytest.approx(2 * 1.25, rel=0.1)


@both
def test_half_a_pair_does_not_count(make: type[NES] | type[FDGD]):
    """Whatever its score is; and alone it changes nothing."""
    ours, other = (make(4, population=6) for _ in range(2))
    for optimiser, score in ((ours, 1e3), (other, -1e3)):
        optimiser.ask()
        optimiser.tell([[score, 1.0, 2.0, np.nan, 3.0, 5.0]])
    assert torch.equal(ours.ask(), other.ask())
    before = ours.centre.clone()
    ours.tell([[1.0, 2.0, 3.0, np.nan, np.nan, np.nan]])
    assert torch.equal(ours.centre, before)
    assert ours.best.scores.tolist() == [1e3], "it can be the best all the same"


@both
def test_pairs_with_an_injected_code_do_not_count(make: type[NES] | type[FDGD]):
    plain, ours = (make(3, population=6) for _ in range(2))
    ours.inject([[100.0, 0.0, 0.0]])
    ours.ask()
    ours.tell([[1e3, 1.0, 2.0, 3.0, 4.0, 6.0]])
    plain.ask()
    plain.tell([[np.nan, 1.0, 2.0, 3.0, 4.0, 6.0]])
    assert torch.equal(ours.centre, plain.centre)
    assert ours.best.codes.tolist() == [[100.0, 0.0, 0.0]]
    before = ours.centre.clone()
    ours.inject(np.ones((6, 3)))
    ours.ask()
    ours.tell([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert torch.equal(ours.centre, before)


@both
def test_after_a_first_generation_the_centre_is_its_best(make: type[NES] | type[FDGD], rng: np.random.Generator):
    codes = rng.normal(size=(2, 5, 3)).astype(np.float32)
    ours = make(3, problems=2, population=4, first_generation=codes)
    ours.ask()
    ours.tell([[1.0, 5.0, np.nan, 2.0, 3.0], [np.nan] * 4 + [-3.0]])
    assert ours.centre.tolist() == [codes[0, 1].tolist(), codes[1, 4].tolist()]
    assert ours.ask().shape == (2, 4, 3)


@both
@pytest.mark.parametrize(
    ("arguments", "sentence", "kind"),
    [
        ({"population": 5}, "population should be even, for pairs of codes, got 5", ValueError),
        ({"radius": 0.0}, "radius should be a finite number above 0", ValueError),
        ({"learning_rate": math.nan}, "learning_rate should be a finite number above 0", ValueError),
        ({"start": np.zeros(3)}, r"start should be \[4\] or \[1, 4\], got \[3\]", ValueError),
    ],
)
def test_bad_arguments_are_refused(
    make: type[NES] | type[FDGD], arguments: dict[str, Any], sentence: str, kind: type[Exception]
):
    with pytest.raises(kind, match=sentence):
        make(4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"radius_learning_rate": -1.0}, "radius_learning_rate should be a finite number of at least 0"),
        ({"minimum_radius": 0.0}, "minimum_radius should be a finite number above 0"),
        ({"minimum_radius": 2.0}, "minimum_radius should be at most the radius 1.25, got 2.0"),
    ],
)
def test_bad_radii_are_refused(arguments: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        NES(4, **arguments)
