"""The compiled modules: what they link to, and what symbols the objects for each instruction set have."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

CMAKE = ROOT / "csrc" / "cmake" / "isa.cmake"


def module_file(name: str) -> Path:
    spec = importlib.util.find_spec(f"cortexloop.{name}")
    if spec is None or spec.origin is None:
        pytest.skip(f"cortexloop was installed without its module {name}")
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


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_links_to_no_torch_no_cuda_no_openmp(name: str):
    """One build serves every torch, loads without a driver, and brings no second OpenMP runtime into the process."""
    libraries = output(tool("ldd"), str(module_file(name)))
    assert "libc" in libraries
    assert not re.search(r"libtorch|libc10|libcuda|libcudart|libnv|libgomp|libiomp|libomp", libraries), libraries


def test_cuda_runtime_stays_private():
    """Torch loads a CUDA runtime of its own: neither may resolve the other's symbols."""
    path = str(module_file("_cuda"))
    names = output(tool("nm", "llvm-nm"), "-D", path).split()
    assert "PyInit__cuda" in names
    assert not [n for n in names if re.match(r"_*cu(da|[A-Z])|fatBinary", n)]


def test_cuda_module_loads_without_a_gpu():
    """In a process without torch; a reason is given exactly where there is no device."""
    module_file("_cuda")
    code = """if True:
        import sys
        from importlib.util import module_from_spec, spec_from_file_location
        spec = spec_from_file_location("_cuda", sys.argv[1])
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        print(module.device_count(), module.unavailable() != "", module.emulated())
    """
    count, reason, emulated = output(sys.executable, "-c", code, str(module_file("_cuda"))).split()
    assert (count == "0") == (reason == "True")
    assert emulated == "False"


def test_every_cuda_source_is_built():
    listed = re.findall(r"csrc/cuda/(\w+\.cu)\b", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    assert listed == sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu"))


def test_architectures_are_those_that_are_checked():
    """Of the build and of .ci/check_cuda.py."""
    cmake = (ROOT / "csrc" / "cmake" / "cuda.cmake").read_text(encoding="utf-8")
    macro = cmake.split("macro(cortexloop_choose_architectures)")[1].split("endmacro")[0]
    # The first line of the macro and the last of its branches are what the newest compiler gets.
    lines = [line for line in macro.splitlines() if "-real" in line or "-virtual" in line]
    built = re.findall(r"\d+-(?:real|virtual)", lines[0] + lines[-1])
    check = (ROOT / ".ci" / "check_cuda.py").read_text(encoding="utf-8")
    names = re.search(r"ARCHITECTURES = \((.*)\)", check)
    ptx = re.search(r'PTX = "compute_(\d+)"', check)
    assert names is not None
    assert ptx is not None
    assert built == [f"{n}-real" for n in re.findall(r"sm_(\d+)", names[1])] + [f"{ptx[1]}-virtual"]


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
