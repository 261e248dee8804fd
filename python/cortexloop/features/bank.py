"""`BankFeatures`: the maps of one layer of one model of a bank."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexloop.bank import ModelBank
from cortexloop.features.base import (
    FeatureSource,
    Images,
    Linearization,
    as_levels,
    check_batch,
    check_differentiable,
)
from cortexloop.functional import activations, pullback
from cortexloop.images import recenter
from cortexloop.weights import CompactWeights, SharedCompactWeights


class BankFeatures(FeatureSource):
    """Features are the post-ReLU maps of a layer of one model of a bank, computed by the reference backend.

    Args:
        bank: the bank; its device is that of the features.
        model: position or name of a model.
        layer: 0 is the first layer; negative counts from the end.
        batch: images at a time.

    Raises:
        ValueError: a name that is not in the bank, or a layer that the model does not have.
        IndexError: a position outside the bank.
    """

    def __init__(self, bank: ModelBank, model: int | str, layer: int, *, batch: int = 64) -> None:
        weights = bank.select(model).models[0]
        depth = len(weights.layers)
        if not -depth <= layer < depth:
            raise ValueError(f"model {weights.name!r} has layers 0..{depth - 1}, got {layer}")
        self.layer = layer % depth
        self.batch = check_batch(batch)
        self.name = f"{weights.name}.layer{self.layer}"
        self._shape = (weights.filters[self.layer], *weights.map_sizes()[self.layer])
        # The model up to that layer, without its readout.
        channels, height, width = self._shape
        empty = np.zeros((height, width, channels), dtype=np.float32)
        trunk = dataclasses.replace(weights, layers=weights.layers[: self.layer + 1], readout=empty, readout_bias=0.0)
        self.bank = ModelBank([trunk]).to(bank.device)

    @classmethod
    def of_weights(
        cls,
        weights: CompactWeights | SharedCompactWeights,
        layer: int = -1,
        *,
        batch: int = 64,
        device: torch.device | str = "cpu",
    ) -> BankFeatures:
        """A layer of a model given as raw parameters: of a shared compact model, too, whose trunk has the same form.

        Raises:
            ValueError: a shared model without ReLUs, which banks do not hold; no such layer.
        """
        if isinstance(weights, SharedCompactWeights):
            if not weights.relu:
                raise ValueError(f"model {weights.name!r} has no ReLUs; take ModuleFeatures of its module")
            empty = np.zeros((*weights.spatial.shape[:2], weights.mixing.shape[0]), dtype=np.float32)
            weights = CompactWeights(
                weights.name, weights.layers, empty, 0.0, weights.height, weights.width, weights.image_mean
            )
        return cls(ModelBank([weights]).to(device), 0, layer, batch=batch)

    @property
    def device(self) -> torch.device:
        return self.bank.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def feature_shape(self) -> tuple[int, int, int]:
        return self._shape

    def settings(self) -> dict[str, Any]:
        return {"kind": "bank", "model": self.bank.names[0], "layer": self.layer, "batch": self.batch}

    def differentiable(self, images: Tensor) -> Tensor:
        check_differentiable(images, self.device)
        return self._compute(images)

    def linearize(self, images: Images) -> Linearization:
        return _BankLinearization(self, as_levels(images, self.device))

    def graph_bytes(self, height: int, width: int) -> int:
        return 0  # the kernels keep one bit for each activation of one image

    def _shown(self, images: Tensor) -> Tensor:
        """Levels as the bank takes them: 8 bits as they are, floating ones recentred."""
        if images.dtype == torch.uint8:
            return images
        # float64 images are computed in float64
        return recenter(images if images.dtype == torch.float64 else images.float(), self.bank.image_mean)

    def _compute(self, images: Tensor) -> Tensor:
        maps = activations(self._shown(images), self.bank, self.layer)[0]
        return maps.permute(0, 3, 1, 2).contiguous()


class _BankLinearization(Linearization):
    """By the bank's kernels."""

    def __init__(self, source: BankFeatures, images: Tensor) -> None:
        self._source, self._images = source, images
        self._bank, self._shown = source.bank, source._shown(images)

    @functools.cached_property
    def features(self) -> Tensor:  # type: ignore[override]
        """[B, C, H, W]; the kernels' pullback does not need them."""
        with torch.no_grad():
            return self._source._compute(self._images)

    def pullback(self, cotangents: Tensor) -> Tensor:
        self._check(cotangents)
        backend = "reference" if self._shown.dtype == torch.float64 else "auto"  # which alone takes float64
        return pullback(self._shown, self._bank, cotangents.permute(0, 1, 3, 4, 2).contiguous(), backend=backend)
