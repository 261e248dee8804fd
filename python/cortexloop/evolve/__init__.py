"""Evolution of images: optimisers, generators and the loop between them and a neuron, many problems as one batch.

    neurons = range(len(bank))
    evolution = Evolution(BankObjective(bank, neurons), CholeskyCMA(4096, problems=len(bank)), FourierGenerator(112, 112))
    evolution.run(75)

May import: `functional`, `ops`, `io`, NumPy, torch.
"""

from __future__ import annotations

from cortexloop.evolve.cma import CholeskyCMA, DiagonalCMA, HessianCMA
from cortexloop.evolve.evolution import Evolution, Generation
from cortexloop.evolve.generators import FourierGenerator, Generator
from cortexloop.evolve.metric import pixel_metric
from cortexloop.evolve.noise import MultiplicativeNoise, Noise, PoissonNoise
from cortexloop.evolve.objectives import BankObjective, ModuleObjective, Objective
from cortexloop.evolve.optimiser import Best, Optimiser, Selection
from cortexloop.evolve.placement import Placement, to_uint8

__all__ = [
    "BankObjective",
    "Best",
    "CholeskyCMA",
    "DiagonalCMA",
    "Evolution",
    "FourierGenerator",
    "Generation",
    "Generator",
    "HessianCMA",
    "ModuleObjective",
    "MultiplicativeNoise",
    "Noise",
    "Objective",
    "Optimiser",
    "Placement",
    "PoissonNoise",
    "Selection",
    "pixel_metric",
    "to_uint8",
]
