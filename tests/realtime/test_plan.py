"""`Plan`: the same numbers as `responses`, from memory that never moves."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.testing import CASES, random_inputs


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_plan_equals_responses(engine: str, layout: str, dtype: str, paired: bool, precision: str) -> None:
    inputs = random_inputs(CASES[11])
    images = inputs.images_uint8 if dtype == "uint8" else inputs.images
    if layout == "NCHW":
        images = images.permute(0, 3, 1, 2).contiguous()
    pairs = inputs.pairs if paired else None
    options: dict[str, Any] = {"layout": layout, "precision": precision, "backend": engine, "pairs": pairs}
    plan = cl.Plan(inputs.bank, len(images), dtype=dtype, **options)
    assert plan.backend == engine
    assert plan.images.shape == tuple(images.shape)
    assert plan.images.dtype == dtype
    out = plan.responses
    for sign in (0, 1):  # other images through the same plan
        given = images.flip(0) if sign else images
        plan.images[:] = given.numpy()
        got = plan.run()
        assert got is out
        expected = cl.responses(given, inputs.bank, **options)
        assert np.array_equal(got, expected.numpy())


def test_run_allocates_nothing(isa: str) -> None:
    inputs = random_inputs(CASES[4])
    plan = cl.Plan(inputs.bank, 3)
    plan.images[:] = inputs.images_uint8.numpy()
    for _ in range(100):
        plan.run()
    tracemalloc.start()
    plan.run()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(1000):
        plan.run()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200  # the loop counter and the snapshot itself
    assert peak - before < 1000


def test_plan_outlives_its_bank_and_its_neighbours(engine: str) -> None:
    inputs = random_inputs(CASES[4])
    plan = cl.Plan(random_inputs(CASES[4]).bank, 3, backend=engine)
    expected = cl.responses(inputs.images_uint8, inputs.bank, backend=engine).numpy()
    rubbish = [torch.full((1000,), float("nan")) for _ in range(100)]
    plan.images[:] = inputs.images_uint8.numpy()
    assert np.array_equal(plan.run(), expected)
    assert len(rubbish) == 100


def test_plan_follows_the_number_of_threads(isa: str, restore_threads: None) -> None:
    inputs = random_inputs(CASES[12])
    plan = cl.Plan(inputs.bank, 2, backend="cpu")
    plan.images[:] = inputs.images_uint8.numpy()
    expected = plan.run().copy()
    for threads in (1, 3, 2):
        cl.set_num_threads(threads)
        assert np.array_equal(plan.run(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch should be at least 1, got 0"),
        ({"dtype": "float64"}, 'dtype should be "uint8" or "float32"'),
        ({"layout": "CHWN"}, 'layout should be "NHWC" or "NCHW"'),
        ({"precision": "half"}, 'precision should be "exact" or "fast"'),
        ({"backend": "gpu"}, "backend should be one of"),
        ({"batch": 2, "pairs": [0, 7]}, r"pairs should lie in 0\.\.2"),
        ({"batch": 2, "pairs": [0]}, "pairs should hold one model position per image"),
    ],
)
def test_wrong_plans(small_bank: cl.ModelBank, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cl.Plan(small_bank, **options)


def test_repr(small_bank: cl.ModelBank) -> None:
    assert repr(cl.Plan(small_bank, 2, backend="reference")) == (
        "Plan(2 uint8 images, 3 models, layout='NHWC', precision='exact', backend='reference')"
    )
