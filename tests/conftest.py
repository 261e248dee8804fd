"""Fixtures shared by all tests: the engines of this machine, the data pack, one seeded generator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import _native
from fake_cuda import FakeCuda

NO_KERNELS = _native.unavailable()
ISAS = _native.isas() if NO_KERNELS is None else ["any"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse-gpu",
        choices=("stand-in", "emulated"),
        help="run tests/gpu on the CPU: with a stand-in for the compiled kernels, to find mistakes in those tests, "
        "or with the kernels' own source, emulated as in tests/cuda (minutes)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if NO_KERNELS is not None:
        # Without the C++ kernels every call says so; the suite is to pass on such an installation too.
        config.addinivalue_line(
            "filterwarnings", "ignore:the slower 'reference' backend is used:cortexloop.BackendWarning"
        )


def pytest_report_header(config: pytest.Config) -> str:
    if NO_KERNELS is not None:
        return f"cortexloop {cl.__version__}: reference backend only ({NO_KERNELS})"
    return f"cortexloop {cl.__version__}: instruction sets {', '.join(ISAS)}"


@pytest.fixture
def rng() -> np.random.Generator:
    """One seed for every test."""
    return np.random.default_rng(20231122)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine, in force for the test."""
    if NO_KERNELS is not None:
        pytest.skip(f"cpu: {NO_KERNELS}")
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture
def kernels() -> None:
    """Skip, with the reason, where there are no C++ kernels."""
    if NO_KERNELS is not None:
        pytest.skip(f"cpu: {NO_KERNELS}")


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The "cuda" backend on host memory: its Python is the real one, the compiled module a stand-in."""
    module = FakeCuda()
    monkeypatch.setattr(_native, "cuda", lambda: module)
    monkeypatch.setattr(_native, "cuda_unavailable", lambda: module.unavailable() or None)
    return module


@pytest.fixture(params=["reference", *(f"cpu-{name}" for name in ISAS)])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend; the C++ one comes once per instruction set."""
    name, _, isa_name = request.param.partition("-")
    if name == "reference":
        yield name
        return
    if NO_KERNELS is not None:
        pytest.skip(f"cpu: {NO_KERNELS}")
    before = _native.isa()
    _native.set_isa(isa_name)
    yield name
    _native.set_isa(before)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Put the number of threads back after the test."""
    before = cl.get_num_threads()
    yield
    cl.set_num_threads(before)


@pytest.fixture(scope="session")
def v4_data() -> Path:
    """The folder of published V4 models, images and reference predictions."""
    default = Path(__file__).parents[2] / "shared" / "data" / "v4_compact"
    path = Path(os.environ.get("CORTEXLOOP_V4_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no V4 data pack at {path}; set CORTEXLOOP_V4_DATA to its folder")
    return path


@pytest.fixture(scope="session")
def small_bank() -> cl.ModelBank:
    """Three models of 17 x 13 images, of different shapes."""
    from cortexloop.testing import Case, ModelShape, random_inputs

    shapes = (
        ModelShape((5, 7), (5, 3), (1, 2)),
        ModelShape((3,), (3,), (2,)),
        ModelShape((4, 6, 3), (5, 5, 1), (1, 2, 1)),
    )
    return random_inputs(Case("small", 1, 17, 13, shapes)).bank


@pytest.fixture
def small_images(rng: np.random.Generator) -> torch.Tensor:
    """Four uint8 images for `small_bank`, [4, 17, 13, 3]."""
    return torch.from_numpy(rng.integers(0, 256, size=(4, 17, 13, 3), dtype=np.uint8))
