"""The CUDA kernels on the emulated device: order of execution, races, sanitizers, small devices, failures."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from pathlib import Path
from types import ModuleType

import emulated_build
import pytest
import torch
from emulated_bank import EmulatedBank
from emulated_build import Settings

import cortexloop as cl
from cortexloop.testing import CASES, LARGE_CASES, PAIRED_CASES, Case, ModelShape, exact_inputs, random_inputs
from problem_files import write_problem

Tensor = torch.Tensor
HERE = Path(__file__).resolve().parent
random = functools.cache(random_inputs)
SCHEDULES = (0, 1, 2, 3, 4)

PUBLISHED = ModelShape((18, 20, 3, 5, 3), (5, 5, 5, 5, 5), (1, 2, 2, 1, 1))
BANDED = Case("56x48-bands", 1, 56, 48, (PUBLISHED, ModelShape((33, 17, 9), (5, 5, 5), (1, 2, 2))), 5)


def everything(module: ModuleType, case: Case) -> list[Tensor]:
    """What each way of calling the bank returns, on random inputs."""
    inputs = random(case)
    bank = EmulatedBank(module, inputs.bank)
    planes = inputs.images_uint8.permute(0, 3, 1, 2).contiguous()
    weights = inputs.cotangent[torch.arange(case.batch), inputs.pairs]
    return [
        bank.forward(inputs.images),
        bank.forward(planes, "NCHW"),
        bank.forward(inputs.images_uint8, precision="fast"),
        bank.forward(inputs.images, pairs=inputs.pairs),
        *bank.gradient(inputs.images, inputs.cotangent),
        *bank.gradient(planes, weights, "NCHW", inputs.pairs),
    ]


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
@pytest.mark.parametrize("case", [CASES[4], *CASES[11:], BANDED], ids=str)
def test_bits_do_not_depend_on_the_order_of_execution(
    emulated_cuda: ModuleType, emulated_device: Settings, case: Case, multiprocessors: int
) -> None:
    """Nor on how many blocks there are, nor on what shared memory held before: each schedule has its own garbage."""
    expected = everything(emulated_cuda, case)
    emulated_device["multiprocessors"] = multiprocessors
    for schedule in SCHEDULES:
        emulated_device["schedule"] = schedule
        for got, wanted in zip(everything(emulated_cuda, case), expected, strict=True):
            assert torch.equal(got, wanted), schedule


def test_few_units_are_spread_over_the_device(emulated_cuda: ModuleType, emulated_device: Settings) -> None:
    inputs = random(dataclasses.replace(BANDED, batch=1))
    blocks = []
    for multiprocessors in (1, 64):
        emulated_device["multiprocessors"] = multiprocessors
        bank = EmulatedBank(emulated_cuda, inputs.bank)
        before = emulated_device["blocks"]
        bank.forward(inputs.images)
        blocks.append(emulated_device["blocks"] - before)
    assert blocks[1] - blocks[0] >= len(inputs.bank), "more blocks than models, beside those that prepare the image"


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
@pytest.mark.parametrize("case", [CASES[4], CASES[11], CASES[12], CASES[14], BANDED], ids=str)
def test_no_races(emulated_checked_cuda: ModuleType, case: Case, schedule: int) -> None:
    """No access that a barrier should order and does not, within a block or between blocks, and none misaligned."""
    settings = Settings(emulated_checked_cuda.__file__)
    with settings.restored():
        settings["schedule"] = schedule
        settings["multiprocessors"] = 16
        everything(emulated_checked_cuda, case)


def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    """No out-of-bounds access or undefined behaviour, on problems whose bits are known."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    try:
        cxx = emulated_build.compiler()
    except emulated_build.CannotBuildError as error:
        pytest.skip(str(error))
    if not emulated_build.accepts(cxx, flags[0], tmp_path):
        pytest.skip(f"{cxx} has no working {flags[0]} here")
    sources = [HERE / "kernels_check.cpp", *emulated_build.kernel_sources()]
    options = ["-O1", "-g", *flags]
    includes = [f"-I{HERE.parent / 'cpp'}"]
    program = emulated_build.build(sources, tmp_path / "kernels_check", options, includes, program=True)
    chosen = [(CASES[4], False), (CASES[11], False), (CASES[13], False), (BANDED, False), (PAIRED_CASES[0], True)]
    paths = []
    for i, (case, paired) in enumerate(chosen):
        paths.append(str(tmp_path / f"{i}.bin"))
        write_problem(Path(paths[-1]), case, paired)
    done = subprocess.run([str(program), *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout


@pytest.mark.parametrize("shared_memory", [99, 163, 227], ids=lambda n: f"{n} KB")
@pytest.mark.parametrize("case", [CASES[13], BANDED, LARGE_CASES[0]], ids=str)
def test_devices_of_every_shared_memory(
    emulated_cuda: ModuleType, emulated_device: Settings, case: Case, shared_memory: int
) -> None:
    """99 KB a block on 8.6, 8.9 and 12.0; 163 on 8.0; 227 on 9.0 and 10.0. The emulation refuses a block more."""
    case = dataclasses.replace(case, batch=1)
    inputs = exact_inputs(case)
    grad, responses = cl.input_gradient(
        inputs.images.double(), inputs.bank, inputs.cotangent.double(), backend="reference", return_responses=True
    )
    emulated_device["shared_memory"] = shared_memory * 1024
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    assert torch.equal(bank.forward(inputs.images_uint8), responses.float())
    assert torch.isfinite(bank.forward(inputs.images_uint8, precision="fast")).all()
    got, values = bank.gradient(inputs.images, inputs.cotangent)
    assert torch.equal(values, responses.float())
    assert torch.equal(got, grad.float())


def test_number_of_launches(emulated_cuda: ModuleType, emulated_device: Settings) -> None:
    """Images are prepared; one launch serves models with a head, one all others; one sums gradients over models."""
    inputs = random(CASES[12])
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    assert bank.note == ""

    def launches(call: functools.partial[object]) -> int:
        before = emulated_device["launches"]
        call()
        return emulated_device["launches"] - before

    assert launches(functools.partial(bank.forward, inputs.images)) == 2
    assert launches(functools.partial(bank.gradient, inputs.images, inputs.cotangent)) == 2
    mixed = random(CASES[14])
    bank = EmulatedBank(emulated_cuda, mixed.bank)
    assert "4 of 5 models are not of the published form" in bank.note
    assert launches(functools.partial(bank.forward, mixed.images)) == 3
    assert launches(functools.partial(bank.gradient, mixed.images, mixed.cotangent)) == 4


def test_a_failed_launch_names_the_kernel(emulated_cuda: ModuleType, emulated_device: Settings) -> None:
    """And the next call works."""
    inputs = random(CASES[12])
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    expected = bank.forward(inputs.images)
    emulated_device["fail_launch"] = 701
    with pytest.raises(RuntimeError, match=r"bank_\w+_kernel failed: too many resources requested for launch"):
        bank.forward(inputs.images)
    assert torch.equal(bank.forward(inputs.images), expected)
    emulated_device["fail_launch"] = 2
    with pytest.raises(MemoryError, match=r"bank_\w+_kernel failed: out of memory"):
        bank.gradient(inputs.images, inputs.cotangent)
    assert torch.equal(bank.gradient(inputs.images, inputs.cotangent)[1], expected)


def test_devices(emulated_cuda: ModuleType, emulated_device: Settings) -> None:
    assert emulated_cuda.emulated()
    assert emulated_cuda.unavailable() == ""
    assert emulated_cuda.device_count() == 1
    facts = emulated_cuda.device(0)
    assert facts["shared_memory"] == 227 * 1024
    assert (facts["major"], facts["minor"]) == (9, 0)
    assert emulated_cuda.device_unsupported(0) == ""
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulated_cuda.device(1)
    emulated_device["major"] = 7
    assert "need compute capability 8.0 or higher, device 0 has 7.0" in emulated_cuda.device_unsupported(0)
    emulated_device["devices"] = 0
    assert "no NVIDIA GPU" in emulated_cuda.unavailable()
    assert emulated_cuda.device_count() == 0
    emulated_device["driver"] = 0
    assert "driver is missing" in emulated_cuda.unavailable()


def test_arguments_are_checked(emulated_cuda: ModuleType) -> None:
    inputs = random(CASES[12])
    bank = EmulatedBank(emulated_cuda, inputs.bank)
    with pytest.raises(ValueError, match=r"takes images of 28 x 28 pixels, got 27 x 28"):
        bank.forward(inputs.images[:, :27])
    with pytest.raises(ValueError, match=r"needs [0-9]+ bytes of workspace, got 16"):
        bank.bank.forward(256, 256, 1, 0, 1, 28, 28, 0, 0, 256, 256, 16, 0, 0)
    table = inputs.bank.table.clone()
    table[0, 0] = -1
    with pytest.raises(ValueError):
        emulated_cuda.Bank(
            inputs.bank.weights.data_ptr(), inputs.bank.weights.numel(), table.data_ptr(), 1, table.shape[1]
        )
