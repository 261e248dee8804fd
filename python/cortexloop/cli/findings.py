"""What a demonstration was asked for and what it found: plain data that `demo` fills and `report` shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import io
from cortexloop.cli.recordings import Agreement

RADII = np.array([0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 24, 28])
"""Radii of the dots, in pixels."""


@dataclass(frozen=True)
class Effort:
    """How much to compute where the user does not say."""

    count: int  # procedural images
    steps: int  # of gradient ascent
    stride: int  # pixels between the places of dots


# Either keeps the demonstration of the textbook neurons well under a minute on two processors, even busy ones.
EFFORT = {"cpu": Effort(480, 100, 4), "reference": Effort(96, 40, 16)}


@dataclass(frozen=True)
class DemoOptions:
    """See the options of the command."""

    models: Path | None = None
    images: Path | None = None
    responses: Path | None = None
    recording: str | None = None
    held_out_from: int | None = None
    out: Path = Path("cortexloop-demo")
    neurons: tuple[str, ...] = ()
    show: int = 12
    steps: int | None = None
    count: int | None = None
    seed: int = 0
    skip_bad: bool = False
    resize: bool = False
    threads: int | None = None
    backend: str = "auto"
    json: bool = False


@dataclass(frozen=True, eq=False)
class Seen:
    """One image and the response to it."""

    name: str
    response: float
    pixels: NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True, eq=False)
class Scores:
    """Responses of all models to all images, and the images each model likes best."""

    names: tuple[str, ...]
    responses: NDArray[np.float32]  # [images, N]
    preferred: tuple[tuple[Seen, ...], ...]  # per model, best first
    total: int  # images offered, skipped ones included
    skipped: tuple[io.SkippedImage, ...]
    seconds: float  # evaluation alone, without decoding


@dataclass(frozen=True, eq=False)
class Dots:
    """Tuning to single dots, light (255) and dark (0)."""

    light: NDArray[np.float32]  # [RADII], at the place where a light dot of radius 5 excites most
    dark: NDArray[np.float32]
    map: NDArray[np.float32]  # [h, w] response by place, of the polarity that excites more
    polarity: str
    place: tuple[float, float]  # row, column


@dataclass(frozen=True, eq=False)
class Card:
    """Everything the report shows of one neuron."""

    index: int
    name: str
    filters: tuple[int, ...]
    preferred: tuple[Seen, ...]
    synthesized: NDArray[np.uint8]
    response: float
    trajectory: NDArray[np.floating]  # response before the first and after every step
    dots: Dots


@dataclass(frozen=True, eq=False)
class Latency:
    """Seconds from a full image buffer to all responses, one image at a time, through a `Plan`."""

    seconds: NDArray[np.float64]
    models: int

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))


@dataclass(frozen=True, eq=False)
class Findings:
    """The whole result of a demonstration."""

    options: DemoOptions
    effort: Effort
    bank: cl.ModelBank
    left_out: int
    scores: Scores
    agreement: Agreement | None
    cards: tuple[Card, ...]
    latency: Latency
    machine: dict[str, Any]
    seconds: float
