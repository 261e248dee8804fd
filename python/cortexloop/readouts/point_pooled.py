"""Point readout on several scales: the map, and the map averaged over larger and larger squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cortexloop.readouts.base import PublishedState, Readout, fill, positive_number, straight_through
from cortexloop.readouts.gaussian import read_points


class PointPooledReadout(Readout):
    """Each neuron reads the features at one point of the map and of its average-pooled versions.

        response[b, t] = bias[t] + sum_k sum_c vectors[t, k, c] pool^k(features)[b, c] at (position[t] + shift[b])

    pool^k averages squares of kernel x kernel pixels k times; k = 0 is the map itself. Neuralpredictors' PointPooled2d.

    Parameters: `positions` [T, 2] (x, y), `vectors` [T, pool_steps + 1, C], `bias` [T].

    Args:
        in_shape, neurons, bias: as of `Readout`.
        pool_steps: how often the map is pooled, at least 0.
        kernel: side and stride of a square, at least 2.
        init_range: positions start in U(-init_range, init_range); above 0, at most 1.
        align_corners: as of `functional.point_readout`.
        l1_weight: of the sum of |vectors|, the regulariser.
        generator: of the first parameters; None: torch's own.

    Raises:
        ValueError: an option out of range, or so many steps that a map would be smaller than a square.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        neurons: int,
        *,
        pool_steps: int = 1,
        kernel: int = 2,
        bias: bool = True,
        init_range: float = 0.1,
        align_corners: bool = True,
        l1_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_shape, neurons, bias=bias)
        if pool_steps < 0 or kernel < 2:
            raise ValueError(f"pool_steps should be at least 0 and kernel at least 2, got {pool_steps} and {kernel}")
        self.pool_steps, self.kernel = int(pool_steps), int(kernel)
        channels, height, width = self.in_shape
        if min(height, width) < self.kernel**self.pool_steps:
            raise ValueError(
                f"a map of {height} x {width} pixels cannot be pooled {pool_steps} times by {kernel} x {kernel}; "
                "take fewer pool_steps or a smaller kernel"
            )
        self.init_range = positive_number(init_range, "init_range", zero=False)
        if self.init_range > 1:
            raise ValueError(f"init_range should be at most 1, got {init_range}")
        self.align_corners = align_corners
        self.l1_weight = positive_number(l1_weight, "l1_weight")
        self.positions = nn.Parameter(torch.empty(self.neurons, 2))
        self.vectors = nn.Parameter(torch.empty(self.neurons, self.pool_steps + 1, channels))
        self.initialize(generator=generator)

    def initialize_weights(self, generator: torch.Generator | None) -> None:
        """Positions as `init_range` says, vectors 1 / C."""
        with torch.no_grad():
            self.positions.uniform_(-self.init_range, self.init_range, generator=generator)
            self.vectors.fill_(1 / self.in_shape[0])

    def positions_in_force(self) -> Tensor:
        """Where the neurons look, [T, 2]; a position outside of the map acts as the nearest point inside."""
        return straight_through(self.positions.clamp(-1, 1), self.positions)

    def forward(
        self,
        features: Tensor,
        *,
        shift: Tensor | None = None,
        neurons: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Responses [B, T] to features [B, C, H, W].

        Args:
            shift: [B, 2], added to all positions of an image (gaze).
            neurons: positions of some neurons, or a mask [T], to compute only these, in this order.

        Raises:
            ValueError: features or shift of another shape, or neurons that are not there.
        """
        self._check_features(features)
        index = self._neuron_index(neurons)
        positions = self.positions_in_force()
        vectors: Tensor = self.vectors
        if index is not None:
            positions, vectors = positions[index], vectors[index]
        maps, total = features, None
        for step in range(self.pool_steps + 1):
            if step > 0:
                maps = F.avg_pool2d(maps, self.kernel)
            read = read_points(maps, positions, vectors[:, step], shift, self.align_corners)
            total = read if total is None else total + read
        assert total is not None
        return self._with_bias(total, index)

    def penalty(self) -> Tensor:
        return self.l1_weight * self.vectors.abs().sum((1, 2))

    def penalized(self) -> int:
        return self.vectors.numel()

    @torch.no_grad()
    def project(self) -> None:
        """Move positions outside of the map to its edge."""
        self.positions.clamp_(-1, 1)

    @classmethod
    def from_neuralpredictors(
        cls, state_dict: Mapping[str, Any], in_shape: Sequence[int], *, kernel: int, prefix: str = "", **options: Any
    ) -> PointPooledReadout:
        """The readout with the weights of a neuralpredictors PointPooled2d.

        Args:
            state_dict: of the readout or of the model around it; keys `grid` [1, T, 1, 2], `features`
                [1, C * (pool_steps + 1), 1, T], `bias`.
            in_shape: (C, H, W). kernel: `pool_kern`. A state dict does not have these.
            prefix: what comes before these keys.
            options: of this class.

        Raises:
            ValueError: a key is missing, unknown, of another shape, or not finite.
        """
        state = PublishedState(state_dict, prefix)
        positions = state.take("grid", 1, None, 1, 2)[0, :, 0]
        features = state.take("features", 1, None, 1, len(positions))[0, :, 0]
        bias = state.take_optional("bias")
        state.finish()
        channels = int(in_shape[0])
        if features.shape[0] % channels:
            raise ValueError(f"{prefix + 'features'!r} should have {channels} x steps rows, got {features.shape[0]}")
        steps = features.shape[0] // channels - 1
        readout = cls(in_shape, len(positions), pool_steps=steps, kernel=kernel, bias=bias is not None, **options)
        vectors = features.T.reshape(-1, steps + 1, channels)
        return fill(readout, positions=positions, vectors=vectors, bias=bias)
