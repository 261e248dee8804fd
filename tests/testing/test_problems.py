"""The test problems themselves: exact where they say so, informative, and able to fail a wrong kernel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.packing import fold
from cortexloop.testing import (
    CASES,
    LARGE_CASES,
    Case,
    assert_matches_reference,
    error_ratio,
    exact_inputs,
    problems,
    random_inputs,
    without_kinks,
)


@pytest.mark.parametrize("case", [*CASES, *LARGE_CASES[1:]], ids=str)
def test_exact_problems_have_exact_weights_and_live_gradients(case: Case) -> None:
    inputs = exact_inputs(case)
    for model in inputs.bank.models:
        for layer in model.layers:
            for values in (*fold(layer), layer.depthwise if layer.depthwise is not None else np.zeros(1)):
                assert np.array_equal(values, np.rint(values))
    assert inputs.images.abs().max() <= 2
    assert torch.equal(cl.recenter(inputs.images_uint8, inputs.bank.image_mean), inputs.images)
    grad = cl.input_gradient(inputs.images, inputs.bank, inputs.cotangent, backend="reference")
    assert (grad != 0).any()


def test_problems_repeat() -> None:
    for make in (exact_inputs, random_inputs):
        first, second = make(CASES[11]), make(CASES[11])
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.bank.weights, second.bank.weights)
        other = make(dataclasses.replace(CASES[11], seed=1))
        assert not torch.equal(first.images, other.images)


def test_sums_beyond_float32_are_refused() -> None:
    """The generator asserts its own promise."""
    model = exact_inputs(CASES[3]).bank.models[0]
    huge = dataclasses.replace(model, readout=model.readout * np.float32(2**24))
    with pytest.raises(AssertionError, match=r"sums reach .* units"):
        problems._check_exact(huge, torch.full((1, 5, 7, 3), 0.25, dtype=torch.float64), torch.ones(1).double())


def test_pairs_reach_every_model() -> None:
    inputs = random_inputs(dataclasses.replace(CASES[11], batch=9))
    assert set(inputs.pairs.tolist()) == set(range(5))


def test_comparison_fails_a_worse_kernel_and_nan() -> None:
    exact = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch32 = exact.float()
    worse = (exact + 1e-5).float()
    assert error_ratio(torch32, torch32, exact) <= 1
    with pytest.raises(AssertionError, match="times that of float32 torch"):
        assert_matches_reference(worse, torch32, exact, factor=4)
    with pytest.raises(AssertionError, match="NaN or infinity"):
        assert_matches_reference(torch32 * float("nan"), torch32, exact, factor=4)
    with pytest.raises(AssertionError, match="differ"):
        assert_matches_reference(torch32[:1], torch32, exact, factor=4)


def test_images_near_a_kink_are_left_out() -> None:
    inputs = random_inputs(dataclasses.replace(CASES[4], batch=40))
    assert without_kinks(inputs, band=0.0).all()
    wide = without_kinks(inputs, band=1e-3)
    narrow = without_kinks(inputs, band=1e-6)
    assert wide.sum() < narrow.sum()
    assert not (wide & ~narrow).any()
