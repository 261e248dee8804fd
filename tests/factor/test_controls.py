"""Controls: what they destroy, what they keep, and that their record makes the same again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cortexloop.factor import (
    Control,
    Factors,
    channel_permutation,
    keep_only,
    mask_transplant,
    patch_shuffle,
    remove,
    sign_flip,
    target,
)


@pytest.fixture
def factors(rng: np.random.Generator) -> Factors:
    """Four neurons of three factors, 10 channels, masks of 15 x 16 with a border of 1; integers."""
    masks = torch.zeros(4, 3, 15, 16)
    masks[..., 1:-1, 1:-1] = torch.from_numpy(rng.integers(1, 1000, (4, 3, 13, 14))).float()
    return Factors(masks, torch.from_numpy(rng.integers(-500, 500, (4, 3, 10))).float(), "test", 1)


MAKE: dict[str, Callable[[Factors], Control]] = {
    "channel_permutation": lambda f: channel_permutation(f, seed=3),
    "patch_shuffle": lambda f: patch_shuffle(f, seed=3),
    "patch_shuffle_coarse": lambda f: patch_shuffle(f, seed=3, grid=2),
    "mask_transplant": lambda f: mask_transplant(f, seed=3),
    "keep_only": lambda f: keep_only(f, 1),
    "remove": lambda f: remove(f, [0, 2]),
    "sign_flip": lambda f: sign_flip(f, 2),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_records_replay_to_the_bit(factors: Factors, make: Callable[[Factors], Control], tmp_path: Path):
    control = make(factors)
    before = factors.masks.clone(), factors.vectors.clone()
    made = control.apply(factors)
    control.save(tmp_path / "control.safetensors")
    for again in (
        make(factors),
        Control.from_json(control.to_json()),
        Control.load(tmp_path / "control.safetensors"),
    ):
        replayed = again.apply(factors)
        assert torch.equal(replayed.masks, made.masks)
        assert torch.equal(replayed.vectors, made.vectors)
        assert (again.kind, again.seed, again.options) == (control.kind, control.seed, control.options)
    assert torch.equal(factors.masks, before[0])
    assert torch.equal(factors.vectors, before[1])
    assert control.kind in made.method
    assert made.explained is None


def as_sets(values: Tensor) -> list[list[float]]:
    return [sorted(row) for row in values.flatten(0, 1).flatten(1).tolist()]


def test_channel_permutation_moves_channels_only(factors: Factors):
    made = channel_permutation(factors, seed=0).apply(factors)
    assert torch.equal(made.masks, factors.masks)
    assert as_sets(made.vectors) == as_sets(factors.vectors)
    moved = (made.vectors != factors.vectors).any(2)
    assert moved.all()
    order = channel_permutation(factors, seed=0).arrays["channels"]
    assert len({tuple(row) for row in order.reshape(-1, 10)}) == 12  # every factor has its own permutation
    assert not np.array_equal(order, channel_permutation(factors, seed=1).arrays["channels"])


def test_patch_shuffle_by_hand():
    """Patches of 2 x 3 on 5 x 7 inside the border: written out for one mask."""
    masks = torch.zeros(1, 1, 7, 9)
    inner = torch.arange(1.0, 36.0).view(5, 7)
    masks[0, 0, 1:-1, 1:-1] = inner
    factors = Factors(masks, torch.ones(1, 1, 2), "test", 1)
    control = patch_shuffle(factors, seed=11, grid=2)
    source = control.arrays["patches"][0, 0]
    rows, columns = control.arrays["rolls"][0, 0]
    expected = inner.clone()
    for place in range(4):
        i, j = divmod(place, 2)
        k, m = divmod(int(source[place]), 2)
        expected[2 * i : 2 * i + 2, 3 * j : 3 * j + 3] = inner[2 * k : 2 * k + 2, 3 * m : 3 * m + 3]
    expected = expected.roll((int(rows), int(columns)), (0, 1))
    made = control.apply(factors)
    assert torch.equal(made.masks[0, 0, 1:-1, 1:-1], expected)
    assert torch.equal(made.vectors, factors.vectors)


def test_patch_shuffle_keeps_the_border_and_all_values(factors: Factors):
    made = patch_shuffle(factors, seed=0).apply(factors)
    assert as_sets(made.masks) == as_sets(factors.masks)
    assert (made.masks != factors.masks).flatten(2).any(2).all()
    edge = made.masks.clone()
    edge[..., 1:-1, 1:-1] = 0
    assert not edge.any()


def test_transplanted_masks_come_from_another_neuron(factors: Factors):
    for seed in range(20):
        control = mask_transplant(factors, seed=seed)
        donors = control.arrays["donors"]
        assert sorted(donors) == [0, 1, 2, 3]
        assert (donors != np.arange(4)).all()
    made = control.apply(factors)
    assert torch.equal(made.masks, factors.masks[torch.from_numpy(donors)])
    assert torch.equal(made.vectors, factors.vectors)


def test_ablations_and_signs(factors: Factors):
    assert torch.equal(keep_only(factors, 1).apply(factors).vectors, factors.vectors[:, 1:2])
    assert torch.equal(keep_only(factors, [2, 0]).apply(factors).masks, factors.masks[:, [2, 0]])
    assert torch.equal(remove(factors, 0).apply(factors).masks, factors.masks[:, 1:])
    parts = keep_only(factors, 0).apply(factors).tensor() + remove(factors, 0).apply(factors).tensor()
    assert torch.equal(parts, factors.tensor())  # integers: exact
    assert torch.equal(sign_flip(factors).apply(factors).tensor(), -factors.tensor())
    flipped = sign_flip(factors, 2).apply(factors)
    assert torch.equal(flipped.vectors[:, 2], -factors.vectors[:, 2])
    assert torch.equal(flipped.vectors[:, :2], factors.vectors[:, :2])


def test_targets(factors: Factors):
    full = target(factors, "full", 1)
    assert torch.equal(full.tensor(), factors.vectors[:, 1, :, None, None].expand(4, 10, 15, 16))
    centre = target(factors, "centre", 1, size=4)
    assert centre.masks.sum() == 4 * 16
    assert (centre.masks[..., 5:9, 6:10] == 1).all()
    assert torch.equal(target(factors, "wmap", 2).tensor(), keep_only(factors, 2).apply(factors).tensor())
    assert torch.equal(target(factors, "facttsr").tensor(), factors.tensor())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: patch_shuffle(f, seed=0, grid=14), r"grid should lie in 1\.\.13"),
        (lambda f: mask_transplant(f.select([0]), seed=0), "at least 2 are needed"),
        (lambda f: remove(f, [0, 1, 2]), "removing all 3 factors leaves none"),
        (lambda f: keep_only(f, 3), r"indices should lie in 0\.\.2"),
        (lambda f: keep_only(f, []), "empty choice"),
        (lambda f: target(f, "full"), r"'full' is made of one factor, 0\.\.2, got None"),
        (lambda f: target(f, "facttsr", 0), "sum of all factors"),
        (lambda f: target(f, "tsr"), "a target should be one of"),
        (lambda f: target(f, "centre", 0, size=16), r"size should lie in 1\.\.15"),
        (lambda f: sign_flip(f).apply(f.select([0])), r"for factors \[T, R, C, H, W\] = \[4, 3, 10, 15, 16\]"),
        (lambda f: Control.from_json("{}"), "not the record of a control"),
        (lambda f: Control.from_json("[1"), "not the record of a control"),
    ],
)
def test_bad_input_is_refused(factors: Factors, make: Callable[[Factors], object], message: str):
    with pytest.raises(ValueError, match=message):
        make(factors)
