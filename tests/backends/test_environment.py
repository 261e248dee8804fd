"""The environment variables that set the kernels: taken at their word or refused in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "from cortexloop import _native; print(_native.isa(), _native.num_threads())"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_settings_are_taken(kernels: None) -> None:
    done = run("-c", SHOW, CORTEXLOOP_ISA="generic", CORTEXLOOP_NUM_THREADS="3")
    assert done.stdout.split() == ["generic", "3"], done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CORTEXLOOP_ISA", "sse9"),
        ("CORTEXLOOP_ISA", ""),
        ("CORTEXLOOP_NUM_THREADS", "many"),
        ("CORTEXLOOP_NUM_THREADS", "0"),
        ("CORTEXLOOP_NUM_THREADS", "-1"),
        ("CORTEXLOOP_NUM_THREADS", "99999"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(kernels: None, variable: str, value: str) -> None:
    done = run("-c", SHOW, **{variable: value})
    assert done.returncode == 1
    assert f"SettingError: {variable} should be" in done.stderr
    assert repr(value) in done.stderr
    told = run("-m", "cortexloop", "doctor", **{variable: value})
    assert told.returncode == 2
    assert told.stderr.startswith(f"error: {variable} should be")
    assert "Traceback" not in told.stderr
