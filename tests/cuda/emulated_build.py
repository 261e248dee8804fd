"""Builds the CUDA sources with a C++ compiler against the emulation in `emulation/`, for tests without a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
EMULATION = [HERE / "emulation" / "emulation.cpp", HERE / "emulation" / "fiber.cpp"]
STATUS = CSRC / "common" / "status.cpp"
INCLUDES = [f"-I{folder}" for folder in (HERE / "emulation", CSRC / "cuda", CSRC / "include")]
# Kernels read vectors through pointers to other types, as CUDA allows; "#pragma unroll" is nvcc's.
DIALECT = ["-std=c++17", "-DCORTEXLOOP_EMULATION", "-fno-strict-aliasing", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class CannotBuildError(RuntimeError):
    """There is no suitable compiler here; the message is one sentence."""


def compiler() -> str:
    """The C++ compiler.

    Raises:
        CannotBuildError: there is none, or none that understands GCC's options.
    """
    if os.name != "posix":
        raise CannotBuildError("the emulation of CUDA needs a POSIX system")
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    if found is None:
        raise CannotBuildError(f"no C++ compiler named {name} to build the emulation of CUDA with")
    return found


def accepts(cxx: str, flag: str, folder: Path) -> bool:
    """Whether an empty program builds with this flag."""
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    return subprocess.run([cxx, flag, str(source), "-o", str(folder / "probe")], capture_output=True).returncode == 0


def build(sources: list[Path], target: Path, extra: list[str] | None = None) -> Path:
    """Compile the sources and the emulation into a shared library, two at a time.

    Args:
        sources: .cpp and .cu files.
        target: the library to write; objects go beside it.
        extra: further compiler options; they replace the default optimisation.

    Raises:
        CannotBuildError: no compiler.
        AssertionError: a source does not compile; the message is the compiler's.
    """
    cxx = compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    if extra is None:
        native = ["-march=native"] if accepts(cxx, "-march=native", target.parent) else []
        extra = ["-O2", *native]
    common = [cxx, *DIALECT, *WARNINGS, *extra, *INCLUDES, "-fPIC", "-fvisibility=hidden"]
    jobs = []
    objects = []
    for source in [*EMULATION, STATUS, *sources]:
        objects.append(str(target.parent / f"{target.name}.{source.name}.o"))
        jobs.append([*common, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    while jobs:
        running = [subprocess.Popen(job, stderr=subprocess.PIPE, text=True) for job in jobs[:2]]
        jobs = jobs[2:]
        for process in running:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
    link = [cxx, *extra, "-shared", *objects, "-pthread", "-o", str(target)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


class Settings:
    """The emulated device of a library that `build` wrote: attributes by name, as in emulation.cpp.

    Examples: `settings["shared_memory"] = 99 * 1024`, `settings["schedule"] = 1`, `settings["launches"]`.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.cortexloop_emulation_get.restype = ctypes.c_longlong
        self._library.cortexloop_emulation_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]

    def __getitem__(self, name: str) -> int:
        value = self._library.cortexloop_emulation_get(name.encode())
        if value < 0:
            raise KeyError(name)
        return int(value)

    def __setitem__(self, name: str, value: int) -> None:
        if not self._library.cortexloop_emulation_set(name.encode(), value):
            raise KeyError(name)
