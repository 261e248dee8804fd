"""A bank on the emulated device: every buffer guarded, outputs and workspace full of NaN."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from guarded import Guarded, guarded
from torch import Tensor

from cortexloop import ModelBank
from cortexloop._native import DTYPE_CODES, LAYOUT_CODES, PRECISION_CODES

DEVICE_ALIGN = 256  # of what CUDA's allocators return
NAN_BYTE = 0xFF  # float32 and float16 of these bytes are NaN, integers -1


class EmulatedBank:
    """Calls the module's `Bank` as Python's backend does, on memory that notices misuse.

    Args:
        module: the emulated module `_cuda`.
        bank: models on the CPU.
        at_start: whether buffers touch the page in front of them rather than the one behind.
    """

    def __init__(self, module: ModuleType, bank: ModelBank, at_start: bool = False) -> None:
        table = bank.table.contiguous()
        self.n = len(bank)
        self.at_start = at_start
        arguments = (bank.weights.data_ptr(), bank.weights.numel(), table.data_ptr(), self.n, table.shape[1])
        self.bank = module.Bank(*arguments)
        self.note: str = module.bank_note(*arguments[2:])
        packed = torch.from_numpy(np.frombuffer(self.bank.device_image(), np.uint8).copy())
        self._packed = guarded(packed, DEVICE_ALIGN, at_start)

    def _output(self, size: int, align: int) -> Guarded:
        buffer = Guarded(size, align, self.at_start)
        if size:
            buffer.bytes()[:] = NAN_BYTE
        return buffer

    def _inputs(self, images: Tensor, layout: str, pairs: Tensor | None) -> tuple[list[Guarded], tuple[Any, ...]]:
        height, width = images.shape[1:3] if layout == "NHWC" else images.shape[2:4]
        buffers = [guarded(images, at_start=self.at_start)]
        codes = (DTYPE_CODES[images.dtype], LAYOUT_CODES[layout], images.shape[0], height, width)
        pairs_at = 0
        if pairs is not None:
            buffers.append(guarded(pairs, at_start=self.at_start))
            pairs_at = buffers[1].address
        return buffers, (self._packed.address, buffers[0].address, *codes, pairs_at)

    def _shape(self, images: Tensor, pairs: Tensor | None) -> tuple[int, ...]:
        return (images.shape[0], self.n) if pairs is None else (images.shape[0],)

    def forward(
        self, images: Tensor, layout: str = "NHWC", pairs: Tensor | None = None, precision: str = "exact"
    ) -> Tensor:
        """Responses, float32 [B, N] or with pairs [B]."""
        buffers, arguments = self._inputs(images, layout, pairs)
        shape = self._shape(images, pairs)
        out = self._output(4 * int(np.prod(shape)), 4)
        codes = (DTYPE_CODES[images.dtype], images.shape[0], pairs is not None, PRECISION_CODES[precision])
        workspace = self._output(self.bank.forward_workspace(0, *codes), DEVICE_ALIGN)
        self.bank.forward(*arguments, PRECISION_CODES[precision], out.address, workspace.address, workspace.size, 0, 0)
        for buffer in (*buffers, self._packed, out, workspace):
            buffer.check()
        return out.tensor(torch.float32, shape).clone()

    def gradient(
        self, images: Tensor, cotangent: Tensor, layout: str = "NHWC", pairs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(gradient shaped as the images, responses)."""
        buffers, arguments = self._inputs(images, layout, pairs)
        shape = self._shape(images, pairs)
        out = self._output(4 * int(np.prod(shape)), 4)
        grad = self._output(4 * images.numel(), 4)
        weights = guarded(cotangent, at_start=self.at_start)
        size = self.bank.gradient_workspace(0, DTYPE_CODES[images.dtype], images.shape[0], pairs is not None)
        workspace = self._output(size, DEVICE_ALIGN)
        self.bank.gradient(
            *arguments, weights.address, grad.address, out.address, workspace.address, workspace.size, 0, 0
        )
        for buffer in (*buffers, weights, self._packed, out, grad, workspace):
            buffer.check()
        return grad.tensor(torch.float32, tuple(images.shape)).clone(), out.tensor(torch.float32, shape).clone()
