"""Where the project's files are, for tests that read them."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "cortexloop"


@cache
def tracked_files() -> tuple[Path, ...]:
    """Files under version control that exist; skips the test in an unpacked archive."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is unknown")
    done = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return tuple(p for name in done.stdout.split("\0") if name and (p := ROOT / name).is_file())
