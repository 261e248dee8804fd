"""The CUDA module, compiled for the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import emulated_build
import pytest


@pytest.fixture(scope="session")
def emulated_cuda(request: pytest.FixtureRequest) -> ModuleType:
    """The module `_cuda` with the kernels' own source, executed on the CPU: "device" addresses are host addresses."""
    folder = request.config.cache.mkdir("emulated_cuda")
    try:
        return emulated_build.load_module(emulated_build.build_module(folder))
    except emulated_build.CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def emulated_checked_cuda(request: pytest.FixtureRequest) -> ModuleType:
    """The same module; its kernels report every access, so that races and misaligned addresses fail the launch."""
    folder = request.config.cache.mkdir("emulated_cuda")
    try:
        return emulated_build.load_module(emulated_build.build_module(folder, checked=True))
    except emulated_build.CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def emulated_device(emulated_cuda: ModuleType) -> Iterator[emulated_build.Settings]:
    """Settings of the device that `emulated_cuda` runs on, put back after the test."""
    settings = emulated_build.Settings(emulated_cuda.__file__)
    with settings.restored():
        yield settings
