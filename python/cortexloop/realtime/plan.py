"""`Plan`: one shape of call, prepared once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop import _device
from cortexloop.bank import ModelBank
from cortexloop.functional.bank import Pairs, check_pairs
from cortexloop.realtime.bound import Call, DevicePlan, HostPlan


class Plan:
    """Responses of a bank to a fixed number of images, with all memory allocated and all pointers bound beforehand.

    >>> plan = Plan(bank, batch=4)             # doctest: +SKIP
    >>> plan.images[:] = camera.read()         # doctest: +SKIP
    >>> plan.run()[0]                          # doctest: +SKIP

    With a bank on a GPU, input and output are page-locked host memory, and one run is the replay of a captured CUDA
    graph (copy in, kernels, copy out) on a stream of its own, ahead of other streams where the GPU lets it.

    Not for concurrent use: a plan has one input and one output buffer.

    Attributes:
        images: the input, a writable NumPy array [B, H, W, 3] or [B, 3, H, W], zeros at first. uint8 is RGB 0..255,
            float32 holds recentred values.
        responses: the output, float32 [B, N], or [B] with pairs; overwritten by every `run()`.
        backend: the backend that runs.
        bank, layout, precision: as given.

    Args:
        bank: N models in host memory or on a GPU.
        batch: B, the number of images per run (at least 1).
        dtype: "uint8" or "float32".
        layout: "NHWC" or "NCHW".
        precision: "exact" or "fast".
        backend: "auto" or a name.
        pairs: [B] positions of models, fixed for the life of the plan: image i is shown to model pairs[i] only.

    Raises:
        ValueError: an unknown option, a batch below 1, pairs outside the bank, or a bank on a device of another kind.
        BackendError: the named backend cannot run this.
        torch.OutOfMemoryError: the GPU's memory does not suffice.

    Warns:
        BackendWarning: "auto" fell through to a slower backend.
    """

    def __init__(
        self,
        bank: ModelBank,
        batch: int = 1,
        *,
        dtype: str = "uint8",
        layout: str = "NHWC",
        precision: str = "exact",
        backend: str = "auto",
        pairs: Pairs | None = None,
    ) -> None:
        if dtype not in ("uint8", "float32"):
            raise ValueError(f'dtype should be "uint8" or "float32", got {dtype!r}')
        if layout not in ("NHWC", "NCHW"):
            raise ValueError(f'layout should be "NHWC" or "NCHW", got {layout!r}')
        if precision not in ("exact", "fast"):
            raise ValueError(f'precision should be "exact" or "fast", got {precision!r}')
        if batch < 1:
            raise ValueError(f"batch should be at least 1, got {batch}")
        if bank.device.type != "cpu" and not _device.on_gpu(bank.device):
            raise ValueError(
                f"a plan works in host memory or on a CUDA device, the bank is on {bank.device}; use bank.to('cpu')"
            )
        self.bank, self.layout, self.precision = bank, layout, precision
        kind = torch.uint8 if dtype == "uint8" else torch.float32
        call = Call(bank, batch, kind, layout, precision, check_pairs(pairs, batch, bank), backend)
        self._bound = DevicePlan(call) if _device.on_gpu(bank.device) else HostPlan(call)
        self.backend = self._bound.backend
        self.images: NDArray[Any] = self._bound.images.numpy()
        self.responses: NDArray[np.float32] = self._bound.responses.numpy()
        self._run = self._bound.run
        self.run()

    def run(self) -> NDArray[np.float32]:
        """Evaluate `images` into `responses`, and return `responses` (the same array every time).

        The C++ kernels and a captured graph allocate nothing here; the reference backend does.
        """
        self._run()
        return self.responses

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.images)} {self.images.dtype} images, {len(self.bank)} models, "
            f"layout={self.layout!r}, precision={self.precision!r}, backend={self.backend!r})"
        )
