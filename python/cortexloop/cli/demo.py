"""`cortexloop demo`: what a bank of models does, measured here and now, as one HTML report."""

from __future__ import annotations

import datetime
import heapq
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

import cortexloop as cl
from cortexloop import io, synthesis, textbook
from cortexloop.cli.console import BadInputError, bad_input, guarded, print_json, progress, stderr, stdout
from cortexloop.cli.findings import EFFORT, RADII, Card, DemoOptions, Dots, Effort, Findings, Latency, Scores, Seen
from cortexloop.cli.inputs import choose, load_bank, settle_backend, settle_threads
from cortexloop.cli.machine import kernels, processor
from cortexloop.cli.recordings import Agreement, compare, load_recording, of_recording

PREFERRED = 5
BATCH = 32
LATENCY_RUNS, LATENCY_SECONDS = 300, 2.0


def demo(options: DemoOptions) -> None:
    """Run the demonstration and write `report.html` into the folder `options.out`.

    Raises:
        BadInputError: models, images, responses or options that cannot be used.
    """
    from cortexloop.cli.report import render

    _check(options)
    started = time.perf_counter()
    settle_threads(options.threads)
    recording = None
    if options.responses is not None:
        assert options.images is not None
        recording = load_recording(options.responses, options.recording, options.images)
    bank, left_out = _bank(options, recording)
    verdict = settle_backend(bank, backend=options.backend, precision="exact", batch=BATCH)
    usual = EFFORT[verdict.chosen]
    effort = Effort(options.count or usual.count, options.steps or usual.steps, usual.stride)
    scores = _score(options, effort, bank)
    agreement = None
    if recording is not None:
        agreement = compare(
            recording,
            bank.names,
            scores.names,
            scores.responses,
            total=scores.total,
            held_out_from=options.held_out_from,
        )
    cards = _cards(options, effort, bank, scores, agreement)
    latency = _latency(options, bank)
    state = kernels()
    machine = {
        "processor": processor(),
        "backend": verdict.chosen,
        "isa": state["isa"] if verdict.chosen == "cpu" else None,
        "threads": cl.get_num_threads(),
        "cortexloop": cl.__version__,
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    elapsed = time.perf_counter() - started
    findings = Findings(options, effort, bank, left_out, scores, agreement, cards, latency, machine, elapsed)
    report = options.out / "report.html"
    page = render(findings)
    with bad_input():
        options.out.mkdir(parents=True, exist_ok=True)
        with io.atomic_path(report) as temporary:
            temporary.write_text(page, encoding="utf-8")
    _summarise(findings, report)


def _check(options: DemoOptions) -> None:
    least = (("show", options.show, 1), ("steps", options.steps, 1), ("count", options.count, PREFERRED))
    for name, value, smallest in least:
        if value is not None and value < smallest:
            raise BadInputError(f"--{name} should be at least {smallest}, got {value}")
    if options.seed < 0:
        raise BadInputError(f"--seed should be at least 0, got {options.seed}")
    if options.responses is not None and (options.images is None or options.models is None):
        raise BadInputError("--responses needs the --models and --images that they belong to")
    if options.responses is None and (options.recording is not None or options.held_out_from is not None):
        raise BadInputError("--recording and --held-out-from need --responses")
    if options.out.exists() and not options.out.is_dir():
        raise BadInputError(f"--out {str(options.out)!r} is a file; give a folder")


def _bank(options: DemoOptions, recording: io.Responses | None) -> tuple[cl.ModelBank, int]:
    """The models to show, and how many of other recordings were left out."""
    if options.models is None:
        models = {weights.name: weights for weights in textbook.textbook_neurons()}
        return cl.ModelBank.from_weights(models[name] for name in choose(tuple(models), options.neurons)), 0
    if recording is None:
        return load_bank(options.models, options.neurons), 0
    with bad_input(), io.open_models(options.models) as files:
        chosen = choose(files.names, options.neurons)
        own = of_recording(chosen, recording.key)
        return cl.ModelBank.from_weights(files.read(name) for name in own), len(chosen) - len(own)


# ---------------------------------------------------------------------------------------------------- scoring


def _procedural(effort: Effort, seed: int, bank: cl.ModelBank) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    if (bank.height, bank.width) != (textbook.SIZE, textbook.SIZE):
        raise BadInputError(
            f"procedural images are {textbook.SIZE} x {textbook.SIZE} pixels, "
            f"these models take {bank.height} x {bank.width}: give --images"
        )
    pixels = textbook.procedural_images(effort.count, seed)
    for start in range(0, effort.count, BATCH):
        part = pixels[start : start + BATCH]
        yield [f"procedural {start + i + 1}" for i in range(len(part))], part


def _score(options: DemoOptions, effort: Effort, bank: cl.ModelBank) -> Scores:
    source: io.ImageSource | None = None
    if options.images is None:
        batches: Iterator[tuple[list[str], NDArray[np.uint8]]] = _procedural(effort, options.seed, bank)
        total = effort.count
    else:
        with bad_input():
            source = io.open_images(
                options.images,
                size=(bank.height, bank.width),
                resize=options.resize,
                on_error="skip" if options.skip_bad else "raise",
            )
        batches, total = guarded(source.batches(BATCH)), len(source)
    names: list[str] = []
    blocks: list[NDArray[np.float32]] = []
    best: list[list[tuple[float, int, NDArray[np.uint8]]]] = [[] for _ in bank.names]
    seconds = 0.0
    with progress("scoring images", total, quiet=options.json) as bar:
        for batch_names, pixels in batches:
            begin = time.perf_counter()
            block = cl.responses(pixels, bank, backend=options.backend)
            seconds += time.perf_counter() - begin
            for n, heap in enumerate(best):
                _keep_best(heap, block[:, n], pixels, len(names))
            names += batch_names
            blocks.append(block)
            bar.advance(len(batch_names))
    preferred = tuple(
        tuple(Seen(names[-i], value, pixels) for value, i, pixels in sorted(heap, reverse=True)) for heap in best
    )
    skipped = () if source is None else tuple(source.skipped)
    return Scores(tuple(names), np.concatenate(blocks), preferred, total, skipped, seconds)


def _keep_best(
    heap: list[tuple[float, int, NDArray[np.uint8]]],
    values: NDArray[np.float32],
    pixels: NDArray[np.uint8],
    first: int,
) -> None:
    """Keep the `PREFERRED` largest responses with their images; the earlier image wins a tie (its -index is larger)."""
    for i in np.argsort(-values, kind="stable")[:PREFERRED]:
        entry = (float(values[i]), -(first + int(i)))
        if len(heap) < PREFERRED:
            heapq.heappush(heap, (*entry, pixels[i].copy()))
        elif entry > heap[0][:2]:
            heapq.heapreplace(heap, (*entry, pixels[i].copy()))


# ------------------------------------------------------------------------------------------------- per neuron


def _shown(options: DemoOptions, bank: cl.ModelBank, agreement: Agreement | None) -> list[int]:
    """Positions of the neurons with a card: all, or with a recording evenly spaced from the best predicted on."""
    n = len(bank)
    if agreement is None:
        return list(range(min(n, options.show)))
    order = np.argsort(-np.nan_to_num(agreement.r, nan=-2.0), kind="stable")
    chosen = np.linspace(0, n - 1, min(n, options.show)).round().astype(int)
    return [int(order[i]) for i in chosen]


def _cards(
    options: DemoOptions, effort: Effort, bank: cl.ModelBank, scores: Scores, agreement: Agreement | None
) -> tuple[Card, ...]:
    shown = _shown(options, bank, agreement)
    chosen = bank.select(shown)
    with progress("synthesizing images", effort.steps, quiet=options.json) as bar:
        ascent = synthesis.maximize(
            chosen,
            steps=effort.steps,
            seed=options.seed,
            progress=lambda step, responses: bar.advance(),
            backend=options.backend,
        )
    images = np.rint(ascent.images).astype(np.uint8)
    cards = []
    with progress("tuning to dots", len(shown), quiet=options.json) as bar:
        for i, n in enumerate(shown):
            dots = _dots(chosen.select([i]), effort.stride, options.backend)
            cards.append(
                Card(
                    index=n,
                    name=bank.names[n],
                    filters=bank.models[n].filters,
                    preferred=scores.preferred[n],
                    synthesized=images[i],
                    response=float(ascent.responses[i]),
                    trajectory=np.concatenate([ascent.initial[i : i + 1], ascent.trajectory[i]]),
                    dots=dots,
                )
            )
            bar.advance()
    return tuple(cards)


def _dots(bank: cl.ModelBank, stride: int, backend: str) -> Dots:
    curves, maps, places = [], [], []
    for value in (255.0, 0.0):
        found = synthesis.dot_location_tuning(bank, value=value, stride=stride, backend=backend)[0]
        row, column = np.unravel_index(int(found.argmax()), found.shape)
        place = np.array([row, column]) * float(stride) + (stride - 1) / 2
        curves.append(synthesis.dot_size_tuning(bank, RADII, places=place, value=value, backend=backend)[0])
        maps.append(found)
        places.append(place)
    stronger = 0 if curves[0].max() >= curves[1].max() else 1
    row, column = places[stronger]
    return Dots(curves[0], curves[1], maps[stronger], ("light", "dark")[stronger], (float(row), float(column)))


def _latency(options: DemoOptions, bank: cl.ModelBank) -> Latency:
    plan = cl.Plan(bank, 1, backend=options.backend)
    plan.images[:] = 128
    taken: list[float] = []
    with progress("measuring latency", LATENCY_RUNS, quiet=options.json) as bar:
        while len(taken) < LATENCY_RUNS and (len(taken) < 20 or sum(taken) < LATENCY_SECONDS):
            begin = time.perf_counter()
            plan.run()
            taken.append(time.perf_counter() - begin)
            bar.advance()
    return Latency(np.array(taken), len(bank))


# -------------------------------------------------------------------------------------------------- summaries


def summary(findings: Findings, report: Path) -> dict[str, Any]:
    """The key numbers as plain data."""
    scores, agreement, latency = findings.scores, findings.agreement, findings.latency
    pairs = scores.responses.size
    neurons = []
    for card in findings.cards:
        neuron: dict[str, Any] = {
            "name": card.name,
            "preferred_images": [{"name": seen.name, "response": seen.response} for seen in card.preferred],
            "synthesized_response": card.response,
            "preferred_dot_radius": float(
                RADII[(card.dots.light if card.dots.polarity == "light" else card.dots.dark).argmax()]
            ),
            "preferred_dot_polarity": card.dots.polarity,
        }
        if agreement is not None:
            neuron["r"] = float(agreement.r[card.index])
            if agreement.corrected is not None:
                neuron["noise_corrected_r2"] = float(agreement.corrected[card.index])
        neurons.append(neuron)
    document: dict[str, Any] = {
        "report": str(report),
        "seconds": findings.seconds,
        "models": len(findings.bank),
        "images": len(scores.names),
        "skipped": [{"name": s.name, "reason": s.reason} for s in scores.skipped],
        "pairs_per_second": pairs / scores.seconds,
        "ms_per_pair": 1e3 * scores.seconds / pairs,
        "latency_ms": {
            "p50": 1e3 * latency.percentile(50),
            "p99": 1e3 * latency.percentile(99),
            "models": latency.models,
        },
        "machine": findings.machine,
        "neurons": neurons,
    }
    if agreement is not None:
        document["recording"] = {
            "name": agreement.recording,
            "images": agreement.where,
            "median_r": float(np.nanmedian(agreement.r)),
            "r": dict(zip(findings.bank.names, agreement.r.tolist(), strict=True)),
        }
        if agreement.corrected is not None:
            document["recording"]["median_noise_corrected_r2"] = float(np.nanmedian(agreement.corrected))
            document["recording"]["noise_corrected_r2"] = dict(
                zip(findings.bank.names, agreement.corrected.tolist(), strict=True)
            )
    return document


def _summarise(findings: Findings, report: Path) -> None:
    found = summary(findings, report)
    if findings.options.json:
        print_json(found)
        return
    for skipped in findings.scores.skipped:
        stderr().print(f"[yellow]skipped:[/] {escape(skipped.name)}: {escape(skipped.reason)}", soft_wrap=True)
    table = Table("neuron", title=f"{found['models']} models, {found['images']:,} images", title_justify="left")
    for column in ("best image", "synthesized", "dot radius"):
        table.add_column(column, justify="right")
    agreement = findings.agreement
    if agreement is not None:
        table.add_column("r", justify="right")
        if agreement.corrected is not None:
            table.add_column("r2_ER", justify="right")
    for neuron in found["neurons"]:
        cells = [
            escape(neuron["name"]),
            f"{neuron['preferred_images'][0]['response']:.2f}",
            f"{neuron['synthesized_response']:.2f}",
            f"{neuron['preferred_dot_radius']:g} px {neuron['preferred_dot_polarity']}",
        ]
        cells += [f"{neuron[key]:.3f}" for key in ("r", "noise_corrected_r2") if key in neuron]
        table.add_row(*cells)
    console = stdout()
    console.print(table)
    if agreement is not None:
        console.print(
            f"median r with {agreement.recording}: [bold]{found['recording']['median_r']:.3f}[/] on {agreement.where}",
            soft_wrap=True,
        )
    console.print(
        f"{found['ms_per_pair']:.2f} ms per image and model; one image through {found['models']} models: "
        f"{found['latency_ms']['p50']:.2f} ms (median), {found['latency_ms']['p99']:.2f} ms (99 %); "
        f"{findings.machine['backend']} backend, {findings.machine['threads']} threads",
        soft_wrap=True,
    )
    console.print(f"report: [bold]{escape(str(report))}[/] ({found['seconds']:.0f} s)", soft_wrap=True)
