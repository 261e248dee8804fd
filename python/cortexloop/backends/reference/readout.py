"""Readouts of feature maps in plain torch: float32 and float64, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexloop.backends.registry import Gradients, Wanted


class ReadoutOperators:
    """Factors as two matrix products, the one with the smaller result first; points by torch's `grid_sample`."""

    def factorized_readout(self, features: Tensor, masks: Tensor, vectors: Tensor) -> Tensor:
        x, m, v = _flat(features, masks, vectors)
        masks_first = x.shape[1] <= x.shape[2]
        per_factor = ((x @ m.mT) * v.mT).sum(1) if masks_first else ((v @ x) * m).sum(2)  # [B, T * R]
        return per_factor.view(-1, *masks.shape[:2]).sum(2)

    def factorized_readout_gradient(
        self, features: Tensor, masks: Tensor, vectors: Tensor, cotangent: Tensor, wanted: Wanted
    ) -> Gradients:
        x, m, v = _flat(features, masks, vectors)
        g = cotangent.repeat_interleave(masks.shape[1], dim=1)[:, :, None]  # [B, T * R, 1]
        grad_features = grad_masks = grad_vectors = None
        if wanted[0]:
            by_factor = (g * v).mT @ m if x.shape[1] <= x.shape[2] else v.mT @ (g * m)
            grad_features = by_factor.reshape(features.shape)
        if wanted[1]:
            grad_masks = (g * (v @ x)).sum(0).reshape(masks.shape)
        if wanted[2]:
            grad_vectors = (g * (x @ m.mT).mT).sum(0).reshape(vectors.shape)
        return grad_features, grad_masks, grad_vectors

    def point_readout(self, features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool) -> Tensor:
        sampled = F.grid_sample(features, _grid(positions, len(features)), align_corners=align_corners)
        return (sampled[..., 0] * vectors.mT).sum(1)

    def point_readout_gradient(
        self,
        features: Tensor,
        positions: Tensor,
        vectors: Tensor,
        align_corners: bool,
        cotangent: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        grid = _grid(positions, len(features))
        grad_features = grad_positions = grad_vectors = None
        if wanted[2]:
            sampled = F.grid_sample(features, grid, align_corners=align_corners)[..., 0]  # [B, C, T]
            grad_vectors = (cotangent[:, None] * sampled).sum(0).mT.contiguous()
        if wanted[0] or wanted[1]:
            grad_sampled = (cotangent[:, None] * vectors.mT)[..., None].contiguous()
            bilinear, zeros = 0, 0
            both = (wanted[0], wanted[1])
            grad_features, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad_sampled, features, grid, bilinear, zeros, align_corners, both
            )
            if wanted[1]:
                by_image = grad_grid[:, :, 0]
                grad_positions = (by_image.sum(0) if positions.ndim == 2 else by_image).contiguous()
            grad_features = grad_features if wanted[0] else None
        return grad_features, grad_positions, grad_vectors


def _flat(features: Tensor, masks: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, C, S], masks [T * R, S], vectors [T * R, C]."""
    return features.flatten(2), masks.flatten(2).flatten(0, 1), vectors.flatten(0, 1)


def _grid(positions: Tensor, batch: int) -> Tensor:
    """Positions [T, 2] or [B, T, 2] as `grid_sample` takes them, [B, T, 1, 2]."""
    return positions.expand(batch, *positions.shape[-2:])[:, :, None]
