"""`ControlSource`: conditions in counterbalanced order, each image that of its factors."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from source_replay import check_resume_anywhere, rounds_of, run

import cortexloop as cl
from cortexloop.factor import FactorModel, Factors, optimal_images, target
from cortexloop.features import BankFeatures
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.sources.controls import ControlSource, williams

Make = Callable[..., ControlSource]
ALL = (
    "optimal", "channel_permutation", "patch_shuffle", "mask_transplant", "sign_flip",
    "keep_only:1", "remove:0", "full:0", "centre:1", "wmap:1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(small_bank: cl.ModelBank) -> FactorModel:
    """Three neurons of two factors on a map [5, 17, 13], fitted to responses made from the map."""
    source = BankFeatures(small_bank, 0, 0)
    rng = np.random.default_rng(4)
    c, h, w = source.feature_shape()
    masks = torch.zeros(3, 2, h, w)
    masks[:, :, 3:-3, 3:-3] = torch.from_numpy(rng.random((3, 2, h - 6, w - 6))).float()
    factors = Factors(masks, torch.from_numpy(rng.standard_normal((3, 2, c))).float(), "made")
    images = rng.integers(0, 256, (40, 17, 13, 3), dtype=np.uint8)
    responses = rng.standard_normal((40, 3))
    return FactorModel.fit(source, images, responses, factors=factors, nonlinearity=None)


@pytest.fixture
def make(model: FactorModel) -> Make:
    def made(**options: Any) -> ControlSource:
        given = {"model": model, "steps": 3, "seed": 5, "blur_every": 0, **options}
        return ControlSource(given.pop("model"), **given)

    return made


def neuron(images: Images) -> Any:
    return images.mean((1, 2, 3), dtype=np.float64)


@pytest.mark.parametrize("count", range(1, 12))
def test_williams_squares_are_balanced(count: int) -> None:
    square = williams(count)
    assert square.shape == (count if count % 2 == 0 or count == 1 else 2 * count, count)
    assert (np.sort(square, axis=1) == np.arange(count)).all()
    for column in square.T:
        assert set(np.bincount(column, minlength=count)) == {len(square) // count}
    follows = Counter((int(a), int(b)) for row in square for a, b in itertools.pairwise(row))
    if count > 1:
        assert len(follows) == count * (count - 1)
        assert len(set(follows.values())) == 1


def test_every_condition_is_shown_as_often_in_every_place(make: Make) -> None:
    source = make(starts=2, repeats=2)  # 3 neurons x 2 starts x 2 repeats = 12 blocks of 4
    assert isinstance(source, Source)
    json.dumps(source.settings())
    events = run(source, neuron, 99)
    assert source.propose() is None
    labels = [event.proposal.labels for event in rounds_of(events)]
    assert [len(block) for block in labels] == [4] * 12
    places = Counter((label.split("/")[1], place) for block in labels for place, label in enumerate(block))
    assert len(places) == 16
    assert set(places.values()) == {3}
    assert set(Counter(label for block in labels for label in block).values()) == {2}
    for block in labels:
        assert len({(label.split("/")[0], label.split("/")[2]) for label in block}) == 1
    assert [event.decision for event in rounds_of(events)] == [{"conditions": block} for block in labels]
    images = {}
    for event in rounds_of(events):
        for label, image in zip(event.proposal.labels, event.images, strict=True):
            assert np.array_equal(images.setdefault(label, image), image)
    assert not source.stuck


def test_images_are_the_optimal_ones_of_each_condition(make: Make, model: FactorModel) -> None:
    source = make(conditions=ALL, neurons=[2, 0], starts=2, per_batch=7)
    source.prepare()
    made = source._images
    assert len(made) == 20
    events = run(source, neuron, 99)
    assert [event.proposal.count for event in rounds_of(events)] == [7] * 5 + [5]
    assert model.source is not None
    controls = source.controls
    assert sorted(controls) == sorted(set(ALL) - {"optimal", "full:0", "centre:1", "wmap:1"})
    for i, name in enumerate(ALL):
        weights = model.readout
        if name in controls:
            weights = controls[name].apply(weights)
        elif ":" in name:
            weights = target(weights, name[:-2], int(name[-1]))  # type: ignore[arg-type]
        expected = optimal_images(
            weights.select([2]), model.source, score="cosine", starts=2, seed=5, steps=3, blur_every=0
        )
        np.testing.assert_array_equal(made[i, 0], np.rint(expected.images[0]).astype(np.uint8))


def test_resumes_at_any_point_and_images_do_not_depend_on_the_order(make: Make) -> None:
    events = run(make(draws=2, conditions=("optimal", "patch_shuffle")), neuron, 99)
    assert {label.split("/")[1] for label in rounds_of(events)[0].proposal.labels} == {
        "optimal", "patch_shuffle#0", "patch_shuffle#1",
    }  # fmt: skip
    check_resume_anywhere(lambda: make(draws=2, conditions=("optimal", "patch_shuffle")), neuron, events)


def test_settings_tell_other_models_orders_and_controls_apart(make: Make, model: FactorModel) -> None:
    same = make().settings()
    assert make().settings() == same
    assert make(seed=6).settings() != same
    flipped = model.readout.replaced(vectors=-model.readout.vectors, method="other")
    assert make(model=dataclasses.replace(model, readout=flipped)).settings() != same


def test_silent_starts_are_listed(make: Make, model: FactorModel) -> None:
    nothing = model.readout.replaced(masks=model.readout.masks * 0, method="nothing")
    source = make(model=dataclasses.replace(model, readout=nothing), neurons=[1], conditions=("optimal",))
    source.prepare()
    assert source.stuck == ["1/optimal/0"]


def test_bad_arguments_and_foreign_decisions(make: Make, model: FactorModel) -> None:
    for options, message in (
        ({"model": model.with_source(None)}, "load it with a source of features"),
        ({"neurons": [3]}, r"neurons should lie in 0\.\.2, got 3"),
        ({"neurons": [1, 1]}, "one or more different ones"),
        ({"neurons": []}, "one or more different ones"),
        ({"conditions": ("best",)}, "a condition should be one of optimal, channel_permutation"),
        ({"conditions": ("remove",)}, "write remove:0, got 'remove'"),
        ({"conditions": ("wmap:2",)}, r"is made of one factor, 0\.\.1, got 2"),
        ({"conditions": ("optimal", "optimal")}, "one or more different ones"),
        ({"conditions": ()}, "one or more different ones"),
        ({"score": "corr"}, "score should be"),
        ({"starts": 0}, "starts should be a whole number of at least 1"),
        ({"model": dataclasses.replace(model, excluded={"empty": [1]}), "neurons": [1]}, r"not fitted \(empty\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    left = make(model=dataclasses.replace(model, excluded={"empty": [1]}))
    assert left.settings()["neurons"] == [0, 2]
    with pytest.raises(ValueError, match="other images are due"):
        left.propose({"conditions": ["1/optimal/0"]})
