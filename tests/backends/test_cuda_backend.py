"""The Python of the CUDA backend, with a stand-in for the compiled module: addresses, copies, errors, verdicts."""

from __future__ import annotations

import dataclasses
import gc
import threading
from typing import Any

import pytest
import torch

import cortexloop as cl
from cortexloop import _device, _native, ops
from cortexloop._native import gpu
from cortexloop.backends import registry
from cortexloop.testing import CASES, PAIRED_CASES, exact_inputs, random_inputs
from fake_cuda import FakeCuda

INPUTS = random_inputs(CASES[11])


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_responses_and_gradient_reach_the_kernels(
    fake_cuda: FakeCuda, dtype: torch.dtype, layout: str, paired: bool
) -> None:
    inputs = exact_inputs(PAIRED_CASES[0])
    images = inputs.images_uint8 if dtype == torch.uint8 else inputs.images
    if layout == "NCHW":
        images = images.permute(0, 3, 1, 2).contiguous()
    pairs = inputs.pairs if paired else None
    cotangent = inputs.cotangent[:, 0].contiguous() if paired else inputs.cotangent
    results = [
        cl.input_gradient(
            images, inputs.bank, cotangent, pairs=pairs, layout=layout, backend=name, return_responses=True
        )
        for name in ("cuda", "reference")
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    got = cl.responses(images, inputs.bank, pairs=pairs, layout=layout, backend="cuda")
    assert torch.equal(got, results[1][1])
    assert fake_cuda.calls["forward"] == fake_cuda.calls["gradient"] == 1


def test_autograd_compiles_the_bank_once(fake_cuda: FakeCuda) -> None:
    bank = random_inputs(CASES[4]).bank
    images = random_inputs(CASES[4]).images.clone().requires_grad_()
    for _ in range(3):
        cl.responses(images, bank, backend="cuda").sum().backward()
    # once with numbers, once without (to ask what the kernels take)
    assert fake_cuda.calls["Bank"] == 1
    assert fake_cuda.calls["device_image"] == 1
    assert (fake_cuda.calls["forward"], fake_cuda.calls["gradient"]) == (3, 3)


def test_a_compiled_bank_lives_as_long_as_its_tensors(fake_cuda: FakeCuda) -> None:
    bank = random_inputs(CASES[4]).bank
    compiled = gpu.compiled_bank(bank.weights, bank.table)
    assert gpu.compiled_bank(bank.weights, bank.table) is compiled
    others = bank.weights.clone()
    assert gpu.compiled_bank(others, bank.table) is not compiled
    assert gpu.compiled_bank(bank.weights, bank.table) is compiled  # not thrown out by the other one
    gc.collect()
    before = len(gpu._banks)
    del bank, others
    gc.collect()
    assert len(gpu._banks) == before - 1


def test_weights_that_were_written_to_are_compiled_again(fake_cuda: FakeCuda) -> None:
    inputs = random_inputs(CASES[4])
    before = cl.responses(inputs.images, inputs.bank, backend="cuda")
    inputs.bank.weights.mul_(2)
    got = cl.responses(inputs.images, inputs.bank, backend="cuda")
    assert torch.equal(got, cl.responses(inputs.images, inputs.bank, backend="reference"))
    assert not torch.equal(got, before)
    with torch.inference_mode():
        bank = random_inputs(CASES[4]).bank
    assert torch.equal(cl.responses(inputs.images, bank, backend="cuda"), before)


def test_threads_compile_a_bank_once(fake_cuda: FakeCuda) -> None:
    inputs = random_inputs(CASES[4])
    expected = cl.responses(inputs.images, inputs.bank, backend="reference")
    results: list[torch.Tensor] = []

    def work() -> None:
        results.append(cl.responses(inputs.images, inputs.bank, backend="cuda"))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(result, expected) for result in results)
    assert fake_cuda.calls["device_image"] == 1


def test_empty_batch(fake_cuda: FakeCuda) -> None:
    images = INPUTS.images[:0]
    assert cl.responses(images, INPUTS.bank, backend="cuda").shape == (0, len(INPUTS.bank))
    assert cl.responses(images, INPUTS.bank, pairs=[], backend="cuda").shape == (0,)


def reason(**changes: Any) -> str | None:
    problem = registry.Problem("bank_forward", bank=ops.bank_shape(INPUTS.bank.table))
    return registry.backend("cuda").unsupported(dataclasses.replace(problem, **changes))


def test_the_backend_says_why_not(fake_cuda: FakeCuda) -> None:
    assert reason() is None
    assert reason(device="meta") == "the CUDA kernels work in GPU memory, the images are on meta"
    assert reason(dtype=torch.float64) == "the CUDA kernels take uint8 and float32 images, these are float64"
    assert reason(index=1) == "there is no GPU number 1, this machine has 1"
    assert reason(op="sample_codes") == ("there is no CUDA kernel for sample_codes")
    fake_cuda.too_old = "Tesla K80 has compute capability 3.7, the CUDA kernels need 8.0"
    assert reason() == fake_cuda.too_old
    with pytest.raises(cl.BackendError, match=r"'cuda' backend cannot run bank_forward: Tesla K80 .* need 8\.0"):
        cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")
    fake_cuda.no_device = "no NVIDIA driver was found"
    assert reason() == fake_cuda.no_device


def test_a_bank_beyond_the_kernels(fake_cuda: FakeCuda) -> None:
    fake_cuda.bank_refused = "model 2 needs more shared memory than the GPU has"
    assert reason() == fake_cuda.bank_refused
    with pytest.raises(cl.BackendError, match="more shared memory"):
        cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")


def test_notes_name_the_device(fake_cuda: FakeCuda) -> None:
    backend = registry.backend("cuda")
    assert backend.note(registry.Problem("bank_forward")) == "Imaginary GPU"
    fake_cuda.note = "3 of 5 models run one layer at a time"
    bank = ops.bank_shape(random_inputs(CASES[4]).bank.table)
    assert backend.note(registry.Problem("bank_forward", bank=bank)) == f"Imaginary GPU; {fake_cuda.note}"
    verdict = cl.explain(bank=INPUTS.bank, backend="cuda").verdicts[0]
    assert (verdict.backend, verdict.chosen, verdict.reason) == ("cuda", True, None)


def test_without_the_compiled_module_the_reason_says_what_to_install() -> None:
    if _native.cuda_unavailable() is None:
        pytest.skip("the CUDA kernels are built, and there is a GPU")
    explanation = cl.explain(device="cuda")
    assert explanation.reason("cuda") == _native.cuda_unavailable()
    assert explanation.chosen != "cuda"


@pytest.mark.parametrize(
    ("found", "built", "sentence"),
    [
        (None, True, r"built without CUDA: no CUDA compiler \(nvcc\) at install time; install .* and reinstall"),
        (object(), False, "this torch .* was built without CUDA .*install a CUDA build of torch"),
        (object(), True, "no NVIDIA driver was found"),
    ],
)
def test_reasons_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, found: object, built: bool, sentence: str
) -> None:
    module = FakeCuda()
    module.no_device = "no NVIDIA driver was found"
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(_native, "cuda", lambda: module)
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(_native.cuda_unavailable.__wrapped__())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("some_kernel failed: out of memory")]
)
def test_out_of_memory_is_one_sentence(fake_cuda: FakeCuda, error: Exception) -> None:
    fake_cuda.failure = error
    fake_cuda.workspace = 3 * 2**20
    with pytest.raises(torch.OutOfMemoryError) as raised:
        cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")
    told = " (some_kernel failed: out of memory)" if isinstance(error, MemoryError) else ""
    assert str(raised.value) == (
        f"there is not enough memory on cpu, for 3 images with 5 models: 3.0 MiB of workspace, and the results{told}; "
        "give fewer images at a time, or free memory on that device"
    )
    with pytest.raises(torch.OutOfMemoryError, match=r"for 3 pairs: 3\.0 MiB of workspace"):
        cl.input_gradient(INPUTS.images, INPUTS.bank, torch.ones(3), pairs=INPUTS.pairs, backend="cuda")


def test_memory_that_does_not_fit_is_one_sentence(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, device: torch.device) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. ...")

    cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")
    monkeypatch.setattr(_device, "aligned_buffer", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"for 3 images with 5 models: 0\.0 MiB of workspace"):
        cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")


def test_the_sentence_says_how_much_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**28, 80 * 2**30))
    with (
        pytest.raises(
            torch.OutOfMemoryError, match=r"on cuda:0, of which 0\.2 of 80\.0 GiB are free, for a test; give"
        ),
        _device.memory(torch.device("cuda", 0), "a test"),
    ):
        raise MemoryError


def test_a_failed_launch_names_the_kernel_and_the_next_call_works(fake_cuda: FakeCuda) -> None:
    fake_cuda.failure = RuntimeError("bank_fwd_kernel could not be launched: invalid configuration argument")
    with pytest.raises(RuntimeError, match="bank_fwd_kernel could not be launched"):
        cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")
    fake_cuda.failure = None
    got = cl.responses(INPUTS.images, INPUTS.bank, backend="cuda")
    assert torch.equal(got, cl.responses(INPUTS.images, INPUTS.bank, backend="reference"))


def test_a_bank_first_seen_during_a_capture_asks_for_a_warm_up(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(CASES[4])
    sentence = r"this bank has not run on cpu yet, and a CUDA graph is being captured, .*: call it once before"
    with monkeypatch.context() as patch:
        patch.setattr(_device, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=sentence):
            cl.responses(inputs.images, inputs.bank, backend="cuda")
    ops.bank_shape(inputs.bank.table)
    with monkeypatch.context() as patch:
        patch.setattr(_device, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=sentence):
            gpu.compiled_bank(inputs.bank.weights, inputs.bank.table)
    compiled = gpu.compiled_bank(inputs.bank.weights, inputs.bank.table)
    monkeypatch.setattr(_device, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match=sentence):
        compiled.image(inputs.images.device)


def test_a_prepared_bank_runs_during_a_capture(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = random_inputs(CASES[4])
    expected = cl.responses(inputs.images, inputs.bank, backend="cuda")
    monkeypatch.setattr(_device, "capturing", lambda device: True)
    assert torch.equal(cl.responses(inputs.images, inputs.bank, backend="cuda"), expected)


def test_pairs_on_a_gpu_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them waits for the GPU; the test pretends that the CPU is one."""
    from cortexloop.ops import bank as module

    monkeypatch.setattr(_device, "on_gpu", lambda device: True)
    capturing = []
    monkeypatch.setattr(_device, "capturing", lambda device: bool(capturing))
    read = []
    aminmax = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x: read.append(1) or aminmax(x))
    pairs = torch.tensor([0, 4, 2])
    module._check_range(pairs, 5)
    module._check_range(pairs, 5)
    assert len(read) == 1
    with pytest.raises(ValueError, match=r"pairs should lie in 0\.\.3 .* got 4 for image 1"):
        module._check_range(pairs, 4)
    pairs[0] = 7
    with pytest.raises(ValueError, match="got 7 for image 0"):
        module._check_range(pairs, 5)
    capturing.append(True)
    module._check_range(pairs, 5)  # nothing can be read now
    assert len(read) == 3


def test_pointers_on_another_device_are_refused() -> None:
    for where in (torch.device("cuda", 1), torch.device("meta")):
        with pytest.raises(ValueError, match=f"pairs should be on {where}, got cpu"):
            _native.pointer(torch.zeros(3), "pairs", torch.float32, (3,), where)
    with pytest.raises(ValueError, match="images should be on cpu, got meta"):
        _native._arguments(INPUTS.images.to("meta"), INPUTS.bank.weights, INPUTS.bank.table, None, "NHWC")
