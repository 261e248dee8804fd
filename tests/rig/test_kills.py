"""Server and client die at random moments; see `kills.py`, which also runs by hand for a thousand of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_a_hundred_kills_change_nothing():
    script = Path(__file__).with_name("kills.py")
    run = subprocess.run(
        [sys.executable, str(script), "--kills", "100", "--sessions", "5", "--seed", "100"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.stdout, run.stderr
    found = json.loads(run.stdout)
    assert found["differences"] == []
    assert found["kills"] == 100
    assert run.stderr == ""
    assert found["server"] > 40
    assert found["client"] > 10
    assert found["restarts"] > 20  # the others died before they had opened the session
