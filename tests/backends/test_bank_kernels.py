"""Every backend, on every instruction set of this machine: exact answers, close answers, invariances, margins."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import _native
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


@functools.cache
def exact_answers(case: Case) -> tuple[Tensor, Tensor]:
    inputs = exact(case)
    return reference64(inputs)


def reference64(inputs: Inputs, pairs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 responses and input gradient."""
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


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_forward_exact(engine: str, case: Case) -> None:
    inputs = exact(case)
    expected = exact_answers(case)[0].float()
    assert torch.equal(cl.responses(inputs.images, inputs.bank, backend=engine), expected)
    assert torch.equal(cl.responses(inputs.images_uint8, inputs.bank, backend=engine), expected)


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_gradient_exact(engine: str, case: Case) -> None:
    inputs = exact(case)
    responses, grad = exact_answers(case)
    got, values = cl.input_gradient(inputs.images, inputs.bank, inputs.cotangent, backend=engine, return_responses=True)
    assert torch.equal(values, responses.float())
    assert torch.equal(got, grad.float())
    from_pixels = cl.input_gradient(inputs.images_uint8, inputs.bank, inputs.cotangent, backend=engine)
    assert torch.equal(from_pixels, got)


@pytest.mark.parametrize("case", PAIRED_CASES, ids=str)
def test_pairs_exact(engine: str, case: Case) -> None:
    inputs = exact(case)
    rows = torch.arange(case.batch)
    expected, grad = reference64(inputs, inputs.pairs)
    assert torch.equal(expected, exact_answers(case)[0][rows, inputs.pairs])
    got = cl.responses(inputs.images, inputs.bank, pairs=inputs.pairs, backend=engine)
    assert torch.equal(got, expected.float())
    cotangent = inputs.cotangent[rows, inputs.pairs]
    got_grad = cl.input_gradient(inputs.images, inputs.bank, cotangent, pairs=inputs.pairs, backend=engine)
    assert torch.equal(got_grad, grad.float())


@pytest.mark.parametrize("seed", range(12))
def test_random_architectures_exact(engine: str, seed: int) -> None:
    draw = np.random.default_rng([seed, 7])
    shapes = []
    for _ in range(3):
        depth = int(draw.integers(1, 5))
        filters = tuple(int(n) for n in draw.integers(1, 40, size=depth))
        kernels = tuple(int(k) for k in draw.choice([1, 3, 5, 7], size=depth))
        shapes.append(ModelShape(filters, kernels, tuple(int(s) for s in draw.integers(1, 3, size=depth))))
    height, width = (int(n) for n in draw.integers(1, 40, size=2))
    case = Case(f"random-{seed}", 2, height, width, tuple(shapes), seed)
    inputs = exact(case)
    responses, grad = exact_answers(case)
    got, values = cl.input_gradient(inputs.images, inputs.bank, inputs.cotangent, backend=engine, return_responses=True)
    assert torch.equal(cl.responses(inputs.images_uint8, inputs.bank, backend=engine), responses.float())
    assert torch.equal(values, responses.float())
    assert torch.equal(got, grad.float())


@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
def test_forward_close(engine: str, case: Case) -> None:
    inputs = random(dataclasses.replace(case, batch=32 if case in CASES else 8))
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    torch32 = cl.responses(inputs.images, inputs.bank, backend="reference")
    got = cl.responses(inputs.images, inputs.bank, backend=engine)
    assert_matches_reference(got, torch32, expected, factor=FACTOR["bank_forward", torch.float32])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_close(engine: str, case: Case) -> None:
    # More images than the case has, so that some keep clear of every kink.
    inputs = random(Case(case.name, 12, case.height, case.width, case.models, case.seed))
    clear = without_kinks(inputs)
    assert clear.any(), "no image of this case keeps clear of the kinks; choose another seed"
    images, cotangent = inputs.images[clear], inputs.cotangent[clear]
    expected = cl.input_gradient(images.double(), inputs.bank, cotangent.double(), backend="reference")
    torch32 = cl.input_gradient(images, inputs.bank, cotangent, backend="reference")
    got = cl.input_gradient(images, inputs.bank, cotangent, backend=engine)
    assert_matches_reference(got, torch32, expected, factor=FACTOR["bank_input_gradient", torch.float32])


def test_fast_precision_is_close(isa: str) -> None:
    """Reduced precision: within the error that rounding inputs and weights to bfloat16 causes, or exact without it."""
    inputs = random(LARGE_CASES[0])
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    exactly = cl.responses(inputs.images, inputs.bank, backend="cpu")
    got = cl.responses(inputs.images, inputs.bank, backend="cpu", precision="fast")
    if _native.fast_supported():
        # Rounding inputs and weights of every layer to bfloat16 moves published models by at most 8.6 % of their
        # standard deviation, about 1 here; a wrong layout would be off by 100 %.
        assert (got - expected).abs().max() < 0.086
    else:
        assert torch.equal(got, exactly)
        note = cl.explain(bank=inputs.bank, precision="fast").verdicts[0].note
        assert note is not None
        assert "exact" in note


def test_kernels_match_the_readable_modules(engine: str) -> None:
    """Packing, folding and kernels against unfolded nn.Modules that never saw a packed bank."""
    from cortexloop.models import CompactModel

    for case in (CASES[9], CASES[11], CASES[12]):
        inputs = random(case)
        modules = [CompactModel.from_weights(w).double() for w in inputs.bank.models]
        with torch.no_grad():
            expected = torch.stack([m(inputs.images.double()) for m in modules], dim=1)
        got = cl.responses(inputs.images, inputs.bank, backend=engine)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, shift: int, fill: float) -> tuple[Tensor, Tensor]:
    """A contiguous view that starts `shift` elements into a buffer filled with `fill`: (buffer, view)."""
    n = int(np.prod(shape))
    buffer = torch.full((n + 64,), fill, dtype=dtype)
    return buffer, buffer[shift : shift + n].view(shape)


def outside(buffer: Tensor, shift: int, n: int) -> Tensor:
    return torch.cat([buffer[:shift], buffer[shift + n :]])


@pytest.mark.parametrize("shift", [1, 3, 17])
@pytest.mark.parametrize("case", [CASES[4], CASES[11], CASES[13]], ids=str)
def test_misaligned_views_and_margins(isa: str, case: Case, shift: int) -> None:
    """Unaligned inputs and outputs, NaN around every input and a sentinel around every output."""
    inputs = exact(case)
    bank = inputs.bank
    responses, grad = exact_answers(case)
    nan = float("nan")
    _, images = guarded(tuple(inputs.images.shape), torch.float32, shift, nan)
    images.copy_(inputs.images)
    _, pixels = guarded(tuple(inputs.images.shape), torch.uint8, shift, 255)
    pixels.copy_(inputs.images_uint8)
    _, weights = guarded(tuple(bank.weights.shape), torch.float32, shift, nan)
    weights.copy_(bank.weights)
    _, cotangent = guarded(tuple(inputs.cotangent.shape), torch.float32, shift, nan)
    cotangent.copy_(inputs.cotangent)
    for x in (images, pixels):
        buffer, out = guarded(tuple(responses.shape), torch.float32, shift, -777.0)
        _native.bank_forward(x, weights, bank.table, None, "NHWC", "exact", out)
        assert torch.equal(out, responses.float())
        assert (outside(buffer, shift, out.numel()) == -777.0).all()
        grad_buffer, grad_out = guarded(tuple(grad.shape), torch.float32, shift, -777.0)
        buffer, out = guarded(tuple(responses.shape), torch.float32, shift, -777.0)
        _native.bank_input_gradient(x, weights, bank.table, None, cotangent, "NHWC", grad_out, out)
        assert torch.equal(out, responses.float())
        assert torch.equal(grad_out, grad.float())
        assert (outside(buffer, shift, out.numel()) == -777.0).all()
        assert (outside(grad_buffer, shift, grad_out.numel()) == -777.0).all()


def test_outputs_are_written_not_added(isa: str) -> None:
    """Uninitialised output memory may hold NaN."""
    inputs = exact(CASES[11])
    bank = inputs.bank
    responses, grad = exact_answers(CASES[11])
    out = torch.full(tuple(responses.shape), float("nan"))
    grad_out = torch.full(tuple(grad.shape), float("nan"))
    _native.bank_input_gradient(inputs.images, bank.weights, bank.table, None, inputs.cotangent, "NHWC", grad_out, out)
    assert torch.equal(grad_out, grad.float())
    assert torch.equal(out, responses.float())


def test_zero_cotangent_gives_zero_gradient_and_responses(engine: str) -> None:
    inputs = random(CASES[11])
    zero = torch.zeros_like(inputs.cotangent)
    grad, responses = cl.input_gradient(inputs.images, inputs.bank, zero, backend=engine, return_responses=True)
    assert torch.equal(grad, torch.zeros_like(inputs.images))
    assert torch.equal(responses, cl.responses(inputs.images, inputs.bank, backend=engine))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty_batch(engine: str, dtype: torch.dtype) -> None:
    bank = random(CASES[11]).bank
    images = torch.zeros((0, bank.height, bank.width, 3), dtype=dtype)
    assert cl.responses(images, bank, backend=engine).shape == (0, len(bank))
    assert cl.responses(images, bank, pairs=[], backend=engine).shape == (0,)
    grad = cl.input_gradient(images, bank, torch.zeros(0, len(bank)), backend=engine)
    assert grad.shape == images.shape
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("case", [CASES[4], CASES[11], CASES[14]], ids=str)
def test_layouts_give_equal_bits(engine: str, case: Case) -> None:
    inputs = random(case)
    for x in (inputs.images, inputs.images_uint8):
        planes = x.permute(0, 3, 1, 2).contiguous()
        expected = cl.responses(x, inputs.bank, backend=engine)
        assert torch.equal(cl.responses(planes, inputs.bank, layout="NCHW", backend=engine), expected)
        grad = cl.input_gradient(x, inputs.bank, inputs.cotangent, backend=engine)
        other = cl.input_gradient(planes, inputs.bank, inputs.cotangent, layout="NCHW", backend=engine)
        assert torch.equal(other.permute(0, 2, 3, 1), grad)


@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[12]], ids=str)
def test_pixels_equal_recentred_values(engine: str, case: Case) -> None:
    inputs = random(case)
    recentred = cl.recenter(inputs.images_uint8, inputs.bank.image_mean)
    expected = cl.responses(recentred, inputs.bank, backend=engine)
    assert torch.equal(cl.responses(inputs.images_uint8, inputs.bank, backend=engine), expected)


@pytest.mark.parametrize("case", [CASES[11], CASES[12]], ids=str)
def test_batch_invariance(engine: str, case: Case) -> None:
    inputs = random(Case(case.name, 5, case.height, case.width, case.models, case.seed))
    bank, index = inputs.bank, inputs.pairs
    whole = cl.responses(inputs.images, bank, backend=engine)
    grads = cl.input_gradient(inputs.images, bank, inputs.cotangent, backend=engine)
    paired = cl.responses(inputs.images, bank, pairs=index, backend=engine)
    assert torch.equal(paired, whole[torch.arange(5), index])
    for i in range(5):
        one = inputs.images[i : i + 1]
        assert torch.equal(cl.responses(one, bank, backend=engine)[0], whole[i])
        got = cl.input_gradient(one, bank, inputs.cotangent[i : i + 1], backend=engine)
        assert torch.equal(got[0], grads[i])


def test_bank_invariance(engine: str) -> None:
    """A model answers the same in a bank of many and alone."""
    inputs = random(CASES[11])
    whole = cl.responses(inputs.images, inputs.bank, backend=engine)
    for n in range(len(inputs.bank)):
        assert torch.equal(cl.responses(inputs.images, inputs.bank.select(n), backend=engine)[:, 0], whole[:, n])


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("batch", [1, 5])
def test_thread_invariance(isa: str, restore_threads: None, batch: int, precision: str) -> None:
    case = CASES[12]
    inputs = random(Case(case.name, batch, case.height, case.width, case.models, case.seed))
    results = []
    for threads in (1, 2, 3, 7):
        cl.set_num_threads(threads)
        assert cl.get_num_threads() == threads
        results.append(
            (
                cl.responses(inputs.images, inputs.bank, backend="cpu", precision=precision),
                cl.input_gradient(inputs.images, inputs.bank, inputs.cotangent, backend="cpu"),
            )
        )
    for responses, grad in results[1:]:
        assert torch.equal(responses, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_run_twice(engine: str, precision: str) -> None:
    inputs = random(CASES[13])
    first = cl.responses(inputs.images, inputs.bank, backend=engine, precision=precision)
    cl.responses(-inputs.images, inputs.bank, backend=engine, precision=precision)  # leaves other values in scratch
    assert torch.equal(cl.responses(inputs.images, inputs.bank, backend=engine, precision=precision), first)
    grad = cl.input_gradient(inputs.images, inputs.bank, inputs.cotangent, backend=engine)
    cl.input_gradient(-inputs.images, inputs.bank, inputs.cotangent, backend=engine)
    assert torch.equal(cl.input_gradient(inputs.images, inputs.bank, inputs.cotangent, backend=engine), grad)


def test_nan_reaches_only_its_own_image(engine: str) -> None:
    """Torch tensors are not inspected: NaN propagates to that image's responses and no further."""
    case = CASES[12]
    inputs = random(Case(case.name, 3, case.height, case.width, case.models, case.seed))
    clean = cl.responses(inputs.images, inputs.bank, backend=engine)
    images = inputs.images.clone()
    images[1] = float("nan")
    got = cl.responses(images, inputs.bank, backend=engine)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


def test_extreme_values_stay_in_their_image(engine: str) -> None:
    """Infinities and huge values may give anything for that image, and change no other."""
    case = CASES[11]
    inputs = random(Case(case.name, 3, case.height, case.width, case.models, case.seed))
    clean = cl.responses(inputs.images, inputs.bank, backend=engine)
    images = inputs.images.clone()
    images[0], images[1] = float("inf"), 3e38
    assert torch.equal(cl.responses(images, inputs.bank, backend=engine)[2], clean[2])
