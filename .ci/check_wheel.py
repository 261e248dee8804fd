"""Check what a built wheel holds: `check_wheel.py WHEEL [MODULE ...]`."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

LIMIT = 20 * 2**20
PACKAGE = "cortexloop/"


def problems(wheel: Path, modules: set[str]) -> list[str]:
    """What is wrong with the wheel, one sentence each.

    Args:
        modules: the compiled modules that it should hold, and no others: `_cpu`, `_cuda`.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    found = []
    if wheel.stat().st_size > LIMIT:
        found.append(f"it is {wheel.stat().st_size / 2**20:.1f} MiB, at most {LIMIT / 2**20:.0f} MiB is wanted")
    compiled = {n for n in names if n.endswith((".so", ".pyd", ".dylib"))}
    if {n.removeprefix(PACKAGE).split(".")[0] for n in compiled} != modules or len(compiled) != len(modules):
        found.append(f"compiled modules should be {sorted(modules) or 'none'}, it holds {sorted(compiled) or 'none'}")
    strangers = [n for n in names if not n.startswith((PACKAGE, "cortexloop-"))]
    if strangers:
        found.append(f"files outside the package: {strangers}")
    modules = {str(p.relative_to("python")) for p in Path("python").rglob("*.py")} | {
        f"{PACKAGE}py.typed",
        f"{PACKAGE}_cpu.pyi",
        f"{PACKAGE}_cuda.pyi",
    }
    missing = sorted(modules - set(names))
    if missing:
        found.append(f"missing: {missing}")
    if not any(n.endswith("licenses/LICENSE") for n in names):
        found.append("the licence is missing")
    return found


def main() -> int:
    """Print the verdict; exit code 1 if something is wrong."""
    wheel = Path(sys.argv[1])
    found = problems(wheel, set(sys.argv[2:]))
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB", *found, sep="\n  ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
