"""Compile the CUDA kernels for every architecture and read what the assembler says about them.

`check_cuda.py` compiles csrc/cuda/*.cu with warnings as errors, prints registers, shared memory, stack frame and spills
of every kernel on every architecture, and fails on a stack frame or a spill: both mean that numbers meant for registers
travel through memory. `check_cuda.py --nvcc FOLDER` prints the path of a CUDA compiler, installing NVIDIA's wheels into
FOLDER where this machine has none. Needs no GPU and no driver.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
# As in csrc/cmake/cuda.cmake; a test compares.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PTX = "compute_100"
OPTIONS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "--Werror=all-warnings"),
    *("-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", "-Xptxas=-v", f"-I{CUDA}", f"-I{ROOT / 'csrc' / 'include'}"),
]
PARTS = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")  # they fit only those of their own release
WHEELS = tuple(f"nvidia-{part}==13.0.*" for part in PARTS)
JOBS = 2  # a job needs up to a gigabyte


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one architecture: registers a thread, bytes otherwise."""

    kernel: str
    architecture: str
    registers: int
    shared: int  # static; what a launch asks for comes on top
    stack: int
    spill_stores: int
    spill_loads: int


def find_nvcc() -> str | None:
    """The CUDA compiler that CMake would take, or None."""
    named = os.environ.get("CUDACXX")
    if named:
        return named
    folders = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def install_nvcc(folder: Path) -> str:
    """Install NVIDIA's compiler wheels into a folder of their own, and return the path of nvcc.

    Raises:
        SystemExit: it cannot be installed; the message is one sentence.
    """
    # Not into the environment: torch has its own opinion on the version of CUDA's run-time wheel.
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), *WHEELS]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob("nvidia/*/bin/nvcc"))
    if done.returncode != 0 or not found:
        raise SystemExit(
            "the CUDA kernels cannot be checked: no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda, and "
            f"`pip install {' '.join(WHEELS)}` failed: {done.stderr.strip().splitlines()[-1:] or 'no nvcc inside'}"
        )
    libraries = found[0].parents[1] / "lib64"  # where this nvcc looks for what the wheels have in lib
    if not libraries.exists():
        libraries.symlink_to("lib")
    return str(found[0])


def compile_for(nvcc: str, source: Path, architecture: str, folder: Path) -> tuple[bool, str]:
    """Compile one file for one architecture: (whether that worked, everything that the compiler printed)."""
    virtual = architecture.replace("sm_", "compute_")
    target = folder / f"{source.stem}.{architecture}.o"
    generate = f"-gencode=arch={virtual},code={architecture}"
    command = [nvcc, *OPTIONS, generate, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def architectures(source: Path) -> tuple[str, ...]:
    """All, PTX included, for a file with kernels; one for a file of the host, where they make no difference."""
    return (*ARCHITECTURES, PTX) if "__global__" in source.read_text(encoding="utf-8") else ARCHITECTURES[:1]


def short_names(mangled: list[str]) -> dict[str, str]:
    """Names without namespaces and parameters, as `bank_fwd_kernel<Fast, 4>`, where c++filt is at hand."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not mangled:
        return {name: name for name in mangled}
    lines = subprocess.run([tool, *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for name, line in zip(mangled, lines, strict=True):
        text = re.sub(r"\(anonymous namespace\)::|_INTERNAL_\w+::|\b\w+::|^void ", "", line)
        text = re.sub(r"\((?:int|bool|unsigned)\)", "", text)
        short[name] = re.sub(r"\(.*$", "", text)
    return short


def parse(output: str, architecture: str) -> list[Usage]:
    """What `ptxas -v` says, kernel by kernel; functions that were not inlined count as well."""
    number = r"(\d+) bytes "
    properties = re.compile(
        rf"Function properties for (\S+)\s+{number}stack frame, {number}spill stores, {number}spill loads"
    )
    found = []
    for match in properties.finditer(output):
        rest = output[match.end() :].split("Function properties for")[0]
        used = re.search(r"Used (\d+) registers", rest)
        shared = re.search(r"(\d+) bytes smem", rest)
        registers, static = (int(m[1]) if m else 0 for m in (used, shared))
        found.append(Usage(match[1], architecture, registers, static, int(match[2]), int(match[3]), int(match[4])))
    return found


def table(usages: list[Usage]) -> str:
    """One line per kernel, one column per architecture."""
    names = short_names(sorted({u.kernel for u in usages}))
    by_name: dict[str, dict[str, str]] = {}
    for u in usages:
        cell = f"{u.registers} / {u.shared} / {u.stack} / {u.spill_stores + u.spill_loads}"
        by_name.setdefault(names[u.kernel], {})[u.architecture] = cell
    width = max(map(len, by_name))
    lines = ["registers / bytes of static shared memory / of stack / spilled"]
    lines.append(" " * width + "".join(f"  {a:>16}" for a in ARCHITECTURES))
    for name, cells in sorted(by_name.items()):
        lines.append(f"{name:{width}}" + "".join(f"  {cells.get(a, '-'):>16}" for a in ARCHITECTURES))
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 if something does not compile, warns, spills or needs a stack."""
    if sys.argv[1:2] == ["--nvcc"]:
        print(find_nvcc() or install_nvcc(Path(sys.argv[2])))
        return 0
    sources = sorted(CUDA.glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        nvcc = find_nvcc() or install_nvcc(Path(folder) / "nvcc")
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release .*", version)
        print(f"{nvcc}: {release[0] if release else version}")
        jobs = [(source, a) for source in sources for a in architectures(source)]
        with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            results = list(pool.map(lambda job: compile_for(nvcc, *job, Path(folder)), jobs))
    failed: dict[Path, tuple[list[str], str]] = {}  # architectures, the first one's output
    usages = []
    for (source, architecture), (worked, output) in zip(jobs, results, strict=True):
        if not worked:
            failed.setdefault(source, ([], output))[0].append(architecture)
        elif architecture != PTX:
            usages += parse(output, architecture)
    complaints = [f"{source.name} for {', '.join(where)}:\n{output}" for source, (where, output) in failed.items()]
    if not complaints and not usages:
        complaints.append("ptxas reported no kernel at all")
    if usages:
        print(table(usages))
    bad = [u for u in usages if u.stack or u.spill_stores or u.spill_loads]
    names = short_names(sorted({u.kernel for u in bad}))
    complaints += [
        f"{names[u.kernel]} on {u.architecture}: {u.stack} bytes of stack, {u.spill_stores} of spill stores, "
        f"{u.spill_loads} of spill loads; none is wanted"
        for u in bad
    ]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
