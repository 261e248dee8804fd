"""Model bank on the CPU: allocate the outputs, hand the addresses to C++."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cortexloop import _native
from cortexloop.backends.registry import Problem


class BankOperators:
    """Fused kernels for uint8 and float32 images in host memory."""

    def bank_unsupported(self, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the images are on {problem.device}"
        if problem.dtype not in _native.DTYPE_CODES:
            dtype = str(problem.dtype).removeprefix("torch.")
            return f"the C++ kernels take uint8 and float32 images, these are {dtype}"
        if problem.bank is None:
            return None
        shape = problem.bank
        table = np.frombuffer(shape.table, dtype=np.int64).reshape(shape.models, shape.columns).copy()
        return _native.bank_unsupported(torch.from_numpy(table))

    def bank_note(self, problem: Problem) -> str | None:
        isa = _native.isa()
        if problem.op == "bank_forward" and problem.precision == "fast":
            if _native.fast_supported():
                return f'instruction set {isa}, "fast": products of bfloat16 values summed in float32'
            return f'instruction set {isa} has no reduced-precision forward: "fast" runs the exact kernel'
        return f"instruction set {isa}"

    def bank_forward(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str
    ) -> Tensor:
        out = torch.empty(_native.response_shape(images.shape[0], table, pairs))
        if not _native.fast_supported():
            precision = "exact"
        _native.bank_forward(images, weights, table, pairs, layout, precision, out)
        return out

    def bank_input_gradient(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        grad = torch.empty(images.shape)
        responses = torch.empty(_native.response_shape(images.shape[0], table, pairs))
        _native.bank_input_gradient(images, weights, table, pairs, cotangent, layout, grad, responses)
        return grad, responses
