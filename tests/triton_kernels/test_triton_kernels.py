"""The Triton kernels without a GPU: interpreted, and compiled ahead of time. Each group is a pytest process of its own,
since TRITON_INTERPRET has to be set before the kernels are imported."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GROUPS = {
    "interpreted-exact": ("interpreted_kernels.py", ["-k", "exact"], True),
    "interpreted-others": ("interpreted_kernels.py", ["-k", "not exact"], True),
    "compiled": ("compiled_kernels.py", [], False),
    "interpreted-moments": ("interpreted_moments.py", [], True),
    "compiled-moments": ("compiled_moments.py", [], False),
}
NO_TESTS = int(pytest.ExitCode.NO_TESTS_COLLECTED)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """All groups, running side by side."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; pip install cortexloop[triton]")
    folder = tmp_path_factory.mktemp("triton")
    running = {}
    for name, (file, options, interpreted) in GROUPS.items():
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        if interpreted:
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-rPs", "-p", "no:cacheprovider", str(HERE / file), *options]
        with (folder / f"{name}.txt").open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        running[name] = process, folder / f"{name}.txt"
    yield running
    for process, _ in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("group", GROUPS)
def test_kernels(processes: dict[str, tuple[subprocess.Popen[str], Path]], group: str) -> None:
    process, output = processes[group]
    code = process.wait(timeout=1200)
    text = output.read_text()
    if code == NO_TESTS:
        pytest.skip(" ".join(re.findall(r"^SKIPPED.*?: (.*)$", text, re.MULTILINE)) or text)
    print(text)
    assert code == 0, text
