"""What an experiment of evolutions found: plain data that `evolve` gathers and the tables and the report show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import io
from cortexloop.cli.evolution.compare import AgainstNatural, Comparison
from cortexloop.cli.evolution.options import EvolveOptions, Settings
from cortexloop.cli.evolution.store import RunFolder

Double = NDArray[np.float64]

TRACES = ("mean", "min", "max", "clean_mean", "clean_min", "clean_max", "reference_mean", "code_norm")
"""Numbers per generation, columns of `generations.csv`: over the population, of the scores that the optimiser was told
and (`clean`) of the responses before noise. `reference_mean` is NaN without reference images."""

STAGES = ("generate", "score", "optimise")


@dataclass(frozen=True)
class Layout:
    """Which evolutions there are: neuron by neuron, each with all its seeds, in groups that are computed together."""

    neurons: int
    seeds: int
    group: int

    @property
    def problems(self) -> int:
        return self.neurons * self.seeds

    @property
    def groups(self) -> int:
        return -(-self.problems // self.group)

    def members(self, group: int) -> range:
        """Problems of a group; problem p belongs to neuron p // seeds and to its seed p % seeds."""
        return range(group * self.group, min((group + 1) * self.group, self.problems))


@dataclass(frozen=True, eq=False)
class Natural:
    """The natural images that evolved ones are compared with."""

    count: int
    names: tuple[str, ...]  # the best image of each neuron
    best: Double  # [N] the response to it
    pixels: NDArray[np.uint8]  # [N, H, W, 3]
    skipped: tuple[io.SkippedImage, ...]
    digest: str


@dataclass(frozen=True, eq=False)
class Versus:
    """Evolved against natural images under one condition, or (`condition` None) the best of all runs."""

    condition: tuple[str, float] | None
    found: AgainstNatural


@dataclass(frozen=True, eq=False)
class Shown:
    """The images of one evolution and the noise-free responses to them.

    Attributes:
        frames: (generation, its best image, response) of some generations, from the first to the last.
        centre: the optimiser's estimate at the end.
        best: the image with the best observed score.
    """

    frames: tuple[tuple[int, NDArray[np.uint8], float], ...]
    centre: NDArray[np.uint8]
    centre_response: float
    best: NDArray[np.uint8]
    best_response: float
    best_generation: int


@dataclass(frozen=True, eq=False)
class EvolveFindings:
    """The whole result.

    Attributes:
        conditions: C pairs of optimiser and noise level.
        traces: name in `TRACES` -> [C, generations, N, S].
        grey: [N] response to a grey screen.
        seconds: of `STAGES`, over all conditions.
    """

    options: EvolveOptions
    settings: Settings
    conditions: tuple[tuple[str, float], ...]
    bank: cl.ModelBank
    layout: Layout
    folder: RunFolder
    traces: dict[str, Double]
    grey: Double
    seconds: dict[str, float]
    natural: Natural | None
    versus: tuple[Versus, ...]
    comparison: Comparison | None
    record: dict[str, Any]
    """The contents of run.json."""

    @property
    def sign(self) -> float:
        return -1.0 if self.settings.minimise else 1.0

    def extreme(self, values: Double, axis: int | tuple[int, ...]) -> Double:
        """The best along axes: the largest, with `minimise` the smallest."""
        return np.asarray(values.min(axis=axis) if self.settings.minimise else values.max(axis=axis))

    def best_clean(self) -> Double:
        """[C, N, S] best noise-free response to any image that was shown."""
        name = "clean_min" if self.settings.minimise else "clean_max"
        return self.extreme(self.traces[name], 1)

    def shown(self, condition: int, neuron: int, seed: int) -> Shown:
        """Images of one evolution, read from its part."""
        problem = neuron * self.layout.seeds + seed
        part = self.folder.load_part(condition, problem // self.layout.group)
        row = problem % self.layout.group
        extreme = self.traces["clean_min" if self.settings.minimise else "clean_max"][condition, :, neuron, seed]
        generations = part["frame_generation"].tolist()
        return Shown(
            frames=tuple((g, part["frame_image"][row, i], float(extreme[g])) for i, g in enumerate(generations)),
            centre=part["centre_image"][row],
            centre_response=float(part["centre_clean"][row]),
            best=part["best_image"][row],
            best_response=float(part["best_clean"][row]),
            best_generation=int(part["best_generation"][row]),
        )
