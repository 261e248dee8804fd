"""Recombination by rank: the best half of a population, weighted by the logarithm of rank (Hansen & Ostermeier 2001).

w_i ~ ln(mu + 1/2) - ln(i),   i = 1 .. floor(mu),   mu = population / 2 unless said otherwise
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cortexloop.evolve.optimiser import Selection


class RankWeights:
    """Weights by rank, renormalised to sum 1 where fewer codes than parents were shown.

    Args:
        population: codes in a generation.
        parents: mu, at least 1, may be fractional: the first floor(mu) codes count.
    """

    def __init__(self, population: int, parents: float, device: torch.device) -> None:
        rank = np.arange(1, population + 1)
        raw = np.where(rank <= math.floor(parents), math.log(parents + 0.5) - np.log(rank), 0.0)
        shown = np.arange(population + 1)[:, None]
        table = np.where(np.arange(population) < shown, raw, 0)
        table[1:] /= table[1:].sum(1, keepdims=True)
        self.table = torch.from_numpy(table).to(device)
        """Row s: weights by rank if s codes were shown, float64 [population + 1, population]."""
        squares = (table**2).sum(1)
        squares[0] = 1.0
        self.mu_eff_by_shown = torch.from_numpy(1 / squares).to(device)
        self.mu_eff = float(1 / squares[population])
        """Variance effective selection mass, 1 / sum of squared weights."""

    def of(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """(weights float64 [n, population], mu_eff float64 [n])."""
        weights = self.table[selection.shown].gather(1, selection.rank)
        return weights, self.mu_eff_by_shown[selection.shown]
