"""The compiled module: what it links to, and what symbols its per-instruction-set objects have."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from project import ROOT

CMAKE = ROOT / "csrc" / "cmake" / "isa.cmake"


def module_file() -> Path:
    spec = importlib.util.find_spec("cortexloop._cpu")
    if spec is None or spec.origin is None:
        pytest.skip("cortexloop was installed without its C++ kernels")
    return Path(spec.origin)


def tool(*names: str) -> str:
    for name in names:
        found = shutil.which(name) if name else None
        if found:
            return found
    pytest.skip(f"none of {', '.join(filter(None, names))} is installed")
    raise AssertionError("unreachable")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_links_to_no_torch_no_cuda_no_openmp():
    """One build serves every torch, and no second OpenMP runtime enters the process."""
    libraries = output(tool("ldd"), str(module_file()))
    assert "libc" in libraries
    assert not re.search(r"libtorch|libc10|libcuda|libcudart|libgomp|libiomp|libomp", libraries), libraries


def flags() -> dict[str, list[str]]:
    """Compiler flags of each instruction set, as isa.cmake gives them to GCC and Clang."""
    values: dict[str, list[str]] = {}
    for line in CMAKE.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\s*set\((isa_\w+) (.*)\)\s*$", line)
        if match:  # the MSVC branch comes first and is overwritten
            words = re.sub(r"\$\{(\w+)\}", lambda m: " ".join(values[m[1]]), match[2]).split()
            values[match[1]] = words
    common = values.pop("isa_common")
    return {name.removeprefix("isa_flags_"): common + extra for name, extra in values.items()} | {"generic": common}


def names() -> list[str]:
    """Instruction sets of this kind of processor; all of them compile on it, whether it can run them or not."""
    compiled = {p.stem.removeprefix("isa_") for p in (ROOT / "csrc" / "cpu").glob("isa_*.cpp")}
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return sorted(n for n in compiled if n == "generic" or (n == "neon") == arm)


@pytest.fixture(scope="module", params=names())
def symbols(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """(type, name) of every symbol of one instruction set's object file, compiled with the build's own flags."""
    compiler, nm = tool(os.environ.get("CXX", ""), "c++", "g++", "clang++"), tool("nm", "llvm-nm")
    target = tmp_path_factory.mktemp("objects") / f"{request.param}.o"
    source = ROOT / "csrc" / "cpu" / f"isa_{request.param}.cpp"
    include = f"-I{ROOT / 'csrc' / 'include'}"
    options = [*flags().get(request.param, flags()["generic"]), "-std=c++17", "-fPIC", include]
    output(compiler, *options, "-c", str(source), "-o", str(target))
    lines = [line.split() for line in output(nm, str(target)).splitlines()]
    return [(line[-2], line[-1]) for line in lines]


def test_no_weak_symbols(symbols: list[tuple[str, str]]):
    """Of a weak symbol the linker keeps one copy, perhaps the one compiled for a newer processor than this."""
    weak = [name for kind, name in symbols if kind in "wWvVu"]
    assert not weak


def test_one_public_symbol(symbols: list[tuple[str, str]]):
    """Everything but the table of kernels has internal linkage."""
    public = [name for kind, name in symbols if kind in "TDRBGSC"]
    assert len(public) == 1, public


def test_kernels_call_no_library(symbols: list[tuple[str, str]]):
    """No allocation, no exceptions, no C++ library: compilers may insert only plain memory functions."""
    outside = {name.lstrip("_") for kind, name in symbols if kind == "U"}
    assert outside <= {"memcpy", "memset", "memmove", "GLOBAL_OFFSET_TABLE_", "stack_chk_fail"}, outside
