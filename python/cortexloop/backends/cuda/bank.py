"""Model bank on a GPU: allocate outputs and workspace with torch on the current stream, hand the addresses to C++."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from cortexloop import _device, _native
from cortexloop._native import gpu
from cortexloop.backends.registry import Problem


class BankOperators:
    """Fused kernels for uint8 and float32 images in GPU memory."""

    def bank_unsupported(self, problem: Problem) -> str | None:
        reason = _native.cuda_unavailable()
        if reason:
            return reason
        if problem.device != gpu.device_type():
            return f"the CUDA kernels work in GPU memory, the images are on {problem.device}"
        if problem.dtype not in _native.DTYPE_CODES:
            dtype = str(problem.dtype).removeprefix("torch.")
            return f"the CUDA kernels take uint8 and float32 images, these are {dtype}"
        reason = gpu.device_unsupported(problem.index)
        if reason or problem.bank is None:
            return reason
        shape = problem.bank
        return gpu.bank_unsupported(shape.table, shape.models, shape.columns)

    def bank_note(self, problem: Problem) -> str | None:
        parts = [str(gpu.devices()[problem.index]["name"])]
        if problem.op == "bank_forward" and problem.precision == "fast":
            parts.append('"fast": float16 maps and operands, products summed in float32')
        if problem.bank is not None:
            shape = problem.bank
            note = gpu.bank_note(shape.table, shape.models, shape.columns)
            parts += [note] if note else []
        return "; ".join(parts)

    def bank_forward(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str
    ) -> Tensor:
        device = images.device
        shape = _native.response_shape(images.shape[0], table, pairs)
        with _device.selected(device):
            compiled = gpu.compiled_bank(weights, table)
            size = gpu.forward_workspace(compiled, images, pairs, precision)
            with _memory(images, table, pairs, size):
                out = torch.empty(shape, device=device)
                workspace = _device.aligned_buffer(size, device)
                gpu.forward(compiled, images, table, pairs, layout, precision, out, workspace)
        return out

    def bank_input_gradient(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        device = images.device
        with _device.selected(device):
            compiled = gpu.compiled_bank(weights, table)
            size = gpu.gradient_workspace(compiled, images, pairs)
            with _memory(images, table, pairs, size):
                grad = torch.empty(images.shape, device=device)
                responses = torch.empty(cotangent.shape, device=device)
                workspace = _device.aligned_buffer(size, device)
                gpu.gradient(compiled, images, table, pairs, cotangent, layout, grad, responses, workspace)
        return grad, responses


def _memory(images: Tensor, table: Tensor, pairs: Tensor | None, workspace: int) -> AbstractContextManager[None]:
    what = f"{images.shape[0]} images with {table.shape[0]} models" if pairs is None else f"{len(pairs)} pairs"
    return _device.memory(images.device, f"{what}: {workspace / 2**20:.1f} MiB of workspace, and the results")
