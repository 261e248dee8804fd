"""Streams, pinned memory and captured graphs where a device is a GPU; elsewhere the same names do the work at once.

Code that overlaps copying with computing, or records a graph, is written once over this and runs on a CPU too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor


def on_gpu(device: torch.device) -> bool:
    """Whether a device belongs to torch's CUDA (NVIDIA's, or AMD's under the same name)."""
    return device.type == "cuda"


def index(device: torch.device) -> int:
    """The device's number among those of its kind; 0 for host memory."""
    number = cast("int | None", device.index)  # torch's stubs leave out None
    if number is None:
        return torch.cuda.current_device() if on_gpu(device) else 0
    return number


def selected(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one within the block."""
    return torch.cuda.device(device) if on_gpu(device) else contextlib.nullcontext()


def stream_address(device: torch.device) -> int:
    """The stream that torch would launch on now, as CUDA's handle; 0 for host memory."""
    return torch.cuda.current_stream(device).cuda_stream if on_gpu(device) else 0


def capturing(device: torch.device) -> bool:
    """Whether work on this device is being recorded into a graph instead of done: nothing may be waited for then."""
    if not on_gpu(device):
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raise if a graph is being captured, where something has to be copied first.

    Raises:
        RuntimeError: one sentence that asks for a warm-up call.
    """
    if capturing(device):
        raise RuntimeError(
            f"this bank has not run on {device} yet, and a CUDA graph is being captured, in which nothing can be "
            "prepared: call it once before the capture (a warm-up)"
        )


def wait(device: torch.device) -> None:
    """Return when everything that the current stream has been given is done."""
    if on_gpu(device):
        torch.cuda.current_stream(device).synchronize()


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory; page-locked if `device` is a GPU, so that copies to and from it need not wait."""
    return torch.zeros(shape, dtype=dtype, pin_memory=on_gpu(device))


def aligned_buffer(size: int, device: torch.device) -> Tensor:
    """uint8 [size] at an address that is a multiple of 256, on the current stream; may be uninitialised."""
    spare = torch.empty(size + 255, dtype=torch.uint8, device=device)
    start = -spare.data_ptr() % 256
    return spare[start : start + size]


class Lane:
    """Work in order, beside other lanes: a stream on a GPU. Elsewhere there is one lane, the caller.

    Args:
        device: where the work is done.
        urgent: ahead of lanes that are not.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device, priority=-1 if urgent else 0) if on_gpu(device) else None  # type: ignore[no-untyped-call]

    def entered(self) -> AbstractContextManager[object]:
        """What torch launches within the block goes onto this lane."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow_caller(self) -> None:
        """Start what comes next on this lane only after everything the caller's stream has been given so far."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def finish(self) -> None:
        """Wait until the lane is empty."""
        if self.stream is not None:
            self.stream.synchronize()


class Mark:
    """A point in the work given to a device, which other lanes or the caller can wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.event: Any = torch.cuda.Event() if on_gpu(device) else None  # type: ignore[no-untyped-call]

    def set(self) -> None:
        """Put the mark behind what the current stream has been given so far."""
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(self.device))

    def hold_caller(self) -> None:
        """Start what comes next on the current stream only after the mark."""
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)

    def wait(self) -> None:
        """Return when the work before the mark is done."""
        if self.event is not None:
            self.event.synchronize()


def captured(work: Callable[[], object], lane: Lane) -> Callable[[], object]:
    """`work` recorded as a CUDA graph, to be replayed on `lane`; elsewhere `work` itself.

    It runs twice before, so that everything is compiled, uploaded and allocated. Every tensor whose memory it uses has
    to outlive the graph, except those that it makes itself.
    """
    if lane.stream is None:
        work()
        return work
    lane.follow_caller()
    with torch.cuda.device(lane.device):
        with lane.entered():
            for _ in range(2):
                work()
        lane.finish()
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate and copy while this one records
        with torch.cuda.graph(graph, stream=lane.stream, capture_error_mode="thread_local"):
            work()
    return graph.replay


@contextlib.contextmanager
def memory(device: torch.device, what: str) -> Iterator[None]:
    """Say in one sentence what did not fit.

    Args:
        what: what the block needs memory for, with its size.

    Raises:
        torch.OutOfMemoryError: instead of torch's own, or of a MemoryError of the kernels.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        free = ""
        if on_gpu(device):
            left, total = torch.cuda.mem_get_info(device)
            free = f", of which {left / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
        told = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""  # names the kernel
        raise torch.OutOfMemoryError(
            f"there is not enough memory on {device}{free}, for {what}{told}; "
            "give fewer images at a time, or free memory on that device"
        ) from error
