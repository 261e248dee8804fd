"""The k best images of every model, over a stream larger than memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.functional import stream_responses


@dataclass(frozen=True, eq=False)
class TopImages:
    """The best images of each of N models, best first.

    Attributes:
        positions: int64 [k, N], each image's position in the stream; -1 where there were fewer than k images.
        responses: float [k, N], what they evoke; NaN where there were fewer than k images.
        seen: how many images there were.
    """

    positions: NDArray[np.int64]
    responses: NDArray[np.floating]
    seen: int


class TopK:
    """Keeps the k largest (or smallest) responses of every model. Of equal ones the earlier counts; NaN never does.

    Args:
        models: N, the number of models.
        k: how many images to keep of each (at least 1).
        lowest: keep the smallest responses.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(self, models: int, k: int, *, lowest: bool = False) -> None:
        if models < 1 or k < 1:
            raise ValueError(f"models and k should be at least 1, got {models} and {k}")
        self.k, self.seen = k, 0
        self._sign = 1 if lowest else -1
        self._positions = np.full((k, models), -1, np.int64)
        self._keys = np.full((k, models), np.inf)  # small is good; what was not seen is worst

    def add(self, responses: NDArray[np.floating]) -> None:
        """Consider the next images, [B, N]. They follow those of the calls before in the count of positions.

        Raises:
            ValueError: another number of models.
        """
        models = self._keys.shape[1]
        if responses.ndim != 2 or responses.shape[1] != models:
            raise ValueError(f"responses should be [B, {models}], one column per model, got {list(responses.shape)}")
        keys = np.where(np.isnan(responses), np.inf, self._sign * responses.astype(np.float64))
        better = np.flatnonzero((keys < self._keys[-1]).any(axis=1))  # few, once some images have been seen
        if better.size:
            keys = np.concatenate([self._keys, keys[better]])
            ours = np.broadcast_to((self.seen + better)[:, None], (better.size, models))
            positions = np.concatenate([self._positions, ours])
            order = np.argsort(keys, axis=0, kind="stable")[: self.k]
            self._keys = np.take_along_axis(keys, order, axis=0)
            self._positions = np.where(np.isinf(self._keys), -1, np.take_along_axis(positions, order, axis=0))
        self.seen += len(responses)

    def result(self) -> TopImages:
        """The best so far."""
        missing = self._positions < 0
        values = np.where(missing, np.nan, self._sign * self._keys)
        return TopImages(self._positions.copy(), values, self.seen)


def top_images(
    batches: Iterable[NDArray[Any]], bank: ModelBank, k: int, *, lowest: bool = False, **options: Any
) -> TopImages:
    """The k images of a stream that drive each model most (or least); at any time a few batches are in memory.

    Args:
        batches: arrays of images, as for `stream_responses`; a few hundred images each keep a GPU busy.
        bank: N models, on the device that is to do the work.
        k: how many images per model.
        lowest: the images that drive each model least.
        options: layout, precision and backend, as for `stream_responses`.

    Raises:
        ValueError: k below 1.
        What `stream_responses` raises.
    """
    best = TopK(len(bank), k, lowest=lowest)
    for responses in stream_responses(batches, bank, **options):
        best.add(responses)
    return best.result()
