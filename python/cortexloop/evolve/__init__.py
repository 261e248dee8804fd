"""Evolution of images: optimisers, generators and the loop between them and a neuron, many problems as one batch.

    neurons = range(len(bank))
    optimiser = CholeskyCMA(4096, problems=len(bank))
    evolution = Evolution(BankObjective(bank, neurons), optimiser, FourierGenerator(112, 112))
    evolution.run(75)

May import: `functional`, `ops`, `io`, NumPy, torch.
"""

from __future__ import annotations

from cortexloop.evolve.catalogue import OPTIMISERS, Recipe, make_optimiser
from cortexloop.evolve.cma import CholeskyCMA, DiagonalCMA, HessianCMA
from cortexloop.evolve.evolution import Evolution, Generation
from cortexloop.evolve.generators import (
    GENERATORS,
    BigGANGenerator,
    CPPNGenerator,
    DeePSimGenerator,
    FourierGenerator,
    GaborGenerator,
    Generator,
)
from cortexloop.evolve.genetic import GeneticAlgorithm
from cortexloop.evolve.gradient import FDGD, NES
from cortexloop.evolve.metric import pixel_metric
from cortexloop.evolve.noise import MultiplicativeNoise, Noise, PoissonNoise
from cortexloop.evolve.objectives import BankObjective, ModuleObjective, Objective
from cortexloop.evolve.optimiser import Best, Optimiser, Selection
from cortexloop.evolve.placement import Placement, to_uint8
from cortexloop.evolve.sphere import SphereCMA

__all__ = [
    "FDGD",
    "GENERATORS",
    "NES",
    "OPTIMISERS",
    "BankObjective",
    "Best",
    "BigGANGenerator",
    "CPPNGenerator",
    "CholeskyCMA",
    "DeePSimGenerator",
    "DiagonalCMA",
    "Evolution",
    "FourierGenerator",
    "GaborGenerator",
    "Generation",
    "Generator",
    "GeneticAlgorithm",
    "HessianCMA",
    "ModuleObjective",
    "MultiplicativeNoise",
    "Noise",
    "Objective",
    "Optimiser",
    "Placement",
    "PoissonNoise",
    "Recipe",
    "Selection",
    "SphereCMA",
    "make_optimiser",
    "pixel_metric",
    "to_uint8",
]
