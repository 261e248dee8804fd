"""`import cortexloop` is light: it loads no GPU backend, no file formats, no plotting, no command line."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = ("cortexloop._cuda", "triton", "h5py", "matplotlib", "typer", "rich", "onnx", "onnxruntime", "pyarrow", "scipy")

SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import cortexloop
elapsed = time.perf_counter() - start
print(json.dumps({"modules": sorted(set(sys.modules) - before), "seconds": elapsed}))
"""


def test_import_is_light(record_property):
    """The time, which a busy machine stretches, is recorded but not judged."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(done.stdout)
    record_property("import_seconds", result["seconds"])
    loaded = {name for name in HEAVY if any(m == name or m.startswith(f"{name}.") for m in result["modules"])}
    assert not loaded
