"""The only importer of the compiled modules `_cpu` and `_cuda`: availability with a reason, checked pointers, wrappers.

The kernels know neither torch nor NumPy; they get addresses and sizes. Everything an address promises (type, shape,
device, contiguity) is checked here, because C++ cannot. `gpu.py` has the wrappers of `_cuda`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cortexloop import _cpu as cpu_module

CPU = torch.device("cpu")
DTYPE_CODES = {torch.uint8: 0, torch.float32: 1}
LAYOUT_CODES = {"NHWC": 0, "NCHW": 1}
PRECISION_CODES = {"exact": 0, "fast": 1}
MAX_THREADS = 4096


@functools.cache
def unavailable() -> str | None:
    """None where the compiled kernels can be loaded, else one sentence why not."""
    if importlib.util.find_spec("cortexloop._cpu") is None:
        return (
            "cortexloop was installed without its C++ kernels (no working C++ compiler at install time); "
            "install a compiler and reinstall cortexloop"
        )
    return None


class SettingError(ValueError):
    """An environment variable of cortexloop has a value that cannot be used; the message is one sentence."""


@functools.cache
def cpu() -> Any:
    """The compiled module `cortexloop._cpu`, loaded when first asked for, set as the environment says.

    Raises:
        RuntimeError: the module was not built; the sentence is `unavailable()`.
        SettingError: `CORTEXLOOP_ISA` or `CORTEXLOOP_NUM_THREADS` has a value that cannot be used.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    module = importlib.import_module("cortexloop._cpu")
    threads = os.environ.get("CORTEXLOOP_NUM_THREADS")
    if threads is not None:
        if not threads.isdecimal() or not 1 <= int(threads) <= MAX_THREADS:
            raise SettingError(f"CORTEXLOOP_NUM_THREADS should be a number from 1 to {MAX_THREADS}, got {threads!r}")
        module.set_num_threads(int(threads))
    name = os.environ.get("CORTEXLOOP_ISA")
    if name is not None:
        if name not in module.isas():
            raise SettingError(f"CORTEXLOOP_ISA should be one of {', '.join(module.isas())} here, got {name!r}")
        module.set_isa(name)
    return module


@functools.cache
def cuda_unavailable() -> str | None:
    """None where the CUDA kernels are built and can reach a GPU, else one sentence why not."""
    if importlib.util.find_spec("cortexloop._cuda") is None:
        return (
            "cortexloop was built without CUDA: no CUDA compiler (nvcc) at install time; "
            "install the CUDA toolkit and reinstall cortexloop"
        )
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return (
            f"this torch ({torch.__version__}) was built without CUDA and cannot hold tensors on a GPU; "
            "install a CUDA build of torch"
        )
    return cuda().unavailable() or None


@functools.cache
def cuda() -> Any:
    """The compiled module `cortexloop._cuda`, loaded when first asked for; loading it needs no GPU.

    Raises:
        ModuleNotFoundError: it was not built; ask `cuda_unavailable()` first.
    """
    return importlib.import_module("cortexloop._cuda")


def isas() -> list[str]:
    """Instruction sets compiled in and runnable here, weakest first."""
    names: list[str] = cpu().isas()
    return names


def isa() -> str:
    """The instruction set in force."""
    name: str = cpu().isa()
    return name


def set_isa(name: str) -> None:
    """Force an instruction set by name.

    Raises:
        ValueError: not compiled in, or not runnable on this processor.
    """
    cpu().set_isa(name)


def num_threads() -> int:
    """Threads the kernels use."""
    n: int = cpu().num_threads()
    return n


def set_num_threads(n: int) -> None:
    """Set the number of threads the kernels use (at least 1)."""
    cpu().set_num_threads(n)


def fast_supported() -> bool:
    """Whether the instruction set in force has a reduced-precision forward."""
    supported: bool = cpu().fast_supported()
    return supported


def pointer(x: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device = CPU) -> int:
    """The address of a tensor that is exactly what the kernel expects.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong device or shape, or not contiguous. Nothing is repaired here; copies are made, visibly, by
            `cortexloop.functional`.
    """
    if x.dtype != dtype:
        raise TypeError(f"{name} should be {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} should be on {device}, got {x.device}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} should have shape {list(shape)}, got {list(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name} should be contiguous, got strides {list(x.stride())}")
    return x.data_ptr()


def bank_unsupported(table: Tensor) -> str | None:
    """None where the kernels take this bank, else one sentence why not. `table`: int64 [N, fields]."""
    n, fields = table.shape
    sentence: str = cpu().bank_unsupported(pointer(table, "table", torch.int64, (n, fields)), n, fields)
    return sentence or None


def image_arguments(images: Tensor, layout: str) -> tuple[int, int, int, int, int, int]:
    """(images_ptr, dtype, layout, batch, height, width), as all bank functions of both modules take them.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: not three channels, or not contiguous.
    """
    batch = images.shape[0]
    height, width = images.shape[1:3] if layout == "NHWC" else images.shape[2:4]
    shape = (batch, height, width, 3) if layout == "NHWC" else (batch, 3, height, width)
    if images.dtype not in DTYPE_CODES:
        raise TypeError(f"images should be torch.uint8 or torch.float32, got {images.dtype}")
    address = pointer(images, "images", images.dtype, shape, images.device)
    return address, DTYPE_CODES[images.dtype], LAYOUT_CODES[layout], batch, height, width


def _arguments(images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str) -> tuple[int, ...]:
    """The arguments shared by all bank functions of `_cpu`, from `images_ptr` to `pairs_ptr`."""
    if images.device != CPU:
        raise ValueError(f"images should be on cpu, got {images.device}")
    n, fields = table.shape
    return (
        *image_arguments(images, layout),
        pointer(weights, "weights", torch.float32, (weights.numel(),)),
        weights.numel(),
        pointer(table, "table", torch.int64, (n, fields)),
        n,
        fields,
        0 if pairs is None else pointer(pairs, "pairs", torch.int64, (images.shape[0],)),
    )


def response_shape(batch: int, table: Tensor, pairs: Tensor | None) -> tuple[int, ...]:
    """[B, N], or [B] with pairs."""
    return (batch, table.shape[0]) if pairs is None else (batch,)


def bank_forward(
    images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str, out: Tensor
) -> None:
    """Write the responses to `out`, float32 [B, N] or [B]. Images: uint8 or float32 [B, H, W, 3] or [B, 3, H, W]."""
    shape = response_shape(images.shape[0], table, pairs)
    cpu().bank_forward(
        *_arguments(images, weights, table, pairs, layout),
        PRECISION_CODES[precision],
        pointer(out, "out", torch.float32, shape),
    )


def bank_input_gradient(
    images: Tensor,
    weights: Tensor,
    table: Tensor,
    pairs: Tensor | None,
    cotangent: Tensor,
    layout: str,
    grad: Tensor,
    responses: Tensor,
) -> None:
    """Write d sum(cotangent * responses) / d images to `grad` (float32, shape of images), and the responses."""
    shape = response_shape(images.shape[0], table, pairs)
    cpu().bank_input_gradient(
        *_arguments(images, weights, table, pairs, layout),
        pointer(cotangent, "cotangent", torch.float32, shape),
        pointer(grad, "grad", torch.float32, tuple(images.shape)),
        pointer(responses, "responses", torch.float32, shape),
    )


def bank_plan(
    images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str, out: Tensor
) -> cpu_module.BankPlan:
    """Bind all pointers once. The caller keeps every tensor alive and in place for as long as the plan."""
    shape = response_shape(images.shape[0], table, pairs)
    plan: cpu_module.BankPlan = cpu().BankPlan(
        *_arguments(images, weights, table, pairs, layout),
        PRECISION_CODES[precision],
        pointer(out, "out", torch.float32, shape),
    )
    return plan


def _optional(x: Tensor | None, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return 0 if x is None else pointer(x, name, dtype, shape)


def random_rows(normal: bool, seed: int, stream: int, step: int, problems: Tensor, out: Tensor) -> None:
    """Fill `out`, float32 [n, rows, columns], with normal or uniform numbers. `problems`: int64 [n]."""
    n, rows, columns = out.shape
    cpu().random_rows(
        normal,
        seed,
        stream,
        step,
        pointer(problems, "problems", torch.int64, (n,)),
        n,
        rows,
        columns,
        pointer(out, "out", torch.float32, (n, rows, columns)),
    )


def sample_codes(
    seed: int,
    stream: int,
    step: int,
    problems: Tensor,
    mean: Tensor,
    scale: Tensor,
    diagonal: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """Write mean + scale * (diagonal * z (I + left^T right)) to `out`, float32 [n, rows, columns].

    mean, diagonal: float32 [n, columns]; scale: float32 [n]; factors: left and right, float32 [n, rank, columns].
    """
    n, rows, columns = out.shape
    rank = 0 if factors is None else factors[0].shape[1]
    left, right = (None, None) if factors is None else factors
    cpu().sample_codes(
        seed,
        stream,
        step,
        pointer(problems, "problems", torch.int64, (n,)),
        n,
        rows,
        columns,
        pointer(mean, "mean", torch.float32, (n, columns)),
        pointer(scale, "scale", torch.float32, (n,)),
        _optional(diagonal, "diagonal", torch.float32, (n, columns)),
        _optional(left, "left", torch.float32, (n, rank, columns)),
        _optional(right, "right", torch.float32, (n, rank, columns)),
        rank,
        pointer(out, "out", torch.float32, (n, rows, columns)),
    )


def code_moments(codes: Tensor, weights: Tensor, centre: Tensor | None, first: Tensor, second: Tensor | None) -> None:
    """Write the weighted sums over rows of codes, and of (codes - centre)^2 if `second` is given.

    codes: float32 [n, rows, columns]; weights: float32 [n, rows]; centre, first, second: float32 [n, columns].
    """
    n, rows, columns = codes.shape
    cpu().code_moments(
        pointer(codes, "codes", torch.float32, (n, rows, columns)),
        pointer(weights, "weights", torch.float32, (n, rows)),
        _optional(centre, "centre", torch.float32, (n, columns)),
        n,
        rows,
        columns,
        pointer(first, "first", torch.float32, (n, columns)),
        _optional(second, "second", torch.float32, (n, columns)),
    )


def low_rank_product(x: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write x (I + left^T right) to `out`. x, out: float32 [n, columns]; left, right: float32 [n, rank, columns]."""
    n, columns = x.shape
    rank = left.shape[1]
    cpu().low_rank_product(
        pointer(x, "x", torch.float32, (n, columns)),
        pointer(left, "left", torch.float32, (n, rank, columns)),
        pointer(right, "right", torch.float32, (n, rank, columns)),
        rank,
        n,
        columns,
        pointer(out, "out", torch.float32, (n, columns)),
    )


def row_dots(x: Tensor, y: Tensor, out: Tensor) -> None:
    """Write the sums over columns of x * y to `out`, float32 [n]. x, y: float32 [n, columns]."""
    n, columns = x.shape
    cpu().row_dots(
        pointer(x, "x", torch.float32, (n, columns)),
        pointer(y, "y", torch.float32, (n, columns)),
        n,
        columns,
        pointer(out, "out", torch.float32, (n,)),
    )
