"""The CUDA kernels' own source, executed on the CPU: exact answers, close answers, invariances."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

import numpy as np
import pytest
import torch
from emulated_bank import EmulatedBank
from emulated_build import Settings

import cortexloop as cl
from cortexloop.testing import (
    CASES,
    FACTOR,
    LARGE_CASES,
    PAIRED_CASES,
    Case,
    Inputs,
    ModelShape,
    assert_matches_reference,
    exact_inputs,
    random_inputs,
    without_kinks,
)

Tensor = torch.Tensor
exact = functools.cache(exact_inputs)
random = functools.cache(random_inputs)

PUBLISHED = ModelShape((18, 20, 3, 5, 3), (5, 5, 5, 5, 5), (1, 2, 2, 1, 1))
# Few units on many processors: images are cut into bands of rows.
BANDED = Case("56x48-bands", 1, 56, 48, (PUBLISHED, ModelShape((33, 17, 9), (5, 5, 5), (1, 2, 2))), 5)


def exact_answers(case: Case, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 responses and input gradient of `exact(case)`."""
    inputs = exact(case)
    cotangent = inputs.cotangent if pairs is None else inputs.cotangent[torch.arange(len(pairs)), pairs]
    grad, responses = cl.input_gradient(
        inputs.images.double(),
        inputs.bank,
        cotangent.double(),
        pairs=pairs,
        backend="reference",
        return_responses=True,
    )
    return responses, grad


def views(inputs: Inputs) -> list[tuple[Tensor, str]]:
    """Recentred values and pixels in both layouts."""
    both = (inputs.images, inputs.images_uint8)
    return [(x, "NHWC") for x in both] + [(x.permute(0, 3, 1, 2).contiguous(), "NCHW") for x in both]


@pytest.mark.parametrize("at_start", [False, True], ids=["ends-at-a-page", "starts-at-a-page"])
@pytest.mark.parametrize("case", [*CASES, BANDED, *LARGE_CASES], ids=str)
def test_exact(emulated_cuda: ModuleType, case: Case, at_start: bool) -> None:
    """Every buffer lies between pages without access; outputs and workspace start as NaN."""
    if at_start and case in LARGE_CASES:
        return  # the same code as in BANDED, and a second per call
    inputs = exact(case)
    responses, grad = exact_answers(case)
    bank = EmulatedBank(emulated_cuda, inputs.bank, at_start)
    for images, layout in views(inputs):
        assert torch.equal(bank.forward(images, layout), responses.float()), (images.dtype, layout)
        got, values = bank.gradient(images, inputs.cotangent, layout)
        assert torch.equal(values, responses.float()), (images.dtype, layout)
        got = got if layout == "NHWC" else got.permute(0, 2, 3, 1)
        assert torch.equal(got, grad.float()), (images.dtype, layout)


@pytest.mark.parametrize("case", PAIRED_CASES, ids=str)
def test_pairs_exact(emulated_cuda: ModuleType, case: Case) -> None:
    inputs = exact(case)
    responses, grad = exact_answers(case, inputs.pairs)
    cotangent = inputs.cotangent[torch.arange(case.batch), inputs.pairs]
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    for images, layout in views(inputs):
        assert torch.equal(bank.forward(images, layout, inputs.pairs), responses.float())
        got, values = bank.gradient(images, cotangent, layout, inputs.pairs)
        assert torch.equal(values, responses.float())
        assert torch.equal(got if layout == "NHWC" else got.permute(0, 2, 3, 1), grad.float())


@pytest.mark.parametrize("seed", range(12))
def test_random_architectures_exact(emulated_cuda: ModuleType, seed: int) -> None:
    """Every second bank has the published form, so that its head runs fused, in sizes of its own."""
    draw = np.random.default_rng([seed, 31])
    shapes = []
    for _ in range(2):
        depth = int(draw.integers(3, 7)) if seed % 2 else int(draw.integers(1, 6))
        filters = tuple(int(n) for n in draw.integers(1, 60, size=depth))
        kernels = tuple(int(k) for k in draw.choice([1, 3, 5, 7], size=depth))
        strides = tuple(int(s) for s in draw.integers(1, 3, size=depth))
        if seed % 2:
            kernels, strides = (5, 5, 5, *kernels[3:]), (1, 2, 2, *strides[3:])
        shapes.append(ModelShape(filters, kernels, strides))
    height, width = (int(n) for n in draw.integers(1, 13, size=2) * 4) if seed % 2 else draw.integers(1, 50, size=2)
    case = Case(f"random-{seed}", 2, int(height), int(width), tuple(shapes), seed)
    inputs = exact(case)
    responses, grad = exact_answers(case)
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    assert torch.equal(bank.forward(inputs.images), responses.float())
    got, values = bank.gradient(inputs.images_uint8, inputs.cotangent)
    assert torch.equal(values, responses.float())
    assert torch.equal(got, grad.float())


@pytest.mark.parametrize("case", [CASES[8], *CASES[11:], BANDED], ids=str)
def test_forward_close(emulated_cuda: ModuleType, case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=16))
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    torch32 = cl.responses(inputs.images, inputs.bank, backend="reference")
    for images in (inputs.images, inputs.images_uint8):
        assert_matches_reference(bank.forward(images), torch32, expected, factor=FACTOR["bank_forward", torch.float32])


@pytest.mark.parametrize("case", [CASES[8], *CASES[11:]], ids=str)
def test_gradient_close(emulated_cuda: ModuleType, case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=12))
    clear = without_kinks(inputs)
    assert clear.any(), "no image of this case keeps clear of the kinks; choose another seed"
    images, cotangent = inputs.images[clear], inputs.cotangent[clear]
    expected = cl.input_gradient(images.double(), inputs.bank, cotangent.double(), backend="reference")
    torch32 = cl.input_gradient(images, inputs.bank, cotangent, backend="reference")
    got, _ = EmulatedBank(emulated_cuda, inputs.bank).gradient(images, cotangent)
    assert_matches_reference(got, torch32, expected, factor=FACTOR["bank_input_gradient", torch.float32])


@pytest.mark.parametrize("case", [*CASES[11:], BANDED, *LARGE_CASES], ids=str)
def test_fast_is_close(emulated_cuda: ModuleType, case: Case) -> None:
    """float16 operands: responses have a standard deviation of about 1, wrong layouts miss by that much."""
    inputs = random(case)
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    for images, layout in views(inputs):
        got = bank.forward(images, layout, precision="fast")
        assert (got - expected).abs().max() < 0.086


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("case", [CASES[11], CASES[12], CASES[14]], ids=str)
def test_a_response_depends_on_its_image_and_model_alone(emulated_cuda: ModuleType, case: Case, precision: str) -> None:
    inputs = random(dataclasses.replace(case, batch=5))
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    whole = bank.forward(inputs.images, precision=precision)
    paired = bank.forward(inputs.images, pairs=inputs.pairs, precision=precision)
    assert torch.equal(paired, whole[torch.arange(5), inputs.pairs])
    for i in range(5):
        assert torch.equal(bank.forward(inputs.images[i : i + 1], precision=precision)[0], whole[i])
    alone = EmulatedBank(emulated_cuda, inputs.bank.select(len(inputs.bank) - 1))
    assert torch.equal(alone.forward(inputs.images, precision=precision)[:, 0], whole[:, -1])
    images = inputs.images.clone()
    images[1] = float("nan")
    images[3] = float("inf")
    got = bank.forward(images, precision=precision)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 4]], whole[[0, 2, 4]])


@pytest.mark.parametrize("case", [CASES[11], CASES[14]], ids=str)
def test_a_gradient_depends_on_its_image_alone(emulated_cuda: ModuleType, case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=3))
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    whole, values = bank.gradient(inputs.images, inputs.cotangent)
    assert torch.equal(values, bank.forward(inputs.images))
    for i in range(3):
        got, _ = bank.gradient(inputs.images[i : i + 1], inputs.cotangent[i : i + 1])
        assert torch.equal(got[0], whole[i])
    zero, values = bank.gradient(inputs.images, torch.zeros_like(inputs.cotangent))
    assert torch.equal(zero, torch.zeros_like(inputs.images))
    assert torch.equal(values, bank.forward(inputs.images))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty_batch(emulated_cuda: ModuleType, emulated_device: Settings, dtype: torch.dtype) -> None:
    """Nothing is launched."""
    bank = EmulatedBank(emulated_cuda, random(CASES[11]).bank)
    images = torch.zeros((0, 17, 13, 3), dtype=dtype)
    before = emulated_device["launches"]
    assert bank.forward(images).shape == (0, 5)
    assert bank.forward(images, pairs=torch.zeros(0, dtype=torch.int64)).shape == (0,)
    grad, responses = bank.gradient(images, torch.zeros(0, 5))
    assert grad.shape == images.shape
    assert responses.shape == (0, 5)
    assert emulated_device["launches"] == before
