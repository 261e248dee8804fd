"""Ask and tell, injected codes, the best so far, and every bad argument refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_optimisers import NAMES, scores_of, small

from cortexloop.evolve.catalogue import OPTIMISERS, make_optimiser
from cortexloop.evolve.cma import CholeskyCMA
from cortexloop.evolve.optimiser import Optimiser

every = pytest.mark.parametrize("name", NAMES)


@every
def test_shapes_and_the_protocol(name: str):
    optimiser = small(name, 10, problems=3)
    assert (optimiser.n, optimiser.dim, optimiser.problems) == (3, 10, (0, 1, 2))
    assert optimiser.centre.shape == (3, 10)
    for generation in range(3):
        assert optimiser.generation == generation
        codes = optimiser.ask()
        extra = name.startswith("sphere") and generation > 0
        assert codes.shape == (3, optimiser.codes_next, 10) == (3, optimiser.population + extra, 10)
        assert codes.dtype == torch.float32
        assert codes.is_contiguous()
        assert optimiser.ask() is codes, "the same until they are told"
        optimiser.tell(scores_of(optimiser, codes))
        with pytest.raises(RuntimeError, match=r"nothing to tell about: call ask\(\) first"):
            optimiser.tell(scores_of(optimiser, codes))


@every
@pytest.mark.parametrize(
    "convert",
    [
        np.ndarray.tolist,
        lambda scores: scores.astype(np.float32),
        np.asfortranarray,
        torch.from_numpy,
        lambda scores: torch.from_numpy(scores).int(),
        lambda scores: torch.from_numpy(scores)[..., None],
    ],
    ids=["list", "float32", "columns first", "tensor", "whole numbers", "one repeat"],
)
def test_scores_may_be_any_array(name: str, convert: Callable[[np.ndarray], Any]):
    ours, plain = (small(name, 5, problems=2, population=6) for _ in range(2))
    scores = np.round(scores_of(ours, ours.ask()))
    plain.ask()
    ours.tell(convert(scores))
    plain.tell(scores)
    assert torch.equal(ours.ask(), plain.ask())


@every
def test_best_is_the_best_ever_shown(name: str):
    optimiser = small(name, 6, problems=2, population=6)
    assert optimiser.best.codes.isnan().all()
    assert optimiser.best.scores.isnan().all()
    assert optimiser.best.scores.dtype == torch.float64
    assert optimiser.best.generation.tolist() == [-1, -1]
    shown, told = [], []
    for _ in range(5):
        codes = optimiser.ask().clone()
        scores = scores_of(optimiser, codes, missing=0.3)
        optimiser.tell(scores)
        shown.append(codes)
        told.append(scores)
        flat = np.concatenate(told, axis=1)
        first = np.nanargmax(flat, axis=1)
        assert optimiser.best.scores.tolist() == [row[place] for row, place in zip(flat, first, strict=True)]
        every_code = torch.cat(shown, dim=1)
        assert torch.equal(optimiser.best.codes, every_code[torch.arange(2), torch.from_numpy(first)])
        sizes = np.repeat(np.arange(len(told)), [t.shape[1] for t in told])
        assert optimiser.best.generation.tolist() == sizes[first].tolist()
    optimiser.best.codes.zero_()
    assert not (optimiser.best.codes == 0).all(), "a copy"


def test_equal_scores_go_by_position():
    optimiser = CholeskyCMA(3, population=4)
    codes = optimiser.ask().clone()
    optimiser.tell([[1.0, 2.0, 2.0, 1.0]])
    assert torch.equal(optimiser.best.codes[0], codes[0, 1])
    optimiser.ask()
    optimiser.tell([[2.0, 0.0, 0.0, 0.0]])
    assert optimiser.best.generation.tolist() == [0], "the first of equals stays"


@every
def test_injected_codes_take_the_first_places(name: str, rng: np.random.Generator):
    ours, plain = (small(name, 5, problems=2, population=6) for _ in range(2))
    for optimiser in (ours, plain):
        optimiser.tell(scores_of(optimiser, optimiser.ask()))
    ours.inject(rng.normal(size=(6, 5)))
    codes = rng.normal(size=(2, 2, 5)).astype(np.float32)
    ours.inject(codes)  # later calls replace earlier ones
    given = torch.tensor(codes)
    if name.startswith("sphere"):
        given = 4 * given / given.norm(dim=2, keepdim=True)
    codes[:] = 100.0  # a copy was taken
    assert torch.allclose(ours.ask()[:, :2], given, rtol=1e-6, atol=0)
    assert torch.equal(ours.ask()[:, 2:], plain.ask()[:, 2:])
    with pytest.raises(RuntimeError, match=r"inject before ask\(\)"):
        ours.inject(codes)
    scores = np.full(ours.ask().shape[:2], -50.0)
    scores[:, 1] = 60.0
    ours.tell(scores)
    assert torch.allclose(ours.best.codes, given[:, 1], rtol=1e-6, atol=0)
    assert ours.ask().isfinite().all()
    ours.tell(scores_of(ours, ours.ask()))
    assert ours.best.scores.tolist() == [60.0, 60.0], "injected once only"


@every
def test_first_generation_is_shown_as_given(name: str, rng: np.random.Generator):
    codes = rng.normal(size=(7, 5)).astype(np.float32)
    for given in (codes, np.stack([codes, codes]), torch.from_numpy(codes), codes.tolist()):
        optimiser = small(name, 5, problems=2, population=6, first_generation=given)
        assert optimiser.codes_next == 7
        shown = optimiser.ask()
        expected = torch.from_numpy(codes)
        if name.startswith("sphere"):
            expected = 4 * expected / expected.norm(dim=1, keepdim=True)
        assert torch.allclose(shown, expected.expand(2, -1, -1), rtol=1e-6, atol=0)
        optimiser.tell(scores_of(optimiser, shown))
        assert optimiser.ask().shape[1] == 6 + name.startswith("sphere")
        assert optimiser.ask().isfinite().all()


@every
@pytest.mark.parametrize("size", [1, 2, 30])
def test_first_generation_of_any_size(name: str, size: int, rng: np.random.Generator):
    optimiser = small(name, 5, population=6, first_generation=rng.normal(size=(size, 5)))
    for _ in range(3):
        optimiser.tell(scores_of(optimiser, optimiser.ask(), missing=0.2))
        assert optimiser.ask().isfinite().all()
        assert optimiser.centre.isfinite().all()


@every
def test_streams_by_id(name: str):
    ids = [128, 2**32 - 1, 0]
    both = small(name, 5, problems=ids)
    for problems in (tuple(ids), np.array(ids), torch.tensor(ids)):
        other = small(name, 5, problems=problems)
        assert other.problems == tuple(ids)
        assert torch.equal(other.ask(), both.ask())
    assert torch.equal(small(name, 5, problems=129).ask()[128], both.ask()[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "hessian-cma"])  # its metric has the dimension
@pytest.mark.parametrize(
    ("dim", "sentence", "kind"),
    [
        (0, "dim should be from [12] to", ValueError),
        (4.0, "dim should be a whole number, got 4.0", TypeError),
        (True, "dim should be a whole number, got True", TypeError),
    ],
)
def test_bad_dimensions_are_refused(name: str, dim: Any, sentence: str, kind: type[Exception]):
    with pytest.raises(kind, match=sentence):
        small(name, dim, population=6)


@every
@pytest.mark.parametrize(
    ("arguments", "sentence", "kind"),
    [
        ({"population": 1}, "population should be from 2 to", ValueError),
        ({"population": 6.0}, "population should be a whole number", TypeError),
        ({"problems": 0}, "problems should be from 1 to", ValueError),
        ({"problems": []}, "problems should be at least one id, each once", ValueError),
        ({"problems": [3, 3]}, r"problems should be at least one id, each once, got \[3, 3\]", ValueError),
        ({"problems": [-1]}, "problems should be from 0 to 4294967295, got -1", ValueError),
        ({"problems": [2**32]}, "problems should be from 0 to 4294967295", ValueError),
        ({"problems": [1.5]}, "problems should be a whole number, got 1.5", TypeError),
        ({"problems": "12"}, "problems should be a number or a sequence of ids, got '12'", TypeError),
        ({"problems": None}, "problems should be a number or a sequence of ids, got None", TypeError),
        ({"problems": True}, "problems should be a whole number, got True", TypeError),
        ({"seed": -1}, "seed should be from 0 to 18446744073709551615, got -1", ValueError),
        ({"seed": 2**64}, "seed should be from 0 to", ValueError),
        ({"seed": 0.5}, "seed should be a whole number", TypeError),
        ({"dtype": torch.float16}, r"dtype should be torch.float32 or torch.float64, got torch.float16", TypeError),
        (
            {"first_generation": np.zeros((3, 5))},
            r"first_generation should be \[k, 4\] or \[1, k, 4\] with k >= 1, got \[3, 5\]",
            ValueError,
        ),
        ({"first_generation": np.zeros((0, 4))}, "first_generation should be", ValueError),
        ({"first_generation": np.zeros((2, 3, 4))}, "first_generation should be", ValueError),
        ({"first_generation": np.full((3, 4), np.nan)}, "first_generation should be finite", ValueError),
        ({"first_generation": np.ones((3, 4), complex)}, "first_generation should be real numbers", TypeError),
        ({"first_generation": [["a"] * 4]}, "first_generation should be an array of real numbers", TypeError),
        ({"nonsense": 1}, "nonsense", TypeError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(name: str, arguments: dict[str, Any], sentence: str, kind: type[Exception]):
    with pytest.raises(kind, match=sentence):
        small(name, **{"dim": 4, "population": 6, **arguments})


@pytest.mark.parametrize(
    ("scores", "sentence", "kind"),
    [
        (np.zeros(6), r"scores should be \[2, 6\] \(problems, codes asked for\) or \[2, 6, repeats\]", ValueError),
        (np.zeros((2, 5)), r"got \[2, 5\]", ValueError),
        (np.zeros((1, 6)), r"got \[1, 6\]", ValueError),
        (np.zeros((2, 6, 0)), r"got \[2, 6, 0\]", ValueError),
        (np.zeros((2, 6, 1, 1)), r"got \[2, 6, 1, 1\]", ValueError),
        (np.full((2, 6), np.inf), "scores should be finite, or NaN", ValueError),
        (np.full((2, 6, 3), -np.inf), "scores should be finite, or NaN", ValueError),
        (np.zeros((2, 6), complex), "scores should be real numbers", TypeError),
        (np.zeros((2, 6), bool), "scores should be real numbers", TypeError),
        ([["high"] * 6] * 2, "scores should be an array of real numbers", TypeError),
        (None, "scores should be an array of real numbers", TypeError),
        ([[1.0], [1.0, 2.0]], "scores should be an array of real numbers", TypeError),
    ],
)
@pytest.mark.parametrize("name", ["cholesky-cma", "ga-xdream"])
def test_bad_scores_are_refused_and_nothing_changes(name: str, scores: Any, sentence: str, kind: type[Exception]):
    optimiser, plain = (small(name, 4, problems=2, population=6) for _ in range(2))
    codes = optimiser.ask()
    with pytest.raises(kind, match=sentence):
        optimiser.tell(scores)
    assert optimiser.generation == 0
    assert optimiser.ask() is codes
    assert optimiser.best.generation.tolist() == [-1, -1]
    for each in (optimiser, plain):
        each.tell(scores_of(each, each.ask()))
    assert torch.equal(optimiser.ask(), plain.ask())


@pytest.mark.parametrize(
    ("codes", "sentence", "kind"),
    [
        (np.ones((7, 4)), "the next generation has 6 codes, got 7 to inject", ValueError),
        (np.ones((2, 5)), r"codes should be \[k, 4\] or \[1, k, 4\] with k >= 1, got \[2, 5\]", ValueError),
        (np.ones(4), r"got \[4\]", ValueError),
        (np.ones((0, 4)), r"got \[0, 4\]", ValueError),
        (np.full((1, 4), np.inf), "codes should be finite", ValueError),
        (np.ones((1, 4), bool), "codes should be real numbers", TypeError),
        ("nothing", "codes should be an array of real numbers", TypeError),
    ],
)
@every
def test_bad_codes_to_inject_are_refused(name: str, codes: Any, sentence: str, kind: type[Exception]):
    optimiser, plain = (small(name, 4, population=6) for _ in range(2))
    with pytest.raises(kind, match=sentence):
        optimiser.inject(codes)
    assert torch.equal(optimiser.ask(), plain.ask())


def test_room_for_injected_codes_is_that_of_the_generation(rng: np.random.Generator):
    optimiser = small("cholesky-cma", 4, population=6, first_generation=np.ones((2, 4)))
    with pytest.raises(ValueError, match="the next generation has 2 codes, got 3 to inject"):
        optimiser.inject(np.ones((3, 4)))
    sphere = small("sphere-cma-exp", 4, population=6)
    sphere.tell(scores_of(sphere, sphere.ask()))
    sphere.inject(rng.normal(size=(7, 4)))
    assert sphere.ask().shape == (1, 7, 4)


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        (torch.empty(2, 6, 5), r"out should be torch.float32 \[2, 6, 4\] on cpu, got torch.float32 \[2, 6, 5\]"),
        (torch.empty(2, 6, 4, dtype=torch.float64), "got torch.float64"),
        (torch.empty(2, 6, 4, device="meta"), "on meta"),
        (torch.empty(2, 4, 6).mT, "out should be contiguous"),
    ],
)
def test_bad_memory_is_refused(out: torch.Tensor, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        small("nes", 4, problems=2, population=6).ask(out=out)


@every
@pytest.mark.parametrize(
    ("changed", "value"), [("population", 8), ("seed", 1), ("minimise", True), ("problems", [1, 2]), ("dim", 6)]
)
def test_states_of_other_runs_are_refused(name: str, changed: str, value: Any):
    def make(**keywords: Any) -> Optimiser:
        return small(name, **{"dim": 5, "problems": 2, "population": 6, **keywords})

    optimiser = make()
    codes = optimiser.ask()
    with pytest.raises(ValueError, match=f"the state belongs to another run: its {changed} is"):
        optimiser.load_state_dict(make(**{changed: value}).state_dict())
    assert optimiser.ask() is codes


@every
def test_states_of_other_optimisers_are_refused(name: str):
    for other in {*NAMES} - {name}:
        theirs = small(other, 5, population=6)
        ours = small(name, 5, population=6)
        with pytest.raises(ValueError, match="the state belongs to another run: its"):
            ours.load_state_dict(theirs.state_dict())


@every
def test_incomplete_states_are_refused(name: str):
    optimiser = small(name, 5, population=6)
    optimiser.tell(scores_of(optimiser, optimiser.ask()))
    for tensor in optimiser.state_dict()["tensors"]:
        lacking, wrong = optimiser.state_dict(), optimiser.state_dict()
        del lacking["tensors"][tensor]
        wrong["tensors"][tensor] = torch.zeros(3, 3, 3, 3)
        before = optimiser.ask()
        with pytest.raises(ValueError, match=f"the state lacks the tensor '{tensor}'"):
            optimiser.load_state_dict(lacking)
        with pytest.raises(ValueError, match=f"{tensor}.* should have the"):
            optimiser.load_state_dict(wrong)
        assert optimiser.ask() is before
    for part in ("settings", "tensors", "generation", "asked"):
        lacking = optimiser.state_dict()
        del lacking[part]
        with pytest.raises(ValueError, match=f"the state lacks '{part}'"):
            optimiser.load_state_dict(lacking)


def test_optimisers_by_name():
    for name, recipe in OPTIMISERS.items():
        assert recipe.name == name
        assert recipe.description
        assert "\n" not in recipe.description
        assert recipe.source
        optimiser = make_optimiser(
            name, 6, problems=[2, 3], population=None, generations=10, seed=4, minimise=True, device="cpu"
        )
        assert optimiser.problems == (2, 3)
        assert optimiser.minimise
        assert optimiser.settings()["seed"] == 4
    assert make_optimiser("sphere-cma-lin", 6, generations=10).settings()["generations"] == 10
    assert make_optimiser("sphere-cma-inv", 6).settings()["schedule"] == "inv"
    with pytest.raises(ValueError, match=r"optimiser should be one of cholesky-cma, .*, fdgd, got 'cma'"):
        make_optimiser("cma", 6)
    with pytest.raises(TypeError, match="radius should be a number"):
        make_optimiser("nes", 6, radius="wide")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_numbers_are_finite_and_positive(value: float):
    for name, argument in (("nes", "learning_rate"), ("sphere-cma-exp", "radius"), ("ga-xdream", "selectivity")):
        with pytest.raises(ValueError, match=f"{argument} should be a finite number above 0"):
            make_optimiser(name, 6, **{argument: value})
