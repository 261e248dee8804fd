"""Readout weights of many neurons in feature space, dense or as factors; never more of them than a chunk at once."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class FactorsLike(Protocol):
    """Weights as sums of outer products: masks [N, R, H, W] and vectors [N, R, C]."""

    @property
    def masks(self) -> Tensor:
        """[N, R, H, W]."""

    @property
    def vectors(self) -> Tensor:
        """[N, R, C]."""


class ReadoutWeights:
    """Weights [N, C, H, W] of N neurons.

    Args:
        weights: a tensor [N, C, H, W], or anything with `masks` [N, R, H, W] and `vectors` [N, R, C].
        shape: C, H, W of the features.
        dtype, device: what rows are given as.

    Raises:
        ValueError: other shapes, or numbers that are not finite.
        TypeError: neither form.
    """

    def __init__(
        self, weights: Tensor | FactorsLike, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._dense: Tensor | None = None
        if isinstance(weights, Tensor):
            if weights.ndim != 4 or tuple(weights.shape[1:]) != shape:
                raise ValueError(f"weights should be [N, {', '.join(map(str, shape))}], got {list(weights.shape)}")
            self._dense = weights.detach().to(device)
            parts = [self._dense]
            self.neurons = len(weights)
        elif isinstance(getattr(weights, "masks", None), Tensor) and isinstance(
            getattr(weights, "vectors", None), Tensor
        ):
            masks, vectors = weights.masks.detach(), weights.vectors.detach()
            channels, height, width = shape
            n, r = masks.shape[:2] if masks.ndim == 4 else (-1, -1)
            if tuple(masks.shape) != (n, r, height, width) or tuple(vectors.shape) != (n, r, channels):
                raise ValueError(
                    f"factors should be masks [N, R, {height}, {width}] and vectors [N, R, {channels}], got "
                    f"{list(masks.shape)} and {list(vectors.shape)}"
                )
            self._masks, self._vectors = masks.to(device, dtype), vectors.to(device, dtype)
            parts = [self._masks, self._vectors]
            self.neurons = int(n)
        else:
            raise TypeError(
                f"weights should be a tensor [N, C, H, W], or have masks and vectors, got {type(weights).__name__}"
            )
        if self.neurons < 1:
            raise ValueError("weights hold no neuron")
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError("weights hold NaN or infinity")

    def rows(self, neurons: Tensor) -> Tensor:
        """The weights of some neurons, [K, C, H, W]."""
        if self._dense is not None:
            return self._dense[neurons].to(self._dtype)
        return torch.einsum("krhw,krc->kchw", self._masks[neurons], self._vectors[neurons])
