"""`cortexloop fit`: factorized encoding models of recorded neurons, compared, reported and stored."""

from __future__ import annotations

import datetime
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop.cli import machine
from cortexloop.cli.console import BadInputError, progress
from cortexloop.cli.evolution.run import torch_threads
from cortexloop.cli.evolution.store import plain
from cortexloop.cli.fitting import data, maps, model
from cortexloop.cli.fitting.cards import make_cards
from cortexloop.cli.fitting.data import Excluded, Pictures, Recorded
from cortexloop.cli.fitting.findings import FitFindings
from cortexloop.cli.fitting.options import FitOptions, check, settle_baselines, settle_threshold
from cortexloop.cli.fitting.summary import summarise
from cortexloop.cli.fitting.tables import NEURONS, PREDICTIONS, write_tables
from cortexloop.cli.folder import OutputFolder
from cortexloop.cli.inputs import settle_threads
from cortexloop.cli.sources import OpenSource, open_source, settle_torch_device

REPORT, RUN, MODEL = "report.html", "run.json", "model.safetensors"


def fit_command(options: FitOptions) -> None:
    """Fit, compare, and write everything into the folder `options.out`.

    Raises:
        BadInputError: images, responses, features, options or a folder that cannot be used.
    """
    check(options)
    baselines = settle_baselines(options.baselines)
    settle_threshold(options.threshold)
    folder = OutputFolder(options.out, (REPORT, RUN, MODEL, PREDICTIONS, NEURONS), overwrite=options.overwrite)
    settle_threads(options.threads)
    with torch_threads(options.threads):
        _fit(options, baselines, folder)


def _fit(options: FitOptions, baselines: tuple[str, ...], folder: OutputFolder) -> None:
    from cortexloop.cli.fitting.report import render

    started = time.perf_counter()
    record = _record(options)
    opened, pictures, recorded, found = _inputs(options)
    recorded, kept = data.settle_missing(recorded, options.missing)
    train, held, rule = data.split(recorded, options)
    recorded = data.without_constant(recorded, train)
    values = found(kept)
    fitted = model.fit(options, values.values, recorded, train, held, baselines)
    record |= fitted.texts
    if opened is not None:
        record["features"] = opened.source.settings()
    shown = _shown(options, fitted.methods[0].r)
    cards = make_cards(
        shown,
        model.for_cards(fitted, shown, values, held),
        recorded,
        held,
        opened,
        pictures,
        seed=options.seed,
        quiet=options.json,
    )
    skipped = () if pictures is None else tuple(Excluded(one.name, one.reason) for one in pictures.skipped)
    channels, height, width = values.values.shape[1:]
    source = f"features of {str(options.features)!r}" if opened is None else opened.source.name
    record |= {
        "source_name": source,
        "feature_shape": [channels, height, width],
        "held_out": rule,
        "excluded": [vars(one) for one in (*recorded.excluded, *fitted.excluded)],
        "dropped_images": [vars(one) for one in (*recorded.dropped, *skipped)],
    }
    findings = FitFindings(
        options, options.out, source, (channels, height, width), None if pictures is None else pictures.size,
        replace(recorded, excluded=(*recorded.excluded, *fitted.excluded)), held, rule, fitted.methods,
        fitted.predictions, fitted.ceiling, fitted.explained, fitted.kept, fitted.ranks, fitted.dead, skipped,
        (*(() if opened is None else opened.notes), *fitted.notes), cards, record,
    )  # fmt: skip
    with progress("writing tables and report", 2, quiet=options.json) as bar, folder.writing() as place:
        fitted.model.save(place / MODEL)
        write_tables(findings, place)
        bar.advance()
        record["seconds"] = time.perf_counter() - started
        (place / REPORT).write_text(render(findings), encoding="utf-8")
        (place / RUN).write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        bar.advance()
    summarise(findings)


def _record(options: FitOptions) -> dict[str, Any]:
    state = machine.kernels()
    return {
        "command": "fit",
        "started": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": 0.0,
        "options": options.stored(),
        "example": options.example,
        "source": None if options.features is not None else options.source.stored(),
        "machine": {"processor": machine.processor(), "isa": state["isa"], "threads": cl.get_num_threads()},
        "versions": {"cortexloop": cl.__version__} | {name: machine.version_of(name) for name in ("numpy", "torch")},
    }


Inputs = tuple["OpenSource | None", "Pictures | None", Recorded, Any]


def _inputs(options: FitOptions) -> Inputs:
    """Source, images, recording, and a function from kept images to their maps.

    Everything that can be checked before features are computed is checked here. Raises BadInputError.
    """
    if options.features is not None:
        return _precomputed(options)
    opened = open_source(options.source)
    if options.example:
        pictures, recorded = data.load_example(options)
        if opened.size != pictures.size:
            raise BadInputError(
                f"the example's images are {pictures.size[0]} x {pictures.size[1]} pixels, {opened.source.name} takes "
                f"{opened.size[0]} x {opened.size[1]}: give --images and --responses"
            )
    else:
        assert options.images is not None
        pictures = data.open_images(options.images, opened.size, resize=options.resize, skip_bad=options.skip_bad)
        recorded = data.load_recorded(options, _usable(options, pictures), len(pictures.names))

    def computed(kept: NDArray[np.bool_]) -> maps.Maps:
        names = [name for name, keep in zip(recorded.names, kept, strict=True) if keep]
        return maps.compute(opened, pictures, names, quiet=options.json)

    return opened, pictures, recorded, computed


def _usable(options: FitOptions, pictures: Pictures) -> list[str]:
    """Names of the images that can be decoded; all of them, unless bad ones are to be skipped."""
    if not options.skip_bad:
        return pictures.names
    names: list[str] = []
    with progress("reading images", len(pictures.names), quiet=options.json) as bar:
        for batch, _ in pictures.batches(64):
            names += batch
            bar.advance(len(batch))
    return names


def _precomputed(options: FitOptions) -> Inputs:
    path = options.features
    assert path is not None
    array = maps.read(path)
    pictures = None
    names: list[str] | None = None
    if options.images is not None:
        pictures = data.open_images(options.images, None, resize=False, skip_bad=False)
        names = pictures.names
        if len(names) != len(array):
            raise BadInputError(
                f"--features has {len(array):,} rows and --images {len(names):,} images: they should be as many, in "
                f"the "
                "same order"
            )
    recorded = data.load_recorded(options, names, len(array))
    device = settle_torch_device(options.source.device)

    def taken(kept: NDArray[np.bool_]) -> maps.Maps:
        return maps.take(array, np.flatnonzero(kept), device, path)

    return None, pictures, recorded, taken


def _shown(options: FitOptions, r: NDArray[np.float64]) -> list[int]:
    """Positions of the neurons with a card: all, or evenly spaced from the best predicted on."""
    order = np.argsort(-np.nan_to_num(r, nan=-2.0), kind="stable")
    chosen = np.linspace(0, len(r) - 1, min(len(r), options.show)).round().astype(int)
    return [int(order[i]) for i in chosen]
