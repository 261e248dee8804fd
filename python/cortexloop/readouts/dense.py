"""Dense readout: a weight for each feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cortexloop.readouts.base import Readout, positive_number


class DenseReadout(Readout):
    """A weight for each feature: response[b, t] = bias[t] + sum_chw weight[t, c, h, w] features[b, c, h, w].

    Parameters: `weight` [T, C, H, W], `bias` [T].

    Args:
        in_shape, neurons, bias: as of `Readout`.
        l1_weight, l2_weight: of the sums of |weight| and of weight^2, the regulariser.
        init_scale: standard deviation of the first weights.
        generator: of the first parameters; None: torch's own.

    Raises:
        ValueError: a size below 1, or a negative weight.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        neurons: int,
        *,
        bias: bool = True,
        l1_weight: float = 0.0,
        l2_weight: float = 1.0,
        init_scale: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_shape, neurons, bias=bias)
        self.l1_weight = positive_number(l1_weight, "l1_weight")
        self.l2_weight = positive_number(l2_weight, "l2_weight")
        self.init_scale = positive_number(init_scale, "init_scale", zero=False)
        self.weight = nn.Parameter(torch.empty(self.neurons, *self.in_shape))
        self.initialize(generator=generator)

    def initialize_weights(self, generator: torch.Generator | None) -> None:
        """N(0, init_scale^2)."""
        with torch.no_grad():
            self.weight.normal_(0, self.init_scale, generator=generator)

    def forward(self, features: Tensor) -> Tensor:
        """Responses [B, T] to features [B, C, H, W].

        Raises:
            ValueError: features of another shape.
        """
        self._check_features(features)
        return F.linear(features.flatten(1), self.weight.flatten(1), self.bias)

    def penalty(self) -> Tensor:
        flat = self.weight.flatten(1)
        return self.l1_weight * flat.abs().sum(1) + self.l2_weight * flat.square().sum(1)

    def penalized(self) -> int:
        return self.weight.numel()
