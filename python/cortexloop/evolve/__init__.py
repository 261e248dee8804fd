"""Evolution of images: optimisers, generators and the loop between them and a neuron, many problems as one batch.

May import: `functional`, `ops`, `io`, NumPy, torch.
"""

from __future__ import annotations

from cortexloop.evolve.cma import CholeskyCMA, DiagonalCMA, HessianCMA
from cortexloop.evolve.optimiser import Best, Optimiser, Selection

__all__ = [
    "Best",
    "CholeskyCMA",
    "DiagonalCMA",
    "HessianCMA",
    "Optimiser",
    "Selection",
]
