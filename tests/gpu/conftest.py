"""Tests that need a GPU; without one they are skipped, with the reason.

`--rehearse-gpu=stand-in` runs them on the CPU with a stand-in for the compiled kernels: what they find then is mistakes
in the tests. `--rehearse-gpu=emulated` does so with the kernels' own source, emulated as in tests/cuda.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cortexloop as cl
from cortexloop import _native


@pytest.fixture(scope="session")
def rehearsal(request: pytest.FixtureRequest) -> bool:
    """Whether the CPU plays the GPU."""
    return bool(request.config.getoption("--rehearse-gpu"))


@pytest.fixture(scope="session")
def emulated(request: pytest.FixtureRequest) -> ModuleType:
    """The module `_cuda` that runs on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "cuda"))
        emulated_build = importlib.import_module("emulated_build")
    folder = request.config.cache.mkdir("emulated_cuda")
    module: ModuleType = emulated_build.load_module(emulated_build.build_module(folder))
    return module


@pytest.fixture(scope="session")
def device(rehearsal: bool) -> torch.device:
    """The first GPU."""
    if rehearsal:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    return torch.device("cuda", 0)


@pytest.fixture
def real_gpu(rehearsal: bool, device: torch.device) -> torch.device:
    """The first GPU, for what a CPU cannot play."""
    if rehearsal:
        pytest.skip("a CPU cannot play this")
    return device


@pytest.fixture
def second_device(real_gpu: torch.device) -> torch.device:
    """Another GPU than the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU only")
    return torch.device("cuda", 1)


@pytest.fixture(params=["cuda", "triton"])
def gpu_engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, rehearsal: bool, device: torch.device
) -> str:
    """Each backend with kernels for a GPU."""
    name: str = request.param
    if rehearsal and name != "cuda":
        pytest.skip("the rehearsal is about the CUDA kernels only")
    if request.config.getoption("--rehearse-gpu") == "stand-in":
        request.getfixturevalue("fake_cuda")
    elif rehearsal:
        module = request.getfixturevalue("emulated")
        monkeypatch.setattr(_native, "cuda", lambda: module)
        monkeypatch.setattr(_native, "cuda_unavailable", lambda: None)
    reason = cl.explain(device=device, backend=name).reason(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name
