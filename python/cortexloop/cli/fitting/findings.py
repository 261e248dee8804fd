"""What a fit found: plain data that `run` fills and the tables and the report show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.cli.fitting.data import Excluded, Recorded
from cortexloop.cli.fitting.options import FitOptions

Double = NDArray[np.float64]
Ellipse = tuple[float, float, float, float, float]
"""x, y, two semi-axes, in image pixels, and the rotation in degrees, clockwise as seen on the screen."""


@dataclass(frozen=True, eq=False)
class Method:
    """How well one way of fitting predicts the held-out images.

    Attributes:
        name: as on the command line; "factors" for the factor model.
        r, r2, fev: [T] Pearson correlation, coefficient of determination and 1 - var(y - yhat) / var(y).
        seconds: fitting and predicting.
    """

    name: str
    label: str
    r: Double
    r2: Double
    fev: Double
    seconds: float


@dataclass(frozen=True, eq=False)
class Seen:
    """One image with the response to it; `pixels` None where there are no images."""

    name: str
    predicted: float
    recorded: float
    pixels: NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False)
class Channel:
    """One channel of a factor's vector: its weight, and the image that drives it most where the mask looks."""

    name: str
    weight: float
    pixels: NDArray[np.uint8] | None
    image: str


@dataclass(frozen=True, eq=False)
class FactorShown:
    """One factor: where it looks and the channels that it weighs most.

    Attributes:
        mask: [H, W] of the feature map.
        share: of the norm of all factors of the neuron.
    """

    mask: Double
    channels: tuple[Channel, ...]
    share: float


@dataclass(frozen=True, eq=False)
class FieldShown:
    """A receptive field: a map over the image frame and the ellipse fitted to it."""

    map: Double
    ellipse: Ellipse | None


@dataclass(frozen=True, eq=False)
class Card:
    """Everything the report shows of one neuron.

    Attributes:
        analytic: the field in feature space, from the factors alone.
        gradient: the field in pixels, back-projected through the network; None where that cannot be done.
        x, y: linear score and recorded response of the held-out images.
        curve: (x, y) of the response that the model predicts for each linear score.
        by_rank: [ranks] explained variance of the tensor for 1, 2, ... factors.
    """

    index: int
    name: str
    factors: tuple[FactorShown, ...]
    analytic: FieldShown
    gradient: FieldShown | None
    background: NDArray[np.uint8] | None
    background_name: str
    best: tuple[Seen, ...]
    worst: tuple[Seen, ...]
    off: tuple[Seen, ...]
    x: Double
    y: Double
    curve: tuple[Double, Double]
    by_rank: Double


@dataclass(frozen=True, eq=False)
class FitFindings:
    """The whole result.

    Attributes:
        predictions: [N, T] of all images; `held` are positions of those held out.
        ceiling: [T] largest correlation that a perfect model could reach, or None without single repeats.
        explained, kept: [T] explained variance of the factorization; fraction of the tensor's entries that passed
            the threshold.
        dead: features that never vary, of `feature_shape`.
    """

    options: FitOptions
    out: Path
    source: str
    feature_shape: tuple[int, int, int]
    image_size: tuple[int, int] | None
    recorded: Recorded
    held: NDArray[np.int64]
    rule: str
    methods: tuple[Method, ...]
    predictions: Double
    ceiling: Double | None
    explained: Double
    kept: Double
    ranks: tuple[int, ...]
    dead: int
    skipped: tuple[Excluded, ...]
    notes: tuple[str, ...]
    cards: tuple[Card, ...]
    record: dict[str, Any]

    @property
    def model(self) -> Method:
        return self.methods[0]
