"""`Plan` on a GPU, as far as a CPU can tell: the same numbers, and what is asked of the device in which order."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import _device
from cortexloop.functional.bank import check_pairs
from cortexloop.realtime.bound import Call, DevicePlan
from cortexloop.testing import CASES, random_inputs
from fake_cuda import FakeCuda

INPUTS = random_inputs(CASES[11])


def device_plan(backend: str, *, dtype: str = "uint8", layout: str = "NHWC", paired: bool = False) -> DevicePlan:
    pairs = check_pairs(INPUTS.pairs if paired else None, 3, INPUTS.bank)
    kind = torch.uint8 if dtype == "uint8" else torch.float32
    return DevicePlan(Call(INPUTS.bank, 3, kind, layout, "exact", pairs, backend))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("backend", ["cuda", "reference"])
def test_device_plan_equals_responses(fake_cuda: FakeCuda, backend: str, dtype: str, layout: str, paired: bool) -> None:
    images = INPUTS.images_uint8 if dtype == "uint8" else INPUTS.images
    if layout == "NCHW":
        images = images.permute(0, 3, 1, 2).contiguous()
    plan = device_plan(backend, dtype=dtype, layout=layout, paired=paired)
    assert plan.backend == backend
    for given in (images, images.flip(0)):
        plan.images.numpy()[...] = given.numpy()
        plan.run()
        options: dict[str, Any] = {"layout": layout, "backend": backend, "pairs": INPUTS.pairs if paired else None}
        assert torch.equal(plan.responses, cl.responses(given, INPUTS.bank, **options))


def test_only_what_can_be_captured_is(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    monkeypatch.setattr(_device, "captured", lambda work, lane: captured.append(work) or work)
    device_plan("reference")
    assert captured == []
    device_plan("cuda")
    assert len(captured) == 1


def test_a_device_plan_keeps_what_its_graph_reads(fake_cuda: FakeCuda) -> None:
    inputs = random_inputs(CASES[4])
    pairs = torch.tensor([0, 0, 0])
    held = [weakref.ref(t) for t in (inputs.bank.weights, inputs.bank.table, pairs)]
    plan = DevicePlan(Call(inputs.bank, 3, torch.uint8, "NHWC", "exact", pairs, "cuda"))
    plan.images.copy_(inputs.images_uint8)
    expected = cl.responses(inputs.images_uint8, inputs.bank, pairs=pairs, backend="reference")
    before = fake_cuda.calls["device_image"]
    del inputs, pairs
    gc.collect()
    assert all(ref() is not None for ref in held)
    plan.run()
    assert torch.equal(plan.responses, expected)
    assert fake_cuda.calls["device_image"] == before  # the bank is still where the graph expects it


def test_the_public_plan_chooses_by_the_banks_device(monkeypatch: pytest.MonkeyPatch, fake_cuda: FakeCuda) -> None:
    inputs = random_inputs(CASES[4])
    expected = cl.responses(inputs.images_uint8.numpy(), inputs.bank, backend="reference")
    monkeypatch.setattr("cortexloop.realtime.plan._device", SimpleNamespace(on_gpu=lambda device: True))
    plan = cl.Plan(inputs.bank, 3, backend="cuda")
    assert isinstance(plan._bound, DevicePlan)
    plan.images[:] = inputs.images_uint8.numpy()
    assert np.array_equal(plan.run(), expected)
    assert plan.backend == "cuda"
    assert "backend='cuda'" in repr(plan)


def test_other_devices_are_refused(small_bank: cl.ModelBank) -> None:
    with pytest.raises(ValueError, match="a plan works in host memory or on a CUDA device, the bank is on meta"):
        cl.Plan(small_bank.to("meta"))
