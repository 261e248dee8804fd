"""`Method`: the interface that all attribution methods share, and the chunks in which they work."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.attribution.post import Post
from cortexloop.attribution.targets import Target, as_target
from cortexloop.bank import ModelBank
from cortexloop.features.base import Images, as_levels
from cortexloop.images import gaussian_blur

Baseline = str | float | Images
Neurons = Sequence[int] | NDArray[np.integer] | Tensor | int
MEMORY = 2**30
"""Bytes that a method may use beyond its result, unless told otherwise."""


@dataclass(frozen=True)
class Selection:
    """What is to be done: `neurons` int64 [K] for every image, or one for each image if `paired`."""

    neurons: Tensor
    paired: bool


def floating(levels: Tensor, target: Target) -> Tensor:
    """Levels as float32, or as float64 if they or the target are."""
    return levels.to(torch.float64 if torch.float64 in (levels.dtype, target.dtype) else torch.float32)


def select(target: Target, batch: int, neurons: Neurons | None, pairs: Neurons | None) -> Selection:
    """Checked positions of neurons.

    Raises:
        ValueError: both given, not one per image, or outside the target.
        TypeError: not integers.
    """
    if neurons is not None and pairs is not None:
        raise ValueError("give neurons (for every image) or pairs (one neuron for each image), not both")
    if neurons is None and pairs is None:
        return Selection(torch.arange(target.neurons, device=target.device), False)
    name, given = ("neurons", neurons) if pairs is None else ("pairs", pairs)
    index = torch.as_tensor(given, device=target.device).reshape(-1) if not isinstance(given, int) else None
    index = torch.tensor([given], device=target.device) if index is None else index
    if index.numel() == 0:
        index = index.to(torch.int64)
    if index.is_floating_point() or index.dtype == torch.bool or index.is_complex():
        raise TypeError(f"{name} should be integers (positions of neurons), got {index.dtype}")
    index = index.to(torch.int64)
    if pairs is not None and len(index) != batch:
        raise ValueError(f"pairs should hold one neuron for each of the {batch} images, got {len(index)}")
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < target.neurons):
        raise ValueError(f"{name} should lie in 0..{target.neurons - 1}, got {int(index.min())}..{int(index.max())}")
    return Selection(index, pairs is not None)


def chunks(
    images: int, neurons: int, per_image: int, per_pair: int, memory: int, *, paired: bool
) -> Iterator[tuple[slice, slice]]:
    """Blocks of images and neurons that take at most `memory` bytes each; images outermost.

    Args:
        per_image, per_pair: bytes of each image, and of each image and neuron.
        paired: every image has one neuron; both slices are then the same.

    Raises:
        ValueError: one image with one neuron needs more.
    """
    least = per_image + per_pair
    if least > memory:
        raise ValueError(
            f"one image with one neuron needs about {least / 2**20:.0f} MiB, memory={memory} allows "
            f"{memory / 2**20:.0f} MiB; allow more"
        )
    if paired:
        step = max(1, min(images, memory // least))
        for start in range(0, images, step):
            rows = slice(start, min(start + step, images))
            yield rows, rows
        return
    columns = max(1, min(neurons, (memory - per_image) // per_pair))
    rows_at_once = max(1, min(images, memory // (per_image + columns * per_pair)))
    for start in range(0, images, rows_at_once):
        for first in range(0, neurons, columns):
            yield slice(start, min(start + rows_at_once, images)), slice(first, min(first + columns, neurons))


class Method(abc.ABC):
    """An attribution method.

    Args:
        target: a bank, or a `Readout` of any features.
        memory: bytes that may be used beyond the result. Work is cut into chunks by an estimate of what each image and
            each neuron takes: 2 to 4 times the images' size on kernels, and what torch's graph stores for one image (it
            is measured) for other networks. What torch's own operators use meanwhile is not counted.

    Raises:
        TypeError: neither a bank nor a target.
        ValueError: `memory` is not positive.
    """

    def __init__(self, target: Target | ModelBank, *, memory: int = MEMORY) -> None:
        self.target = as_target(target)
        if memory < 1:
            raise ValueError(f"memory should be a number of bytes, got {memory}")
        self.memory = memory

    @abc.abstractmethod
    def attribute(self, images: Images, neurons: Neurons | None = None, pairs: Neurons | None = None) -> Tensor:
        """Maps of images.

        Args:
            images: uint8 RGB or floating levels 0..255, [B, H, W, 3]; NumPy or torch.
            neurons: positions; every image is attributed for each of them. Default: all.
            pairs: [B] positions instead: image i is attributed for neuron pairs[i] only.
        """

    def _inputs(self, images: Images, neurons: Neurons | None, pairs: Neurons | None) -> tuple[Tensor, Selection]:
        """Floating levels on the target's device, and what is to be done with them."""
        levels = floating(as_levels(images, self.target.device), self.target)
        return levels, select(self.target, len(levels), neurons, pairs)


class PixelMethod(Method):
    """A method that gives a number for every pixel and colour, by gradients.

    Args: as of `Method`, and
        post: steps on each map, such as Post(channels="l2"); done chunk by chunk, so that whole maps are never held.
    """

    baseline: Baseline = "zero"

    def __init__(self, target: Target | ModelBank, *, post: Post | None = None, memory: int = MEMORY) -> None:
        super().__init__(target, memory=memory)
        self.post = Post() if post is None else post

    def attribute(self, images: Images, neurons: Neurons | None = None, pairs: Neurons | None = None) -> Tensor:
        """Maps of images.

        Args: as of `Method.attribute`.

        Returns:
            [B, K, H, W, 3] (or [B, H, W, 3] with pairs) on the target's device; without the last axis if `post` takes
            the colours together.

        Raises:
            TypeError, ValueError: images or positions that do not fit; too little `memory` for one image.
        """
        levels, chosen = self._inputs(images, neurons, pairs)
        start = self._start(levels)
        leading = (len(levels),) if chosen.paired else (len(levels), len(chosen.neurons))
        whole = levels.new_empty((*leading, *self.post.shape(*levels.shape[1:3])))
        for rows, columns in self._chunks(levels, chosen):
            part = self._maps(levels[rows], start[rows], Selection(chosen.neurons[columns], chosen.paired))
            whole[rows if chosen.paired else (rows, columns)] = self.post(part)
        return whole

    @abc.abstractmethod
    def _maps(self, levels: Tensor, start: Tensor, chosen: Selection) -> Tensor:
        """Maps of one chunk, [B, K, H, W, 3] or [B, H, W, 3]; `start`: the baselines, of the shape of the levels."""

    def _start(self, levels: Tensor) -> Tensor:
        """The baseline of every image, of the shape of the levels."""
        return reference_levels(self.baseline, levels, self.target.zero).expand_as(levels)

    def _chunks(self, levels: Tensor, chosen: Selection) -> Iterator[tuple[slice, slice]]:
        count = len(chosen.neurons)
        if len(levels) == 0 or count == 0:
            return iter(())
        image, pair = self.target.memory(levels.shape[1], levels.shape[2])
        size = 2 if levels.dtype == torch.float64 and self.target.dtype == torch.float32 else 1
        return chunks(len(levels), count, size * image, size * pair, self.memory, paired=chosen.paired)


def reference_levels(baseline: Baseline, levels: Tensor, zero: tuple[float, float, float]) -> Tensor:
    """The baseline image(s), of the shape of `levels` or [1, H, W, 3] or [1, 1, 1, 3].

    Args:
        baseline: "zero" for the levels that the network sees as 0, "blur" for the image itself, blurred with a Gaussian
            of sigma H / 8; a level; or an image, [H, W, 3] or one for each image.

    Raises:
        ValueError: an unknown name or another shape.
    """
    if isinstance(baseline, str):
        if baseline == "zero":
            return torch.tensor(zero, dtype=levels.dtype, device=levels.device)[None, None, None]
        if baseline == "blur":
            return gaussian_blur(levels, levels.shape[1] / 8)
        raise ValueError(f'baseline should be "zero", "blur", a level or an image, got {baseline!r}')
    if isinstance(baseline, (int, float)):
        return levels.new_full((1, 1, 1, 3), float(baseline))
    image = torch.as_tensor(baseline).to(levels.device, levels.dtype)
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1:] != levels.shape[1:] or len(image) not in (1, len(levels)):
        raise ValueError(
            f"a baseline should be {list(levels.shape[1:])}, or one for each of {len(levels)} images, "
            f"got {list(image.shape)}"
        )
    return image
