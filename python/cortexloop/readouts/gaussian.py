"""Gaussian readout: each neuron looks at one point of the map, which is drawn anew in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cortexloop.functional import point_readout
from cortexloop.readouts.base import PublishedState, Readout, fill, positive_number, straight_through

_SIGMA_SHAPES: dict[str, tuple[int, ...]] = {"isotropic": (1,), "uncorrelated": (2,), "full": (2, 2)}


class GaussianReadout(Readout):
    """Each neuron reads the features at one point; in training the point is drawn from a Gaussian around its mean.

        response[b, t] = bias[t] + sum_c vectors[t, c] features[b, c] at (position[b, t] + shift[b])
        position = clamp(mu + sigma * noise, -1, 1) in training; clamp(mu, -1, 1) in evaluation

    The readout of Lurz et al. (2021), neuralpredictors' FullGaussian2d.

    Parameters: `mu` [T, 2] (x, y), `sigma` [T, 1], [T, 2] or [T, 2, 2], `vectors` [T, C], `bias` [T].

    Args:
        in_shape, neurons, bias: as of `Readout`.
        covariance: "isotropic" (sigma [T, 1], one standard deviation), "uncorrelated" ([T, 2], one for x, one for y),
            or "full" ([T, 2, 2], a square root of the covariance: the matrix that the noise is multiplied by).
        init_mu_range: mu starts in U(-init_mu_range, init_mu_range); above 0, at most 1.
        init_sigma: where sigma starts; for "full", in U(-init_sigma, init_sigma).
        sample_per_image: draw a position for each image; else one per neuron for the whole batch.
        align_corners: as of `functional.point_readout`.
        l1_weight: of the sum of |vectors|, the regulariser.
        generator: of the first parameters; None: torch's own.

    Raises:
        ValueError: a size below 1, an unknown covariance, or an option out of range.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        neurons: int,
        *,
        bias: bool = True,
        covariance: str = "full",
        init_mu_range: float = 0.1,
        init_sigma: float = 1.0,
        sample_per_image: bool = True,
        align_corners: bool = True,
        l1_weight: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_shape, neurons, bias=bias)
        if covariance not in _SIGMA_SHAPES:
            raise ValueError(f"covariance should be one of {', '.join(map(repr, _SIGMA_SHAPES))}, got {covariance!r}")
        self.covariance = covariance
        self.init_mu_range = positive_number(init_mu_range, "init_mu_range", zero=False)
        if self.init_mu_range > 1:
            raise ValueError(f"init_mu_range should be at most 1, got {init_mu_range}")
        self.init_sigma = positive_number(init_sigma, "init_sigma", zero=False)
        self.sample_per_image = sample_per_image
        self.align_corners = align_corners
        self.l1_weight = positive_number(l1_weight, "l1_weight")
        self.mu = nn.Parameter(torch.empty(self.neurons, 2))
        self.sigma = nn.Parameter(torch.empty(self.neurons, *_SIGMA_SHAPES[covariance]))
        self.vectors = nn.Parameter(torch.empty(self.neurons, self.in_shape[0]))
        self.initialize(generator=generator)

    def initialize_weights(self, generator: torch.Generator | None) -> None:
        """mu and sigma as the options say, vectors 1 / C."""
        with torch.no_grad():
            self.mu.uniform_(-self.init_mu_range, self.init_mu_range, generator=generator)
            if self.covariance == "full":
                self.sigma.uniform_(-self.init_sigma, self.init_sigma, generator=generator)
            else:
                self.sigma.fill_(self.init_sigma)
            self.vectors.fill_(1 / self.in_shape[0])

    def positions(self) -> Tensor:
        """Where the neurons look in evaluation, [T, 2]; a mean outside of the map acts as the nearest point inside."""
        return straight_through(self.mu.clamp(-1, 1), self.mu)

    def sample_positions(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Positions drawn for `batch` images, [B, T, 2], or [T, 2] unless `sample_per_image`.

        Args:
            generator: on the parameters' device; None: torch's own.
        """
        shape = (batch, self.neurons, 2) if self.sample_per_image else (self.neurons, 2)
        noise = torch.randn(shape, generator=generator, dtype=self.mu.dtype, device=self.mu.device)
        full = self.covariance == "full"
        spread = (self.sigma @ noise[..., None])[..., 0] if full else self.sigma * noise
        return (self.positions() + spread).clamp(-1, 1)

    def forward(
        self,
        features: Tensor,
        *,
        sample: bool | None = None,
        shift: Tensor | None = None,
        neurons: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Responses [B, T] to features [B, C, H, W].

        Args:
            sample: draw positions; None: in training mode only.
            shift: [B, 2], added to all positions of an image (gaze), after they were clamped.
            neurons: positions of some neurons, or a mask [T], to compute only these, in this order.
            generator: source of the noise; None: torch's own.

        Raises:
            ValueError: features or shift of another shape, or neurons that are not there.
        """
        self._check_features(features)
        batch = features.shape[0]
        drawn = self.training if sample is None else sample
        positions = self.sample_positions(batch, generator) if drawn else self.positions()
        index = self._neuron_index(neurons)
        vectors: Tensor = self.vectors
        if index is not None:
            positions, vectors = positions.index_select(-2, index), vectors[index]
        return self._with_bias(read_points(features, positions, vectors, shift, self.align_corners), index)

    def penalty(self) -> Tensor:
        return self.l1_weight * self.vectors.abs().sum(1)

    def penalized(self) -> int:
        return self.vectors.numel()

    @torch.no_grad()
    def project(self) -> None:
        """Move means outside of the map to its edge."""
        self.mu.clamp_(-1, 1)

    @classmethod
    def from_neuralpredictors(
        cls, state_dict: Mapping[str, Any], in_shape: Sequence[int], *, prefix: str = "", **options: Any
    ) -> GaussianReadout:
        """The readout with the weights of a neuralpredictors FullGaussian2d.

        Args:
            state_dict: of the readout or of the model around it; keys `_mu` [1, T, 1, 2], `sigma`, `_features`
                [1, C, 1, T], `bias`. Positions or features shared between neurons become one set per neuron.
            in_shape: (C, H, W), which the state dict does not have.
            prefix: what comes before these keys.
            options: of this class.

        Raises:
            ValueError: a key is missing, unknown, of another shape, or not finite. A mean predicted by a network
                (`mu_transform`) is not supported.
        """
        state = PublishedState(state_dict, prefix)
        sigma = state.take("sigma", 1, None, None, None)[0]
        neurons = sigma.shape[0]
        mu = state.take("_mu", 1, None, 1, 2)[0, :, 0]
        sharing = state.take_optional("grid_sharing_index")
        if sharing is not None:
            mu = mu[sharing.long()]
        vectors = state.shared(state.take("_features", 1, None, 1, None), 3)[0, :, 0].T
        bias = state.take_optional("bias")
        state.finish()
        shapes = {(1, 1): "isotropic", (1, 2): "uncorrelated", (2, 2): "full"}
        covariance = shapes.get((sigma.shape[1], sigma.shape[2]))
        if covariance is None:
            raise ValueError(f"{prefix + 'sigma'!r} should be [1, T, 1 or 2, 1 or 2], got {[1, *sigma.shape]}")
        readout = cls(in_shape, neurons, bias=bias is not None, covariance=covariance, **options)
        sigma = sigma if covariance == "full" else sigma[:, 0]
        return fill(readout, mu=mu, sigma=sigma, vectors=vectors, bias=bias)


def read_points(
    features: Tensor, positions: Tensor, vectors: Tensor, shift: Tensor | None, align_corners: bool
) -> Tensor:
    """`point_readout` at positions [T, 2] or [B, T, 2], moved by a shift [B, 2] of all neurons of an image.

    Raises:
        ValueError: a shift of another shape.
    """
    if shift is not None:
        if tuple(shift.shape) != (features.shape[0], 2):
            raise ValueError(f"shift should be [{features.shape[0]}, 2], got {list(shift.shape)}")
        positions = positions + shift[:, None]
    return point_readout(features, positions, vectors, align_corners=align_corners)
