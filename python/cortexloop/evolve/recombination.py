"""Recombination by rank: the best half of a population, weighted by the logarithm of rank (Hansen & Ostermeier 2001).

w_i ~ ln(mu + 1/2) - ln(i),   i = 1 .. floor(mu),   mu = population / 2 unless said otherwise
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


class RankWeights:
    """Weights by rank, renormalised to sum 1 where fewer codes than parents were shown.

    Args:
        population: codes in a generation.
        parents: mu, at least 1, may be fractional: the first floor(mu) codes count.
    """

    def __init__(self, population: int, parents: float, device: torch.device) -> None:
        rank = np.arange(1, population + 1)
        raw = np.where(rank <= math.floor(parents), math.log(parents + 0.5) - np.log(rank), 0.0)
        total = np.concatenate(([1.0], np.cumsum(raw)))
        mass = total**2 / np.concatenate(([1.0], np.cumsum(raw**2)))
        self.raw = torch.from_numpy(raw).to(device)
        """By rank, before they are normalised, float64 [population]."""
        self.total = torch.from_numpy(total).to(device)
        """What to divide by if this many codes were shown, float64 [population + 1]."""
        self.mu_eff_by_shown = torch.from_numpy(mass).to(device)
        self.mu_eff = float(mass[population])
        """Variance effective selection mass, 1 / sum of squared weights."""

    def of(self, rank: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
        """(weights float64 [n, m], mu_eff float64 [n]).

        Args:
            rank: int64 [n, m], the place of each code from 0. shown: int64 [n]; codes of this rank and above weigh 0.
        """
        weights = torch.where(rank < shown[:, None], self.raw[rank], 0.0) / self.total[shown][:, None]
        return weights, self.mu_eff_by_shown[shown]
