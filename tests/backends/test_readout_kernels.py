"""The C++ kernels of readouts: accuracy, and bits that depend on an image and its neuron alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import ops
from cortexloop.testing.compare import FACTOR, assert_matches_reference
from readout_problems import FACTORIZED, POINT, Shape, factorized, point

LARGE = (Shape(9, 77, 14, 14, 70, rank=3), Shape(9, 40, 28, 28, 70))
LARGE_POINTS = (Shape(9, 77, 14, 14, 70), Shape(9, 40, 23, 28, 600, shared=False))
WHOLE = (True, True, True)


def everything(shape: Shape, inputs: tuple[Tensor, ...], cotangent: Tensor, engine: str, which: str) -> list[Tensor]:
    """Responses and the three gradients."""
    if which == "factorized":
        response = ops.factorized_readout(*inputs, engine)
        return [response, *ops.factorized_readout_gradient(*inputs, cotangent, *WHOLE, engine)]
    response = ops.point_readout(*inputs, shape.align_corners, engine)
    return [response, *ops.point_readout_gradient(*inputs, shape.align_corners, cotangent, *WHOLE, engine)]


CASES = [("factorized", s) for s in (*LARGE, *FACTORIZED)] + [("point", s) for s in (*LARGE_POINTS, *POINT)]
cases = pytest.mark.parametrize(("which", "shape"), CASES, ids=lambda v: str(v))
large = pytest.mark.parametrize(
    ("which", "shape"), [*[("factorized", s) for s in LARGE], *[("point", s) for s in LARGE_POINTS]], ids=str
)


def problem(which: str, shape: Shape) -> tuple[tuple[Tensor, ...], Tensor]:
    make: Callable[..., tuple[tuple[Tensor, ...], Tensor]] = factorized if which == "factorized" else point
    return make(shape, exact=False)


@large
def test_error_is_that_of_float32_torch(isa: str, which: str, shape: Shape):
    inputs, cotangent = problem(which, shape)
    doubles = tuple(x.double() for x in inputs)
    exact = everything(shape, doubles, cotangent.double(), "reference", which)
    torch32 = everything(shape, inputs, cotangent, "reference", which)
    kernel = everything(shape, inputs, cotangent, "cpu", which)
    op = f"{which}_readout"
    assert_matches_reference(kernel[0], torch32[0], exact[0], factor=FACTOR[op, torch.float32])
    for got, plain, wanted in zip(kernel[1:], torch32[1:], exact[1:], strict=True):
        assert_matches_reference(got, plain, wanted, factor=FACTOR[f"{op}_gradient", torch.float32])


@cases
def test_threads_change_nothing(kernels: None, restore_threads: None, which: str, shape: Shape):
    inputs, cotangent = problem(which, shape)
    cl.set_num_threads(1)
    one = everything(shape, inputs, cotangent, "cpu", which)
    cl.set_num_threads(3)
    three = everything(shape, inputs, cotangent, "cpu", which)
    again = everything(shape, inputs, cotangent, "cpu", which)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, three, again, strict=True))


@cases
def test_an_image_alone_gives_the_same_bits(isa: str, which: str, shape: Shape):
    """Responses and the gradient by its features; also a neuron alone, whose place in a block is another one."""
    inputs, cotangent = problem(which, shape)
    features, second, vectors = inputs
    whole = everything(shape, inputs, cotangent, "cpu", which)
    own = second if second.ndim != 3 else second[1:2]
    alone = everything(shape, (features[1:2].clone(), own, vectors), cotangent[1:2].clone(), "cpu", which)
    assert torch.equal(alone[0], whole[0][1:2])
    assert torch.equal(alone[1], whole[1][1:2])
    last = second[-1:] if which == "factorized" or shape.shared else second[:, -1:].clone()
    neuron = everything(shape, (features, last, vectors[-1:]), cotangent[:, -1:].clone(), "cpu", which)
    assert torch.equal(neuron[0], whole[0][:, -1:])


@pytest.mark.parametrize("which", ["factorized", "point"])
@pytest.mark.parametrize("rank", [1, 2])
def test_empty_batch(engine: str, which: str, rank: int):
    shape = Shape(0, 5, 4, 3, 7, rank=rank, shared=rank == 1)
    inputs, cotangent = problem(which, shape)
    response, grad_features, *rest = everything(shape, inputs, cotangent, engine, which)
    assert response.shape == (0, 7)
    assert grad_features.shape == (0, 5, 4, 3)
    for gradient, x in zip(rest, inputs[1:], strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


@pytest.mark.parametrize("which", ["factorized", "point"])
def test_misaligned_views_and_their_neighbours(isa: str, which: str):
    """Inputs that start at any float between NaNs: nothing else is read."""
    shape = Shape(3, 7, 5, 6, 9, rank=2)
    inputs, cotangent = problem(which, shape)

    def shifted(x: Tensor) -> Tensor:
        memory = torch.full((x.numel() + 34,), torch.nan)
        view = memory[17 : 17 + x.numel()].view(x.shape)
        return view.copy_(x)

    plain = everything(shape, inputs, cotangent, "cpu", which)
    moved = everything(shape, tuple(shifted(x) for x in inputs), shifted(cotangent), "cpu", which)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("which", ["factorized", "point"])
def test_nothing_outside_of_the_outputs_is_written(isa: str, which: str):
    """Outputs between sentinels, handed to the compiled module directly."""
    from cortexloop._native import readout

    shape = Shape(3, 7, 5, 5, 9, rank=2, shared=False)
    inputs, cotangent = problem(which, shape)
    expected = everything(shape, inputs, cotangent, "cpu", which)
    memories = [torch.full((x.numel() + 64,), 7.0) for x in expected]
    views = [m[32 : 32 + x.numel()].view(x.shape) for m, x in zip(memories, expected, strict=True)]
    if which == "factorized":
        readout.factorized_readout(*inputs, views[0])
        readout.factorized_readout_gradient(*inputs, cotangent, *views[1:])
    else:
        readout.point_readout(*inputs, True, views[0])
        readout.point_readout_gradient(*inputs, True, cotangent, *views[1:])
    for memory, view, wanted in zip(memories, views, expected, strict=True):
        assert torch.equal(view, wanted)
        assert (memory[:32] == 7).all()
        assert (memory[-32:] == 7).all()


@pytest.mark.parametrize("which", ["factorized", "point"])
def test_not_a_number_stays_with_its_image(isa: str, which: str):
    shape = Shape(3, 4, 5, 5, 9, rank=2)
    inputs, cotangent = problem(which, shape)
    inputs[0][1] = torch.nan
    response = everything(shape, inputs, cotangent, "cpu", which)[0]
    inside = (inputs[1].abs() <= 1).all(-1) if which == "point" else torch.ones(9, dtype=torch.bool)
    assert response[1][inside].isnan().all()
    assert response[0].isfinite().all()
    assert response[2].isfinite().all()
