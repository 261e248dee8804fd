"""Streams, graphs, devices, memory and threads: results stay those of one quiet call."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.screening import top_images
from cortexloop.testing import CASES, Case, Inputs, random_inputs

Tensor = torch.Tensor
MIXED = Case("28x28-streams", 24, 28, 28, CASES[14].models)


@functools.cache
def inputs() -> Inputs:
    return random_inputs(MIXED)


class Quiet:
    """A problem on the GPU, and what one call after another gives."""

    def __init__(self, engine: str, device: torch.device) -> None:
        self.engine = engine
        self.bank = random_inputs(MIXED).bank.to(device)
        self.pixels, self.images = inputs().images_uint8.to(device), inputs().images.to(device)
        self.cotangent = inputs().cotangent.to(device)
        self.expected = self.forward(self.pixels)
        self.grad = self.gradient(self.images)

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        return cl.responses(images, self.bank, backend=self.engine, **options)

    def gradient(self, images: Tensor) -> Tensor:
        return cl.input_gradient(images, self.bank, self.cotangent, backend=self.engine)


@pytest.fixture
def quiet(gpu_engine: str, device: torch.device) -> Quiet:
    return Quiet(gpu_engine, device)


def test_numpy_images_go_to_the_bank(quiet: Quiet) -> None:
    """One chunk, several chunks, batch after batch, the best of a stream."""
    pixels = inputs().images_uint8.numpy()
    expected = quiet.expected.cpu().numpy()
    assert np.array_equal(quiet.forward(pixels), expected)  # type: ignore[arg-type]
    many = np.tile(pixels, (30, 1, 1, 1))
    assert np.array_equal(quiet.forward(many), np.tile(expected, (30, 1)))  # type: ignore[arg-type]
    batches = [pixels[:7], pixels[7:20], pixels[20:]]
    results = list(cl.stream_responses(batches, quiet.bank, backend=quiet.engine))
    assert np.array_equal(np.concatenate(results), expected)
    best = top_images(batches, quiet.bank, 3, backend=quiet.engine)
    assert np.array_equal(best.positions, np.argsort(-expected, axis=0, kind="stable")[:3])
    grad = cl.input_gradient(inputs().images.numpy(), quiet.bank, inputs().cotangent.numpy(), backend=quiet.engine)
    assert np.array_equal(grad, quiet.grad.cpu().numpy())


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_plan_equals_responses(quiet: Quiet, precision: str, dtype: str, paired: bool) -> None:
    pairs = inputs().pairs if paired else None
    given = (inputs().images_uint8 if dtype == "uint8" else inputs().images).numpy()
    options: dict[str, Any] = {"precision": precision, "backend": quiet.engine, "pairs": pairs}
    plan = cl.Plan(quiet.bank, len(given), dtype=dtype, **options)
    assert plan.backend == quiet.engine
    for images in (given, given[::-1], given):
        plan.images[:] = images
        expected = cl.responses(np.ascontiguousarray(images), quiet.bank, **options)
        for _ in range(20):  # a race needs more than one
            plan.responses[:] = np.nan
            assert np.array_equal(plan.run(), expected)


def test_plans_share_nothing(quiet: Quiet) -> None:
    plans = [cl.Plan(quiet.bank, n, backend=quiet.engine) for n in (1, 5, 24)]
    expected = quiet.expected.cpu().numpy()
    for plan in plans:
        plan.images[:] = inputs().images_uint8[: len(plan.images)].numpy()
    for plan in (*plans, *reversed(plans)):
        assert np.array_equal(plan.run(), expected[: len(plan.images)])


def test_a_plan_outlives_its_bank(quiet: Quiet, device: torch.device) -> None:
    bank = random_inputs(MIXED).bank.to(device)
    plan = cl.Plan(bank, 24, backend=quiet.engine)
    plan.images[:] = inputs().images_uint8.numpy()
    del bank
    gc.collect()
    rubbish = [torch.full((1 << 20,), float("nan"), device=device) for _ in range(20)]
    assert np.array_equal(plan.run(), quiet.expected.cpu().numpy())
    assert len(rubbish) == 20


def test_concurrent_callers(quiet: Quiet) -> None:
    """Threads on one stream each where there are streams."""
    wrong: list[str] = []

    def work(images: Tensor, expected: Tensor) -> None:
        lane = torch.cuda.Stream(images.device) if images.is_cuda else None
        with torch.cuda.stream(lane) if lane is not None else contextlib.nullcontext():
            wrong.extend(f"call {i}" for i in range(10) if not torch.equal(quiet.forward(images), expected))

    parts = [(quiet.pixels[i::4].contiguous(), quiet.expected[i::4].contiguous()) for i in range(4)]
    if quiet.pixels.is_cuda:
        torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_is_given_back(quiet: Quiet, real_gpu: torch.device) -> None:
    """Repeated calls take no more memory than one, whatever lies in what they get."""
    before = torch.cuda.memory_allocated(real_gpu)
    for i in range(30):
        rubbish = torch.full((1 << 22,), float("nan"), device=real_gpu)
        del rubbish
        assert torch.equal(quiet.forward(quiet.pixels), quiet.expected), i
        assert torch.equal(quiet.gradient(quiet.images), quiet.grad), i
    assert torch.cuda.memory_allocated(real_gpu) == before


def test_side_stream(quiet: Quiet, real_gpu: torch.device) -> None:
    """Work goes onto the caller's stream: behind what the caller put there, ahead of what follows."""
    lane = torch.cuda.Stream(real_gpu)
    lane.wait_stream(torch.cuda.current_stream(real_gpu))
    for _ in range(20):
        late = torch.zeros_like(quiet.pixels)
        torch.cuda.synchronize()
        with torch.cuda.stream(lane):
            torch.cuda._sleep(2_000_000)  # about a millisecond
            late.copy_(quiet.pixels)
            got = quiet.forward(late)
            late.zero_()
            copy = got.clone()
        lane.synchronize()
        assert torch.equal(copy, quiet.expected)


def test_two_streams_at_once(quiet: Quiet, real_gpu: torch.device) -> None:
    lanes = [torch.cuda.Stream(real_gpu) for _ in range(2)]
    others = quiet.pixels.flip(0)
    expected = quiet.forward(others)
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for lane, images in zip(lanes, (quiet.pixels, others), strict=True):
            with torch.cuda.stream(lane):
                results.append(quiet.forward(images))
        torch.cuda.synchronize()
        assert torch.equal(results[0], quiet.expected)
        assert torch.equal(results[1], expected)


def test_graph_capture(quiet: Quiet, real_gpu: torch.device) -> None:
    """Forward and gradient, product and pairs, replayed on other images."""
    pixels, images = quiet.pixels.clone(), quiet.images.clone()
    pairs = inputs().pairs.to(real_gpu)
    paired = quiet.forward(pixels, pairs=pairs)  # the warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quiet.forward(pixels)
        out_pairs = quiet.forward(pixels, pairs=pairs)
        grad = quiet.gradient(images)
    rubbish = torch.full((1 << 22,), float("nan"), device=real_gpu)
    for flipped in (False, True, False):
        pixels.copy_(quiet.pixels.flip(0) if flipped else quiet.pixels)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, quiet.forward(pixels))
        assert torch.equal(grad, quiet.grad)
        if not flipped:
            assert torch.equal(out_pairs, paired)
    assert rubbish.isnan().all()


def test_capture_without_a_warm_up_is_one_sentence(quiet: Quiet, real_gpu: torch.device) -> None:
    bank = random_inputs(CASES[4]).bank.to(real_gpu)
    images = random_inputs(CASES[4]).images_uint8.to(real_gpu)

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            images.clone()  # torch warns of empty graphs
            cl.responses(images, bank, backend=quiet.engine)

    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured, .* call it once before the capture"):
        capture()
    torch.cuda.synchronize()
    assert torch.equal(quiet.forward(quiet.pixels), quiet.expected)


def test_second_device(quiet: Quiet, second_device: torch.device) -> None:
    there = Quiet(quiet.engine, second_device)
    assert torch.equal(there.expected.cpu(), quiet.expected.cpu())
    assert torch.equal(there.grad.cpu(), quiet.grad.cpu())
    plan = cl.Plan(there.bank, 24, backend=quiet.engine)
    plan.images[:] = inputs().images_uint8.numpy()
    assert np.array_equal(plan.run(), quiet.expected.cpu().numpy())
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match=r"images are on cuda:0, the bank is on cuda:1; move one of them"):
        cl.responses(quiet.pixels, there.bank)


def test_images_elsewhere_than_the_bank(quiet: Quiet, real_gpu: torch.device) -> None:
    with pytest.raises(ValueError, match=r"images are on cpu, the bank is on cuda:0; move one of them"):
        cl.responses(inputs().images_uint8, quiet.bank)
    with pytest.raises(cl.BackendError, match="the images are on cpu"):
        cl.responses(inputs().images_uint8, inputs().bank, backend=quiet.engine)


def test_out_of_memory_is_one_sentence(quiet: Quiet, real_gpu: torch.device) -> None:
    """And the process goes on."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(real_gpu).total_memory
    # the gradient of these images is four times as large as they are
    images = torch.zeros((4096, 28, 28, 3), dtype=torch.uint8, device=real_gpu)
    cotangent = torch.zeros((4096, len(quiet.bank)), device=real_gpu)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(real_gpu) + (1 << 21)) / total, real_gpu)
    try:
        with pytest.raises(
            torch.OutOfMemoryError, match=r"there is not enough memory on cuda:0, of which .* GiB are free"
        ):
            cl.input_gradient(images, quiet.bank, cotangent, backend=quiet.engine)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, real_gpu)
    assert torch.equal(quiet.forward(quiet.pixels), quiet.expected)


def test_a_refused_launch_leaves_the_process_usable(quiet: Quiet, device: torch.device) -> None:
    """The compiled module checks its arguments before it launches anything."""
    if quiet.engine != "cuda":
        pytest.skip("about the compiled module")
    from cortexloop._native import gpu

    compiled = gpu.compiled_bank(quiet.bank.weights, quiet.bank.table)
    out = torch.empty(24, len(quiet.bank), device=device)
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        gpu.forward(compiled, quiet.pixels, quiet.bank.table, None, "NHWC", "exact", out, nothing)
    assert torch.equal(quiet.forward(quiet.pixels), quiet.expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch importing itself
def test_compile(quiet: Quiet, device: torch.device, rehearsal: bool, compiler: str) -> None:
    if rehearsal and compiler == "inductor":
        pytest.skip("takes too long for a rehearsal")

    def loss(x: Tensor) -> Tensor:
        return (quiet.forward(x * 0.5) * quiet.cotangent).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    leaf, plain = quiet.images.clone().requires_grad_(), quiet.images.clone().requires_grad_()
    value, expected = compiled(leaf), loss(plain)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)  # the sum is fused in another order
    assert torch.equal(leaf.grad, plain.grad)  # type: ignore[arg-type]


def test_autograd_equals_input_gradient(quiet: Quiet) -> None:
    leaf = quiet.images.clone().requires_grad_()
    (quiet.forward(leaf) * quiet.cotangent).sum().backward()
    assert torch.equal(leaf.grad, quiet.grad)  # type: ignore[arg-type]


def test_auto_takes_the_fastest(quiet: Quiet, real_gpu: torch.device) -> None:
    chosen = cl.explain(bank=quiet.bank).chosen
    assert chosen in ("cuda", "triton")
    assert torch.equal(cl.responses(quiet.pixels, quiet.bank), cl.responses(quiet.pixels, quiet.bank, backend=chosen))
