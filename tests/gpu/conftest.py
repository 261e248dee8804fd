"""Tests that need a GPU; without one they are skipped, with the reason.

`--rehearse-gpu` runs them on the CPU with a stand-in for the compiled kernels: what they find is mistakes in the tests.
"""

from __future__ import annotations

import pytest
import torch

import cortexloop as cl


@pytest.fixture(scope="session")
def rehearsal(request: pytest.FixtureRequest) -> bool:
    """Whether the CPU plays the GPU."""
    return bool(request.config.getoption("--rehearse-gpu"))


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
def gpu_engine(request: pytest.FixtureRequest, rehearsal: bool, device: torch.device) -> str:
    """Each backend with kernels for a GPU."""
    name: str = request.param
    if rehearsal:
        if name != "cuda":
            pytest.skip("the rehearsal has a stand-in for the CUDA kernels only")
        request.getfixturevalue("fake_cuda")
    reason = cl.explain(device=device, backend=name).reason(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name
