"""Which backend, how many threads, and why."""

from __future__ import annotations

import operator

import numpy as np
import torch

from cortexloop import _native, ops
from cortexloop.bank import ModelBank


def set_num_threads(n: int) -> None:
    """Set how many threads evaluate a bank (process-wide; at the start `CORTEXLOOP_NUM_THREADS`, else all processors).

    Results do not depend on it, bit for bit. Without the C++ kernels this sets torch's number of threads, since torch
    then does the work.

    Raises:
        TypeError: not an integer.
        ValueError: less than 1.
    """
    count = operator.index(n)
    if count < 1:
        raise ValueError(f"the number of threads should be at least 1, got {count}")
    if _native.unavailable() is None:
        _native.set_num_threads(count)
    else:
        torch.set_num_threads(count)


def get_num_threads() -> int:
    """How many threads evaluate a bank."""
    return _native.num_threads() if _native.unavailable() is None else torch.get_num_threads()


def as_torch_dtype(dtype: str | torch.dtype | np.dtype | type) -> torch.dtype:
    """A dtype given by name or as NumPy's or torch's.

    Raises:
        TypeError: torch has no such type.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = np.dtype(dtype).name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch has no type {name}")
    return found


def explain(
    op: str = "bank_forward",
    bank: ModelBank | None = None,
    *,
    batch: int = 1,
    dtype: str | torch.dtype | np.dtype | type = "uint8",
    layout: str = "NHWC",
    precision: str = "exact",
    device: str | torch.device | None = None,
    backend: str = "auto",
) -> ops.Explanation:
    """Which backend would run a call, and why not the others.

    Args:
        op: "bank_forward" (`responses`), "bank_input_gradient" (`input_gradient`), "sample_codes" (all that an
            evolution does to its codes; `dtype` is theirs), or "factorized_readout", "point_readout" (with their
            gradients; `dtype` is that of the features).
        bank: the bank, or None to ask about availability only.
        batch, dtype, layout, precision: the images and options of the call.
        device: where the images are; the bank's device, or the CPU without a bank.
        backend: "auto" or a name, as given to the call.

    Returns:
        An `Explanation`: `.chosen`, `.reason(name)`, `.verdicts`, and a readable `str()`.

    Raises:
        ValueError: unknown operator or backend, or a device that is not the bank's.
        BackendError: no backend can run it.
    """
    if op not in ops.OPS:
        raise ValueError(f"op should be one of {', '.join(map(repr, ops.OPS))}, got {op!r}")
    where = torch.device("cpu" if device is None else device)
    if bank is not None:
        if device is not None and (where.type != bank.device.type or where.index not in (None, bank.device.index)):
            raise ValueError(f"the bank is on {bank.device}, images on {device} could not be shown to it")
        where = bank.device
    problem = ops.Problem(
        op=op,
        device=where.type,
        index=where.index or 0,
        dtype=as_torch_dtype(dtype),
        batch=batch,
        layout=layout,
        precision=precision,
        bank=None if bank is None else ops.bank_shape(bank.table),
    )
    return ops.explain(problem, backend)
