"""Trial-to-trial variability of simulated neurons, from counter-based random numbers: the same for any batch split."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cortexloop import ops
from cortexloop.evolve.optimiser import positive

MAX_EXPECTED_SPIKES = 700.0
"""Largest expected count that PoissonNoise takes; exp(-count) has to be a normal float64."""


class Noise(Protocol):
    """Turns clean scores into single trials."""

    def __call__(
        self, clean: Tensor, problems: Tensor, generation: int, repeats: int, seed: int, stream: int
    ) -> Tensor:
        """Scores of single trials, float64 [n, m, repeats], from clean float64 [n, m]; problems: int64 [n] ids."""

    def settings(self) -> dict[str, Any]:
        """Kind and parameters, JSON-able."""


class MultiplicativeNoise:
    """score * max(0, 1 + sigma N(0, 1)), independent in every trial (the noise of Wang & Ponce's optimiser benchmark).

    Args:
        sigma: standard deviation as a share of the score; 0, 0.2 and 0.5 in the benchmark.

    Raises:
        ValueError, TypeError: sigma negative or not a number.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = positive("sigma", sigma, zero=True)

    def __call__(
        self, clean: Tensor, problems: Tensor, generation: int, repeats: int, seed: int, stream: int
    ) -> Tensor:
        """See `Noise`."""
        z = ops.normals(seed, stream, generation, problems, clean.shape[1], repeats).double()
        return clean[..., None] * (1 + self.sigma * z).clamp(min=0)

    def settings(self) -> dict[str, Any]:
        """Kind and parameters, JSON-able."""
        return {"noise": "multiplicative", "sigma": self.sigma}


class PoissonNoise:
    """Spike counts: Poisson(max(0, score * spikes_per_unit)) / spikes_per_unit (XDREAM's noise, Xiao & Kreiman 2020).

    Args:
        spikes_per_unit: expected spikes for a score of 1.

    Raises:
        ValueError, TypeError: not a positive number; when called, a score that expects more than 700 spikes.
    """

    def __init__(self, spikes_per_unit: float) -> None:
        self.spikes_per_unit = positive("spikes_per_unit", spikes_per_unit)

    def __call__(
        self, clean: Tensor, problems: Tensor, generation: int, repeats: int, seed: int, stream: int
    ) -> Tensor:
        """See `Noise`."""
        expected = (clean * self.spikes_per_unit).clamp(min=0)[..., None]
        most = float(expected.nan_to_num(0).max()) if expected.numel() else 0.0
        if most > MAX_EXPECTED_SPIKES:
            raise ValueError(
                f"a score expects {most:.4g} spikes per presentation, more than the {MAX_EXPECTED_SPIKES:.0f} that "
                f"Poisson noise takes; lower spikes_per_unit ({self.spikes_per_unit:g})"
            )
        u = ops.uniforms(seed, stream, generation, problems, clean.shape[1], repeats).double()
        # Inversion: count the terms of the distribution function that lie below u. u <= 1 - 2^-24 bounds their number.
        term = (-expected).exp().expand_as(u).clone()
        below = term.clone()
        counts = torch.zeros_like(u)
        for k in range(1, int(most + 12 * most**0.5 + 24)):
            counts += below <= u
            term *= expected / k
            below += term
        return torch.where(clean[..., None].isnan(), torch.nan, counts / self.spikes_per_unit)

    def settings(self) -> dict[str, Any]:
        """Kind and parameters, JSON-able."""
        return {"noise": "poisson", "spikes_per_unit": self.spikes_per_unit}
