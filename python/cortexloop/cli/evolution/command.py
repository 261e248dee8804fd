"""`cortexloop evolve`: closed-loop evolutions of images for model neurons, compared, reported and stored."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import evolve, io, textbook
from cortexloop.cli import machine
from cortexloop.cli.console import BadInputError, bad_input, complain, guarded, progress, stderr
from cortexloop.cli.evolution import store
from cortexloop.cli.evolution.compare import against_natural, compare
from cortexloop.cli.evolution.findings import STAGES, TRACES, EvolveFindings, Layout, Natural, Versus
from cortexloop.cli.evolution.options import EvolveOptions, Settings, check_same, settle
from cortexloop.cli.evolution.run import (
    Experiment,
    InterruptedRunError,
    group_size,
    run_parts,
    settle_torch_threads,
    torch_threads,
)
from cortexloop.cli.evolution.store import RunFolder
from cortexloop.cli.evolution.summary import summarise
from cortexloop.cli.evolution.tables import check_parquet, write_tables
from cortexloop.cli.inputs import choose, load_bank, output_table, settle_backend, settle_threads

BATCH = 64
MAX_REFERENCES = 1000

INTERRUPTED = 130


def evolve_command(options: EvolveOptions) -> int:
    """Run, or go on with, the evolutions and write everything into the folder `options.out`.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        BadInputError: models, images, options or a folder that cannot be used.
    """
    started = time.perf_counter()
    folder = RunFolder(options.out)
    before: dict[str, Any] | None = None
    if options.resume:
        before = folder.read()
        options = options.continuing(before["options"])
    settings = settle(options, optimisers=tuple(evolve.OPTIMISERS), generators=tuple(evolve.GENERATORS))
    if before is not None:
        check_same(settings, before["settings"], options.out)
    elif folder.occupied():
        raise BadInputError(
            f"--out {str(options.out)!r} holds another run: --resume continues it, or give another folder"
        )
    if options.parquet:
        check_parquet()
    settle_threads(options.threads)
    with torch_threads(options.threads):
        experiment, record = _prepare(options, settings)
        layout = _layout(experiment, before)
        if before is not None:
            _check_files(record, before, options.out)
            if before["status"] == "complete":
                stderr().print(f"the run in {str(options.out)!r} is complete: nothing is left to do", soft_wrap=True)
                return 0
            record |= {key: before[key] for key in ("started", "seconds")}
        return _carry_out(options, experiment, layout, folder, record, started)


def _carry_out(
    options: EvolveOptions,
    experiment: Experiment,
    layout: Layout,
    folder: RunFolder,
    record: dict[str, Any],
    started: float,
) -> int:
    from cortexloop.cli.evolution.report import render

    earlier = float(record.setdefault("seconds", 0.0))
    record |= {"group": layout.group, "status": "running"}
    folder.create()
    try:
        natural = _score_natural(options, experiment, folder)
        folder.begin()
        folder.write(record)
    except BaseException:
        if not options.resume:
            folder.discard()
        raise
    try:
        run_parts(experiment, layout, folder, every=options.checkpoint_every, quiet=options.json)
        findings = _gather(options, experiment, layout, folder, natural, record)
        record["seconds"] = earlier + time.perf_counter() - started
        with progress("writing tables and report", 2, quiet=options.json) as bar:
            write_tables(findings)
            bar.advance()
            folder.write_text(store.REPORT, render(findings))
    except (InterruptedRunError, KeyboardInterrupt):
        record |= {"seconds": earlier + time.perf_counter() - started, "status": "interrupted"}
        folder.write(record)
        complain(f"interrupted; continue with: cortexloop evolve --resume --out {shlex.quote(str(options.out))}")
        return INTERRUPTED
    record |= {"status": "complete", "skipped": [] if natural is None else [s.name for s in natural.skipped]}
    folder.write(record)
    folder.finish()
    summarise(findings)
    return 0


# ----------------------------------------------------------------------------------------------- preparation


def _prepare(options: EvolveOptions, settings: Settings) -> tuple[Experiment, dict[str, Any]]:
    """What the evolutions are made of, and the record of it.

    Raises:
        BadInputError: anything that cannot be used; nothing was written.
    """
    bank = _bank(options)
    verdict = settle_backend(bank, backend=options.backend, precision=settings.precision, batch=settings.population)
    generator, placement = _images(options, settings, bank)
    references = None if options.references is None else _references(options, bank)
    experiment = Experiment(settings, bank, generator, placement, references, verdict.chosen)
    if options.weights is None:  # a formula, whose bits no number of threads changes
        settle_torch_threads(generator)
    layout = Layout(len(bank), settings.seeds, 1)
    optimisers = {}
    with bad_input():
        for name in settings.optimisers:
            made = experiment.optimiser(name, layout, 0).settings()
            optimisers[name] = {key: value for key, value in made.items() if key != "problems"}
    state = machine.kernels()
    record = {
        "status": "running",
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": settings.as_json(),
        "options": options.stored(),
        "models": {
            "source": "textbook" if options.models is None else str(options.models),
            "names": list(bank.names),
            "sha256": store.digest_of_arrays(bank.weights.numpy(), bank.table.numpy()),
            "files": {} if options.models is None else _digests(options.models),
        },
        "streams": experiment.streams(layout),
        "optimisers": optimisers,
        "generator": generator.settings(),
        "placement": None if placement is None else placement.settings() | {"box": list(placement.box)},
        "references": None if references is None else [len(references), store.digest_of_arrays(references)],
        "machine": {
            "processor": machine.processor(),
            "backend": verdict.chosen,
            "isa": state["isa"] if verdict.chosen == "cpu" else None,
            "threads": cl.get_num_threads(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": {"cortexloop": cl.__version__} | {name: machine.version_of(name) for name in ("numpy", "torch")},
    }  # fmt: skip
    return experiment, record


def _bank(options: EvolveOptions) -> cl.ModelBank:
    if options.models is not None:
        return load_bank(options.models, options.neurons)
    models = {weights.name: weights for weights in textbook.textbook_neurons()}
    return cl.ModelBank.from_weights(models[name] for name in choose(tuple(models), options.neurons))


def _digests(source: Path) -> dict[str, str]:
    """SHA-256 of the model file, or of every file of the folder."""
    if source.is_file():
        return {source.name: store.digest_of_file(source)}
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return {path.relative_to(source).as_posix(): store.digest_of_file(path) for path in files}


def _images(
    options: EvolveOptions, settings: Settings, bank: cl.ModelBank
) -> tuple[evolve.Generator, evolve.Placement | None]:
    """What makes images and where they are shown; without --size they fill the screen.

    A formula makes images of the size in which they are shown, so that none of its detail is lost.
    """
    canvas, make = (bank.height, bank.width), evolve.GENERATORS[settings.generator]
    placement: evolve.Placement | None = None
    with bad_input():
        if settings.size is not None and settings.pixels_per_degree is not None:
            placement = evolve.Placement(
                canvas, pixels_per_degree=settings.pixels_per_degree, size=settings.size, position=settings.position
            )
        if options.weights is None:
            height, width = canvas if placement is None else placement.box[2:]
            return make(height, width, dim=settings.dim), placement
        generator = make(weights=options.weights)
        if placement is None and (generator.height, generator.width) != canvas:
            placement = evolve.Placement(canvas, pixels_per_degree=1.0, size=float(max(canvas)))
        return generator, placement


def _references(options: EvolveOptions, bank: cl.ModelBank) -> NDArray[np.uint8]:
    assert options.references is not None
    with bad_input():
        source = io.open_images(options.references, size=(bank.height, bank.width), resize=options.resize)
        if len(source) > MAX_REFERENCES:
            raise BadInputError(
                f"--references holds {len(source):,} images, all shown in every generation: at most {MAX_REFERENCES}"
            )
        return np.concatenate([pixels for _, pixels in source.batches(BATCH)])


def _layout(experiment: Experiment, before: dict[str, Any] | None) -> Layout:
    group = group_size(experiment) if before is None else int(before["group"])
    problems = len(experiment.bank) * experiment.settings.seeds
    return Layout(len(experiment.bank), experiment.settings.seeds, min(group, problems))


def _check_files(now: dict[str, Any], then: dict[str, Any], where: Path) -> None:
    """Refuse to resume with other models, references, weights or another backend; where they lie does not matter."""
    kinds = {
        "models": ("models", ("names", "sha256")),
        "weights": ("generator", None),
        "references": ("references", None),
        "backends": ("machine", ("backend",)),
    }
    for what, (key, parts) in kinds.items():
        ours, theirs = (record[key] if parts is None else [record[key][p] for p in parts] for record in (now, then))
        if store.plain(ours) != store.plain(theirs):
            raise BadInputError(
                f"the {what} differ from those of the run in {str(where)!r}: it cannot be resumed with them"
            )


# -------------------------------------------------------------------------------------------- natural images


def _score_natural(options: EvolveOptions, experiment: Experiment, folder: RunFolder) -> Natural | None:
    """Stream the natural images through all models into natural.csv and keep the best image of each neuron."""
    if options.images is None:
        return None
    bank, settings = experiment.bank, experiment.settings
    with bad_input():
        source = io.open_images(
            options.images,
            size=(bank.height, bank.width),
            resize=options.resize,
            on_error="skip" if options.skip_bad else "raise",
        )
    sign = -1.0 if settings.minimise else 1.0
    best = np.full(len(bank), -np.inf)
    best_names = [""] * len(bank)
    best_pixels = np.zeros((len(bank), bank.height, bank.width, 3), np.uint8)
    digest = hashlib.sha256()
    with (
        output_table(folder.out / store.NATURAL, bank.names) as table,
        progress("scoring natural images", len(source), quiet=options.json) as bar,
    ):
        for names, pixels in guarded(source.batches(BATCH)):
            block = cl.responses(pixels, bank, precision=settings.precision, backend=experiment.backend)
            table.append(names, block)
            digest.update(pixels.data)
            oriented = sign * block.astype(np.float64)
            for n in np.flatnonzero(oriented.max(axis=0) > best):
                row = int(oriented[:, n].argmax())
                best[n], best_names[n], best_pixels[n] = oriented[row, n], names[row], pixels[row]
            bar.advance(len(names))
    return Natural(table.rows, tuple(best_names), sign * best, best_pixels, tuple(source.skipped), digest.hexdigest())


# ---------------------------------------------------------------------------------------------------- findings


def _gather(
    options: EvolveOptions,
    experiment: Experiment,
    layout: Layout,
    folder: RunFolder,
    natural: Natural | None,
    record: dict[str, Any],
) -> EvolveFindings:
    """Put the parts together and compare."""
    settings = experiment.settings
    conditions = settings.conditions()
    shape = (len(conditions), settings.generations, layout.neurons, layout.seeds)
    traces = {name: np.empty((shape[0], shape[1], layout.problems)) for name in TRACES}
    seconds = dict.fromkeys(STAGES, 0.0)
    for c in range(len(conditions)):
        for group in range(layout.groups):
            part = folder.load_part(c, group)
            members = layout.members(group)
            for name in TRACES:
                traces[name][c, :, members.start : members.stop] = part[name]
            for stage in STAGES:
                seconds[stage] += float(part[f"seconds_{stage}"].sum())
    if natural is not None:
        record["natural"] = {"source": str(options.images), "count": natural.count, "sha256": natural.digest}
    findings = EvolveFindings(
        options, settings, conditions, experiment.bank, layout, folder,
        {name: values.reshape(shape) for name, values in traces.items()},
        experiment.grey(), seconds, natural, (), None, record,
    )  # fmt: skip
    return _compared(findings)


def _compared(findings: EvolveFindings) -> EvolveFindings:
    """With the comparison of optimisers and noise levels, and of evolved with natural images, where there are any."""
    settings, conditions, grey = findings.settings, findings.conditions, findings.grey
    best = findings.best_clean()
    comparison = None
    if len(conditions) > 1:
        final = findings.traces["clean_mean"][:, -1]
        comparison = compare(conditions, final, best, grey, seed=settings.seed, minimise=settings.minimise)
    versus: list[Versus] = []
    if findings.natural is not None:
        natural = findings.natural.best
        for c, condition in enumerate(conditions):
            typical = np.median(best[c], axis=1)
            versus.append(Versus(condition, against_natural(typical, natural, grey, minimise=settings.minimise)))
        if len(conditions) * findings.layout.seeds > 1:
            overall = findings.extreme(best, (0, 2))
            versus.append(Versus(None, against_natural(overall, natural, grey, minimise=settings.minimise)))
    return replace(findings, comparison=comparison, versus=tuple(versus))
