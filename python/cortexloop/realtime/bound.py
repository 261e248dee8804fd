"""What is behind a `Plan`: one class for host memory, one for a GPU, each with everything allocated and bound."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cortexloop import _device, _native, ops
from cortexloop.bank import ModelBank

if TYPE_CHECKING:
    from cortexloop.backends.registry import Backend


@dataclass(frozen=True)
class Call:
    """The call that a plan repeats; pairs: int64 [batch] on the bank's device, or None."""

    bank: ModelBank
    batch: int
    dtype: torch.dtype
    layout: str
    precision: str
    pairs: Tensor | None
    backend: str

    @property
    def images_shape(self) -> tuple[int, ...]:
        size = (self.bank.height, self.bank.width)
        return (self.batch, *size, 3) if self.layout == "NHWC" else (self.batch, 3, *size)

    @property
    def responses_shape(self) -> tuple[int, ...]:
        return (self.batch, len(self.bank)) if self.pairs is None else (self.batch,)

    def settle(self, images: Tensor) -> Backend:
        """Check everything and warn where it must, by a first call through the operator; the backend that runs."""
        bank = self.bank
        ops.bank_forward(images, bank.weights, bank.table, self.pairs, self.layout, self.precision, self.backend)
        shape = ops.bank_shape(bank.table)
        problem = ops.problem("bank_forward", images, shape, layout=self.layout, precision=self.precision)
        return ops.select(problem, self.backend)

    def bind(self, chosen: Backend, images: Tensor) -> Callable[[], Tensor]:
        """The call on one tensor of images, without any check."""
        bank = self.bank
        arguments = (images, bank.weights, bank.table, self.pairs, self.layout, self.precision)
        return functools.partial(chosen.bank_forward, *arguments)


class HostPlan:
    """In host memory: the C++ kernels with their pointers bound, or the reference backend."""

    def __init__(self, call: Call) -> None:
        images = torch.zeros(call.images_shape, dtype=call.dtype)
        responses = torch.zeros(call.responses_shape)
        chosen = call.settle(images)
        self.images, self.responses, self.backend = images, responses, chosen.name
        self.run: Callable[[], object]
        if chosen.name == "cpu":
            bank, precision = call.bank, call.precision if _native.fast_supported() else "exact"
            self.bound = _native.bank_plan(
                images, bank.weights, bank.table, call.pairs, call.layout, precision, responses
            )
            self.call, self.run = call, self.bound.run
        else:
            compute = call.bind(chosen, images)
            self.run = lambda: responses.copy_(compute())


class DevicePlan:
    """On a GPU: copy in, compute and copy out are one captured graph between page-locked buffers.

    A backend that has to wait for the GPU while it works (the reference) cannot be captured and runs step by step.
    """

    def __init__(self, call: Call) -> None:
        device = call.bank.device
        images = _device.host_buffer(call.images_shape, call.dtype, device)
        responses = _device.host_buffer(call.responses_shape, torch.float32, device)
        with _device.memory(device, f"a plan for {call.batch} images"):
            there = torch.zeros(call.images_shape, dtype=call.dtype, device=device)
        chosen = call.settle(there)
        compute = call.bind(chosen, there)

        def work() -> None:
            there.copy_(images, non_blocking=True)
            responses.copy_(compute(), non_blocking=True)

        self.images, self.responses, self.backend = images, responses, chosen.name
        self.call, self.there = call, there  # the graph has their addresses
        self.lane = _device.Lane(device, urgent=True)
        self.lane.follow_caller()
        self.work = work if chosen.name == "reference" else _device.captured(work, self.lane)

    def run(self) -> None:
        """Evaluate, and return when the responses are in host memory."""
        with self.lane.entered():
            self.work()
        self.lane.finish()
