"""A session's configuration: one TOML file, checked field by field, and the sources that are made of it.

    [session]
    name = "monkey-a-2026-11-28"
    folder = "sessions/monkey-a-2026-11-28"
    seed = 1

    [server]
    tcp = "127.0.0.1:5558"

    [references]
    images = "natural/"

    [[streams]]
    name = "evolution"
    kind = "evolution"
    units = ["ch17"]
    optimiser = "cholesky-cma"
    generator = "fourier"
    population = 30

Paths are relative to the file. Complete examples are in `examples/` beside this module.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.source import Images, Source
from cortexloop.rig.tables import (
    ControlsTable,
    EvolutionTable,
    ExchangeTable,
    GuidedTable,
    ImagesTable,
    PlacementTable,
    ReferencesTable,
    RefitTable,
    ScreenTable,
    ServerTable,
    StreamTable,
    SynthesisTable,
    Table,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from cortexloop.bank import ModelBank
    from cortexloop.evolve import Generator, Placement
    from cortexloop.realtime.refit import Refit

T = TypeVar("T")


class _File(Table, frozen=True, kw_only=True):
    session: dict[str, Any]
    streams: Annotated[list[StreamTable], Meta(min_length=1)]
    server: ServerTable = ServerTable()
    exchange: ExchangeTable | None = None
    references: ReferencesTable | None = None


class RigConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says, checked.

    Attributes:
        path: of the file; relative paths start at its folder.
        folder: where the session is kept.
        settings: of the session.
        streams: one table for each stream.
        server, exchange, references: as their tables say.
        kept: what belongs to the session and may not change when it is resumed, plain data; no addresses, no secret.
    """

    path: Path
    folder: Path
    settings: SessionSettings
    streams: list[StreamTable]
    server: ServerTable
    exchange: ExchangeTable | None
    references: ReferencesTable | None
    kept: dict[str, Any]

    def resolve(self, path: str) -> Path:
        """A path of the file."""
        return self.path.parent / Path(path).expanduser()

    def secret(self) -> str | None:
        """What clients have to know, None if nothing.

        Raises:
            ValueError: the secret's file cannot be read, or has too little in it.
        """
        if self.server.secret_file is None:
            return self.server.secret
        path = self.resolve(self.server.secret_file)
        try:
            secret = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path.name}: server.secret_file {str(path)!r} cannot be read: {error}") from error
        if len(secret) < 8:
            raise ValueError(f"{self.path.name}: the secret in {str(path)!r} should have 8 characters or more")
        return secret


# ---------------------------------------------------------------------------------------------- reading


def load(path: str | os.PathLike[str]) -> RigConfig:
    """Read a configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or something in it cannot be used; the message names the field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration {str(path)!r}")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path.name} is no TOML file: {error}") from error
    return parse(raw, path)


def parse(raw: dict[str, Any], path: str | os.PathLike[str]) -> RigConfig:
    """The configuration in the data of a TOML file; `path`: the file, for messages and relative paths.

    Raises:
        ValueError: see `load`.
    """
    path = Path(path)
    tables = _convert(raw, _File, path.name, "")
    session = dict(tables.session)
    for field in ("name", "folder"):
        if not isinstance(session.get(field), str) or not session[field]:
            raise ValueError(f"{path.name}: session.{field} should be given, a text")
    streams = [{"name": stream.name, "units": stream.units} for stream in tables.streams]
    names = [stream.name for stream in tables.streams]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path.name}: two streams are called {twice[0]!r}; names should differ")
    folder = session.pop("folder")
    fields = {"session" if field == "name" else field: value for field, value in session.items()}
    for field in ("session", "streams"):
        if field in session:
            raise ValueError(f"{path.name}: session.{field} is no field; there are name, folder, seed, repeats, ...")
    settings = _convert({**fields, "streams": streams}, SessionSettings, path.name, "session.")
    if tables.server.secret is not None and tables.server.secret_file is not None:
        raise ValueError(f"{path.name}: server.secret and server.secret_file are both given; leave one out")
    kept: dict[str, Any] = {"streams": {stream["name"]: stream for stream in raw["streams"]}}
    if "references" in raw:
        kept["references"] = raw["references"]
    return RigConfig(
        path=path.absolute(),
        folder=path.absolute().parent / Path(folder).expanduser(),
        settings=settings,
        streams=tables.streams,
        server=tables.server,
        exchange=tables.exchange,
        references=tables.references,
        kept=kept,
    )


def _convert(data: Any, kind: type[T], file: str, prefix: str) -> T:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `")
        where = where.rstrip("`").removeprefix("$").removeprefix(".")
        where = re.sub(r"\[\.\.\.\]", "", where)
        if prefix and where.startswith("streams["):
            prefix = ""
        elif prefix and where == "session":
            where = "name"
        place = f"{prefix}{where}".rstrip(".")
        what = what[:1].lower() + what[1:].replace("`", "")
        raise ValueError(f"{file}: {place + ': ' if place else ''}{what}") from error


# ---------------------------------------------------------------------------------------------- making


def build(config: RigConfig) -> tuple[dict[str, Source], Images]:
    """The sources, by the names of their streams, and the reference images [R, H, W, 3], R = 0 if there are none.

    Raises:
        ValueError: a file or an option that a source cannot use; the message names the stream.
        OSError: a file cannot be read.
    """
    sources: dict[str, Source] = {}
    for position, table in enumerate(config.streams):
        seed = config.settings.seed + position if table.seed is None else table.seed
        try:
            sources[table.name] = _source(config, table, seed)
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{config.path.name}: stream {table.name!r}: {error}") from error
    sizes = {name: source.size for name, source in sources.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name!r} {height} x {width}" for name, (height, width) in sizes.items())
        raise ValueError(f"{config.path.name}: all streams should show images of one size, got {told}")
    size = next(iter(sizes.values()))
    if config.references is None:
        return sources, np.zeros((0, *size, 3), np.uint8)
    try:
        references, _ = _images(config.resolve(config.references.images), size, resize=config.references.resize)
    except ValueError as error:
        raise ValueError(f"{config.path.name}: references: {error}") from error
    return sources, references


def _source(config: RigConfig, table: StreamTable, seed: int) -> Source:
    match table:
        case EvolutionTable():
            return _evolution(config, table, seed)
        case GuidedTable():
            from cortexloop.realtime.sources.guided import ModelGuided

            return ModelGuided(
                _generator(config, table, seed),
                _bank(config, table.models, table.neurons, table.device),
                per_batch=table.per_batch,
                policy=table.policy,
                budget_ms=table.budget_ms,
                explore=table.explore,
                seed=seed,
                chunk=table.chunk,
                batches=table.batches,
                minimise=table.minimise,
                placement=_placement(table.placement),
                model=table.model,
                refit=_refit(table.refit),
            )
        case ImagesTable():
            from cortexloop.realtime.sources.fixed import FixedImages

            images, labels = _images(config.resolve(table.images), table.size, resize=table.size is not None)
            return FixedImages(
                images,
                per_batch=table.per_batch,
                rounds=table.rounds,
                labels=labels,
                shuffle=table.shuffle,
                seed=seed,
            )
        case ScreenTable():
            from cortexloop.realtime.sources.candidates import CandidateSource

            bank = _bank(config, table.models, table.neurons, table.device)
            images, names = _images(config.resolve(table.images), (bank.height, bank.width), resize=table.resize)
            return CandidateSource(
                images,
                bank,
                per_batch=table.per_batch,
                policy=table.policy,
                explore=table.explore,
                budget_ms=table.budget_ms,
                seed=seed,
                chunk=table.chunk,
                batches=table.batches,
                names=names,
                model=table.model,
                refit=_refit(table.refit),
            )
        case SynthesisTable():
            from cortexloop.realtime.sources.synthesis import SynthesisSource

            return SynthesisSource(
                _bank(config, table.models, table.neurons, table.device),
                per_batch=table.per_batch,
                batches=table.batches,
                steps=table.steps,
                budget_ms=table.budget_ms,
                seed=seed,
                minimize=table.minimise,
            )
        case ControlsTable():
            return _controls(config, table, seed)


def _evolution(config: RigConfig, table: EvolutionTable, seed: int) -> Source:
    from cortexloop.evolve import make_optimiser
    from cortexloop.realtime.sources.evolution import EvolutionSource

    generator = _generator(config, table, seed)
    options: dict[str, Any] = {**table.optimiser_options, "seed": seed, "minimise": table.minimise}
    if table.population is not None:
        options["population"] = table.population
    if table.generations is not None:
        options["generations"] = table.generations
    optimiser = make_optimiser(table.optimiser, generator.dim, **options)
    return EvolutionSource(optimiser, generator, placement=_placement(table.placement), generations=table.generations)


def _controls(config: RigConfig, table: ControlsTable, seed: int) -> Source:
    from cortexloop.factor import FactorModel
    from cortexloop.features import BankFeatures
    from cortexloop.realtime.sources.controls import CONDITIONS, ControlSource

    layer = BankFeatures(_bank(config, table.models, None, "cpu"), table.model, table.layer)
    return ControlSource(
        FactorModel.load(config.resolve(table.factor_model), layer),
        neurons=table.neurons,
        conditions=CONDITIONS if table.conditions is None else table.conditions,
        draws=table.draws,
        starts=table.starts,
        repeats=table.repeats,
        per_batch=table.per_batch,
        seed=seed,
        steps=table.steps,
    )


def _generator(config: RigConfig, table: EvolutionTable | GuidedTable, seed: int) -> Generator:
    from cortexloop.evolve import GENERATORS

    if table.generator not in GENERATORS:
        raise ValueError(f"generator should be one of {', '.join(GENERATORS)}, got {table.generator!r}")
    make = GENERATORS[table.generator]
    if table.generator.startswith("deepsim"):
        if table.weights is None:
            raise ValueError(f"generator {table.generator!r} needs weights, the file of its published weights")
        if table.dim is not None:
            raise ValueError(f"generator {table.generator!r} has codes of fixed length; leave dim out")
        return make(weights=config.resolve(table.weights), device=table.device)
    if table.weights is not None:
        raise ValueError(f"generator {table.generator!r} takes no weights; only the deepsim generators do")
    return make(*table.size, dim=table.dim, seed=seed)


def _placement(table: PlacementTable | None) -> Placement | None:
    if table is None:
        return None
    from cortexloop.evolve import Placement

    return Placement(
        table.canvas,
        pixels_per_degree=table.pixels_per_degree,
        size=table.size,
        position=table.position,
        background=table.background,
    )


def _refit(table: RefitTable | None) -> Refit | None:
    if table is None:
        return None
    from cortexloop.realtime.refit import Refit

    if table.alphas is None:
        return Refit(after=table.after, standardize=table.standardize)
    return Refit(after=table.after, standardize=table.standardize, alphas=tuple(table.alphas))


def _bank(config: RigConfig, models: str, neurons: list[str] | None, device: str) -> ModelBank:
    """Models of a file or folder; "textbook" for the built-in ones."""
    from cortexloop.bank import ModelBank
    from cortexloop.textbook import textbook_neurons

    if models == "textbook":
        bank = ModelBank.from_weights(textbook_neurons())
        if neurons is not None:
            bank = bank.select(neurons)
    else:
        bank = ModelBank.load(config.resolve(models), names=neurons)
    return bank.to(device)


def _images(path: Path, size: tuple[int, int] | None, *, resize: bool) -> tuple[NDArray[np.uint8], list[str]]:
    """All images of a folder, zip or array file, uint8 [N, H, W, 3], and their names."""
    from cortexloop.io import open_images

    source = open_images(path, size=size, resize=resize)
    images = np.concatenate([pixels for _, pixels in source.batches(64)])
    return images, list(source.names)
