"""The wrappers of `_cuda`: a bank's compiled form and its image on each device, made once, and checked device pointers.

A build that executes the kernels' source on the CPU (`_cuda.emulated()`) takes host memory: then "the GPU" below is the
CPU.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cortexloop import _device, _native
from cortexloop._native import CPU, PRECISION_CODES, image_arguments, pointer, response_shape

if TYPE_CHECKING:
    from cortexloop import _cuda as cuda_module


def device_type() -> str:
    """Where the kernels read and write: "cuda", or "cpu" for the emulated build."""
    return "cpu" if _native.cuda().emulated() else "cuda"


def devices() -> list[dict[str, object]]:
    """Name, compute capability and memory of every GPU, each with the reason why the kernels do not run there, or None.

    Keys: name, major, minor, multiprocessors, shared_memory, memory, l2 (bytes), unsupported.
    """
    module = _native.cuda()
    return [
        {**module.device(i), "unsupported": module.device_unsupported(i) or None} for i in range(module.device_count())
    ]


def device_unsupported(index: int) -> str | None:
    """None where the kernels run on this device, else one sentence why not."""
    module = _native.cuda()
    if not 0 <= index < module.device_count():
        return f"there is no GPU number {index}, this machine has {module.device_count()}"
    return module.device_unsupported(index) or None


class CompiledBank:
    """One packed bank as the kernels want it; its image on a device is copied there when first asked for.

    Args:
        weights, table: float32 [n] and int64 [N, fields], on any device; read once.

    Raises:
        ValueError: a table that the kernels cannot read.
    """

    def __init__(self, weights: Tensor, table: Tensor) -> None:
        host_weights, host_table = weights.detach().to(CPU), table.detach().to(CPU)
        n, fields = table.shape
        self.module, self.version = _native.cuda(), _version(weights)
        self.bank: cuda_module.Bank = self.module.Bank(
            pointer(host_weights, "weights", torch.float32, (weights.numel(),)),
            weights.numel(),
            pointer(host_table, "table", torch.int64, (n, fields)),
            n,
            fields,
        )
        self._images: dict[torch.device, tuple[Tensor, int]] = {}
        self._lock = threading.Lock()

    def image(self, device: torch.device) -> Tensor:
        """The bank's image on a device, uint8 [bytes], aligned; copied there once.

        Raises:
            RuntimeError: it is not there yet, and a graph is being captured.
            torch.OutOfMemoryError: it does not fit.
        """
        stream = _device.stream_address(device)
        with self._lock:
            if device not in self._images:
                _device.refuse_capture(device)
                data = torch.frombuffer(bytearray(self.bank.device_image()), dtype=torch.uint8)
                image = _device.aligned_buffer(data.numel(), device)
                image.copy_(data)
                _device.wait(device)  # every other stream is to see the copy
                self._images[device] = image, stream
            image, home = self._images[device]
        if stream != home:
            # Freed memory goes back to the stream it came from, which knows nothing of what other streams still read.
            image.record_stream(torch.cuda.current_stream(device))
        return image


def _version(x: Tensor) -> int:
    """Grows when the tensor is written to; torch does not count for tensors of its inference mode."""
    return 0 if x.is_inference() else x._version


_banks: MutableMapping[Tensor, MutableMapping[Tensor, CompiledBank]] = WeakTensorKeyDictionary()
_banks_lock = threading.Lock()


def compiled_bank(weights: Tensor, table: Tensor) -> CompiledBank:
    """The compiled form of a bank, made once for as long as both tensors live and the weights are not written to.

    Raises:
        RuntimeError: not made yet, and a graph is being captured.
        ValueError: a table that the kernels cannot read.
    """
    with _banks_lock:
        of_table = _banks.get(table)
        if of_table is None:
            of_table = _banks[table] = WeakTensorKeyDictionary()
        found = of_table.get(weights)
        if found is None or found.module is not _native.cuda() or found.version != _version(weights):
            _device.refuse_capture(weights.device)
            found = of_table[weights] = CompiledBank(weights, table)
    return found


@functools.lru_cache(maxsize=64)
def _verdict(module: Any, table: bytes, n: int, fields: int) -> tuple[str, str]:
    """(why the kernels do not take a bank with this table, what else to know)."""
    host = torch.frombuffer(bytearray(table), dtype=torch.int64)
    shape = (host.data_ptr(), n, fields)
    return module.bank_unsupported(*shape), module.bank_note(*shape)


def bank_unsupported(table: bytes, n: int, fields: int) -> str | None:
    """None where the kernels take a bank with this table, else one sentence why not."""
    return _verdict(_native.cuda(), table, n, fields)[0] or None


def bank_note(table: bytes, n: int, fields: int) -> str | None:
    """What a user should know about how this bank would run, or None."""
    return _verdict(_native.cuda(), table, n, fields)[1] or None


def forward_workspace(compiled: CompiledBank, images: Tensor, pairs: Tensor | None, precision: str) -> int:
    """Bytes that `forward` works in."""
    size: int = compiled.bank.forward_workspace(
        _device.index(images.device),
        _native.DTYPE_CODES[images.dtype],
        images.shape[0],
        pairs is not None,
        PRECISION_CODES[precision],
    )
    return size


def forward(
    compiled: CompiledBank,
    images: Tensor,
    table: Tensor,
    pairs: Tensor | None,
    layout: str,
    precision: str,
    out: Tensor,
    workspace: Tensor,
) -> None:
    """Write the responses to `out`, float32 [B, N] or [B], on the current stream; neither allocates nor waits.

    Images: uint8 or float32 [B, H, W, 3] or [B, 3, H, W]. All tensors on one device; workspace: uint8, aligned.
    """
    device = images.device
    shape = response_shape(images.shape[0], table, pairs)
    compiled.bank.forward(
        compiled.image(device).data_ptr(),
        *image_arguments(images, layout),
        0 if pairs is None else pointer(pairs, "pairs", torch.int64, (images.shape[0],), device),
        PRECISION_CODES[precision],
        pointer(out, "out", torch.float32, shape, device),
        pointer(workspace, "workspace", torch.uint8, (workspace.numel(),), device),
        workspace.numel(),
        _device.index(device),
        _device.stream_address(device),
    )


def gradient_workspace(compiled: CompiledBank, images: Tensor, pairs: Tensor | None) -> int:
    """Bytes that `gradient` works in."""
    size: int = compiled.bank.gradient_workspace(
        _device.index(images.device), _native.DTYPE_CODES[images.dtype], images.shape[0], pairs is not None
    )
    return size


def gradient(
    compiled: CompiledBank,
    images: Tensor,
    table: Tensor,
    pairs: Tensor | None,
    cotangent: Tensor,
    layout: str,
    grad: Tensor,
    responses: Tensor,
    workspace: Tensor,
) -> None:
    """Write d sum(cotangent * responses) / d images to `grad` (float32, shape of images), and the responses.

    On the current stream; neither allocates nor waits.
    """
    device = images.device
    shape = response_shape(images.shape[0], table, pairs)
    compiled.bank.gradient(
        compiled.image(device).data_ptr(),
        *image_arguments(images, layout),
        0 if pairs is None else pointer(pairs, "pairs", torch.int64, (images.shape[0],), device),
        pointer(cotangent, "cotangent", torch.float32, shape, device),
        pointer(grad, "grad", torch.float32, tuple(images.shape), device),
        pointer(responses, "responses", torch.float32, shape, device),
        pointer(workspace, "workspace", torch.uint8, (workspace.numel(),), device),
        workspace.numel(),
        _device.index(device),
        _device.stream_address(device),
    )
