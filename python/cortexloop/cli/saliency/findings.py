"""What the command found: plain data that `bank` or `pairs` fills and the files and the report show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.cli.fitting.data import Excluded
from cortexloop.cli.saliency.options import SaliencyOptions

Single = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Explained:
    """One image with a neuron's response to it and the map of what drove it.

    Attributes:
        pixels: uint8 [H, W, 3].
        map: [H, W], signed; its unit is the method's.
    """

    name: str
    response: float
    pixels: NDArray[np.uint8]
    map: Single


@dataclass(frozen=True, eq=False)
class Pair:
    """A query image and one reference, with the map of what they share in each of them.

    Attributes:
        similarity: of the latent features, for this neuron.
        query: map over the query; `reference` carries its own.
    """

    similarity: float
    query: Single
    reference: Explained


@dataclass(frozen=True, eq=False)
class Comparison:
    """One query image of one neuron with its best references, best first."""

    name: str
    response: float
    pixels: NDArray[np.uint8]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class NeuronMaps:
    """All that was computed for one neuron: `explained` images, or `comparisons` with references."""

    name: str
    explained: tuple[Explained, ...] = ()
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True, eq=False)
class SaliencyFindings:
    """The whole result.

    Attributes:
        label: the method in words.
        texts: (heading, sentence) of the method section.
        textbook: whether the neurons are the built-in ones.
    """

    options: SaliencyOptions
    title: str
    label: str
    images: int
    gallery: int | None
    neurons: tuple[NeuronMaps, ...]
    texts: tuple[tuple[str, str], ...]
    textbook: bool
    notes: tuple[str, ...]
    skipped: tuple[Excluded, ...]
    out: Path
    record: dict[str, Any]
