"""Builds the CUDA sources with a C++ compiler against the emulation in `emulation/`, for tests without a GPU."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
EMULATION = sorted((HERE / "emulation").glob("*.cpp"))
STATUS = CSRC / "common" / "status.cpp"
MODULE = CSRC / "bindings" / "cuda_module.cpp"
INCLUDES = [f"-I{folder}" for folder in (HERE / "emulation", CSRC / "cuda", CSRC / "include")]
# Kernels read vectors through pointers to other types, as CUDA allows; "#pragma unroll" is nvcc's.
DIALECT = ["-std=c++17", "-DCORTEXLOOP_EMULATION", "-fno-strict-aliasing", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
# Calls __tsan_read4 and the like before every access, and a function for every address that is not as aligned as its
# type; nothing that would merge accesses before. Both are in emulation/races.cpp.
CHECKED = ["-O1", "-g", "-fsanitize=thread,alignment", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"]


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


def build(
    sources: list[Path],
    target: Path,
    options: list[str] | None = None,
    includes: Sequence[str] = (),
    checked: bool = False,
    program: bool = False,
) -> Path:
    """Compile the sources and the emulation into a shared library or a program, two at a time.

    Args:
        sources: .cpp and .cu files.
        target: the file to write; objects go beside it.
        options: of the compiler, in place of the default optimisation.
        includes: further options that say where headers are.
        checked: whether kernels report every load and store, so that races are found (emulation/races.h).

        program: link a program rather than a library.

    Raises:
        CannotBuildError: no compiler.
        AssertionError: a source does not compile; the message is the compiler's.
    """
    cxx = compiler()
    target.parent.mkdir(parents=True, exist_ok=True)
    if options is None:
        native = ["-march=native"] if accepts(cxx, "-march=native", target.parent) else []
        options = ["-O2", *native]
    common = [cxx, *DIALECT, *WARNINGS, *INCLUDES, *includes, "-fPIC", "-fvisibility=hidden"]
    jobs = []
    objects = []
    for source in [*EMULATION, STATUS, *sources]:
        objects.append(str(target.parent / f"{target.name}.{source.name}.o"))
        own = CHECKED if checked and source in sources and source != MODULE else options
        jobs.append([*common, *own, "-x", "c++", "-c", str(source), "-o", objects[-1]])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs):
            assert done.returncode == 0, done.stderr
    link = [cxx, *options, *(() if program else ("-shared",)), *objects, "-pthread", "-o", str(target)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def kernel_sources() -> list[Path]:
    """The kernels and their host side, besides the status functions."""
    return [CSRC / "common" / "model_view.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]


def python_includes() -> list[str]:
    """Where the headers of Python and pybind11 are.

    Raises:
        CannotBuildError: one of them is not installed.
    """
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        raise CannotBuildError(f"no Python.h in {python} (install Python's development files)")
    if importlib.util.find_spec("pybind11") is None:
        raise CannotBuildError("pybind11 is not installed (pip install pybind11)")
    import pybind11

    return [f"-isystem{python}", f"-isystem{pybind11.get_include()}"]


def module_key() -> str:
    """Changes whenever a source, a header or the compiler does."""
    digest = hashlib.sha256(subprocess.run([compiler(), "--version"], capture_output=True).stdout)
    folders = [CSRC / "cuda", CSRC / "common", CSRC / "include", HERE / "emulation"]
    files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]
    for path in [*files, MODULE, Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_module(folder: Path, checked: bool = False) -> Path:
    """The extension module `_cuda` that runs on the CPU; built once for the same sources and the same folder.

    Args:
        folder: where builds are kept.
        checked: as for `build`.

    Raises:
        CannotBuildError: a compiler or header is missing.
        AssertionError: a source does not compile; the message is the compiler's.
    """
    kind = "checked" if checked else "plain"
    target = folder / module_key() / kind / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as own:  # another process may be building the same
            built = build(
                [MODULE, *kernel_sources()], Path(own) / target.name, includes=python_includes(), checked=checked
            )
            built.replace(target)
        for old in folder.iterdir():
            if old.name != target.parents[1].name:
                shutil.rmtree(old, ignore_errors=True)
    return target


def load_module(path: Path) -> ModuleType:
    """Import the file as a module named `_cuda`, without making it known to other imports."""
    # pybind11 keeps modules by their full name, and would return the first one for the second file.
    spec = importlib.util.spec_from_file_location(f"emulated_{path.parent.name}._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Settings:
    """The emulated device of a library that `build` wrote: attributes by name, as in emulation.cpp.

    Examples: `settings["shared_memory"] = 99 * 1024`, `settings["schedule"] = 1`, `settings["launches"]`.
    """

    NAMES = ("devices", "driver", "multiprocessors", "shared_memory", "major", "minor", "free_memory", "schedule")

    def __init__(self, library: str | Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.cortexloop_emulation_get.restype = ctypes.c_longlong
        self._library.cortexloop_emulation_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put the settings that the block changes back at its end."""
        before = {name: self[name] for name in self.NAMES}
        try:
            yield
        finally:
            for name, value in before.items():
                self[name] = value

    def __getitem__(self, name: str) -> int:
        value = self._library.cortexloop_emulation_get(name.encode())
        if value < 0:
            raise KeyError(name)
        return int(value)

    def __setitem__(self, name: str, value: int) -> None:
        if not self._library.cortexloop_emulation_set(name.encode(), value):
            raise KeyError(name)
