"""`CandidateSource`: what it chooses, within which time, and that a replay repeats it to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_replay import Learned, TickingClock, check_resume_anywhere, replay, rounds_of, run

import cortexloop as cl
from cortexloop.features import BankFeatures
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.refit import Refit
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.sources.candidates import CandidateSource
from cortexloop.realtime.sources.common import images_digest

Make = Callable[..., CandidateSource]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def images(rng: np.random.Generator) -> Images:
    """37 candidates of contrasts and means that models tell apart."""
    levels = rng.uniform(0, 255, (37, 1, 1, 3)) + rng.uniform(-1, 1, (37, 17, 13, 3)) * rng.uniform(
        5, 90, (37, 1, 1, 1)
    )
    return np.clip(levels, 0, 255).astype(np.uint8)


@pytest.fixture
def make(small_bank: cl.ModelBank, images: Images) -> Make:
    """A source with all the time there is."""

    def made(**options: Any) -> CandidateSource:
        all_options = {
            "images": images,
            "bank": small_bank,
            "per_batch": 5,
            "chunk": 8,
            "clock": ManualClock(),
        } | options
        return CandidateSource(all_options.pop("images"), all_options.pop("bank"), **all_options)

    return made


@pytest.fixture
def neuron(small_bank: cl.ModelBank) -> Callable[[Images], Any]:
    """A linear mixture of the bank that prefers what the bank's mean does not."""

    def responses(images: Images) -> Any:
        return cl.responses(images, small_bank).astype(np.float64) @ [-2.0, 1.0, -0.5] + 3.0

    return responses


def chosen(events: list[Any]) -> list[list[int]]:
    return [event.decision["chosen"] for event in rounds_of(events)]


def all_chosen(events: list[Any]) -> list[int]:
    return [position for positions in chosen(events) for position in positions]


def test_is_a_source(make: Make) -> None:
    assert isinstance(make(), Source)
    json.dumps(make(refit=Refit()).settings())


@pytest.mark.parametrize("policy", ["best", "worst", "disagreement"])
def test_all_are_shown_once_in_the_order_of_the_policy(
    policy: str, make: Make, images: Images, small_bank: cl.ModelBank, neuron: Any
) -> None:
    source = make(policy=policy)
    events = run(source, neuron, 99)
    responses = cl.responses(images, small_bank).astype(np.float64)
    key = {"best": -responses.mean(1), "worst": responses.mean(1), "disagreement": -responses.std(1)}[policy]
    assert all_chosen(events) == np.argsort(key, kind="stable").tolist()
    assert [len(c) for c in chosen(events)] == [5] * 7 + [2]
    assert source.propose() is None
    first = rounds_of(events)[0]
    np.testing.assert_array_equal(first.images, images[chosen(events)[0]])
    assert first.proposal.labels[0] == f"{policy}:{chosen(events)[0][0]}"
    assert first.decision["evaluated"] == 37
    np.testing.assert_allclose(first.decision["predicted"], responses.mean(1)[chosen(events)[0]], rtol=1e-6)


def test_one_model_can_decide(make: Make, images: Images, small_bank: cl.ModelBank, neuron: Any) -> None:
    events = run(make(model=small_bank.names[1], max_open=1), neuron, 1)
    expected = np.argsort(-cl.responses(images, small_bank)[:, 1], kind="stable")[:5]
    assert chosen(events) == [expected.tolist()]


def test_random_images_are_the_stated_share_and_evaluate_nothing(make: Make, neuron: Any) -> None:
    events = run(make(explore=0.3, max_open=1), neuron, 99)
    at_random = [event.decision["explore"] for event in rounds_of(events)]
    assert np.cumsum(at_random[:7]).tolist() == [int(0.3 * 5 * (i + 1)) for i in range(7)]
    assert sorted(all_chosen(events)) == list(range(37))
    labels = rounds_of(events)[1].proposal.labels
    assert [label.split(":")[0] for label in labels] == ["best"] * 3 + ["explore"] * 2
    alone = run(make(policy="random"), neuron, 99)
    assert {event.decision["evaluated"] for event in rounds_of(alone)} == {0}
    assert sorted(all_chosen(alone)) == list(range(37))
    assert chosen(alone) != chosen(run(make(policy="random", seed=1), neuron, 99))


@pytest.mark.parametrize("ms", [0.0, 0.7, 3.0, 9.0, 40.0, 1e6])
@pytest.mark.parametrize("options", [{}, {"refit": Refit(after=8), "explore": 0.25}, {"policy": "disagreement"}])
def test_replay_is_exact_wherever_the_budget_ends(ms: float, options: Any, make: Make, neuron: Any) -> None:
    def again() -> CandidateSource:
        return make(budget_ms=100.0, clock=TickingClock(ms), **options)

    events = run(again(), neuron, 99, missing=4)
    evaluated = [event.decision["evaluated"] for event in rounds_of(events)]
    assert evaluated == sorted(evaluated)
    assert sorted(all_chosen(events)) == list(range(37))
    if ms >= 40 and not options:
        assert evaluated[0] <= 16  # what the first images take, and no more
    if ms == 0:
        assert evaluated[0] == 37
    source = again()
    source.guide.rows = None  # type: ignore[assignment]  # nothing is evaluated
    replay(source, events)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ms=st.floats(0, 200),
    per_batch=st.integers(1, 12),
    chunk=st.integers(1, 40),
    explore=st.floats(0, 1),
    policy=st.sampled_from(["best", "worst", "disagreement", "random"]),
    refit=st.sampled_from([None, Refit(after=5), Refit(after=20, validation="running")]),
    max_open=st.integers(1, 4),
    missing=st.integers(0, 3),
)
def test_any_run_shows_all_once_and_is_replayed(
    ms: float, missing: int, make: Make, neuron: Any, **options: Any
) -> None:
    def again() -> CandidateSource:
        return make(budget_ms=100.0, clock=TickingClock(ms), **options)

    events = run(again(), neuron, 99, missing=missing)
    assert sorted(all_chosen(events)) == list(range(37))
    replay(again(), events)


@pytest.mark.parametrize("options", [{}, {"refit": Refit(after=8), "explore": 0.25}, {"policy": "random"}])
def test_resumes_at_any_point(options: Any, make: Make, neuron: Any) -> None:
    events = run(make(**options), neuron, 99, missing=3)
    check_resume_anywhere(lambda: make(**options), neuron, events)


def test_candidates_are_evaluated_within_the_budget(make: Make) -> None:
    """Chunks take 20 ms by this clock; 100 ms are enough for some of them, and later rounds go on from there."""
    clock = ManualClock()
    evaluated = []

    def started(budget_ms: float) -> CandidateSource:
        source = make(budget_ms=budget_ms, clock=clock, per_batch=2, max_open=9)
        rows = source.guide.rows

        def slow(some: Images) -> Any:
            clock.advance(0.02)
            evaluated.append(len(some))
            return rows(some)

        source.guide.rows = slow  # type: ignore[method-assign]
        return source

    for budget_ms, expected in ((100.0, [5, 5, 5]), (50.0, [2, 4, 5]), (20.0, [1, 2, 3]), (10.0, [1, 1, 1])):
        source, chunks = started(budget_ms), []
        evaluated.clear()
        for _ in range(3):
            proposal = source.propose()
            assert proposal is not None
            assert proposal.decision["ms"] <= max(budget_ms, 20)  # the first chunk is evaluated in any case
            assert proposal.decision["evaluated"] == sum(evaluated)
            chunks.append(len(evaluated))
        assert chunks == expected


def test_refitted_model_takes_over(make: Make, images: Images, neuron: Any) -> None:
    """Without noise and nearly without regularisation, a linear neuron is known after a few images."""
    source = make(refit=Refit(after=10, alphas=(1e-9,)), per_batch=10)
    events = run(source, neuron, 2)
    assert source.guide.refitted
    left = np.setdiff1d(np.arange(37), chosen(events)[0])
    best = left[np.argsort(-neuron(images[left]), kind="stable")[:10]]
    assert chosen(events)[1] == best.tolist()
    np.testing.assert_allclose(rounds_of(events)[1].decision["predicted"], neuron(images[best]), atol=1e-4)


def test_layer_averages_are_features(make: Make, images: Images, small_bank: cl.ModelBank, neuron: Any) -> None:
    layer = BankFeatures(small_bank, 0, 0)

    def again() -> CandidateSource:
        return make(refit=Refit(after=10), layer=layer, max_open=2)

    source = again()
    events = run(source, neuron, 99)
    assert source.guide.ridge is not None
    assert source.guide.ridge.width == 5
    rows = source.guide.rows(images)
    assert rows.shape == (37, 3 + 5)
    np.testing.assert_allclose(rows[:, 3:], layer(images).mean((2, 3)).numpy(), rtol=1e-6)
    check_resume_anywhere(again, neuron, events[:6])
    with pytest.raises(ValueError, match="say refit=Refit"):
        make(layer=layer)


def test_images_without_finite_responses_are_not_chosen(make: Make, neuron: Any) -> None:
    source = make(per_batch=10, refit=Refit(after=4), explore=0.2)
    rows = source.guide.rows
    dark = {3, 17, 30}
    place = {images.tobytes(): i for i, images in enumerate(source._images)}

    def faulty(some: Images) -> Any:
        found = rows(some)
        found[[place[image.tobytes()] in dark for image in some]] = [np.nan, np.inf, 0]
        return found

    source.guide.rows = faulty  # type: ignore[method-assign]
    events = run(source, neuron, 99)
    for event in rounds_of(events):
        by_policy = event.decision["chosen"][: event.proposal.count - event.decision["explore"]]
        assert not dark & set(by_policy)
    assert rounds_of(events)[-1].decision["not_ranked"] == 3
    assert source.propose() is None or set(np.flatnonzero(~source._shown)) <= dark


def test_of_equal_images_the_earlier_comes_first(make: Make) -> None:
    same = np.full((20, 17, 13, 3), 77, np.uint8)
    source = make(images=same, max_open=9)
    assert [source.propose().decision["chosen"] for _ in range(2)] == [list(range(5)), list(range(5, 10))]  # type: ignore[union-attr]


def test_memory_maps_and_digests(make: Make, images: Images, tmp_path: Path, neuron: Any) -> None:
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    source = make(images=mapped)
    assert source.settings() == make().settings()
    assert chosen(run(source, neuron, 9)) == chosen(run(make(), neuron, 9))
    assert make(images_sha256=images_digest(images)).settings() == make().settings()
    other = images.copy()
    other[36, 0, 0, 0] ^= 1
    assert make(images=other).settings() != make().settings()
    assert type(make(images=mapped).propose().render()) is np.ndarray  # type: ignore[union-attr]


def test_names_batches_and_open_proposals(make: Make, images: Images) -> None:
    source = make(names=[f"image {i}.png" for i in range(37)], batches=2)
    assert source.max_open == 2
    proposal = source.propose()
    assert proposal is not None
    assert proposal.labels[0] == f"best:image {proposal.decision['chosen'][0]}.png"
    assert source.propose() is not None
    assert source.propose() is None
    assert make(refit=Refit()).max_open == 1
    with pytest.raises(ValueError, match="oldest proposal has 5 images, got scores of shape"):
        source.learn(np.zeros(4), np.zeros((4, 1)))
    with pytest.raises(ValueError, match="scores should be finite"):
        source.learn(np.full(5, np.inf), np.zeros((5, 1)))
    for _ in range(2):
        source.learn(np.zeros(5), np.zeros((5, 1)))
    with pytest.raises(RuntimeError, match="no proposal of these candidates is out"):
        source.learn(np.zeros(5), np.zeros((5, 1)))


@pytest.mark.parametrize(
    "change",
    [
        "decision",
        {"chosen": [0, 1, 2, 3, 37]},
        {"chosen": [0, 1, 2, 3, 3]},
        {"chosen": []},
        {"chosen": list(range(6))},
        {"chosen": [0.0]},
        {"explore": 6},
        {"explore": None},
        {"rows": None},
        {"rows": {"dtype": "<f4", "shape": [5, 3], "base64": "AAAA"}},
        {"rows": {"dtype": "<f8", "shape": [0], "base64": ""}},
    ],
)
def test_foreign_decisions_are_refused(change: Any, make: Make) -> None:
    decision = make(refit=Refit()).propose().decision  # type: ignore[union-attr]
    source = make(refit=Refit())
    before = source.digest()
    with pytest.raises(ValueError, match="the decision does not belong to this source"):
        source.propose(change if isinstance(change, str) else {**decision, **change})
    assert source.digest() == before
    assert source.propose(decision) is not None
    with pytest.raises(ValueError, match="not shown before"):
        source.propose(decision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_batch": 0}, "per_batch should be a whole number of at least 1, got 0"),
        ({"policy": "good"}, "policy should be one of"),
        ({"explore": 1.5}, r"explore should lie in 0\.\.1"),
        ({"budget_ms": 0}, "budget_ms should be above 0"),
        ({"chunk": 0}, "chunk should be a whole number"),
        ({"names": ["a"]}, "names should be one for each of 37 candidates, got 1"),
        ({"images": np.zeros((3, 5, 5, 3), np.uint8)}, "candidates are 5 x 5 pixels, the bank takes 17 x 13"),
        ({"images": np.zeros((0, 17, 13, 3), np.uint8)}, "at least one image"),
        ({"model": "nobody"}, "no model named 'nobody'"),
        ({"refit": Refit(after=0)}, "got after = 0"),
    ],
)
def test_bad_arguments(options: Any, message: str, make: Make) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_one_model_does_not_disagree(make: Make, small_bank: cl.ModelBank) -> None:
    with pytest.raises(ValueError, match="one model cannot disagree"):
        make(policy="disagreement", bank=small_bank.select([0]))
    with pytest.raises(TypeError, match="uint8"):
        make(images=torch.zeros(1))


def test_learned_scores_are_in_the_digest(make: Make, neuron: Any) -> None:
    first, second = make(), make()
    a, b = run(first, neuron, 1), run(second, lambda images: neuron(images) + 1, 1)
    assert isinstance(a[-1], Learned)
    assert isinstance(b[-1], Learned)
    assert a[-1].digest != b[-1].digest
