"""`ModelGuided`: generated images that models choose, within a budget, replayed to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from source_replay import TickingClock, check_resume_anywhere, replay, rounds_of, run

import cortexloop as cl
from cortexloop.evolve import FourierGenerator, Placement, to_uint8
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.refit import Refit
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.sources.guided import ModelGuided

Make = Callable[..., ModelGuided]
POLICIES = ("model", "disagreement", "evolution")


@pytest.fixture
def make(small_bank: cl.ModelBank) -> Make:
    """A source of few images with all the time there is."""

    def made(**options: Any) -> ModelGuided:
        given = {"bank": small_bank, "per_batch": 4, "chunk": 16, "most": 48, "population": 6, "clock": ManualClock()}
        given |= {"generator": FourierGenerator(17, 13, 24), **options}
        return ModelGuided(given.pop("generator"), given.pop("bank"), **given)

    return made


@pytest.fixture
def neuron(small_bank: cl.ModelBank) -> Callable[[Images], Any]:
    def responses(images: Images) -> Any:
        return cl.responses(images, small_bank).astype(np.float64) @ [-2.0, 1.0, -0.5] + 3.0

    return responses


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ms", [0.0, 2.0, 9.0, 1e6])
def test_replay_is_exact_wherever_the_budget_ends(policy: str, ms: float, make: Make, neuron: Any) -> None:
    def again() -> ModelGuided:
        return make(policy=policy, budget_ms=50.0, clock=TickingClock(ms), refit=Refit(after=6))

    assert isinstance(again(), Source)
    json.dumps(again().settings())
    events = run(again(), neuron, 4, missing=3)
    proposals = rounds_of(events)
    least = 3 * 6 if policy == "evolution" else 16
    evaluated = [event.decision["evaluated"] for event in proposals]
    assert all(least <= count <= 54 for count in evaluated)
    assert ms > 0 or min(evaluated) >= 48
    assert ms < 1e6 or max(evaluated) <= 24
    assert [event.decision["explore"] for event in proposals] == [1] * 4
    assert proposals[0].proposal.labels == [policy] * 3 + ["explore"]
    assert [event.decision["refitted"] for event in proposals] == [False, False, False, True]
    source = again()
    source.guide.rows = None  # type: ignore[assignment]  # nothing is evaluated
    replay(source, events)


@pytest.mark.parametrize("policy", POLICIES)
def test_resumes_at_any_point(policy: str, make: Make, neuron: Any) -> None:
    options: dict[str, Any] = {"policy": policy, "refit": Refit(after=6), "batches": 3, "max_open": 2}
    events = run(make(**options), neuron, 9, missing=3)
    assert len(rounds_of(events)) == 3
    check_resume_anywhere(lambda: make(**options), neuron, events)


@pytest.mark.parametrize("policy", POLICIES)
def test_images_are_those_of_the_codes_and_look_good_to_the_models(
    policy: str, make: Make, small_bank: cl.ModelBank
) -> None:
    source = make(policy=policy, per_batch=8, most=200)
    proposal = source.propose()
    assert proposal is not None
    assert proposal.codes is not None
    images = proposal.render()
    codes = torch.from_numpy(np.array(proposal.codes))
    np.testing.assert_array_equal(images, to_uint8(FourierGenerator(17, 13, 24)(codes)).numpy())
    responses = cl.responses(images, small_bank)
    np.testing.assert_allclose(proposal.decision["predicted"], responses.mean(1), rtol=1e-5)
    value = responses.std(1) if policy == "disagreement" else responses.mean(1)
    assert value[:6].min() > value[6:].max()  # chosen of 200, and two of the new ones
    low = make(policy=policy, per_batch=8, most=200, minimise=True).propose()
    assert low is not None
    if policy != "disagreement":
        assert cl.responses(low.render(), small_bank).mean(1)[:6].max() < value.min()


@pytest.mark.parametrize("policy", ["model", "evolution"])
def test_follows_the_neuron_instead_of_the_bank(policy: str, make: Make, neuron: Any) -> None:
    """The neuron dislikes what the bank's mean likes: only the refitted model finds out."""
    options: dict[str, Any] = {"policy": policy, "per_batch": 12, "most": 120}
    blind = rounds_of(run(make(**options), neuron, 4))
    seeing = rounds_of(run(make(refit=Refit(after=10), **options), neuron, 4))
    assert neuron(seeing[0].images).mean() == neuron(blind[0].images).mean()
    assert neuron(seeing[-1].images)[:9].mean() > neuron(blind[-1].images)[:9].mean() + 0.3
    assert neuron(seeing[-1].images)[:9].mean() > neuron(seeing[-1].images)[9:].max()


def test_children_keep_the_size_of_codes(make: Make, neuron: Any) -> None:
    source = make(per_batch=8, mutation=0.5, parents=20)
    run(source, neuron, 3, missing=4)
    assert len(source._best) == 18
    assert (np.diff(source._best_scores) <= 0).all()
    source._best = source._new(np.random.default_rng(1), 20)
    norms = np.linalg.norm(source._pool(np.random.default_rng(0), 400), axis=1)
    assert norms[1::2].mean() == pytest.approx(norms[::2].mean(), rel=0.05)


def test_placed_images(make: Make, small_bank: cl.ModelBank, neuron: Any) -> None:
    placement = Placement((17, 13), pixels_per_degree=10, size=0.9, background=10)
    source = make(generator=FourierGenerator(9, 9, 24), placement=placement)
    assert source.size == (17, 13)
    images = rounds_of(run(source, neuron, 1))[0].images
    assert (images[:, 0] == 10).all()
    with pytest.raises(ValueError, match="images are 9 x 9 pixels, the bank takes 17 x 13"):
        make(generator=FourierGenerator(9, 9, 24))


def test_models_without_a_finite_response_choose_nothing(make: Make) -> None:
    for policy in POLICIES:
        source = make(policy=policy)
        source.guide.rows = lambda images: np.full((len(images), 3), np.nan, np.float32)  # type: ignore[method-assign]
        proposal = source.propose()
        assert proposal is not None
        assert proposal.codes is not None
        assert np.isfinite(proposal.codes).all()


def test_foreign_decisions_and_bad_arguments(make: Make, small_bank: cl.ModelBank) -> None:
    decision = make().propose().decision  # type: ignore[union-attr]
    for change in ({"codes": None}, {"rows": decision["codes"]}, {"explore": 5}, {"explore": "1"}):
        with pytest.raises(ValueError, match="the decision does not belong to this source"):
            make().propose({**decision, **change})
    with pytest.raises(ValueError, match="the decision does not belong"):
        make().propose([1])
    for options, message in (
        ({"policy": "best"}, "policy should be one of"),
        ({"optimiser": "none"}, "optimiser should be one of"),
        ({"population": 1}, "population should be a whole number of at least 2"),
        ({"spread": 0.0}, "spread above 0"),
        ({"explore": -0.1}, "explore should lie in"),
        ({"budget_ms": -1}, "budget_ms should be above 0"),
        ({"policy": "disagreement", "bank": small_bank.select([0])}, "one model cannot disagree"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
