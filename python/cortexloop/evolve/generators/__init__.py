"""Generators: from codes to images.

May import what `evolve` may.
"""

from __future__ import annotations

from collections.abc import Callable

from cortexloop.evolve.generators.base import Generator
from cortexloop.evolve.generators.fourier import FourierGenerator

GENERATORS: dict[str, Callable[..., Generator]] = {
    "fourier": FourierGenerator,
}
"""By name, as on the command line: formulas take (height, width, dim=None, seed=0), trained ones (weights=path)."""

__all__ = [
    "GENERATORS",
    "FourierGenerator",
    "Generator",
]
