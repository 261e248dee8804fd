"""`FeatureSource`: what every source of features offers, and the checks of images that they share."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.features.replay import AT_ONCE, Replay

Images = NDArray[Any] | Tensor
"""uint8 RGB, or floating levels 0..255; [B, H, W, 3]."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FeatureSource(abc.ABC):
    """Maps of features of images, [B, C, H, W].

    Attributes:
        name: for people and files, such as "resnet50.layer3.5".
        batch: images at a time.
    """

    name: str
    batch: int

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where features are computed and stay."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the features: float32, or float64 where the network is float64."""

    @abc.abstractmethod
    def feature_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the maps."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that determines the features except the network's weights, as JSON can hold it."""

    @abc.abstractmethod
    def differentiable(self, images: Tensor) -> Tensor:
        """Features [B, C, H, W] with the graph back to `images`, in one piece.

        Args:
            images: floating levels 0..255, [B, H, W, 3], on the source's device; requires_grad if a graph is wanted.

        Raises:
            TypeError: not a floating tensor.
            ValueError: wrong shape, size or device.
        """

    def linearize(self, images: Images) -> Linearization:
        """Features of some images, and their derivative, ready for any number of cotangents: one forward pass.

        Args:
            images: as for a call (on the source's device or another one); in one piece, so as many as memory holds.

        Raises:
            TypeError, ValueError: as for a call.
        """
        levels = as_levels(images, self.device)
        return GraphLinearization(self, levels if levels.is_floating_point() else levels.to(self.dtype))

    def graph_bytes(self, height: int, width: int) -> int:
        """Bytes that a linearization keeps for each image of this size: measured, by grey images.

        What two images keep beyond one, so that weights do not count.
        """
        sizes = []
        for count in (1, 2):
            kept: dict[int, int] = {}

            def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            grey = torch.full((count, height, width, 3), 128.0, dtype=self.dtype, device=self.device)
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                graph = self.differentiable(grey.requires_grad_())
            sizes.append(sum(kept.values()))
            del graph
        return max(0, sizes[1] - sizes[0])

    @abc.abstractmethod
    def _compute(self, images: Tensor) -> Tensor:
        """Features of one batch of checked images on the source's device; called without a graph."""

    def __call__(self, images: Images) -> Tensor:
        """Features [B, C, H, W] without a graph, on the source's device; `batch` images at a time.

        Args:
            images: uint8 RGB or floating levels 0..255, [B, H, W, 3]; NumPy or torch, on any device.

        Raises:
            TypeError: not images, or of a dtype that holds no levels.
            ValueError: wrong shape or size, NaN in a NumPy array, or values that look like 0..1.
        """
        checked = as_images(images)
        if len(checked) == 0:
            return torch.empty((0, *self.feature_shape()), dtype=self.dtype, device=self.device)
        if len(checked) <= self.batch:
            return self._without_graph(checked)
        out = torch.empty((len(checked), *self.feature_shape()), dtype=self.dtype, device=self.device)
        for start in range(0, len(checked), self.batch):
            out[start : start + self.batch] = self._without_graph(checked[start : start + self.batch])
        return out

    def stream(self, images: Images | Iterable[Images]) -> Iterator[Tensor]:
        """Features batch by batch, in order, for more images than fit in memory.

        Args:
            images: as for a call, or any iterable of such arrays, each of any number of images of one dtype. Small
                arrays are put together.

        Yields:
            [b, C, H, W] with b = `batch`, but for the last.

        Raises:
            TypeError, ValueError: as for a call.
        """
        for group in grouped([images] if isinstance(images, (np.ndarray, Tensor)) else images, self.batch):
            yield self._without_graph(group)

    def _without_graph(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self._compute(images.to(self.device)).to(self.dtype)


class Linearization(abc.ABC):
    """Features at some images, and the linear map from changes of the images to changes of the features.

    Attributes:
        features: [B, C, H, W], without a graph.
    """

    features: Tensor

    @abc.abstractmethod
    def pullback(self, cotangents: Tensor) -> Tensor:
        """J^T h: d sum(cotangent * features) / d image, for K cotangents of each image.

        Args:
            cotangents: [B, K, C, H, W], of the features' dtype and device.

        Returns:
            [B, K, H, W, 3], per grey level.

        Raises:
            ValueError: another shape.
        """

    def _check(self, cotangents: Tensor) -> None:
        b, *maps = self.features.shape
        if cotangents.ndim != 5 or cotangents.shape[0] != b or list(cotangents.shape[2:]) != maps:
            wanted = ", ".join(map(str, maps))
            raise ValueError(f"cotangents should be [{b}, K, {wanted}], got {list(cotangents.shape)}")


class GraphLinearization(Linearization):
    """By torch's graph of one forward pass.

    The graph is replayed with up to `replay.AT_ONCE` cotangents at a time. One that holds a derivative written in
    Python is run by torch, once for each cotangent.
    """

    def __init__(self, source: FeatureSource, images: Tensor) -> None:
        with torch.enable_grad():
            self._images = images.detach().clone().requires_grad_()
            self._graph = source.differentiable(self._images)
        self.features = self._graph.detach()
        self._replay = Replay(self._graph, self._images)

    def pullback(self, cotangents: Tensor) -> Tensor:
        self._check(cotangents)
        count = cotangents.shape[1]
        grads = torch.empty(
            (len(self._images), count, *self._images.shape[1:]), dtype=self.features.dtype, device=self.features.device
        )
        if self._replay.reason is None:
            for start in range(0, count, AT_ONCE):
                rows = cotangents[:, start : start + AT_ONCE].transpose(0, 1).contiguous()
                grads[:, start : start + AT_ONCE] = self._replay.run(rows).transpose(0, 1)
            return grads
        for k in range(count):
            grads[:, k] = torch.autograd.grad(self._graph, self._images, cotangents[:, k], retain_graph=True)[0]
        return grads


def as_levels(images: Images, device: torch.device) -> Tensor:
    """Checked images on a device; values that look like 0..1 are let through, for paths that start at black.

    Raises:
        TypeError, ValueError: as `as_images`.
    """
    return as_images(images, unit_range=True).to(device)


def as_images(images: Images, *, unit_range: bool = False) -> Tensor:
    """Images as a tensor [B, H, W, 3] (of the same memory where that can be).

    Args:
        unit_range: whether floating values that all lie in 0..1 are let through.

    Raises:
        TypeError: not an array, or a dtype that holds no levels.
        ValueError: wrong shape, NaN in a NumPy array, or values that look like 0..1.
    """
    if not isinstance(images, (np.ndarray, Tensor)):
        raise TypeError(f"images should be a NumPy array or a torch tensor, got {type(images).__name__}")
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8 and images.dtype.kind != "f":
            raise TypeError(f"images should be uint8 or floating levels 0..255, got {images.dtype}")
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise ValueError("images hold NaN or infinity")
        array = np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("="))
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    else:
        tensor = images.detach()
    if tensor.dtype != torch.uint8 and tensor.dtype not in FLOATS:
        raise TypeError(f"images should be uint8 or floating levels 0..255, got {tensor.dtype}")
    check_shape(tensor)
    if tensor.dtype != torch.uint8 and tensor.numel() and not unit_range:
        low, high = (float(v) for v in torch.aminmax(tensor))
        if low >= 0 and 0 < high <= 1:
            raise ValueError(
                f"floating images hold levels 0..255, these lie in {low:.3g}..{high:.3g}; multiply them by 255"
            )
    return tensor


def check_shape(images: Tensor) -> None:
    """ValueError unless images are [B, H, W, 3]."""
    if images.ndim != 4 or images.shape[3] != 3:
        advice = ""
        if images.ndim == 3:
            advice = "; add a batch axis: images[None]"
        elif images.ndim == 4 and images.shape[1] == 3:
            advice = "; put the channels last: permute(0, 2, 3, 1), or transpose(0, 2, 3, 1) in NumPy"
        raise ValueError(f"images should be [B, H, W, 3], got {list(images.shape)}{advice}")


def check_differentiable(images: Tensor, device: torch.device) -> None:
    """Refuse what a graph cannot start from.

    Raises:
        TypeError: not a floating tensor.
        ValueError: wrong shape or device.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"differentiable features take floating torch images of levels 0..255, got {what}")
    check_shape(images)
    if images.device != device:
        raise ValueError(f"images are on {images.device}, the features are computed on {device}: images.to('{device}')")


def grouped(arrays: Iterable[Images], batch: int) -> Iterator[Tensor]:
    """Checked images of the arrays in groups of `batch`, the last one smaller.

    Raises:
        TypeError, ValueError: as `as_images`, or arrays of different dtype or size.
    """
    waiting: list[Tensor] = []
    count = 0
    for array in arrays:
        checked = as_images(array)
        if waiting and (checked.dtype != waiting[0].dtype or checked.shape[1:] != waiting[0].shape[1:]):
            raise ValueError(
                f"the arrays of a stream should hold images of one dtype and size, got {checked.dtype} "
                f"{list(checked.shape[1:])} behind {waiting[0].dtype} {list(waiting[0].shape[1:])}"
            )
        if len(checked):
            waiting.append(checked)
            count += len(checked)
        while count >= batch:
            joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            yield joined[:batch]
            waiting = [joined[batch:]] if count > batch else []
            count -= batch
    if waiting:
        yield torch.cat(waiting)


def check_batch(batch: int) -> int:
    """ValueError unless a batch holds at least one image."""
    if batch < 1:
        raise ValueError(f"batch should be at least 1 image, got {batch}")
    return batch
