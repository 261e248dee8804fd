"""A stand-in for the compiled module `_cuda`: the same functions on host addresses, computed by the reference backend.

It reads a bank from its device image only, scribbles over the whole workspace, and can be told to fail.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexloop.backends.reference import BACKEND as REFERENCE

DTYPES = (torch.uint8, torch.float32)
FEATURES = (torch.float32, torch.float16, torch.bfloat16)
HEADER = 3  # numbers of weights, models and columns, int64


def at(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor on memory that somebody else owns."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class FakeCuda:
    """The module. Attributes tell it what to pretend; `calls` counts what was asked of it."""

    def __init__(self) -> None:
        self.no_device = ""
        self.too_old = ""
        self.bank_refused = ""
        self.note = ""
        self.failure: Exception | None = None
        self.workspace = 1000
        self.calls: dict[str, int] = {}
        module = self

        class Bank(_Bank):
            def __init__(self, *arguments: int) -> None:
                super().__init__(module, *arguments)

        self.Bank = Bank

    def count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    def emulated(self) -> bool:
        return True

    def unavailable(self) -> str:
        return self.no_device

    def device_count(self) -> int:
        return 0 if self.no_device else 1

    def device(self, index: int) -> dict[str, Any]:
        sizes = {"multiprocessors": 2, "shared_memory": 232448, "memory": 2**30, "l2": 2**20}
        return {"name": "Imaginary GPU", "major": 9, "minor": 0, **sizes}

    def device_unsupported(self, index: int) -> str:
        return self.too_old

    def bank_unsupported(self, table_ptr: int, n_models: int, table_stride: int) -> str:
        return self.bank_refused

    def feature_moments(
        self,
        features_ptr: int,
        dtype: int,
        weights_ptr: int,
        centred_ptr: int,
        shift_ptr: int,
        before: float,
        batch: float,
        images: int,
        columns: int,
        neurons: int,
        mean_ptr: int,
        m2_ptr: int,
        cross_ptr: int,
        device: int,
        stream: int,
    ) -> None:
        self.count("feature_moments")
        if self.failure is not None:
            raise self.failure
        assert (device, stream) == (0, 0)
        REFERENCE.feature_moments(
            at(features_ptr, FEATURES[dtype], images, columns),
            at(weights_ptr, torch.float32, images) if weights_ptr else None,
            at(centred_ptr, torch.float32, images, neurons),
            at(shift_ptr, torch.float32, neurons),
            before,
            batch,
            at(mean_ptr, torch.float64, columns),
            at(m2_ptr, torch.float64, columns),
            at(cross_ptr, torch.float32, neurons, columns),
        )

    def bank_note(self, table_ptr: int, n_models: int, table_stride: int) -> str:
        return self.note


class _Bank:
    def __init__(
        self, module: FakeCuda, weights_ptr: int, weights_len: int, table_ptr: int, n_models: int, table_stride: int
    ) -> None:
        module.count("Bank")
        self.module = module
        weights = at(weights_ptr, torch.float32, weights_len).clone()
        table = at(table_ptr, torch.int64, n_models, table_stride).clone()
        header = np.array([weights_len, n_models, table_stride], np.int64)
        self.n = n_models
        self.data = header.tobytes() + table.numpy().tobytes() + weights.numpy().tobytes()

    def device_image(self) -> bytes:
        self.module.count("device_image")
        return self.data

    def forward_workspace(self, device: int, dtype: int, batch: int, paired: bool, precision: int) -> int:
        return self.module.workspace + batch

    def gradient_workspace(self, device: int, dtype: int, batch: int, paired: bool) -> int:
        return self.module.workspace + 2 * batch

    def _read(self, image_ptr: int) -> tuple[Tensor, Tensor]:
        assert image_ptr % 256 == 0, "the bank's image is not aligned"
        n_weights, n, stride = at(image_ptr, torch.int64, HEADER).tolist()
        table = at(image_ptr + 8 * HEADER, torch.int64, n, stride)
        weights = at(image_ptr + 8 * (HEADER + n * stride), torch.float32, n_weights)
        return weights, table

    def _start(self, name: str, batch: int, workspace_ptr: int, workspace_bytes: int, device: int, stream: int) -> None:
        self.module.count(name)
        if self.module.failure is not None:
            raise self.module.failure
        at(workspace_ptr, torch.uint8, workspace_bytes).fill_(0xFF)
        assert (device, stream) == (0, 0)

    @staticmethod
    def _images(ptr: int, dtype: int, layout: int, batch: int, height: int, width: int) -> Tensor:
        shape = (batch, height, width, 3) if layout == 0 else (batch, 3, height, width)
        return at(ptr, DTYPES[dtype], *shape)

    def forward(
        self,
        image_ptr: int,
        images_ptr: int,
        dtype: int,
        layout: int,
        batch: int,
        height: int,
        width: int,
        pairs_ptr: int,
        precision: int,
        out_ptr: int,
        workspace_ptr: int,
        workspace_bytes: int,
        device: int,
        stream: int,
    ) -> None:
        self._start("forward", batch, workspace_ptr, workspace_bytes, device, stream)
        assert workspace_bytes == self.forward_workspace(device, dtype, batch, pairs_ptr != 0, precision)
        images = self._images(images_ptr, dtype, layout, batch, height, width)
        pairs = at(pairs_ptr, torch.int64, batch) if pairs_ptr else None
        shape = (batch, self.n) if pairs is None else (batch,)
        axes = ("NHWC", "NCHW")[layout]
        result = REFERENCE.bank_forward(images, *self._read(image_ptr), pairs, axes, "exact")
        at(out_ptr, torch.float32, *shape).copy_(result)

    def gradient(
        self,
        image_ptr: int,
        images_ptr: int,
        dtype: int,
        layout: int,
        batch: int,
        height: int,
        width: int,
        pairs_ptr: int,
        cotangent_ptr: int,
        grad_ptr: int,
        responses_ptr: int,
        workspace_ptr: int,
        workspace_bytes: int,
        device: int,
        stream: int,
    ) -> None:
        self._start("gradient", batch, workspace_ptr, workspace_bytes, device, stream)
        assert workspace_bytes == self.gradient_workspace(device, dtype, batch, pairs_ptr != 0)
        images = self._images(images_ptr, dtype, layout, batch, height, width)
        pairs = at(pairs_ptr, torch.int64, batch) if pairs_ptr else None
        shape = (batch, self.n) if pairs is None else (batch,)
        cotangent = at(cotangent_ptr, torch.float32, *shape)
        axes = ("NHWC", "NCHW")[layout]
        grad, responses = REFERENCE.bank_input_gradient(images, *self._read(image_ptr), pairs, cotangent, axes)
        at(grad_ptr, torch.float32, *images.shape).copy_(grad)
        at(responses_ptr, torch.float32, *shape).copy_(responses)
