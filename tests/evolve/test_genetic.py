"""Genetic algorithms against their published rules in NumPy float64."""

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
from cortexloop.evolve.genetic import GeneticAlgorithm

Array = NDArray[np.float64]


@pytest.fixture
def float64() -> Iterator[None]:
    """The C++ kernels take float32 only."""
    with cl.use_backend("reference"):
        yield


def numbers(normal: bool, stream: int, generation: int, problem: int, rows: int, columns: int) -> Array:
    draw = ops.normals if normal else ops.uniforms
    return draw(6, stream, generation, torch.tensor([problem]), rows, columns)[0].double().numpy()


class Rules:
    """One problem; the next generation from codes and scores."""

    def __init__(self, problem: int, population: int, dim: int) -> None:
        self.problem, self.population, self.dim = problem, population, dim
        self.rate, self.size, self.skew, self.conserve = 0.25, 0.75, 0.75, population // 4
        self.generation = 0

    def fitness(self, scores: Array) -> Array:
        """Of codes from best to worst: Ponce et al. 2019."""
        return np.exp((scores - scores.max()) / max(2 * scores.std(), 1e-8))

    def carried(self, codes: Array, scores: Array) -> Array:
        return codes[:0]

    def next(self, codes: Array, scores: Array) -> Array:
        self.generation += 1
        shown = np.flatnonzero(~np.isnan(scores))
        carried = self.carried(codes, scores)
        if len(shown) == 0:
            return np.vstack([codes[: self.population - len(carried)], carried])
        order = shown[np.argsort(-scores[shown], kind="stable")]
        bins = np.cumsum(self.fitness(scores[order]))
        draws = numbers(False, streams.GENETIC_PARENTS, self.generation, self.problem, 2, self.population)
        first, second = (order[np.digitize(draw, bins / bins[-1])] for draw in draws)
        rows = (self.generation, self.problem, self.population, self.dim)
        from_first = numbers(False, streams.GENETIC_RECOMBINATION, *rows) < self.skew
        children = np.where(from_first, codes[first], codes[second])
        mutated = numbers(False, streams.GENETIC_MUTATED, *rows) < self.rate
        children[mutated] += self.size * numbers(True, streams.GENETIC_MUTATION, *rows)[mutated]
        kept = codes[order[: self.conserve]]
        return np.vstack([kept, children[len(kept) : self.population - len(carried)], carried])


class XDreamRules(Rules):
    def __init__(self, problem: int, population: int, dim: int, conserve: int) -> None:
        super().__init__(problem, population, dim)
        self.rate, self.size, self.skew, self.conserve = 0.5, 0.5, 0.5, conserve

    def fitness(self, scores: Array) -> Array:
        clipped = np.minimum(scores, np.percentile(scores, 95))
        return np.exp((clipped - clipped.max()) / max(scores.std() / 2, 1e-8))

    def carried(self, codes: Array, scores: Array) -> Array:
        return codes[np.isnan(scores)][: self.population - min(self.conserve, np.sum(~np.isnan(scores)))]


def make(convention: str, dim: int, conserve: int | None, **keywords: Any) -> GeneticAlgorithm:
    named = {"ponce2019": GeneticAlgorithm.ponce2019, "xdream": GeneticAlgorithm.xdream}[convention]
    return named(dim, conserve=conserve, **keywords)


@pytest.mark.parametrize(("population", "dim"), [(8, 5), (21, 30)])
@pytest.mark.parametrize(("convention", "conserve"), [("ponce2019", None), ("xdream", 0), ("xdream", 3)])
def test_by_hand(
    convention: str, conserve: int | None, population: int, dim: int, float64: None, rng: np.random.Generator
):
    problems = [4, 11]
    ours = make(convention, dim, conserve, population=population, problems=problems, seed=6, dtype=torch.float64)
    rules = [
        Rules(p, population, dim) if conserve is None else XDreamRules(p, population, dim, conserve) for p in problems
    ]
    codes = [numbers(True, streams.GENETIC_FIRST, 0, p, population, dim) for p in problems]
    # Few, many, all and all but one missing.
    for missing in (0, 0, 2, population - 1, 1, 0, population, 3, population - 2, 0):
        asked = ours.ask().numpy()
        for mine, theirs in zip(asked, codes, strict=True):
            assert np.abs(mine - theirs).max() < 1e-12
        scores = -np.abs(np.stack(codes) - 1.0).sum(2)
        for row in scores:
            row[rng.permutation(population)[:missing]] = np.nan
        ours.tell(scores)
        codes = [rule.next(c, s) for rule, c, s in zip(rules, codes, scores, strict=True)]


@pytest.mark.parametrize("convention", ["ponce2019", "xdream"])
def test_published_settings(convention: str):
    ours = make(convention, 10, None if convention == "ponce2019" else 0)
    settings = ours.settings()
    expected = {
        "ponce2019": (40, 2.0, None, 0.75, 0.25, 0.75, 10, False),
        "xdream": (20, 0.5, 95.0, 0.5, 0.5, 0.5, 0, True),
    }[convention]
    names = ("population", "temperature", "clip", "first_parent", "mutation_rate", "mutation_size", "conserve")
    assert (*(settings[name] for name in names), settings["carry_over"]) == expected


def test_the_conventions_of_temperature_are_opposite():
    assert GeneticAlgorithm.ponce2019(3, temperature=4.0).temperature == 4.0
    assert GeneticAlgorithm.xdream(3, selectivity=4.0).temperature == 0.25


def test_the_best_are_conserved_in_order():
    ours = GeneticAlgorithm.ponce2019(6, population=12, conserve=4)
    codes = ours.ask().clone()
    scores = np.arange(12.0)[None] % 7
    scores[0, 6] = np.nan  # would have been first
    ours.tell(scores)
    assert torch.equal(ours.ask()[0, :4], codes[0, [5, 4, 11, 3]])
    assert not (ours.ask()[0, 4:, None] == codes[0]).all(-1).any(), "children differ"


def test_codes_not_shown_are_dropped_or_carried_over():
    scores = np.arange(10.0)[None]
    scores[0, [1, 7, 9]] = np.nan
    for convention, rows in (("ponce2019", []), ("xdream", [1, 7, 9])):
        ours = make(convention, 6, 0, population=10, mutation_rate=1.0)
        codes = ours.ask().clone()
        ours.tell(scores)
        again = (ours.ask()[0, :, None] == codes[0]).all(-1)
        assert again.nonzero().tolist() == [[10 - len(rows) + k, row] for k, row in enumerate(rows)]


def test_parents_were_shown(float64: None):
    """Without mutation every gene is a parent's; genes are tagged by the code they come from."""
    tags = np.arange(10.0)[:, None].repeat(50, 1)
    ours = GeneticAlgorithm.ponce2019(
        50, problems=3, population=10, mutation_rate=0.0, first_generation=tags, conserve=0, temperature=100.0
    )
    ours.ask()
    scores = np.arange(10.0)[None].repeat(3, 0)
    scores[0, ::2] = np.nan
    scores[1, :9] = np.nan
    ours.tell(scores)
    one, two, three = ours.ask().numpy()
    assert set(one.flat) == {1.0, 3.0, 5.0, 7.0, 9.0}
    assert set(two.flat) == {9.0}
    assert len(set(three.flat)) > 4
    assert max(len(set(child)) for child in three) == 2, "two parents"


def test_shares_of_parents_and_mutations(rng: np.random.Generator):
    """Fitness, parental skew, rate and size of mutations, over many children."""
    tags = np.array([[0.0], [1000.0], [2000.0]]).repeat(400, 1)
    scores = np.array([[1.0, 2.0, 4.0]]).repeat(40, 0)
    ours = GeneticAlgorithm.ponce2019(400, problems=40, population=40, first_generation=tags, conserve=0)
    ours.ask()
    ours.tell(scores)
    children = ours.ask().double().numpy()
    parents = np.round(children / 1000).astype(int)
    fitness = np.exp((scores[0] - 4) / (2 * scores[0].std()))
    share = fitness / fitness.sum()
    count = 2 * 1600
    # The share of genes of each tag: parents are drawn 3200 times, the heavier half of them weighs 3/4.
    error = 4 * np.sqrt(share * (1 - share) / count * (0.75**2 + 0.25**2) * 2)
    assert (np.abs(np.bincount(parents.ravel(), minlength=3) / parents.size - share) < error).all()
    mixed = [child for child in parents.reshape(-1, 400) if len(set(child)) == 2]
    major = [np.bincount(child, minlength=3).max() / 400 for child in mixed]
    assert np.mean(major) == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / (400 * len(major))))
    change = children - 1000 * parents
    assert (change != 0).mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / change.size))
    assert change[change != 0].std() == pytest.approx(0.75, rel=0.01)


def test_one_outlier_is_not_every_childs_parent_where_scores_are_clipped():
    scores = np.zeros((1, 41))
    scores[0, :3] = [1000.0, 5.0, 4.0]
    tags = np.arange(41.0)[:, None].repeat(3, 1)
    drawn = {}
    for convention in ("ponce2019", "xdream"):
        ours = make(convention, 3, 0, population=200, mutation_rate=0.0, first_generation=tags)
        ours.ask()
        ours.tell(scores)
        drawn[convention] = (ours.ask() == 0).double().mean()
    # xdream: the 95th percentile of 41 scores is the third of them, so three codes are equally fit.
    temperature = scores.std() / 2
    expected = 1 / (3 + 38 * math.exp(-4 / temperature))
    assert drawn["xdream"] == pytest.approx(expected, abs=0.05)


def test_equal_scores_have_equal_chances():
    tags = np.arange(8.0)[:, None].repeat(200, 1)
    ours = GeneticAlgorithm.xdream(200, problems=20, population=40, mutation_rate=0.0, first_generation=tags)
    ours.ask()
    ours.tell(np.full((20, 8), 3.0))
    share = np.bincount(ours.ask().numpy().astype(int).ravel(), minlength=8) / ours.ask().numel()
    assert np.abs(share - 1 / 8).max() < 0.04


def test_first_generation_of_other_sizes(rng: np.random.Generator):
    """Larger than the population: what was not shown has room behind the conserved codes only."""
    codes = rng.normal(size=(9, 4)).astype(np.float32)
    ours = GeneticAlgorithm.xdream(4, population=6, conserve=2, first_generation=codes)
    scores = np.full((1, 9), np.nan)
    scores[0, [3, 4, 8]] = [1.0, 3.0, 2.0]
    ours.ask()
    ours.tell(scores)
    assert torch.equal(ours.ask()[0], torch.from_numpy(codes[[4, 8, 0, 1, 2, 5]]))
    # Nothing shown: carried over as far as there is room, or the random generation that it replaced.
    fresh = GeneticAlgorithm.xdream(4, population=6).ask()
    for size in (4, 6, 9):
        ours = GeneticAlgorithm.xdream(4, population=6, first_generation=codes.repeat(1, 0)[:size])
        ours.ask()
        ours.tell(np.full((1, size), np.nan))
        carried = min(size, 6)
        assert torch.equal(ours.ask()[0, 6 - carried :], torch.from_numpy(codes[:carried]))
        assert torch.equal(ours.ask()[0, : 6 - carried], fresh[0, : 6 - carried])
    ours = GeneticAlgorithm.ponce2019(4, population=6, first_generation=codes)
    ours.ask()
    ours.tell(np.full((1, 9), np.nan))
    assert torch.equal(ours.ask(), GeneticAlgorithm.ponce2019(4, population=6).ask())


def test_injected_codes_not_shown_are_carried_over():
    ours = GeneticAlgorithm.xdream(3, population=4)
    ours.inject([[7.0, 8.0, 9.0]])
    ours.ask()
    ours.tell([[np.nan, 1.0, 2.0, 3.0]])
    assert ours.ask()[0, 3].tolist() == [7.0, 8.0, 9.0]


def test_first_generation_from_statistics(rng: np.random.Generator):
    mean, deviation = rng.normal(size=5), rng.random(5)
    plain = GeneticAlgorithm.xdream(5, problems=2, population=400).ask().double().numpy()
    ours = GeneticAlgorithm.xdream(
        5, problems=2, population=400, initial_mean=mean, initial_deviation=deviation, initial_minimum=0.0
    )
    assert ours.ask().double().numpy() == pytest.approx(np.maximum(mean + deviation * plain, 0), abs=1e-6)
    assert plain.std() == pytest.approx(1.0, abs=0.05)


def test_centre_is_the_mean_of_the_generation(rng: np.random.Generator):
    first = rng.normal(size=(3, 5))
    ours = GeneticAlgorithm.ponce2019(5, population=6, first_generation=first)
    assert ours.centre[0].numpy() == pytest.approx(first.mean(0), rel=1e-5)
    ours.tell(scores_of(ours, ours.ask()))
    assert ours.centre[0].numpy() == pytest.approx(ours.ask()[0].numpy().mean(0), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence", "kind"),
    [
        ({"temperature": 0.0}, "temperature should be a finite number above 0, got 0.0", ValueError),
        ({"clip": 101.0}, "clip should be from 0 to 100, got 101.0", ValueError),
        ({"clip": -1.0}, "clip should be from 0 to 100, got -1.0", ValueError),
        ({"clip": "95"}, "clip should be a number", TypeError),
        ({"first_parent": 1.5}, "first_parent should be from 0 to 1, got 1.5", ValueError),
        ({"mutation_rate": -0.1}, "mutation_rate should be from 0 to 1, got -0.1", ValueError),
        ({"mutation_rate": math.nan}, "mutation_rate should be from 0 to 1, got nan", ValueError),
        ({"mutation_size": -0.1}, "mutation_size should be a finite number of at least 0", ValueError),
        ({"conserve": 6}, "conserve should be from 0 to 5, got 6", ValueError),
        ({"conserve": 1.0}, "conserve should be a whole number", TypeError),
        ({"initial_mean": np.zeros(4)}, r"initial_mean should be a number or \[5\], got \[4\]", ValueError),
        ({"initial_mean": math.nan}, "initial_mean should be finite", ValueError),
        ({"initial_deviation": -1.0}, "initial_deviation should be at least 0", ValueError),
        ({"initial_minimum": "zero"}, "initial_minimum should be an array of real numbers", TypeError),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], sentence: str, kind: type[Exception]):
    good = {
        "population": 6,
        "temperature": 1.0,
        "clip": None,
        "first_parent": 0.5,
        "mutation_rate": 0.5,
        "mutation_size": 0.5,
        "conserve": 0,
        "carry_over": True,
    }
    GeneticAlgorithm(5, **good)
    with pytest.raises(kind, match=sentence):
        GeneticAlgorithm(5, **{**good, **arguments})


def test_bad_arguments_of_the_conventions_are_refused():
    with pytest.raises(ValueError, match="parental_skew should be from 0 to 1"):
        GeneticAlgorithm.ponce2019(5, parental_skew=2.0)
    with pytest.raises(ValueError, match="heritability should be from 0 to 1"):
        GeneticAlgorithm.xdream(5, heritability=-0.5)
    with pytest.raises(ValueError, match="selectivity should be a finite number above 0"):
        GeneticAlgorithm.xdream(5, selectivity=0)
    with pytest.raises(TypeError, match="population should be a whole number, got '40'"):
        GeneticAlgorithm.ponce2019(5, population="40")


def test_parts_that_fit_in_cache_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = run(GeneticAlgorithm.xdream(20, problems=5, population=10), 3, missing=0.2)
    for draws in (1, 400):
        monkeypatch.setattr("cortexloop.evolve.genetic.DRAWS", draws)
        assert same_bits(run(GeneticAlgorithm.xdream(20, problems=5, population=10), 3, missing=0.2), whole)
