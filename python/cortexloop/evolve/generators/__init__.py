"""Generators: from codes to images, by formulas or by networks trained elsewhere.

May import what `evolve` may.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cortexloop.evolve.generators.base import Generator
from cortexloop.evolve.generators.biggan import BigGANGenerator
from cortexloop.evolve.generators.cppn import CPPNGenerator
from cortexloop.evolve.generators.deepsim import VARIANTS, DeePSimGenerator
from cortexloop.evolve.generators.fourier import FourierGenerator
from cortexloop.evolve.generators.gabor import GaborGenerator

GENERATORS: dict[str, Callable[..., Generator]] = {
    "fourier": FourierGenerator,
    "gabor": GaborGenerator,
    "cppn": CPPNGenerator,
    **{f"deepsim-{variant}": partial(DeePSimGenerator, variant=variant) for variant in VARIANTS},
}
"""By name, as on the command line: formulas take (height, width, dim=None, seed=0), trained ones (weights=path)."""

__all__ = [
    "GENERATORS",
    "BigGANGenerator",
    "CPPNGenerator",
    "DeePSimGenerator",
    "FourierGenerator",
    "GaborGenerator",
    "Generator",
]
