"""Threads, imports and public names."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import cortexloop as cl


def test_number_of_threads(restore_threads: None) -> None:
    cl.set_num_threads(1)
    assert cl.get_num_threads() == 1
    cl.set_num_threads(2)
    assert cl.get_num_threads() == 2


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_wrong_number_of_threads(n: Any, error: type[Exception]) -> None:
    before = cl.get_num_threads()
    with pytest.raises(error):
        cl.set_num_threads(n)
    assert cl.get_num_threads() == before


def test_use_backend_holds_for_one_thread_only() -> None:
    seen: list[str] = []
    with cl.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(cl.explain().chosen))
        thread.start()
        thread.join()
        assert cl.explain().chosen == "reference"
    assert seen == [cl.explain().chosen]


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "uint8", torch.uint8])
def test_explain_takes_dtypes_of_any_kind(dtype: Any) -> None:
    assert cl.explain(dtype=dtype).chosen in ("cpu", "reference")


def test_explain_of_float64() -> None:
    explanation = cl.explain(dtype="float64")
    assert explanation.chosen == "reference"
    assert explanation.reason("cpu") is not None


def test_explain_refuses_another_device_than_the_bank(small_bank: cl.ModelBank) -> None:
    with pytest.raises(ValueError, match="the bank is on cpu, images on cuda could not be shown to it"):
        cl.explain(bank=small_bank, device="cuda")
    assert cl.explain(bank=small_bank, device="cpu").chosen in ("cpu", "reference")


def test_import_loads_nothing_that_only_some_need() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import cortexloop as cl; new = set(sys.modules) - before;"
        "heavy = [m for m in ('h5py', 'matplotlib', 'typer', 'rich', 'safetensors', 'PIL', 'scipy', 'onnx', "
        "'cortexloop._cpu', 'cortexloop._cuda', 'triton', 'cortexloop.models', 'cortexloop.testing') if m in new];"
        "assert not heavy, heavy; cl.models; cl.metrics; assert 'cortexloop.models' in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_public_names_exist_and_are_documented() -> None:
    for name in cl.__all__:
        value = getattr(cl, name)
        assert name in ("IMAGE_MEAN", "__version__") or value.__doc__, name
    assert {"io", "models", "metrics", "screening", "synthesis", "testing"} <= set(dir(cl))
    with pytest.raises(AttributeError, match="no attribute 'respones'"):
        _ = cl.respones  # type: ignore[attr-defined]
