"""The tables of a session's configuration, field by field; `cortexloop.rig.config` reads them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cortexloop.realtime.messages import Name
from cortexloop.rig.protocol import Limits

Whole = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Some = Annotated[int, Meta(ge=1, le=1_000_000)]
Side = Annotated[int, Meta(ge=1, le=16384)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
Part = Annotated[float, Meta(ge=0, le=1)]
File = Annotated[str, Meta(min_length=1, max_length=4000)]
Pair = tuple[float, float]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ServerTable(Table, frozen=True, kw_only=True):
    """Where the server listens.

    zmq, tcp: addresses; "" for none. secret: what clients have to know, or secret_file: a file with it. It keeps others
    of the rig's network out by mistake, not by malice: nothing is encrypted. insecure: let other computers in without.
    limits: see `cortexloop.rig.protocol.Limits`.
    """

    zmq: str = "tcp://127.0.0.1:5557"
    tcp: str = "127.0.0.1:5558"
    secret: Annotated[str, Meta(min_length=8, max_length=1000)] | None = None
    secret_file: File | None = None
    insecure: bool = False
    limits: Limits = Limits()


class ExchangeTable(Table, frozen=True, kw_only=True):
    """Images and scores as files, see `cortexloop.rig.folder`.

    images, scores: folders; the scores' is that of the images if not given. image_format: of the files. poll_ms: how
    often the folders are looked at. settle_ms: how long a score file has to stand still. units: names of the columns of
    score files, "ch0", "ch1", ... if not given.
    """

    images: File
    scores: File | None = None
    image_format: Literal["png", "bmp"] = "png"
    poll_ms: Annotated[float, Meta(ge=1, le=10_000)] = 20.0
    settle_ms: Annotated[float, Meta(ge=1, le=60_000)] = 100.0
    units: list[Name] = []


class ReferencesTable(Table, frozen=True, kw_only=True):
    """Images that are shown first in every batch. images: folder, zip, .npy or .npz. resize: to the streams' size."""

    images: File
    resize: bool = False


class PlacementTable(Table, frozen=True, kw_only=True):
    """See `cortexloop.evolve.Placement`."""

    canvas: tuple[Side, Side]
    pixels_per_degree: Positive
    size: float | tuple[float, float]  # bounds as well, in this union, crash msgspec 0.22; `Placement` checks them
    position: Pair = (0.0, 0.0)
    background: float | tuple[float, float, float] = 127.5


class RefitTable(Table, frozen=True, kw_only=True):
    """See `cortexloop.realtime.refit.Refit`."""

    after: Annotated[int, Meta(ge=2, le=1_000_000)] = 32
    alphas: Annotated[list[Positive], Meta(min_length=1)] | None = None
    standardize: bool = True


class _Stream(Table, frozen=True, kw_only=True, tag_field="kind"):
    name: str
    units: list[Name] = []
    seed: Whole | None = None
    """The session's seed plus the stream's position if not given."""


class _Generated(_Stream, frozen=True, kw_only=True):
    generator: str = "fourier"
    size: tuple[Side, Side] = (112, 112)
    """Height and width, for generators that are formulas."""
    dim: Some | None = None
    weights: File | None = None
    placement: PlacementTable | None = None
    device: str = "cpu"


class EvolutionTable(_Generated, frozen=True, kw_only=True, tag="evolution"):
    """An evolution: `optimiser` of `OPTIMISERS` with further keywords in `optimiser_options`, `generator` of
    `GENERATORS`."""

    optimiser: str = "cholesky-cma"
    optimiser_options: dict[str, bool | int | float | str] = {}
    population: Some | None = None
    generations: Some | None = None
    minimise: bool = False


class GuidedTable(_Generated, frozen=True, kw_only=True, tag="guided"):
    """An evolution guided by models, see `cortexloop.realtime.sources.guided.ModelGuided`."""

    models: File
    neurons: list[str] | None = None
    per_batch: Some
    policy: Literal["model", "disagreement", "evolution"] = "model"
    budget_ms: Positive = 1000.0
    explore: Part = 0.25
    chunk: Some = 64
    batches: Some | None = None
    minimise: bool = False
    model: str | None = None
    refit: RefitTable | None = None


class ImagesTable(_Stream, frozen=True, kw_only=True, tag="images"):
    """Given images, see `cortexloop.realtime.sources.fixed.FixedImages`."""

    images: File
    size: tuple[Side, Side] | None = None
    """To which pictures are resized; as they are if not given."""
    per_batch: Some
    rounds: Some = 1
    shuffle: bool = True


class ScreenTable(_Stream, frozen=True, kw_only=True, tag="screen"):
    """Candidates that models choose from, see `cortexloop.realtime.sources.candidates.CandidateSource`."""

    images: File
    models: File
    neurons: list[str] | None = None
    device: str = "cpu"
    resize: bool = False
    per_batch: Some
    policy: Literal["best", "worst", "disagreement", "random"] = "best"
    explore: Part = 0.0
    budget_ms: Positive = 1000.0
    chunk: Some = 64
    batches: Some | None = None
    model: str | None = None
    refit: RefitTable | None = None


class SynthesisTable(_Stream, frozen=True, kw_only=True, tag="synthesis"):
    """Images by gradient ascent on models, see `cortexloop.realtime.sources.synthesis.SynthesisSource`."""

    models: File
    neurons: list[str] | None = None
    device: str = "cpu"
    per_batch: Some
    batches: Some
    steps: Some = 100
    budget_ms: Positive | None = None
    minimise: bool = False


class ControlsTable(_Stream, frozen=True, kw_only=True, tag="controls"):
    """Optimal images of a factor model and their controls, see `cortexloop.realtime.sources.controls.ControlSource`.

    factor_model: what `FactorModel.save` wrote. models, model, layer: the bank, its model and the layer whose features
    it was fitted on.
    """

    factor_model: File
    models: File
    model: str
    layer: int
    neurons: list[Whole] | None = None
    conditions: list[str] | None = None
    draws: Some = 1
    starts: Some = 1
    repeats: Some = 1
    per_batch: Some | None = None
    steps: Some = 100


StreamTable = (
    EvolutionTable | GuidedTable | ImagesTable | ScreenTable | SynthesisTable | ControlsTable
)  # what `kind` may say
