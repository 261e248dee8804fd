"""Features of images, batch by batch and as often as needed, whether from a network or given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.factor._checks import Array, floats, listed, neuron_indices
from cortexloop.features import FeatureSource

KEEP_BYTES = 1_000_000_000
_BATCH = 64  # given features at a time: what is made of a batch for all neurons should stay small


class FeatureBatches:
    """Batches of features [b, C, H, W] of chosen images.

    Features from a source are computed once and kept if all of them fit in `keep` bytes, else in every pass.

    Args:
        source: where features come from; None: `inputs` are features.
        inputs: images [B, h, w, 3] for the source, or features [B, C, H, W].
        chosen: which images, int64 [n]; None: all.

    Raises:
        TypeError, ValueError: not arrays of that shape, or features that are not finite.
    """

    def __init__(
        self, source: FeatureSource | None, inputs: Array, chosen: Tensor | None = None, *, keep: int = KEEP_BYTES
    ) -> None:
        self.source = source
        if source is None:
            self.inputs: Array = floats(inputs, "features", 4, finite=False)
            self.shape: tuple[int, int, int] = tuple(self.inputs.shape[1:])  # type: ignore[assignment]
            self.device = self.inputs.device
        else:
            if not isinstance(inputs, Tensor | np.ndarray) or inputs.ndim != 4 or inputs.shape[3] != 3:
                found = list(inputs.shape) if isinstance(inputs, Tensor | np.ndarray) else type(inputs).__name__
                raise ValueError(f"images for {source.name} should be an array [B, H, W, 3], got {found}")
            self.inputs = inputs
            self.shape = source.feature_shape()
            self.device = source.device
        self.chosen = torch.arange(len(inputs)) if chosen is None else chosen.cpu()
        self.batch = _BATCH if source is None else source.batch
        size = len(self.chosen) * int(np.prod(self.shape)) * 4
        self._kept: list[Tensor] | None = [] if source is not None and size <= keep else None
        self._complete = False

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(which of the chosen images, their features)."""
        for number, start in enumerate(range(0, len(self.chosen), self.batch)):
            part = slice(start, min(start + self.batch, len(self.chosen)))
            yield part, self._features(number, part)
        self._complete = True

    def _features(self, number: int, part: slice) -> Tensor:
        if self._kept is not None and number < len(self._kept):
            return self._kept[number]
        index = self.chosen[part]
        given: Any = self.inputs[index.numpy() if isinstance(self.inputs, np.ndarray) else index]
        features = given if self.source is None else self.source(given)
        if not self._complete and not bool(torch.isfinite(features).all()):
            bad = index[~torch.isfinite(features).flatten(1).all(1).cpu()]
            raise ValueError(f"features of images {listed(bad)} hold NaN or infinity; leave those images out")
        if self._kept is not None:
            self._kept.append(features)
        return features


def check_responses(responses: Array, count: int, train: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Responses of the training images, float64 [n, T], the indices of these images [n], and constant neurons.

    Only the training rows are looked at, so that nothing of the others can have an influence.

    Raises:
        TypeError, ValueError: not [B, T], another number of images, indices out of range or given twice, fewer than 4
            training images, or NaN or infinite responses among them.
    """
    y = floats(responses, "responses", 2, finite=False)
    if len(y) != count:
        raise ValueError(
            f"responses should be [images, neurons], of {count} images as the other input is; got {list(y.shape)}"
        )
    chosen = torch.arange(count) if train is None else neuron_indices(train, count)
    if len(torch.unique(chosen)) != len(chosen):
        raise ValueError("train should name every image once; repeats are said by `weights`")
    if len(chosen) < 4:
        raise ValueError(f"a fit needs at least 4 training images, got {len(chosen)}")
    y = y[chosen.to(y.device)].double()
    bad = torch.nonzero(~torch.isfinite(y).all(0))[:, 0]
    if len(bad):
        raise ValueError(
            f"responses of neurons {listed(bad)} to training images are NaN or infinite; leave those neurons out, or "
            "those images by `train`"
        )
    constant = torch.nonzero((y == y[:1]).all(0))[:, 0]
    return y, chosen, constant


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """In host memory."""
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
