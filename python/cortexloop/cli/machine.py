"""Facts about the installation and the machine, for `doctor` and for the headers of reports and benchmarks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

import cortexloop as cl

REQUIRED = ("numpy", "torch", "safetensors", "pillow", "matplotlib", "jinja2", "typer", "rich")

OPTIONAL = {
    "pyarrow": 'writing .parquet tables: pip install "cortexloop[parquet]"',
    "onnx": 'exporting models to ONNX: pip install "cortexloop[onnx]"',
    "onnxruntime": 'comparing speed with ONNX Runtime: pip install "cortexloop[bench]"',
    "openvino": 'comparing speed with OpenVINO: pip install "cortexloop[bench]"',
    "scipy": 'checks of the test suite: pip install "cortexloop[test]"',
}
"""Packages that only some need, and what for."""

VARIABLES = {
    "CORTEXLOOP_ISA": "instruction set to force",
    "CORTEXLOOP_NUM_THREADS": "threads at the start",
    "CORTEXLOOP_V4_DATA": "folder of the V4 data pack, for tests",
}


def processor() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Processors that were busy on average over the last minute; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def version_of(package: str) -> str | None:
    """The installed version; None if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def kernels() -> dict[str, Any]:
    """State of the compiled kernels: `reason` (None if present), `isa` in force, `isas` available, `fast` supported."""
    from cortexloop import _native

    reason = _native.unavailable()
    if reason is not None:
        return {"reason": reason, "isa": None, "isas": [], "fast": False}
    return {"reason": None, "isa": _native.isa(), "isas": _native.isas(), "fast": _native.fast_supported()}


def gpu() -> dict[str, Any]:
    """GPUs as torch sees them, and the state of the CUDA kernels: `reason` (None if built and able to reach a GPU).

    Keys: torch_cuda (the CUDA that torch was built with, or None), triton (its version, or None), reason, devices
    (name, compute capability, memory in bytes, and why the kernels do not run there, or None).
    """
    from cortexloop import _native
    from cortexloop._native import gpu as kernels_on_gpu

    reason = _native.cuda_unavailable()
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "unsupported": kernels_on_gpu.device_unsupported(i) if reason is None else reason,
            }
        )
    return {"torch_cuda": torch.version.cuda, "triton": version_of("triton"), "reason": reason, "devices": found}


def _verdicts(op: str, device: str) -> list[dict[str, Any]]:
    return [
        {"backend": v.backend, "chosen": v.chosen, "reason": v.reason, "note": v.note}
        for v in cl.explain(op, device=device).verdicts
    ]


def facts() -> dict[str, Any]:
    """Everything `doctor` prints, as plain data."""
    ops = ("bank_forward", "bank_input_gradient")
    return {
        "cortexloop": cl.__version__,
        "location": str(Path(cl.__file__).parent),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version_of(name) for name in REQUIRED},
        "optional": {name: {"version": version_of(name), "purpose": why} for name, why in OPTIONAL.items()},
        "processor": processor(),
        "processors": processors(),
        "threads": cl.get_num_threads(),
        "kernels": kernels(),
        "gpu": gpu(),
        "backends": {op: _verdicts(op, "cpu") for op in ops},
        "backends_on_a_gpu": {op: _verdicts(op, "cuda") for op in ops},
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }
