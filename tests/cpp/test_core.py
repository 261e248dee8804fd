"""The C++ core on its own: exact problems solved by a program built with sanitizers, and a build for every target."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cortexloop.testing import CASES, PAIRED_CASES
from problem_files import write_problem

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HERE = Path(__file__).resolve().parent
HOST = [
    "common/parallel.cpp",
    "common/status.cpp",
    "cpu/bank.cpp",
    "cpu/dispatch.cpp",
    "cpu/evolution.cpp",
    "cpu/moments.cpp",
    "cpu/point_readout.cpp",
    "cpu/readout.cpp",
    "common/model_view.cpp",
]
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-Wno-maybe-uninitialized"]
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
SANITIZERS = {
    "address,undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler on this machine")
    return found


def links(cxx: str, flags: list[str], folder: Path) -> bool:
    """Whether an empty program builds with these flags (a sanitizer's run-time library may be missing)."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    return subprocess.run([cxx, *flags, str(source), "-o", str(folder / "probe")], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("problems")
    paths = []
    for paired, cases in ((False, CASES), (True, PAIRED_CASES)):
        for i, case in enumerate(cases):
            path = folder / f"{'paired' if paired else 'product'}{i}.bin"
            write_problem(path, case, paired)
            paths.append(str(path))
    return paths


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_core_is_clean_under_sanitizers(sanitizer: str, problems: list[str], tmp_path: Path) -> None:
    """No out-of-bounds access, undefined behaviour, leak or data race, on problems whose bits are known."""
    cxx = compiler()
    flags = SANITIZERS[sanitizer]
    if not links(cxx, flags, tmp_path):
        pytest.skip(f"{cxx} has no working -fsanitize={sanitizer} here")
    # Kernels at -O1: sanitizers see the same accesses, and the build stays short. GCC warns falsely in sanitized code.
    common = [cxx, "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-w", *flags, f"-I{CSRC / 'include'}"]
    isas = [name for name, isa_flags in FLAGS.items() if links(cxx, isa_flags, tmp_path)]
    jobs = []
    objects = []
    for name in isas:
        objects.append(str(tmp_path / f"{name}.o"))
        jobs.append([*common, *FLAGS[name], "-c", str(CSRC / f"cpu/isa_{name}.cpp"), "-o", objects[-1]])
    running = [subprocess.Popen(job, stderr=subprocess.PIPE, text=True) for job in jobs]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = tmp_path / "core_check"
    defines = [f"-DCORTEXLOOP_HAVE_{name.upper()}" for name in isas if name != "generic"]
    checks = [HERE / "core_check.cpp", HERE / "readout_check.cpp"]
    sources = [str(path) for path in (*(CSRC / name for name in HOST), *checks)]
    build = [*common, *defines, *sources, *objects, "-pthread", "-o", str(program)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # One problem suffices to look for races; out-of-bounds accesses depend on the shape.
    chosen = problems if sanitizer != "thread" else problems[:2] + problems[-1:]
    done = subprocess.run([str(program), *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout


def test_kernels_compile_for_neon(tmp_path: Path) -> None:
    """The Arm kernels are built wherever a cross compiler is at hand."""
    cxx = shutil.which("aarch64-linux-gnu-g++")
    if cxx is None:
        pytest.skip("no aarch64-linux-gnu-g++ on this machine (Debian: g++-aarch64-linux-gnu)")
    command = [cxx, "-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", *WARNINGS]
    done = subprocess.run(
        [*command, f"-I{CSRC / 'include'}", "-c", str(CSRC / "cpu/isa_neon.cpp"), "-o", str(tmp_path / "neon.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
