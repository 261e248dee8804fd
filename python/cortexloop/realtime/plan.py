"""`Plan`: one shape of call, prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop import _native, ops
from cortexloop.bank import ModelBank
from cortexloop.functional.bank import Pairs, check_pairs


class Plan:
    """Responses of a bank to a fixed number of images, with all memory allocated and all pointers bound beforehand.

    >>> plan = Plan(bank, batch=4)             # doctest: +SKIP
    >>> plan.images[:] = camera.read()         # doctest: +SKIP
    >>> plan.run()[0]                          # doctest: +SKIP

    Not for concurrent use: a plan has one input and one output buffer.

    Attributes:
        images: the input, a writable NumPy array [B, H, W, 3] or [B, 3, H, W], zeros at first. uint8 is RGB 0..255,
            float32 holds recentred values.
        responses: the output, float32 [B, N], or [B] with pairs; overwritten by every `run()`.
        backend: the backend that runs.
        bank, layout, precision: as given.

    Args:
        bank: N models in host memory.
        batch: B, the number of images per run (at least 1).
        dtype: "uint8" or "float32".
        layout: "NHWC" or "NCHW".
        precision: "exact" or "fast".
        backend: "auto" or a name.
        pairs: [B] positions of models, fixed for the life of the plan: image i is shown to model pairs[i] only.

    Raises:
        ValueError: an unknown option, a batch below 1, pairs outside the bank, or a bank that is not in host memory.
        BackendError: the named backend cannot run this.

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
        if bank.device.type != "cpu":
            raise ValueError(f"a plan works in host memory, the bank is on {bank.device}; use bank.to('cpu')")
        self.bank, self.layout, self.precision = bank, layout, precision
        size = (bank.height, bank.width)
        shape = (batch, *size, 3) if layout == "NHWC" else (batch, 3, *size)
        self._images = torch.zeros(shape, dtype=torch.uint8 if dtype == "uint8" else torch.float32)
        self._pairs = check_pairs(pairs, batch, bank)
        self._responses = torch.zeros((batch, len(bank)) if pairs is None else (batch,))
        self.images: NDArray[Any] = self._images.numpy()
        self.responses: NDArray[np.float32] = self._responses.numpy()
        # One call through the operator checks everything, warns where it must, and touches the pages.
        arguments = (self._images, bank.weights, bank.table, self._pairs, layout, precision)
        ops.bank_forward(*arguments, backend)
        problem = ops.problem(
            "bank_forward", self._images, ops.bank_shape(bank.table), layout=layout, precision=precision
        )
        chosen = ops.select(problem, backend)
        self.backend = chosen.name
        self._run: Callable[[], Any]
        if chosen.name == "cpu":
            if not _native.fast_supported():
                arguments = (*arguments[:-1], "exact")
            self._bound = _native.bank_plan(*arguments, self._responses)
            self._run = self._bound.run
        else:
            self._run = lambda: self._responses.copy_(chosen.bank_forward(*arguments))
        self.run()

    def run(self) -> NDArray[np.float32]:
        """Evaluate `images` into `responses`, and return `responses` (the same array every time).

        The C++ kernels allocate nothing here; the reference backend does.
        """
        self._run()
        return self.responses

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.images)} {self.images.dtype} images, {len(self.bank)} models, "
            f"layout={self.layout!r}, precision={self.precision!r}, backend={self.backend!r})"
        )
