"""`BankFeatures`: the maps of one layer of one model of a bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cortexloop.bank import ModelBank
from cortexloop.features.base import FeatureSource, check_batch, check_differentiable
from cortexloop.functional import activations
from cortexloop.images import recenter


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
        self.bank = bank.select(model)
        depth = len(self.bank.models[0].layers)
        if not -depth <= layer < depth:
            raise ValueError(f"model {self.bank.names[0]!r} has layers 0..{depth - 1}, got {layer}")
        self.layer = layer % depth
        self.batch = check_batch(batch)
        self.name = f"{self.bank.names[0]}.layer{self.layer}"
        weights = self.bank.models[0]
        self._shape = (weights.filters[self.layer], *weights.map_sizes()[self.layer])

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

    def _compute(self, images: Tensor) -> Tensor:
        # float64 images are computed in float64 as far as a graph goes
        levels = images if images.dtype in (torch.uint8, torch.float64) else images.float()
        shown = levels if levels.dtype == torch.uint8 else recenter(levels, self.bank.image_mean)
        maps = activations(shown, self.bank, self.layer)[0]
        return maps.permute(0, 3, 1, 2).contiguous()
