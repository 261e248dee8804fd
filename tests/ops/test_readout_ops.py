"""The registered operators of readouts: definition, exact gradients, schema, fake, autograd, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import ops
from readout_problems import FACTORIZED, POINT, Shape, factorized, interpolated, point, weighted_factors

FACTORS, PLACES = factorized(FACTORIZED[0], exact=False), point(POINT[0], exact=False)
EVERYTHING = (True, True, True)


def doubles(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def autograd(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, cotangent)


@pytest.mark.parametrize("shape", FACTORIZED, ids=str)
def test_factors_are_exact_on_integers(engine: str, shape: Shape):
    inputs, cotangent = factorized(shape, exact=True)
    expected = weighted_factors(*doubles(*inputs))
    assert torch.equal(ops.factorized_readout(*inputs, engine).double(), expected)
    gradients = ops.factorized_readout_gradient(*inputs, cotangent, *EVERYTHING, engine)
    for got, wanted in zip(gradients, autograd(weighted_factors, doubles(*inputs), cotangent.double()), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got.double(), wanted)


@pytest.mark.parametrize("shape", POINT, ids=str)
def test_points_are_exact_on_integers(engine: str, shape: Shape):
    """Positions at eighths hit pixels, their edges, and places outside of the map."""
    inputs, cotangent = point(shape, exact=True)
    expected = interpolated(*doubles(*inputs), shape.align_corners)
    assert torch.equal(ops.point_readout(*inputs, shape.align_corners, engine).double(), expected)
    gradients = ops.point_readout_gradient(*inputs, shape.align_corners, cotangent, *EVERYTHING, engine)

    def definition(features: Tensor, vectors: Tensor) -> Tensor:
        return interpolated(features, inputs[1].double(), vectors, shape.align_corners)

    linear = autograd(definition, doubles(inputs[0], inputs[2]), cotangent.double())
    assert torch.equal(gradients[0].double(), linear[0])
    assert torch.equal(gradients[2].double(), linear[1])
    # By positions, also at a kink, where the derivative towards larger positions is meant.
    step = 2.0**-20
    for axis in range(2):
        there = inputs[1].double()
        there[..., axis] += step
        rise = interpolated(inputs[0].double(), there, inputs[2].double(), shape.align_corners) - expected
        slope = rise / step * cotangent.double()
        wanted = slope.sum(0) if shape.shared else slope
        torch.testing.assert_close(gradients[1][..., axis].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
def test_corners_of_the_map(engine: str, align_corners: bool):
    """-1 and 1 are the outermost pixels' centres, or their outer edges, where a quarter of them is seen."""
    features = torch.tensor([[[[1.0, 2, 4], [8, 16, 32]]]])
    corners = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])
    got = ops.point_readout(features, corners, torch.ones(4, 1), align_corners, engine)[0]
    expected = torch.tensor([1.0, 4, 8, 32])
    assert torch.equal(got, expected if align_corners else expected / 4)
    far = torch.tensor([[-9.0, 0], [9, 0], [0, -9], [1e9, -1e9]])
    assert not ops.point_readout(features, far, torch.ones(4, 1), align_corners, engine).any()


def test_undefined_positions_stay_visible(kernels: None):
    nowhere = torch.tensor([[torch.nan, 0.0], [0.0, torch.nan], [-torch.inf, 0.0], [0.0, 0.0]])
    got = ops.point_readout(torch.ones(1, 1, 4, 4), nowhere, torch.ones(4, 1), True, "cpu")
    assert got.isnan().tolist() == [[True, True, True, False]]


def test_gradients_against_finite_differences():
    """In float64, by torch's gradcheck; positions away from pixels, where there are kinks."""
    (features, masks, vectors), _ = factorized(Shape(2, 3, 4, 3, 5, rank=2), exact=False)
    leaves = [x.double().requires_grad_() for x in (features, masks, vectors)]
    assert torch.autograd.gradcheck(lambda *x: ops.factorized_readout(*x, "reference"), leaves)
    (features, _, vectors), _ = point(Shape(2, 3, 4, 5, 6, shared=False), exact=False)
    generator = torch.Generator().manual_seed(0)
    pixel = torch.randint(-1, 3, (2, 6, 2), generator=generator) + 0.2 + 0.6 * torch.rand(2, 6, 2, generator=generator)
    positions = pixel.double() / torch.tensor([4, 3]) * 2 - 1
    leaves = [x.double().requires_grad_() for x in (features, positions, vectors)]
    for align_corners in (True, False):
        at = positions if align_corners else (positions + 1) / 2 * torch.tensor([4 / 5, 3 / 4]) * 2 - 1
        leaves[1] = (at + (0 if align_corners else torch.tensor([1 / 5, 1 / 4]))).double().detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda *x, a=align_corners: ops.point_readout(*x, a, "reference"), leaves)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)], ids=str
)
def test_only_the_gradients_asked_for(engine: str, wanted: tuple[bool, bool, bool]):
    calls = (
        (lambda *asked: ops.factorized_readout_gradient(*FACTORS[0], FACTORS[1], *asked, engine)),
        (lambda *asked: ops.point_readout_gradient(*PLACES[0], True, PLACES[1], *asked, engine)),
    )
    for gradient in calls:
        for got, whole, asked in zip(gradient(*wanted), gradient(*EVERYTHING), wanted, strict=True):
            assert torch.equal(got, whole) if asked else got.numel() == 0


@pytest.mark.parametrize("which", ["factorized", "point"])
@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_autograd_asks_for_what_is_needed(engine: str, which: str, leaf: int):
    inputs, cotangent = FACTORS if which == "factorized" else PLACES
    held = [x.clone().requires_grad_(index == leaf) for index, x in enumerate(inputs)]
    options = (engine,) if which == "factorized" else (True, engine)
    getattr(ops, f"{which}_readout")(*held, *options).backward(cotangent)
    middle = (cotangent,) if which == "factorized" else (True, cotangent)
    expected = getattr(ops, f"{which}_readout_gradient")(*inputs, *middle, *EVERYTHING, engine)[leaf]
    assert [x.grad is None for x in held] == [index != leaf for index in range(3)]
    assert torch.equal(held[leaf].grad, expected)


@pytest.mark.parametrize("which", ["factorized", "point"])
def test_opcheck(engine: str, which: str):
    inputs, cotangent = FACTORS if which == "factorized" else PLACES
    options = (engine,) if which == "factorized" else (True, engine)
    middle = (cotangent,) if which == "factorized" else (True, cotangent)
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.library.opcheck(getattr(torch.ops.cortexloop, f"{which}_readout").default, (*leaves, *options))
    gradient = getattr(torch.ops.cortexloop, f"{which}_readout_gradient").default
    torch.library.opcheck(gradient, (*inputs, *middle, True, False, True, engine))


@pytest.mark.parametrize("which", ["factorized", "point"])
def test_second_derivative_raises(engine: str, which: str):
    inputs, _ = FACTORS if which == "factorized" else PLACES
    leaves = [x.clone().requires_grad_() for x in inputs]
    options = (engine,) if which == "factorized" else (True, engine)
    response = getattr(ops, f"{which}_readout")(*leaves, *options).sum()
    (grad,) = torch.autograd.grad(response, leaves[1], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{which}_readout_gradient has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("which", ["factorized", "point"])
def test_compile_without_graph_breaks(engine: str, which: str):
    inputs, cotangent = FACTORS if which == "factorized" else PLACES
    readout = getattr(cl.functional, f"{which}_readout")

    def loss(features: Tensor, second: Tensor, vectors: Tensor) -> Tensor:
        return (readout(features * 0.5, second, vectors, backend=engine) * cotangent).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    one = autograd(compiled, inputs, torch.tensor(1.0))
    two = autograd(loss, inputs, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def refused(which: str, change: dict[str, Tensor], error: type[Exception], match: str, engine: str) -> None:
    names = ("features", "masks" if which == "factorized" else "positions", "vectors")
    inputs, _ = FACTORS if which == "factorized" else PLACES
    held: dict[str, Any] = {**dict(zip(names, inputs, strict=True)), **change}
    with pytest.raises(error, match=match):
        getattr(ops, f"{which}_readout")(*held.values(), backend=engine)


def test_operators_refuse_what_kernels_cannot_read(engine: str):
    features, masks, vectors = FACTORS[0]
    refused("factorized", {"features": features.mT}, ValueError, "features should be contiguous", engine)
    refused("factorized", {"masks": masks.double()}, TypeError, "masks should be torch.float32 like the", engine)
    refused("factorized", {"masks": masks[0]}, ValueError, r"masks should be \[T, R, H, W\]", engine)
    refused("factorized", {"vectors": vectors[:, :, :2]}, ValueError, r"vectors should be \[7, 1, 3\], got", engine)
    refused("point", {"positions": PLACES[0][1][:3]}, ValueError, r"positions should be \[7, 2\], got \[3, 2\]", engine)
    refused("point", {"features": features[0]}, ValueError, r"features should be \[B, C, H, W\]", engine)
    refused("point", {"vectors": torch.ones(7)}, ValueError, r"vectors should be \[T, C\]", engine)
    wrong = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"cotangent should be \[2, 7\], got \[2, 3\]"):
        ops.factorized_readout_gradient(features, masks, vectors, wrong, *EVERYTHING, engine)


def test_what_each_backend_takes():
    assert cl.explain("factorized_readout", dtype="float64").chosen == "reference"
    assert "features" in str(cl.explain("point_readout", dtype="float32").reason("reference") or "features")
    with pytest.raises(cl.BackendError, match="features should be float32 or float64"):
        ops.point_readout(*(x.half() for x in PLACES[0]), backend="reference")


def test_kernels_leave_float64_to_torch(kernels: None):
    with pytest.raises(cl.BackendError, match="take float32 features, these are float64"):
        ops.factorized_readout(*doubles(*FACTORS[0]), "cpu")
