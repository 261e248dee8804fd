"""The direction of dependencies: imports by their syntax tree, includes by their text, against one table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from project import PACKAGE, ROOT

# Which rooms of the package each room may import; itself is always allowed. A room is a folder or a module.
LEAVES = {"weights", "packing", "bank", "images", "textbook", "_device"}
ALLOWED: dict[str, set[str]] = {
    "weights": set(),
    "packing": {"weights"},
    "images": {"weights"},
    "textbook": {"weights"},
    # `io` and `models` only behind ModelBank.load, .save and .from_modules, when they are called
    "bank": {"weights", "packing", "io", "models"},
    "_device": set(),
    "_native": {"weights", "packing", "bank", "_device"},
    "io": {"weights"},
    "models": {"weights"},
    "metrics": set(),
    "backends": {*LEAVES, "_native"},
    "ops": {*LEAVES, "backends"},
    # the number of threads is a property of the compiled module
    "functional": {*LEAVES, "ops", "_native"},
    # a layer of any network, or of a bank
    "features": {*LEAVES, "functional"},
    "readouts": {*LEAVES, "functional"},
    "regression": {*LEAVES, "functional"},
    "factor": {*LEAVES, "functional", "features", "readouts", "regression", "metrics", "io"},
    "attribution": {*LEAVES, "functional", "features"},
    # Plan binds pointers once instead of going through the operators
    "realtime": {
        *LEAVES,
        "functional",
        "ops",
        "_native",
        "io",
        "metrics",
        "evolve",
        "synthesis",
        "screening",
        "features",
        "readouts",
        "regression",
        "factor",
        "attribution",
    },
    # whatever carries messages between a session and a rig
    "rig": {
        *LEAVES,
        "realtime",
        "io",
        "functional",
        "evolve",
        "synthesis",
        "screening",
        "features",
        "factor",
        "_native",
    },
    "synthesis": {*LEAVES, "functional"},
    "screening": {*LEAVES, "functional"},
    # the counter-based random numbers and sums of whole populations are operators without a functional form
    "evolve": {*LEAVES, "functional", "ops", "io"},
    "testing": {*LEAVES, "functional", "models"},
    "cli": {
        *LEAVES,
        "io",
        "models",
        "metrics",
        "functional",
        "ops",
        "realtime",
        "rig",
        "synthesis",
        "screening",
        "evolve",
        "features",
        "readouts",
        "regression",
        "factor",
        "attribution",
        "testing",
        "_native",
        "__init__",
    },
    "__main__": {"cli"},
    "__init__": {
        *LEAVES,
        "functional",
        "ops",
        "realtime",
        "rig",
        "io",
        "models",
        "metrics",
        "synthesis",
        "screening",
        "evolve",
        "features",
        "readouts",
        "regression",
        "factor",
        "attribution",
        "testing",
    },
}

# Packages from elsewhere that only some rooms may import; NumPy and the standard library are open to all.
FOREIGN: dict[str, set[str]] = {
    "torch": {
        "bank", "images", "_device", "_native", "models", "backends", "ops", "functional", "realtime", "synthesis",
        "evolve", "features", "readouts", "regression", "factor", "attribution", "testing", "cli", "rig",
    },
    "h5py": {"io", "rig"},
    "msgspec": {"realtime", "rig", "cli"},
    "zmq": {"rig"},
    "filelock": {"realtime"},
    "tomli": {"rig"},
    "safetensors": {"io"},
    "onnx": {"io"},
    "pyarrow": {"io", "cli", "rig"},
    "PIL": {"io", "cli", "rig"},
    "typer": {"cli", "__main__"},
    "rich": {"cli", "__main__"},
    "matplotlib": {"cli"},
    "triton": {"backends"},
}  # fmt: skip


def room(path: Path) -> str:
    """The folder or module of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all a module imports, at whatever depth, except for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["cortexloop", *path.relative_to(PACKAGE).parent.parts]
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of the package's own rooms that a module imports; "__init__" stands for the public names."""
    rooms = {room(p) for p in PACKAGE.rglob("*.py")} | {"_cpu", "_cuda"}
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] == "cortexloop":
            yield line, parts[1] if len(parts) > 1 and parts[1] in rooms else "__init__"


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_in_the_table():
    assert {room(path) for path in MODULES} <= ALLOWED.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    here = room(path)
    allowed = ALLOWED[here] | {here} | ({"_cpu", "_cuda"} if here == "_native" else set())
    wrong = [f"{path.name}:{line} imports {there}" for line, there in rooms_imported(path) if there not in allowed]
    assert not wrong, f"{here} may import {sorted(allowed)} only: {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_rooms(path: Path):
    here = room(path)
    wrong = [
        f"{path.name}:{line} imports {name}"
        for line, name in imported(path)
        if here not in FOREIGN.get(name.split(".")[0], {here})
    ]
    assert not wrong


def test_only_native_names_the_compiled_module():
    """Also not by a string that importlib would take."""
    pattern = re.compile(r"""import_module\(\s*f?["']\.?(?:cortexloop\.)?_(?:cpu|cuda)["']""")
    users = {room(path) for path in MODULES if pattern.search(path.read_text(encoding="utf-8"))}
    assert users <= {"_native"}


# Where each folder of csrc may include from. Kernels know neither Python nor torch; only bindings know pybind11.
INCLUDES = {
    "include": {"include"},
    "common": {"include", "common"},
    "cpu": {"include", "common", "cpu"},
    "cuda": {"include", "common", "cuda"},
    "bindings": {"include", "bindings"},
}


def csrc_files() -> list[Path]:
    return sorted(p for suffix in ("*.h", "*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(suffix))


@pytest.mark.parametrize("path", csrc_files(), ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_includes_point_one_way(path: Path):
    here = path.relative_to(ROOT / "csrc").parts[0]
    text = path.read_text(encoding="utf-8")
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
        assert not re.match(r"torch|ATen|c10|omp\.h", name), f"{path.name} includes {name}"
        if re.match(r"pybind11|Python\.h", name):
            assert here == "bindings", f"{path.name} includes {name}; only bindings know Python"
        if quote == '"':
            beside = (path.parent / name).resolve()
            if name == "emulation.h":  # CUDA's names for a C++ compiler; supplied by tests/cuda
                continue
            target = beside if beside.is_file() else ROOT / "csrc" / "include" / name
            assert target.is_file(), f"{path.name} includes {name}, which is neither beside it nor in csrc/include"
            there = target.relative_to(ROOT / "csrc").parts[0]
            assert there in INCLUDES[here], (
                f"{here} may include from {sorted(INCLUDES[here])}, not from {there} ({name})"
            )


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.h")), ids=lambda p: p.name)
def test_kernels_use_no_library_templates(path: Path):
    """std:: templates become weak symbols, one per instruction set, of which the linker keeps any."""
    names = set(re.findall(r"\bstd::(\w+)", path.read_text(encoding="utf-8")))
    assert {name for name in names if not re.fullmatch(r"u?int\d+_t|size_t|ptrdiff_t|memcpy|memset", name)} == set()
