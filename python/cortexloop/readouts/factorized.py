"""Factorized readout: where a neuron looks, times what for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cortexloop.functional import factorized_readout
from cortexloop.readouts.base import PublishedState, Readout, fill, positive_number, straight_through
from cortexloop.weights import SharedCompactWeights

_NORM_EPSILON = 1e-6  # of the published normalisation: added to the norm of a mask


class FactorizedReadout(Readout):
    """Each neuron's weights are a sum of R outer products of a mask over the map and a vector over the channels.

        response[b, t] = bias[t] + sum_r sum_c vectors[t, r, c] sum_hw masks[t, r, h, w] features[b, c, h, w]

    Rank 1 with normalised masks is the readout of Klindt et al. (2017), neuralpredictors' FullFactorized2d; rank 1 as
    it stands is "mixing" and "spatial pool" of Cowley et al.; higher ranks are factor models (Wang & Ponce 2023).

    Parameters: `masks` [T, R, H, W], `vectors` [T, R, C], `bias` [T].

    Args:
        in_shape, neurons, bias: as of `Readout`.
        rank: R.
        normalize_masks: the masks in force have an L2 norm of 1 (masks / (norm + 1e-6)): scale is in the vectors. Where
            they should be positive, too, that comes after.
        positive_masks, positive_vectors: values below 0 act as 0. Gradients pass as if they did not, so that a weight
            can come back, and the parameters stay as they are; `project()` sets them to 0 after an optimiser's step,
            which makes that a projected gradient descent.
        l1_weight: of the sum of |mask|_1 |vector|_1 over neurons and factors, masks and vectors as in force.
        l1_pairs: take that product for every mask with every vector, other neurons' too: what neuralpredictors 0.3.0
            computes, by broadcasting.
        smoothness_weight: of the sum of squares of the masks filtered by the Laplacian
            [[0, -1, 0], [-1, 4, -1], [0, -1, 0]], with zeros around.
        mask_l2_weight, vector_l2_weight: of the sums of squares.
        init_scale: standard deviation of the first masks and vectors.
        generator: of the first parameters; None: torch's own.

    Raises:
        ValueError: a size below 1 or a negative weight.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        neurons: int,
        *,
        rank: int = 1,
        bias: bool = True,
        normalize_masks: bool = False,
        positive_masks: bool = False,
        positive_vectors: bool = False,
        l1_weight: float = 1.0,
        l1_pairs: bool = False,
        smoothness_weight: float = 0.0,
        mask_l2_weight: float = 0.0,
        vector_l2_weight: float = 0.0,
        init_scale: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_shape, neurons, bias=bias)
        if rank < 1:
            raise ValueError(f"rank should be at least 1, got {rank}")
        self.rank = int(rank)
        self.normalize_masks = normalize_masks
        self.positive_masks, self.positive_vectors = positive_masks, positive_vectors
        self.l1_weight = positive_number(l1_weight, "l1_weight")
        self.l1_pairs = l1_pairs
        self.smoothness_weight = positive_number(smoothness_weight, "smoothness_weight")
        self.mask_l2_weight = positive_number(mask_l2_weight, "mask_l2_weight")
        self.vector_l2_weight = positive_number(vector_l2_weight, "vector_l2_weight")
        self.init_scale = positive_number(init_scale, "init_scale", zero=False)
        channels, height, width = self.in_shape
        self.masks = nn.Parameter(torch.empty(self.neurons, self.rank, height, width))
        self.vectors = nn.Parameter(torch.empty(self.neurons, self.rank, channels))
        self.initialize(generator=generator)

    def initialize_weights(self, generator: torch.Generator | None) -> None:
        """N(0, init_scale^2); magnitudes where only positive values count."""
        with torch.no_grad():
            self.masks.normal_(0, self.init_scale, generator=generator)
            self.vectors.normal_(0, self.init_scale, generator=generator)
            if self.positive_masks:
                self.masks.abs_()
            if self.positive_vectors:
                self.vectors.abs_()

    def masks_in_force(self) -> Tensor:
        """The masks [T, R, H, W] that the responses are computed with: normalised, positive, as asked for."""
        masks: Tensor = self.masks
        if self.normalize_masks:
            masks = masks / (masks.square().sum((2, 3), keepdim=True).sqrt() + _NORM_EPSILON)
        return straight_through(masks.clamp_min(0), masks) if self.positive_masks else masks

    def vectors_in_force(self) -> Tensor:
        """The vectors [T, R, C] that the responses are computed with."""
        if self.positive_vectors:
            return straight_through(self.vectors.clamp_min(0), self.vectors)
        return self.vectors

    def weights(self) -> Tensor:
        """Each neuron's weight of each feature, [T, C, H, W]."""
        return torch.einsum("trc,trhw->tchw", self.vectors_in_force(), self.masks_in_force())

    def forward(self, features: Tensor) -> Tensor:
        """Responses [B, T] to features [B, C, H, W].

        Raises:
            ValueError: features of another shape.
        """
        self._check_features(features)
        return self._with_bias(factorized_readout(features, self.masks_in_force(), self.vectors_in_force()))

    def penalty(self) -> Tensor:
        masks, vectors = self.masks_in_force(), self.vectors_in_force()
        vector_sizes = vectors.abs().sum(2)
        own = vector_sizes.sum() if self.l1_pairs else vector_sizes
        total = self.l1_weight * (masks.abs().sum((2, 3)) * own).sum(1)
        if self.smoothness_weight:
            laplacian = masks.new_tensor([[0, -1, 0], [-1, 4, -1], [0, -1, 0]])[None, None]
            rough = F.conv2d(masks.flatten(0, 1)[:, None], laplacian, padding=1)
            total = total + self.smoothness_weight * rough.square().sum((1, 2, 3)).view(masks.shape[:2]).sum(1)
        if self.mask_l2_weight:
            total = total + self.mask_l2_weight * masks.square().sum((1, 2, 3))
        if self.vector_l2_weight:
            total = total + self.vector_l2_weight * vectors.square().sum((1, 2))
        return total

    def penalized(self) -> int:
        channels, height, width = self.in_shape
        return self.neurons * self.rank * channels * height * width

    @torch.no_grad()
    def project(self) -> None:
        """Set masks and vectors below 0 to 0, where they should be positive; but not masks that are normalised.

        There, a value below 0 is part of the norm: without it the readout would be another one.
        """
        if self.positive_masks and not self.normalize_masks:
            self.masks.clamp_min_(0)
        if self.positive_vectors:
            self.vectors.clamp_min_(0)

    @classmethod
    def from_shared(cls, weights: SharedCompactWeights, **options: Any) -> FactorizedReadout:
        """The readout of a shared compact model, as rank 1 on the last map of its trunk, in the weights' dtype.

        Both biases become one: nothing nonlinear lies between mixing and spatial pool.

        Args:
            options: of this class, such as the weights of the regulariser.

        Raises:
            ValueError: the weights are not valid.
        """
        weights.validate()
        height, width, neurons = weights.spatial.shape
        spatial, mixing = torch.as_tensor(weights.spatial), torch.as_tensor(weights.mixing)
        through = torch.as_tensor(weights.mixing_bias).double() * spatial.double().sum((0, 1))
        bias = (torch.as_tensor(weights.spatial_bias).double() + through).to(spatial.dtype)
        readout = cls((mixing.shape[0], height, width), neurons, **options)
        return fill(readout, masks=spatial.permute(2, 0, 1)[:, None], vectors=mixing.T[:, None], bias=bias)

    @classmethod
    def from_neuralpredictors(
        cls,
        state_dict: Mapping[str, Any],
        *,
        prefix: str = "",
        normalize: bool = True,
        constrain_pos: bool = False,
        **options: Any,
    ) -> FactorizedReadout:
        """The readout with the weights of a neuralpredictors FullFactorized2d (SpatialXFeatureLinear, FullSXF).

        Args:
            state_dict: of the readout or of the model around it; keys `spatial` [T, H, W], `_features` [T, C], `bias`.
                Features shared between neurons become one vector per neuron.
            prefix: what comes before these keys.
            normalize, constrain_pos: what it was made with; a state dict does not say.
            options: of this class; `l1_pairs` is true unless given.

        Raises:
            ValueError: a key is missing, unknown, of another shape, or not finite.
        """
        state = PublishedState(state_dict, prefix)
        masks = state.take("spatial", None, None, None)
        neurons, height, width = masks.shape
        vectors = state.shared(state.take("_features", None, None), 0)
        bias = state.take_optional("bias")
        state.finish()
        readout = cls(
            (vectors.shape[1], height, width),
            neurons,
            bias=bias is not None,
            normalize_masks=normalize,
            positive_masks=constrain_pos,
            positive_vectors=constrain_pos,
            **{"l1_pairs": True, **options},
        )
        return fill(readout, masks=masks[:, None], vectors=vectors[:, None], bias=bias)
