"""The "cuda" backend from `cl.responses` down to the kernels' own source, and what it says when a GPU is unsuitable."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import emulated_build
import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import _native
from cortexloop.functional.pipeline import through_device
from cortexloop.realtime.bound import Call, DevicePlan
from cortexloop.testing import CASES, PAIRED_CASES, Case, exact_inputs, random_inputs

MIXED, PAIRED = CASES[11], PAIRED_CASES[0]


@pytest.fixture(autouse=True)
def _emulated(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend finds the emulated module in the place of the compiled one."""
    monkeypatch.setattr(_native, "cuda", lambda: emulated_cuda)
    monkeypatch.setattr(_native, "cuda_unavailable", lambda: emulated_cuda.unavailable() or None)


def gradients(case: Case, images: torch.Tensor, backend: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = exact_inputs(case)
    paired = options.get("pairs") is not None
    cotangent = inputs.cotangent[:, 0].contiguous() if paired else inputs.cotangent
    return cl.input_gradient(images, inputs.bank, cotangent, backend=backend, return_responses=True, **options)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_exact_integers(dtype: torch.dtype, layout: str, paired: bool) -> None:
    inputs = exact_inputs(PAIRED)
    images = inputs.images_uint8 if dtype == torch.uint8 else inputs.images
    if layout == "NCHW":
        images = images.permute(0, 3, 1, 2).contiguous()
    options: dict[str, Any] = {"layout": layout, "pairs": inputs.pairs if paired else None}
    grad, responses = gradients(PAIRED, images, "cuda", **options)
    expected_grad, expected = gradients(PAIRED, images, "reference", **options)
    assert torch.equal(responses, expected)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(cl.responses(images, inputs.bank, backend="cuda", **options), expected)


def test_autograd_and_plan_and_stream() -> None:
    inputs = exact_inputs(MIXED)
    expected = cl.responses(inputs.images, inputs.bank, backend="reference")
    leaf = inputs.images.clone().requires_grad_()
    (cl.responses(leaf, inputs.bank, backend="cuda") * inputs.cotangent).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, gradients(MIXED, inputs.images, "reference")[0])
    plan = DevicePlan(Call(inputs.bank, MIXED.batch, torch.uint8, "NHWC", "exact", None, "cuda"))
    plan.images.copy_(inputs.images_uint8)
    plan.run()
    assert torch.equal(plan.responses, expected)

    def compute(images: torch.Tensor) -> torch.Tensor:
        return cl.responses(images, inputs.bank, backend="cuda")

    batches = iter(inputs.images_uint8.split(1))
    assert torch.equal(torch.cat(list(through_device(batches, compute, torch.device("cpu")))), expected)


def test_fast_is_close() -> None:
    inputs = random_inputs(CASES[12])
    expected = cl.responses(inputs.images.double(), inputs.bank, backend="reference")
    got = cl.responses(inputs.images_uint8, inputs.bank, backend="cuda", precision="fast")
    assert 0 < (got - expected).abs().max() < 0.05


def test_empty_batch() -> None:
    bank = random_inputs(MIXED).bank
    images = torch.zeros((0, bank.height, bank.width, 3), dtype=torch.uint8)
    assert cl.responses(images, bank, backend="cuda").shape == (0, len(bank))
    assert cl.responses(images, bank, pairs=[], backend="cuda").shape == (0,)
    assert cl.input_gradient(images, bank, torch.zeros(0, len(bank)), backend="cuda").shape == images.shape


def test_a_machine_without_a_driver_or_a_device(emulated_device: emulated_build.Settings) -> None:
    emulated_device["driver"] = 0
    assert "driver" in str(cl.explain(backend="cuda").reason("cuda"))
    emulated_device["driver"] = 1
    emulated_device["devices"] = 0
    reason = cl.explain(backend="cuda").reason("cuda")
    assert reason == "this machine has no NVIDIA GPU that CUDA can see"
    with pytest.raises(cl.BackendError, match="no NVIDIA GPU that CUDA can see"):
        cl.responses(random_inputs(MIXED).images, random_inputs(MIXED).bank, backend="cuda")


def test_a_device_that_is_too_old(emulated_device: emulated_build.Settings) -> None:
    emulated_device["major"], emulated_device["minor"] = 7, 5
    with pytest.raises(cl.BackendError, match=r"need compute capability 8\.0 or higher, device 0 has 7\.5"):
        cl.responses(random_inputs(MIXED).images, random_inputs(MIXED).bank, backend="cuda")


def test_a_failed_launch_names_its_kernel_and_the_next_call_works(emulated_device: emulated_build.Settings) -> None:
    inputs = exact_inputs(MIXED)
    expected = cl.responses(inputs.images, inputs.bank, backend="cuda")
    for number in (1, 2):
        emulated_device["fail_launch"] = number
        with pytest.raises((RuntimeError, MemoryError), match=r"kernel|out of memory|not enough memory"):
            cl.responses(inputs.images, inputs.bank, backend="cuda")
        emulated_device["fail_launch"] = 0
        assert torch.equal(cl.responses(inputs.images, inputs.bank, backend="cuda"), expected)


def test_shared_memory_of_smaller_devices(emulated_device: emulated_build.Settings) -> None:
    """Compute capability 8.6 has 99 KiB for a block: the same answers, or a reason."""
    inputs = exact_inputs(CASES[12])
    expected = cl.responses(inputs.images, inputs.bank, backend="reference")
    emulated_device["shared_memory"] = 99 * 1024
    bank = exact_inputs(CASES[12]).bank
    reason = cl.explain(bank=bank, backend="cuda").reason("cuda")
    if reason is None:
        assert torch.equal(cl.responses(inputs.images, bank, backend="cuda"), expected)
    else:
        assert "shared memory" in reason


def test_numpy_in_numpy_out() -> None:
    inputs = exact_inputs(MIXED)
    got = cl.responses(inputs.images_uint8.numpy(), inputs.bank, backend="cuda")
    assert np.array_equal(got, cl.responses(inputs.images_uint8.numpy(), inputs.bank, backend="reference"))
