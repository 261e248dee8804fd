"""The Triton kernels in Triton's interpreter, on the CPU: run by test_triton_kernels.py with TRITON_INTERPRET=1.

The interpreter takes milliseconds per program, so the cases are small. Left out because of that, and run on a GPU only
(tests/gpu): "28x28-mixed", "28x28-wide", images of 112 x 112, batches that fill a round of the real workspace.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import triton
from float16_model import float16_responses

import cortexloop as cl
from cortexloop.backends.triton import bank as operators
from cortexloop.backends.triton import plan as planning
from cortexloop.testing import (
    CASES,
    FACTOR,
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

SMALL = CASES[:11]
DEEP = Case("10x8-mixed", 3, 10, 8, (
    ModelShape((3,), (5,), (1,)),
    ModelShape((17, 7), (5, 3), (1, 2)),
    ModelShape((16, 1, 33), (3, 5, 5), (2, 1, 1)),
    ModelShape((7, 49, 3, 16), (7, 5, 1, 5), (1, 2, 2, 1)),
))  # fmt: skip
PUBLISHED = Case("18x17-published", 1, 18, 17, (ModelShape((48, 49, 3, 7, 3), (5,) * 5, (1, 2, 2, 1, 1)),))
WIDE = Case("9x10-wide", 1, 9, 10, (ModelShape((77, 150, 3), (5, 3, 1), (1, 2, 1)),))


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def responses(images: Tensor, bank: cl.ModelBank, **options: Any) -> Tensor:
    return cl.responses(images, bank, backend="triton", **options)


def gradient(images: Tensor, bank: cl.ModelBank, cotangent: Tensor, **options: Any) -> Any:
    return cl.input_gradient(images, bank, cotangent, backend="triton", **options)


def usable() -> None:
    """Older interpreters turn arrays of one number into a Python number, which newer NumPy refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            responses(random(CASES[0]).images, random(CASES[0]).bank)
        except RuntimeError as error:
            if "only 0-dimensional arrays" in str(error):
                reason = f"Triton {triton.__version__}'s interpreter does not work with NumPy {np.__version__}"
                pytest.skip(reason, allow_module_level=True)
            raise


usable()


@functools.cache
def exact_answers(case: Case) -> tuple[Tensor, Tensor]:
    inputs = exact(case)
    grad, values = cl.input_gradient(
        inputs.images.double(), inputs.bank, inputs.cotangent.double(), backend="reference", return_responses=True
    )
    return values.float(), grad.float()


@pytest.mark.parametrize("case", [*SMALL, PUBLISHED, WIDE], ids=str)
def test_exact(case: Case) -> None:
    """Pixels forward, recentred values backward."""
    inputs = exact(case)
    expected, expected_grad = exact_answers(case)
    assert torch.equal(responses(inputs.images_uint8, inputs.bank), expected)
    grad, values = gradient(inputs.images, inputs.bank, inputs.cotangent, return_responses=True)
    assert torch.equal(values, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=str)
def test_layouts_exact(case: Case) -> None:
    """Pixels and recentred values, colours last or first."""
    inputs = exact(case)
    expected, expected_grad = exact_answers(case)
    for images in (inputs.images, inputs.images_uint8):
        planes = images.permute(0, 3, 1, 2).contiguous()
        assert torch.equal(responses(images, inputs.bank), expected)
        assert torch.equal(responses(planes, inputs.bank, layout="NCHW"), expected)
        assert torch.equal(gradient(images, inputs.bank, inputs.cotangent), expected_grad)
        grad = gradient(planes, inputs.bank, inputs.cotangent, layout="NCHW")
        assert torch.equal(grad.permute(0, 2, 3, 1), expected_grad)


@pytest.mark.parametrize("workspace", [None, 1], ids=["one-round", "unit-by-unit"])
def test_mixed_bank_exact(monkeypatch: pytest.MonkeyPatch, workspace: int | None) -> None:
    """Models of all kinds, at once and each image and model for itself; full products and pairs."""
    if workspace is not None:
        monkeypatch.setattr(planning, "WORKSPACE", workspace)
    inputs = exact(DEEP)
    bank = cl.ModelBank(inputs.bank.models)  # a table that has no plan yet
    program = planning.plan_of(bank.table).program(gradient=True, paired=False)
    assert (len(program.groups), program.images_per_round == 1) == ((1, False) if workspace is None else (4, True))
    expected, expected_grad = exact_answers(DEEP)
    grad, values = gradient(inputs.images_uint8, bank, inputs.cotangent, return_responses=True)
    assert torch.equal(values, expected)
    assert torch.equal(grad, expected_grad)
    rows, pairs = torch.arange(3), torch.tensor([2, 0, 3])
    grad, values = gradient(inputs.images, bank, torch.tensor([2.0, 0.0, -1.0]), pairs=pairs, return_responses=True)
    assert torch.equal(values, expected[rows, pairs])
    assert torch.equal(responses(inputs.images, bank, pairs=pairs), values)
    expected_grad = cl.input_gradient(
        inputs.images.double(), bank, torch.tensor([2.0, 0.0, -1.0]).double(), pairs=pairs, backend="reference"
    )
    assert torch.equal(grad, expected_grad.float())


@pytest.mark.parametrize("case", [CASES[9], PUBLISHED], ids=str)
def test_close(case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=3))
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    torch32 = cl.responses(inputs.images, inputs.bank, backend="reference")
    got = responses(inputs.images, inputs.bank)
    assert_matches_reference(got, torch32, expected, factor=FACTOR["bank_forward", torch.float32])


@pytest.mark.parametrize("case", [CASES[5], CASES[9]], ids=str)
def test_gradient_close(case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=6))
    clear = without_kinks(inputs)
    assert clear.any()
    images, cotangent = inputs.images[clear], inputs.cotangent[clear]
    expected = cl.input_gradient(images.double(), inputs.bank, cotangent.double(), backend="reference")
    torch32 = cl.input_gradient(images, inputs.bank, cotangent, backend="reference")
    got = gradient(images, inputs.bank, cotangent)
    assert_matches_reference(got, torch32, expected, factor=FACTOR["bank_input_gradient", torch.float32])


@pytest.mark.parametrize("case", [CASES[5], CASES[9], DEEP, PUBLISHED], ids=str)
def test_fast_rounds_where_it_says(case: Case) -> None:
    """Against float16 at the same places in plain torch: the two differ by the order of sums alone."""
    inputs = random(case)
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    simulated = float16_responses(inputs.images, inputs.bank)
    torch32 = cl.responses(inputs.images, inputs.bank, backend="reference")
    got = responses(inputs.images_uint8, inputs.bank, precision="fast")
    assert (got - expected).abs().max() < 5e-3  # responses have a standard deviation near 1
    assert (got - simulated).abs().max() < 1e-3
    assert not torch.equal(got, torch32)


def test_fast_survives_large_maps() -> None:
    """Maps far beyond float16's range, which their scales bring back."""
    inputs = random(CASES[4])
    (model,) = inputs.bank.models
    first = model.layers[0]
    loud = dataclasses.replace(first, gamma=first.gamma * 2.0**20, beta=first.beta * 2.0**20)
    second = dataclasses.replace(model.layers[1], depthwise=model.layers[1].depthwise * 2.0**-20)
    bank = cl.ModelBank([dataclasses.replace(model, layers=(loud, second))])
    expected = cl.responses(inputs.images.double(), bank, backend="reference")
    assert cl.activations(inputs.images, bank, 0)[0].max() > 2**17
    assert (responses(inputs.images, bank, precision="fast") - expected).abs().max() < 5e-3


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_batch_invariance(precision: str) -> None:
    inputs = random(DEEP)
    whole = responses(inputs.images, inputs.bank, precision=precision)
    for i in range(3):
        one = inputs.images[i : i + 1]
        assert torch.equal(responses(one, inputs.bank, precision=precision)[0], whole[i])
    paired = responses(inputs.images, inputs.bank, pairs=inputs.pairs, precision=precision)
    assert torch.equal(paired, whole[torch.arange(3), inputs.pairs])


def test_gradients_do_not_depend_on_the_batch_or_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random(Case("9x8-three", 3, 9, 8, DEEP.models[:3]))
    whole = gradient(inputs.images, inputs.bank, inputs.cotangent)
    got = gradient(inputs.images[1:2], inputs.bank, inputs.cotangent[1:2])
    assert torch.equal(got[0], whole[1])
    sizes = planning.lay_out(inputs.bank.table.numpy(), gradient=True)[2]
    program = planning.plan_of(inputs.bank.table).program(gradient=True, paired=False)
    monkeypatch.setattr(planning.plan_of(inputs.bank.table), "_programs", {
        (True, False): dataclasses.replace(program, images_per_round=1)
    })  # fmt: skip
    assert sum(sizes) == program.groups[0].stride
    assert torch.equal(gradient(inputs.images, inputs.bank, inputs.cotangent), whole)


def poisoned(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a call, each in the middle of NaN, or of 255."""
    result = {}
    for name, x in {
        "images": inputs.images,
        "pixels": inputs.images_uint8,
        "weights": inputs.bank.weights,
        "cotangent": inputs.cotangent,
    }.items():
        buffer = torch.full((x.numel() + 64,), 255 if x.dtype == torch.uint8 else float("nan"), dtype=x.dtype)
        result[name] = buffer[3 : 3 + x.numel()].view(x.shape).copy_(x)
    return result


@pytest.mark.parametrize("case", [CASES[5], DEEP], ids=str)
def test_uninitialised_memory_and_margins(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """NaN in fresh memory and around every input reaches nothing; views need not be aligned."""
    inputs, bank = exact(case), exact(case).bank
    expected, expected_grad = exact_answers(case)
    x = poisoned(inputs)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    kernels = operators.BankOperators()
    table = bank.table
    assert torch.equal(kernels.bank_forward(x["pixels"], x["weights"], table, None, "NHWC", "exact"), expected)
    assert kernels.bank_forward(x["images"], x["weights"], table, None, "NHWC", "fast").isfinite().all()
    grad, values = kernels.bank_input_gradient(x["images"], x["weights"], table, None, x["cotangent"], "NHWC")
    assert torch.equal(values, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty_batch(dtype: torch.dtype) -> None:
    bank = random(DEEP).bank
    images = torch.zeros((0, bank.height, bank.width, 3), dtype=dtype)
    assert responses(images, bank).shape == (0, 4)
    assert responses(images, bank, pairs=[]).shape == (0,)
    grad = gradient(images, bank, torch.zeros(0, 4))
    assert grad.shape == images.shape
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_nan_reaches_only_its_own_image(precision: str) -> None:
    inputs = random(CASES[9])
    images = inputs.images.clone()
    images[1] = float("nan")
    got = responses(images, inputs.bank, precision=precision)
    assert got[1].isnan().all()
    assert torch.equal(got[0], responses(inputs.images, inputs.bank, precision=precision)[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_a_zero_cotangent_adds_nothing() -> None:
    """Not even 0 * infinity, and without cotangents there is no gradient."""
    inputs = exact(Case("6x5-two", 2, 6, 5, (ModelShape((3,), (3,), (1,)), ModelShape((4, 5), (5, 3), (1, 2)))))
    weights = inputs.bank.weights.clone()
    layers = planning.lay_out(inputs.bank.table.numpy(), gradient=True)[0]
    mixing = layers[0, 0, planning.Field.MIXING]
    weights[mixing : mixing + 27 * 16] = float("inf")
    kernels, cotangent = operators.BankOperators(), inputs.cotangent.clone()
    cotangent[:, 0] = 0
    grad, values = kernels.bank_input_gradient(inputs.images, weights, inputs.bank.table, None, cotangent, "NHWC")
    assert not values[:, 0].isfinite().all()
    expected = cl.input_gradient(inputs.images.double(), inputs.bank, cotangent.double(), backend="reference")
    assert torch.equal(grad, expected.float())
    nothing = gradient(inputs.images, inputs.bank, torch.zeros_like(cotangent))
    assert torch.equal(nothing, torch.zeros_like(inputs.images))


def test_autograd() -> None:
    inputs = random(CASES[4])
    leaf = inputs.images.clone().requires_grad_()
    (responses(leaf, inputs.bank) * inputs.cotangent).sum().backward()
    assert torch.equal(leaf.grad, gradient(inputs.images, inputs.bank, inputs.cotangent))  # type: ignore[arg-type]


def test_refusals() -> None:
    inputs = random(CASES[4])
    with pytest.raises(cl.BackendError, match="the Triton kernels take uint8 and float32 images, these are float64"):
        responses(inputs.images.double(), inputs.bank)
    short = inputs.bank.weights[:-32].clone()
    with pytest.raises(ValueError, match=r"weights hold \d+ numbers, the table refers to \d+: they do not belong"):
        operators.BankOperators().bank_forward(inputs.images, short, inputs.bank.table, None, "NHWC", "exact")


def test_the_note_says_how_fast_runs() -> None:
    bank = random(CASES[4]).bank
    verdict = cl.explain(bank=bank, backend="triton", precision="fast").verdicts[0]
    assert (verdict.backend, verdict.chosen) == ("triton", True)
    assert verdict.note == '"fast": products of float16 values summed in float32'


def test_a_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random(CASES[4])

    class Broken:
        __name__ = "_readout_kernel"

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise RuntimeError("out of resources")

    monkeypatch.setattr(operators.bank_fwd, "_readout_kernel", Broken())
    with pytest.raises(RuntimeError, match="the Triton kernel _readout_kernel could not run: out of resources"):
        responses(inputs.images, inputs.bank)
    monkeypatch.undo()
    assert responses(inputs.images, inputs.bank).isfinite().all()


def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random(CASES[4])

    def full(*shape: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        torch.OutOfMemoryError, match="not enough memory on cpu, for 3 images with 1 models: 0 MiB of maps"
    ):
        operators.BankOperators().bank_forward(
            inputs.images, inputs.bank.weights, inputs.bank.table, None, "NHWC", "exact"
        )


def test_a_call_that_was_not_prepared_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random(CASES[4])
    bank = cl.ModelBank(inputs.bank.models)
    responses(inputs.images, bank)
    monkeypatch.setattr("cortexloop._device.capturing", lambda device: True)
    responses(inputs.images, bank)
    with pytest.raises(RuntimeError, match="call it once before the capture"):
        responses(inputs.images_uint8, bank)
    with pytest.raises(RuntimeError, match="call it once before the capture"):
        responses(inputs.images, bank, precision="fast")
