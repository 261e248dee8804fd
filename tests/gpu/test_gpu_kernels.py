"""Every backend of a GPU against exact integers and float64, and the invariances that results promise."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

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


def reference64(inputs: Inputs, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 responses and input gradient, made on the CPU."""
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


@functools.cache
def exact_answers(case: Case) -> tuple[Tensor, Tensor]:
    return reference64(exact(case))


@dataclasses.dataclass(frozen=True)
class There:
    """A problem on the GPU."""

    images: Tensor
    pixels: Tensor
    bank: cl.ModelBank
    cotangent: Tensor
    pairs: Tensor


@functools.cache
def moved(inputs_of: object, case: Case, device: torch.device) -> There:
    inputs = inputs_of(case)  # type: ignore[operator]
    return There(
        inputs.images.to(device),
        inputs.images_uint8.to(device),
        inputs.bank.to(device),
        inputs.cotangent.to(device),
        inputs.pairs.to(device),
    )


def views(there: There) -> list[tuple[Tensor, str]]:
    """Pixels and recentred values in both layouts."""
    planes = [x.permute(0, 3, 1, 2).contiguous() for x in (there.images, there.pixels)]
    return [(there.images, "NHWC"), (there.pixels, "NHWC"), (planes[0], "NCHW"), (planes[1], "NCHW")]


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_forward_exact(gpu_engine: str, device: torch.device, case: Case) -> None:
    there = moved(exact, case, device)
    expected = exact_answers(case)[0].float()
    for images, layout in views(there):
        got = cl.responses(images, there.bank, layout=layout, backend=gpu_engine)
        assert torch.equal(got.cpu(), expected), (images.dtype, layout)


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_gradient_exact(gpu_engine: str, device: torch.device, case: Case) -> None:
    there = moved(exact, case, device)
    responses, grad = exact_answers(case)
    for images, layout in views(there):
        got, values = cl.input_gradient(
            images, there.bank, there.cotangent, layout=layout, backend=gpu_engine, return_responses=True
        )
        got = got if layout == "NHWC" else got.permute(0, 2, 3, 1)
        assert torch.equal(values.cpu(), responses.float()), (images.dtype, layout)
        assert torch.equal(got.cpu(), grad.float()), (images.dtype, layout)


@pytest.mark.parametrize("case", PAIRED_CASES, ids=str)
def test_pairs_exact(gpu_engine: str, device: torch.device, case: Case) -> None:
    there, inputs = moved(exact, case, device), exact(case)
    expected, grad = reference64(inputs, inputs.pairs)
    cotangent = there.cotangent[torch.arange(case.batch, device=device), there.pairs]
    for images, layout in views(there):
        got = cl.responses(images, there.bank, pairs=there.pairs, layout=layout, backend=gpu_engine)
        assert torch.equal(got.cpu(), expected.float())
        got = cl.input_gradient(images, there.bank, cotangent, pairs=there.pairs, layout=layout, backend=gpu_engine)
        got = got if layout == "NHWC" else got.permute(0, 2, 3, 1)
        assert torch.equal(got.cpu(), grad.float())


@pytest.mark.parametrize("seed", range(8))
def test_random_architectures_exact(gpu_engine: str, device: torch.device, seed: int) -> None:
    draw = np.random.default_rng([seed, 71])
    shapes = []
    for _ in range(3):
        depth = int(draw.integers(1, 6))
        filters = tuple(int(n) for n in draw.integers(1, 60, size=depth))
        kernels = tuple(int(k) for k in draw.choice([1, 3, 5, 7], size=depth))
        shapes.append(ModelShape(filters, kernels, tuple(int(s) for s in draw.integers(1, 3, size=depth))))
    height, width = (int(n) for n in draw.integers(1, 50, size=2))
    case = Case(f"random-{seed}", 3, height, width, tuple(shapes), seed)
    there = moved(exact, case, device)
    responses, grad = exact_answers(case)
    got, values = cl.input_gradient(
        there.pixels, there.bank, there.cotangent, backend=gpu_engine, return_responses=True
    )
    assert torch.equal(cl.responses(there.images, there.bank, backend=gpu_engine).cpu(), responses.float())
    assert torch.equal(values.cpu(), responses.float())
    assert torch.equal(got.cpu(), grad.float())


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_forward_close(gpu_engine: str, device: torch.device, case: Case) -> None:
    case = dataclasses.replace(case, batch=32 if case in CASES else 8)
    inputs, there = random(case), moved(random, case, device)
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    torch32 = cl.responses(inputs.images, inputs.bank, backend="reference")
    for images in (there.images, there.pixels):
        got = cl.responses(images, there.bank, backend=gpu_engine).cpu()
        assert_matches_reference(got, torch32, expected, factor=FACTOR["bank_forward", torch.float32])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_close(gpu_engine: str, device: torch.device, case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=12))
    clear = without_kinks(inputs)
    assert clear.any(), "no image of this case keeps clear of the kinks; choose another seed"
    images, cotangent = inputs.images[clear], inputs.cotangent[clear]
    expected = cl.input_gradient(images.double(), inputs.bank, cotangent.double(), backend="reference")
    torch32 = cl.input_gradient(images, inputs.bank, cotangent, backend="reference")
    got = cl.input_gradient(images.to(device), inputs.bank.to(device), cotangent.to(device), backend=gpu_engine)
    assert_matches_reference(got.cpu(), torch32, expected, factor=FACTOR["bank_input_gradient", torch.float32])


@pytest.mark.parametrize("case", [*CASES[11:], *LARGE_CASES], ids=str)
def test_fast_is_close(gpu_engine: str, device: torch.device, case: Case) -> None:
    """float16 or bfloat16 operands: responses have a standard deviation of about 1, wrong layouts miss by that much."""
    inputs, there = random(case), moved(random, case, device)
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    for images in (there.images, there.pixels):
        got = cl.responses(images, there.bank, backend=gpu_engine, precision="fast")
        assert (got.cpu() - expected).abs().max() < 0.086


@pytest.mark.parametrize("shift", [1, 3, 17])
@pytest.mark.parametrize("case", [CASES[4], CASES[11], CASES[13]], ids=str)
def test_views_that_are_not_aligned(gpu_engine: str, device: torch.device, case: Case, shift: int) -> None:
    """Images, cotangent and pairs may start anywhere; what lies around them is never used."""
    there = moved(exact, case, device)
    responses, grad = exact_answers(case)

    def view(x: Tensor, fill: float) -> Tensor:
        buffer = torch.full((x.numel() + 64,), fill, dtype=x.dtype, device=device)
        buffer[shift : shift + x.numel()] = x.flatten()
        return buffer[shift : shift + x.numel()].view(x.shape)

    cotangent = view(there.cotangent, float("nan"))
    for images in (view(there.images, float("nan")), view(there.pixels, 255)):
        got, values = cl.input_gradient(images, there.bank, cotangent, backend=gpu_engine, return_responses=True)
        assert torch.equal(values.cpu(), responses.float())
        assert torch.equal(got.cpu(), grad.float())
        assert torch.equal(cl.responses(images, there.bank, backend=gpu_engine).cpu(), responses.float())


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("case", [CASES[11], CASES[12]], ids=str)
def test_batch_invariance(gpu_engine: str, device: torch.device, case: Case, precision: str) -> None:
    there = moved(random, dataclasses.replace(case, batch=5), device)
    options = {"backend": gpu_engine, "precision": precision}
    whole = cl.responses(there.images, there.bank, **options)
    paired = cl.responses(there.images, there.bank, pairs=there.pairs, **options)
    assert torch.equal(paired, whole[torch.arange(5, device=device), there.pairs])
    for i in range(5):
        assert torch.equal(cl.responses(there.images[i : i + 1], there.bank, **options)[0], whole[i])


@pytest.mark.parametrize("case", [CASES[11], CASES[12]], ids=str)
def test_gradients_do_not_depend_on_the_batch(gpu_engine: str, device: torch.device, case: Case) -> None:
    there = moved(random, dataclasses.replace(case, batch=5), device)
    whole = cl.input_gradient(there.images, there.bank, there.cotangent, backend=gpu_engine)
    for i in range(5):
        one = slice(i, i + 1)
        got = cl.input_gradient(there.images[one], there.bank, there.cotangent[one], backend=gpu_engine)
        assert torch.equal(got[0], whole[i])


def test_large_batches_equal_small_ones(gpu_engine: str, device: torch.device) -> None:
    """More units than one round of the machine takes."""
    there = moved(random, CASES[12], device)
    images = there.pixels.repeat(150, 1, 1, 1)
    for precision in ("exact", "fast"):
        expected = cl.responses(there.pixels, there.bank, backend=gpu_engine, precision=precision)
        got = cl.responses(images, there.bank, backend=gpu_engine, precision=precision)
        assert torch.equal(got, expected.repeat(150, 1))
    grad = cl.input_gradient(there.images, there.bank, there.cotangent, backend=gpu_engine)
    got = cl.input_gradient(
        there.images.repeat(150, 1, 1, 1), there.bank, there.cotangent.repeat(150, 1), backend=gpu_engine
    )
    assert torch.equal(got, grad.repeat(150, 1, 1, 1))


def test_a_model_answers_the_same_alone(gpu_engine: str, device: torch.device) -> None:
    there = moved(random, CASES[11], device)
    whole = cl.responses(there.images, there.bank, backend=gpu_engine)
    for n in range(len(there.bank)):
        got = cl.responses(there.images, there.bank.select(n), backend=gpu_engine)
        assert torch.equal(got[:, 0], whole[:, n])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_run_twice(gpu_engine: str, device: torch.device, precision: str) -> None:
    there = moved(random, CASES[13], device)
    for images in (there.images, there.pixels):
        first = cl.responses(images, there.bank, backend=gpu_engine, precision=precision)
        cl.responses(images.flip(1), there.bank, backend=gpu_engine, precision=precision)  # other values in scratch
        assert torch.equal(cl.responses(images, there.bank, backend=gpu_engine, precision=precision), first)
    grad = cl.input_gradient(there.images, there.bank, there.cotangent, backend=gpu_engine)
    cl.input_gradient(-there.images, there.bank, there.cotangent, backend=gpu_engine)
    assert torch.equal(cl.input_gradient(there.images, there.bank, there.cotangent, backend=gpu_engine), grad)


def test_zero_cotangent(gpu_engine: str, device: torch.device) -> None:
    there = moved(random, CASES[11], device)
    zero = torch.zeros_like(there.cotangent)
    grad, responses = cl.input_gradient(there.images, there.bank, zero, backend=gpu_engine, return_responses=True)
    assert torch.equal(grad, torch.zeros_like(there.images))
    assert torch.equal(responses, cl.responses(there.images, there.bank, backend=gpu_engine))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty_batch(gpu_engine: str, device: torch.device, dtype: torch.dtype) -> None:
    bank = moved(random, CASES[11], device).bank
    images = torch.zeros((0, bank.height, bank.width, 3), dtype=dtype, device=device)
    assert cl.responses(images, bank, backend=gpu_engine).shape == (0, len(bank))
    assert cl.responses(images, bank, pairs=[], backend=gpu_engine).shape == (0,)
    grad = cl.input_gradient(images, bank, torch.zeros(0, len(bank), device=device), backend=gpu_engine)
    assert grad.shape == images.shape
    assert grad.dtype == torch.float32


def test_nan_reaches_only_its_own_image(gpu_engine: str, device: torch.device) -> None:
    case = dataclasses.replace(CASES[12], batch=3)
    there = moved(random, case, device)
    for precision in ("exact", "fast"):
        clean = cl.responses(there.images, there.bank, backend=gpu_engine, precision=precision)
        images = there.images.clone()
        images[1] = float("nan")
        got = cl.responses(images, there.bank, backend=gpu_engine, precision=precision)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_extreme_values_stay_in_their_image(gpu_engine: str, device: torch.device) -> None:
    there = moved(random, dataclasses.replace(CASES[11], batch=3), device)
    clean = cl.responses(there.images, there.bank, backend=gpu_engine)
    images = there.images.clone()
    images[0], images[1] = float("inf"), 3e38
    assert torch.equal(cl.responses(images, there.bank, backend=gpu_engine)[2], clean[2])


def test_pairs_outside_the_bank_are_refused(gpu_engine: str, device: torch.device) -> None:
    there = moved(random, PAIRED_CASES[0], device)
    pairs = there.pairs.clone()
    cl.responses(there.images, there.bank, pairs=pairs, backend=gpu_engine)
    pairs[2] = len(there.bank)
    with pytest.raises(ValueError, match=r"pairs should lie in 0.* for image 2"):
        cl.responses(there.images, there.bank, pairs=pairs, backend=gpu_engine)
