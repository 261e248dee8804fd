"""The registered operators: schema, fake, autograd, torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

import cortexloop as cl
from cortexloop import ops
from cortexloop.testing import CASES, random_inputs

INPUTS = random_inputs(CASES[11])
BANK = INPUTS.bank


def arguments(*, pairs: bool, layout: str, dtype: torch.dtype) -> tuple[Any, ...]:
    images = INPUTS.images_uint8 if dtype == torch.uint8 else INPUTS.images.to(dtype)
    if layout == "NCHW":
        images = images.permute(0, 3, 1, 2).contiguous()
    return images, BANK.weights, BANK.table, INPUTS.pairs if pairs else None, layout


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_opcheck_forward(engine: str, pairs: bool, layout: str, dtype: torch.dtype) -> None:
    args = arguments(pairs=pairs, layout=layout, dtype=dtype)
    if dtype.is_floating_point:
        args = (args[0].clone().requires_grad_(), *args[1:])
    torch.library.opcheck(ops.bank_forward, (*args, "exact", engine))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_opcheck_gradient(engine: str, pairs: bool, dtype: torch.dtype) -> None:
    images, weights, table, index, layout = arguments(pairs=pairs, layout="NHWC", dtype=dtype)
    cotangent = INPUTS.cotangent[:, 0].contiguous() if pairs else INPUTS.cotangent
    torch.library.opcheck(ops.bank_input_gradient, (images, weights, table, index, cotangent, layout, engine))


def test_opcheck_float64() -> None:
    args = arguments(pairs=False, layout="NHWC", dtype=torch.float64)
    torch.library.opcheck(ops.bank_forward, (args[0].clone().requires_grad_(), *args[1:], "exact", "reference"))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_autograd_equals_input_gradient(engine: str, layout: str) -> None:
    images = INPUTS.images if layout == "NHWC" else INPUTS.images.permute(0, 3, 1, 2).contiguous()
    leaf = images.clone().requires_grad_()
    (cl.responses(leaf, BANK, layout=layout, backend=engine) * INPUTS.cotangent).sum().backward()
    expected = cl.input_gradient(images, BANK, INPUTS.cotangent, layout=layout, backend=engine)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


def test_autograd_through_copies_and_pairs(engine: str) -> None:
    """A permuted (not contiguous) leaf, an expanded gradient, pairs."""
    leaf = INPUTS.images.permute(0, 2, 1, 3).contiguous().requires_grad_()
    cl.responses(leaf.permute(0, 2, 1, 3), BANK, pairs=INPUTS.pairs, backend=engine).sum().backward()
    ones = torch.ones(len(INPUTS.images))
    expected = cl.input_gradient(INPUTS.images, BANK, ones, pairs=INPUTS.pairs, backend=engine)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.permute(0, 2, 1, 3), expected)


def test_gradient_agrees_with_finite_differences() -> None:
    """Directional derivatives in float64, independent of every backward pass."""
    images = INPUTS.images.double()
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grad = cl.input_gradient(images, BANK, INPUTS.cotangent.double(), backend="reference")
    step = 1e-6

    def total(shift: float) -> torch.Tensor:
        shifted = cl.responses(images + shift * direction, BANK, backend="reference")
        return (shifted * INPUTS.cotangent).sum()

    numeric = (total(step) - total(-step)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-6, atol=1e-7)


def test_second_derivative_raises(engine: str) -> None:
    leaf = INPUTS.images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cl.responses(leaf, BANK, backend=engine).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="bank_input_gradient has no derivative"):
        grad.sum().backward()


def test_packed_weights_have_no_gradient(engine: str) -> None:
    weights = BANK.weights.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="constants without a derivative"):
        ops.bank_forward(INPUTS.images, weights, BANK.table, None, "NHWC", "exact", engine)


def check_compiled(engine: str, compiler: str, layout: str) -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        x = x * 0.5
        if layout == "NCHW":
            x = x.permute(0, 3, 1, 2)
        return (cl.responses(x, BANK, layout=layout, backend=engine) * INPUTS.cotangent).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    leaf, plain = INPUTS.images.clone().requires_grad_(), INPUTS.images.clone().requires_grad_()
    value, expected = compiled(leaf), loss(plain)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)  # the sum is fused in another order
    assert leaf.grad is not None
    assert plain.grad is not None
    assert torch.equal(leaf.grad, plain.grad)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_compile_without_graph_breaks(engine: str, layout: str) -> None:
    check_compiled(engine, "aot_eager", layout)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch importing itself
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_compile_with_inductor(request: pytest.FixtureRequest, name: str) -> None:
    if name == "cpu":
        request.getfixturevalue("kernels")
    check_compiled(name, "inductor", "NCHW")


def test_compiled_functions_follow_use_backend(kernels: None) -> None:
    torch._dynamo.reset()
    seen: list[str] = []
    compiled = torch.compile(lambda x: cl.responses(x * 1.0, BANK), fullgraph=True, backend="aot_eager")
    auto = compiled(INPUTS.images)
    with cl.use_backend("reference"):
        reference = compiled(INPUTS.images)
        seen.append(cl.explain().chosen)
    assert torch.equal(auto, cl.responses(INPUTS.images, BANK, backend="cpu"))
    assert torch.equal(reference, cl.responses(INPUTS.images, BANK, backend="reference"))
    assert torch.equal(compiled(INPUTS.images), auto)
    assert seen == ["reference"]


def test_compile_with_pairs_and_changing_batch() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, p: cl.responses(x * 1.0, BANK, pairs=p, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    for n in (3, 2, 1):
        images, index = INPUTS.images[:n], INPUTS.pairs[:n]
        expected = cl.responses(images, BANK, pairs=index, backend="reference")
        assert torch.equal(compiled(images, index), expected)


def call(**changes: Any) -> torch.Tensor:
    arguments = {
        "images": INPUTS.images,
        "weights": BANK.weights,
        "table": BANK.table,
        "pairs": None,
        "layout": "NHWC",
        "precision": "exact",
        "backend": "reference",
    }
    return ops.bank_forward(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": INPUTS.images.permute(0, 2, 1, 3)}, ValueError, "images should be"),
        ({"images": INPUTS.images.half()}, TypeError, "images should be torch.uint8"),
        ({"images": INPUTS.images.repeat(1, 1, 1, 2)[..., ::2]}, ValueError, "images should be contiguous"),
        ({"images": INPUTS.images[:, :5]}, ValueError, r"images should be \[B, 17, 13, 3\]"),
        ({"weights": BANK.weights.double()}, TypeError, "weights should be torch.float32"),
        ({"weights": BANK.weights[:100]}, ValueError, "do not belong to one bank"),
        ({"table": BANK.table.int()}, TypeError, "table should be torch.int64"),
        ({"pairs": torch.zeros(2, dtype=torch.int64)}, ValueError, r"one model per image, \[3\], got \[2\]"),
        ({"pairs": torch.zeros(3, dtype=torch.int32)}, TypeError, "pairs should be torch.int64"),
        ({"pairs": torch.tensor([0, 5, 1])}, ValueError, r"pairs should lie in 0\.\.4 .* got 5 for image 1"),
        ({"pairs": torch.tensor([0, 1, -1])}, ValueError, "got -1 for image 2"),
        ({"layout": "HWCN"}, ValueError, "layout should be"),
        ({"precision": "half"}, ValueError, "precision should be"),
        ({"backend": "gpu"}, ValueError, "backend should be one of"),
    ],
)
def test_the_operator_checks_what_kernels_rely_on(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_weights_of_another_bank_are_refused_by_the_kernels(kernels: None) -> None:
    with pytest.raises((ValueError, cl.BackendError)):
        call(weights=BANK.weights[:100].clone(), backend="cpu")
