"""Triton kernels: for GPUs without a compiled CUDA module, and other vendors'. Triton is imported when first needed."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cortexloop.backends.registry import Problem
from cortexloop.backends.triton.layout import unsupported_table

if TYPE_CHECKING:
    from cortexloop.backends.triton.bank import BankOperators


@functools.cache
def _operators() -> BankOperators:
    from cortexloop.backends.triton.bank import BankOperators

    return BankOperators()


@functools.cache
def _device_reason(device: str, index: int, what: str = "images") -> str | None:
    """None where Triton runs kernels on this device, else one sentence why not. `what` is on the device."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # any folder of that name on the path is found, too
        return "Triton is not installed; pip install cortexloop[triton]"
    from cortexloop.backends.triton.bank import INTERPRETED

    if INTERPRETED and device in ("cpu", "cuda"):
        return None
    if device != "cuda":
        return f"the Triton kernels work in GPU memory, the {what} are on {device}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # anything that Triton needs of this machine: a C compiler, headers, a driver
        return f"Triton does not work here: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


class TritonBackend:
    """The bank's operators, and streaming moments, on a GPU."""

    name = "triton"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.op == "feature_moments":
            reason = _device_reason(problem.device, problem.index, "features")
            if reason is None:
                from cortexloop.backends.triton.moments import moments_unsupported

                reason = moments_unsupported(problem.dtype)
            return reason
        if problem.op not in ("bank_forward", "bank_input_gradient"):
            return f"there is no Triton kernel for {problem.op}"
        reason = _device_reason(problem.device, problem.index)
        if reason is not None:
            return reason
        if problem.dtype not in (torch.uint8, torch.float32):
            dtype = str(problem.dtype).removeprefix("torch.")
            return f"the Triton kernels take uint8 and float32 images, these are {dtype}"
        if problem.bank is None or not problem.bank.table:
            return None
        table = np.frombuffer(problem.bank.table, dtype=np.int64)
        return unsupported_table(table.reshape(problem.bank.models, problem.bank.columns))

    def note(self, problem: Problem) -> str | None:
        if problem.op == "bank_forward" and problem.precision == "fast":
            return '"fast": products of float16 values summed in float32'
        return None

    def bank_forward(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str
    ) -> Tensor:
        return _operators().bank_forward(images, weights, table, pairs, layout, precision)

    def bank_input_gradient(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        return _operators().bank_input_gradient(images, weights, table, pairs, cotangent, layout)

    def feature_moments(
        self,
        features: Tensor,
        weights: Tensor | None,
        centred: Tensor,
        shift: Tensor,
        before: float,
        batch: float,
        mean: Tensor,
        m2: Tensor,
        cross: Tensor,
    ) -> None:
        from cortexloop.backends.triton.moments import feature_moments

        feature_moments(features, weights, centred, shift, before, batch, mean, m2, cross)


BACKEND = TritonBackend()
