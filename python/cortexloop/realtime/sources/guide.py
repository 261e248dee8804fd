"""What models say about images that nobody has seen yet: a bank, and a regression on it that follows the neuron."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.features import FeatureSource
from cortexloop.realtime.plan import Plan
from cortexloop.realtime.refit import Double, RecursiveRidge, Refit
from cortexloop.realtime.source import Images
from cortexloop.realtime.sources.common import bank_digest, check_count, features_settings

Rows = NDArray[np.float32]

_AT_ONCE = 16384
"""Rows whose spread is computed together; bounds memory."""


class Guide:
    """Predicts responses of the neuron in front of the electrode, and how much models disagree about them.

    An image is known by its row: the responses of the bank's models, then averages over the map of a layer if there is
    one. At first the prediction is the mean of the bank's responses, or that of one model. With a `Refit` it becomes a
    ridge regression of the session's scores on the averages of the layer, or on the bank's responses without a layer,
    as soon as there are enough scores.

    Args:
        bank: models of this or similar neurons, in response units of about equal scale.
        chunk: images that are evaluated together.
        model: name or position of the model whose response is the prediction at first; None: the mean of all.
        refit: None: the prediction stays what it is at first.
        layer: features to regress on.
        precision: of the bank, "exact" or "fast".

    Attributes:
        width: numbers in a row.

    Raises:
        ValueError, IndexError: an unknown model, a layer without a refit or of images of another size, a chunk below 1.
    """

    def __init__(
        self,
        bank: ModelBank,
        *,
        chunk: int = 64,
        model: str | int | None = None,
        refit: Refit | None = None,
        layer: FeatureSource | None = None,
        precision: str = "exact",
    ) -> None:
        check_count("chunk", chunk)
        if layer is not None and refit is None:
            raise ValueError("averages of a layer are features of a model that is refitted: say refit=Refit(), too")
        self.bank, self.layer, self.refit, self.chunk = bank, layer, refit, chunk
        self._model = None if model is None else bank.names.index(bank.select(model).names[0])
        self._plan = Plan(bank, chunk, precision=precision)
        if layer is not None:
            layer(np.full((1, bank.height, bank.width, 3), 128, np.uint8))  # refuses a size that it does not take
        channels = 0 if layer is None else layer.feature_shape()[0]
        self.width = len(bank) + channels
        self._features = slice(len(bank), None) if layer is not None else slice(len(bank))
        self.ridge: RecursiveRidge | None = None if refit is None else refit.model(channels or len(bank))
        self._settings = {
            "bank": bank_digest(bank),
            "model": None if self._model is None else bank.names[self._model],
            "chunk": chunk,
            "precision": precision,
            "layer": None if layer is None else features_settings(layer),
            "refit": None if self.ridge is None or refit is None else {"after": refit.after, **self.ridge.settings()},
        }

    @property
    def refitted(self) -> bool:
        """Whether predictions are those of the regression by now."""
        return self.ridge is not None and self.refit is not None and self.ridge.count >= self.refit.after

    def rows(self, images: Images) -> Rows:
        """float32 [n, width] of images uint8 [n, H, W, 3], a chunk at a time."""
        found = np.empty((len(images), self.width), dtype=np.float32)
        for first in range(0, len(images), self.chunk):
            some = images[first : first + self.chunk]
            self._plan.images[: len(some)] = some
            found[first : first + len(some), : len(self.bank)] = self._plan.run()[: len(some)]
            if self.layer is not None:
                maps = self.layer(np.asarray(some))
                found[first : first + len(some), len(self.bank) :] = maps.mean(dim=(2, 3)).cpu().numpy()
        return found

    def predict(self, rows: Rows) -> Double:
        """Predicted responses [n]."""
        if self.ridge is not None and self.refitted:
            return self.ridge.predict(rows[:, self._features])
        if self._model is not None:
            return rows[:, self._model].astype(np.float64)
        return np.asarray(rows[:, : len(self.bank)].mean(axis=1, dtype=np.float64))

    def disagreement(self, rows: Rows) -> Double:
        """Standard deviation over the bank's models [n], in response units."""
        spread = np.empty(len(rows))
        for first in range(0, len(rows), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            spread[some] = rows[some, : len(self.bank)].std(axis=1, dtype=np.float64)
        return spread

    def learn(self, rows: Rows, scores: Double) -> None:
        """Take the scores [n] of images with these rows; NaN = missing. Rows that are not finite count as missing."""
        if self.ridge is not None:
            features = rows[:, self._features]
            self.ridge.add(np.where(np.isfinite(features), features, np.nan), scores)

    def settings(self) -> dict[str, Any]:
        """What defines it, JSON-able, with digests of contents."""
        return dict(self._settings)

    def digest(self) -> str:
        """SHA-256 of what it has learned."""
        return "" if self.ridge is None else self.ridge.digest()
