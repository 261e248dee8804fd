"""Reading, copying to a device, computing and copying back, overlapped."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from cortexloop import _device

Item = TypeVar("Item")

UNDER_WAY = 2
"""Batches that a device has been given at a time: one is copied while the other one is computed."""


def through_device(
    batches: Iterable[Tensor], compute: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[Tensor]:
    """`compute(batch)` for batches in host memory on a device, with copies to it and work on it overlapped.

    Yields:
        Results in host memory, in order; at most `UNDER_WAY` batches are on the device.
    """
    lane = _device.Lane(device)
    free: list[_Slot] = []
    busy: deque[_Slot] = deque()
    try:
        for batch in batches:
            if len(busy) == UNDER_WAY:
                slot = busy.popleft()
                yield slot.result()
                free.append(slot)
            slot = free.pop() if free else _Slot(device, lane)
            slot.submit(batch, compute)
            busy.append(slot)
        while busy:
            yield busy.popleft().result()
    finally:
        lane.finish()  # the slots' memory goes back to torch, which does not know what this lane still writes


class _Slot:
    """Memory for one batch, page-locked on the host and its like on the device; grows to the largest batch."""

    def __init__(self, device: torch.device, lane: _device.Lane) -> None:
        self.device, self.lane = device, lane
        self.copied, self.done = _device.Mark(device), _device.Mark(device)
        self.staged = self.images = self.out = torch.empty(0)
        self.count = 0

    def submit(self, batch: Tensor, compute: Callable[[Tensor], Tensor]) -> None:
        """Start copying and computing; the batch may be overwritten as soon as this returns."""
        self.count = n = len(batch)
        if self.staged.dtype != batch.dtype or len(self.staged) < n:
            with _device.memory(self.device, f"a batch of {n} images"):
                self.staged = _device.host_buffer(tuple(batch.shape), batch.dtype, self.device)
                self.images = torch.empty(batch.shape, dtype=batch.dtype, device=self.device)
            self.lane.follow_caller()  # whose earlier work may still use that memory
        self.staged[:n].copy_(batch)
        with self.lane.entered():
            self.images[:n].copy_(self.staged[:n], non_blocking=True)
            self.copied.set()
        self.copied.hold_caller()
        result = compute(self.images[:n])
        if self.out.dtype != result.dtype or len(self.out) < n:
            self.out = _device.host_buffer(tuple(result.shape), result.dtype, self.device)
        self.out[:n].copy_(result, non_blocking=True)
        self.done.set()

    def result(self) -> Tensor:
        """Wait, and return a copy."""
        self.done.wait()
        return self.out[: self.count].clone()


class _Failed:
    """An error on its way to the caller's thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same items; the next one is read on a thread while the caller works with the last."""
    room = threading.Semaphore(1)
    ready: queue.SimpleQueue[Item | _Failed | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def read() -> None:
        iterator = iter(items)
        while True:
            room.acquire()
            if stopped.is_set():
                break
            try:
                ready.put(next(iterator))
            except StopIteration:
                ready.put(None)
                break
            except BaseException as error:  # raised again where the caller is
                ready.put(_Failed(error))
                break
        close = getattr(iterator, "close", None)
        if close is not None:
            close()

    reader = threading.Thread(target=read, name="cortexloop reader", daemon=True)
    reader.start()
    try:
        while True:
            item = ready.get()
            if item is None:
                return
            if isinstance(item, _Failed):
                raise item.error
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        reader.join()
