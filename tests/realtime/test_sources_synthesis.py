"""`SynthesisSource`: the images of `synthesis.maximize`, in parts, within a budget."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from source_replay import TickingClock, check_resume_anywhere, replay, rounds_of, run

import cortexloop as cl
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.sources.synthesis import SynthesisSource
from cortexloop.synthesis import maximize, noise_image


def neuron(images: Images) -> Any:
    return images.mean((1, 2, 3), dtype=np.float64)


@pytest.mark.parametrize("minimize", [False, True])
def test_each_model_climbs_from_each_noise_in_turn(small_bank: cl.ModelBank, minimize: bool) -> None:
    source = SynthesisSource(small_bank, per_batch=4, batches=2, steps=5, seed=7, minimize=minimize)
    assert isinstance(source, Source)
    json.dumps(source.settings())
    events = run(source, neuron, 9)
    assert source.propose() is None
    images = np.concatenate([event.images for event in rounds_of(events)])
    labels = [label for event in rounds_of(events) for label in event.proposal.labels]
    assert labels == [f"model{i % 3}:{7 + i // 3}" for i in range(8)]
    for start in range(3):
        alone = maximize(small_bank, steps=5, start=noise_image(small_bank, 7 + start), minimize=minimize)
        for model in range(min(3, 8 - 3 * start)):
            made = images[3 * start + model].astype(np.float64)
            np.testing.assert_allclose(made, alone.images[model], atol=0.51)  # rounded
    check_resume_anywhere(
        lambda: SynthesisSource(small_bank, per_batch=4, batches=2, steps=5, seed=7, minimize=minimize), neuron, events
    )


def test_steps_are_what_the_budget_lets(small_bank: cl.ModelBank) -> None:
    def make(ms: float) -> SynthesisSource:
        return SynthesisSource(
            small_bank, per_batch=2, batches=3, steps=9, budget_ms=60.0, clock=TickingClock(ms), max_open=1
        )

    steps = {}
    for ms in (0.0, 10.0, 30.0, 1e4):
        events = run(make(ms), neuron, 9)
        steps[ms] = [event.decision["steps"] for event in rounds_of(events)]
        source = make(ms)
        replay(source, events)
    assert steps[0.0] == [9, 9, 9]
    assert steps[1e4] == [1, 1, 1]
    assert steps[10.0][0] == 9  # three steps between two looks at the clock, 10 ms
    assert steps[30.0][0] == 6


def test_foreign_decisions_and_bad_arguments(small_bank: cl.ModelBank) -> None:
    source = SynthesisSource(small_bank, per_batch=2, batches=1, steps=3, clock=ManualClock())
    for decision in ({"steps": 4}, {"steps": 0}, {"steps": 1.0}, [3]):
        with pytest.raises(ValueError, match="the decision does not belong to this source"):
            source.propose(decision)
    for options, message in (
        ({"steps": 0}, "steps should be a whole number of at least 1"),
        ({"batches": 0}, "batches should be a whole number"),
        ({"blur": -1.0}, "step_size and blur should be at least 0"),
        ({"budget_ms": 0.0}, "budget_ms should be above 0"),
        ({"seed": -1}, "seed should be a whole number of at least 0"),
    ):
        given: dict[str, Any] = {"per_batch": 2, "batches": 1, **options}
        with pytest.raises(ValueError, match=message):
            SynthesisSource(small_bank, **given)
