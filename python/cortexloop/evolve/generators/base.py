"""What all generators share: the interface, and for those that are formulas scale, colours, squashing and chunks."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.evolve.optimiser import whole

CODE_RMS = 300 / 64
"""RMS of codes that give natural contrast: norm 300 at 4096 dimensions, where published evolutions on fc6 end up."""

CONTRAST = 0.22
"""RMS of random images before squashing, as a share of the range from black to white."""

COLOUR_AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
"""[axis, RGB] orthonormal: luminance, red-blue, magenta-green; principal axes of colour in natural images.

Source: Ohta, Kanade & Sakai 1980, Computer Graphics and Image Processing 13:222; like the axes of cone responses of
Ruderman, Cronin & Chiao 1998, JOSA A 15:2036.
"""

COLOUR_SPREAD = np.array([1.0, 0.28, 0.13])
"""Standard deviations along `COLOUR_AXES` relative to luminance, of ImageNet.

Source: the colour matrix of Olah, Mordvintsev & Schubert 2017, Feature Visualization (Distill).
"""

MAX_SIDE = 4096


class Generator(abc.ABC):
    """Makes images of codes; on a CPU each image depends on its own code alone, bit for bit, whatever the batch.

    Attributes:
        dim: length of a code.
        height, width: of the images, in pixels.
        name: as in `GENERATORS`.
    """

    name: str

    def __init__(self, height: int, width: int, dim: int) -> None:
        self.height, self.width = check_size(height, width)
        self.dim = dim

    def __call__(self, codes: Tensor) -> Tensor:
        """Images of codes.

        Args:
            codes: [..., dim], floating point, on any device.

        Returns:
            float32 [..., 3, height, width], RGB in [0, 1], on the device of the codes; differentiable.

        Raises:
            TypeError: not a tensor of floating point.
            ValueError: another length of codes.
        """
        if not isinstance(codes, Tensor) or not codes.is_floating_point():
            kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"codes should be a floating-point tensor [..., {self.dim}], got {kind}")
        if codes.ndim == 0 or codes.shape[-1] != self.dim:
            raise ValueError(f"codes should be [..., {self.dim}] for this generator, got {list(codes.shape)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and codes.requires_grad):
            flat = codes.reshape(-1, self.dim).to(torch.float32)
            images = self._images(flat) if len(flat) else flat.new_empty(0, 3, self.height, self.width)
            return images.view(*codes.shape[:-1], 3, self.height, self.width)

    @abc.abstractmethod
    def _images(self, codes: Tensor) -> Tensor:
        """[b, dim] float32 -> contiguous [b, 3, height, width] float32; b is 1 or more."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What it takes to make this generator again, JSON-able; weights by file name and SHA-256."""


class FormulaGenerator(Generator):
    """A generator without trained weights. Subclasses give `_render`, and `_tables` of constants for it.

    `_render` may use only operations whose bits for one image do not depend on the batch: `torch.bmm` with one matrix
    per image (or per image and channel), elementwise ones, copies, and `squash`. A plain matrix product over the batch
    is none of these: its blocks, and with them the order of its sums, change with the number of rows. Nor is a `bmm` of
    one matrix, which MKL divides among threads, so `_render` gets two codes at least. Then the bits do not depend on
    the number of threads either. On a GPU it is the vendor's library that decides.
    """

    _cpu_pixels: ClassVar[int] = 100_000
    """Pixels per chunk on a CPU: intermediates stay in the cache, and Python's share of the time stays small."""
    _gpu_pixels: ClassVar[int] = 1 << 23

    _tables: Sequence[NDArray[Any]]

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__(height, width, dim)
        self._on_device: dict[torch.device, tuple[Tensor, ...]] = {}

    @abc.abstractmethod
    def _render(self, codes: Tensor, constants: tuple[Tensor, ...], out: Tensor | None) -> Tensor:
        """[b, dim] -> [b, 3, height, width], written to `out` if given; b is 2 or more."""

    def _images(self, codes: Tensor) -> Tensor:
        constants = self._constants(codes.device)
        if len(codes) == 1:
            return self._render(codes.expand(2, -1), constants, None)[:1]
        if torch.is_grad_enabled():
            return self._render(codes, constants, None)
        pixels = self._cpu_pixels if codes.device.type == "cpu" else self._gpu_pixels
        chunk = max(2, pixels // (self.height * self.width))
        images = codes.new_empty(len(codes), 3, self.height, self.width)
        for first in range(0, len(codes), chunk):
            # The last chunk reaches back rather than be of one image; the same image again has the same bits.
            part = slice(min(first, len(codes) - 2), first + chunk)
            self._render(codes[part], constants, images[part])
        return images

    def _constants(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._on_device:
            with torch.inference_mode(False):  # they outlive this call, and inference tensors cannot be differentiated
                self._on_device[device] = tuple(
                    torch.from_numpy(np.asarray(t, np.int64 if t.dtype.kind == "i" else np.float32)).to(device)
                    for t in self._tables
                )
        return self._on_device[device]


def squash(x: Tensor, out: Tensor | None = None) -> Tensor:
    """1 / (1 + exp(-x)), contiguous, with bits that depend on the element alone; for 4 v it is about 0.5 + v.

    Args:
        x: contiguous.
        out: contiguous, of the shape of x, to write to where no gradient is needed.
    """
    if x.device.type != "cpu":
        return torch.sigmoid(x) if out is None else torch.sigmoid(x, out=out)
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Squash.apply(x))  # type: ignore[no-untyped-call]
    return _squash_on_cpu(x, torch.empty_like(x) if out is None else out)


class _Squash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = _squash_on_cpu(x, torch.empty_like(x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y: Tensor = ctx.saved_tensors[0]
        return grad * y * (1 - y)


_VECTORS = 32
"""A multiple of what torch's vector loops take at a time; they compute left-over elements in another way."""
_GRAIN = 32768
"""torch gives each thread at least so many elements, so multiples of it are split at multiples of it."""


def _squash_on_cpu(x: Tensor, out: Tensor) -> Tensor:
    """torch's sigmoid of whole vectors only: that of single elements, at the end of a loop, differs in the last bit."""
    source, target = x.view(-1), out.view(-1)
    n, threads = source.numel(), torch.get_num_threads()
    first = 0
    while n - first >= _VECTORS:
        blocks = min(threads, (n - first) // _GRAIN)
        count = blocks * _GRAIN if threads > 1 and blocks else (n - first) // _VECTORS * _VECTORS
        torch.sigmoid(source[first : first + count], out=target[first : first + count])
        first += count
    if first < n:
        padded = source.new_zeros(_VECTORS)
        padded[: n - first] = source[first:]
        target[first:] = padded.sigmoid_()[: n - first]
    return out


def check_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of images, as given.

    Raises:
        TypeError, ValueError: not whole numbers from 1 to `MAX_SIDE`.
    """
    return whole("height", height, 1, MAX_SIDE), whole("width", width, 1, MAX_SIDE)


def check_seed(seed: int) -> int:
    """A seed for NumPy's generator, as given.

    Raises:
        TypeError, ValueError: not a whole number from 0 to 2**64 - 1.
    """
    return whole("seed", seed, 0, 2**64 - 1)
