"""Optimisers by name, with their published settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cortexloop.evolve.cma import CholeskyCMA, DiagonalCMA
from cortexloop.evolve.genetic import GeneticAlgorithm
from cortexloop.evolve.gradient import FDGD, NES
from cortexloop.evolve.optimiser import Optimiser
from cortexloop.evolve.sphere import SphereCMA


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make an optimiser.

        recipe(dim, *, problems=1, population=None, generations=75, seed=0, minimise=False, device="cpu", ...)

    population None: the published one. generations: how many are planned, which only schedules look at. All further
    keywords go to the optimiser.

    name: as in `OPTIMISERS`. description: one line. source: publication.
    """

    name: str
    description: str
    source: str
    make: Callable[..., Optimiser] = dataclasses.field(repr=False)
    planned: bool = False

    def __call__(self, dim: int, *, generations: int = 75, **keywords: Any) -> Optimiser:
        """The optimiser.

        Raises:
            ValueError, TypeError: bad arguments, see the optimiser.
        """
        return self.make(dim, **({"generations": generations} if self.planned else {}), **keywords)


def _sphere(schedule: str) -> Callable[..., Optimiser]:
    def make(dim: int, **keywords: Any) -> Optimiser:
        return SphereCMA(dim, schedule=schedule, **keywords)

    return make


_WANG = "Wang & Ponce 2022, GECCO"
_XIAO = "Xiao & Kreiman 2020, PLoS Computational Biology"

_RECIPES = (
    Recipe(
        "cholesky-cma",
        "CMA-ES with a Cholesky factor updated every 11th generation, sigma 3; used in vivo",
        _WANG,
        CholeskyCMA,
    ),
    Recipe(
        "diagonal-cma",
        "separable CMA-ES: a variance for each gene",
        "Ros & Hansen 2008, PPSN",
        DiagonalCMA,
    ),
    *(
        Recipe(
            f"sphere-cma-{schedule}",
            f"evolution strategy on a sphere of norm 300, angles {what}",
            _WANG,
            _sphere(schedule),
            planned=True,
        )
        for schedule, what in (
            ("exp", "from 50 to 7.33 degrees by equal ratios"),
            ("lin", "from 50 to 7.33 degrees by equal steps"),
            ("inv", "15 + 1 / (0.0017 g + 0.0146) degrees"),
        )
    ),
    Recipe(
        "ga-ponce2019",
        "genetic algorithm, the best quarter conserved, kT = 2 std",
        "Ponce et al. 2019, Cell",
        GeneticAlgorithm.ponce2019,
    ),
    Recipe(
        "ga-xdream",
        "genetic algorithm, nothing conserved, kT = std / 2, scores clipped at the 95th percentile",
        _XIAO,
        GeneticAlgorithm.xdream,
    ),
    Recipe("nes", "natural evolution strategy on antithetic pairs, with an adapted radius", _XIAO, NES),
    Recipe("fdgd", "finite-difference gradient ascent on antithetic pairs", _XIAO, FDGD),
)

OPTIMISERS: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})
"""Recipes by name."""


def make_optimiser(name: str, dim: int, **keywords: Any) -> Optimiser:
    """`OPTIMISERS[name](dim, **keywords)`, see `Recipe`.

    Raises:
        ValueError: no optimiser of that name; the message lists those there are. ValueError, TypeError: bad arguments.
    """
    if name not in OPTIMISERS:
        raise ValueError(f"optimiser should be one of {', '.join(OPTIMISERS)}, got {name!r}")
    return OPTIMISERS[name](dim, **keywords)
