"""The client is one file for other computers: old Pythons, and nothing but pyzmq."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cortexloop.rig
from cortexloop.rig.client import RigClient

FILE = Path(cortexloop.rig.__file__).parent / "client.py"


def test_it_is_python_3_8_with_nothing_but_pyzmq_and_perhaps_numpy():
    tree = ast.parse(FILE.read_text(encoding="utf-8"), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"zmq", "numpy"}


def test_it_runs_alone(tmp_path: Path):
    (tmp_path / "client.py").write_bytes(FILE.read_bytes())
    program = "import client; print(client.RigClient('tcp://127.0.0.1:1', heartbeat=None).address)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "tcp://127.0.0.1:1", done.stderr
    assert "cortexloop" not in done.stderr


@pytest.mark.parametrize(
    "bad", ["127.0.0.1:5557", "tcp://", "tcp://host", "http://host:80", "tcp://host:99999", "tcp-raw://5557"]
)
def test_addresses_are_checked_at_once(bad: str):
    with pytest.raises(ValueError, match="an address looks like"):
        RigClient(bad)
