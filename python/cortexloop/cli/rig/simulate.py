"""The command `cortexloop rig simulate`: a day at a rig without an animal."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape
from rich.table import Table

from cortexloop.cli.console import BadInputError, bad_input, print_json, sentence, stdout, telling_interruptions
from cortexloop.cli.parameters import Json
from cortexloop.cli.rig import rig

if TYPE_CHECKING:
    from cortexloop.realtime.source import Source
    from cortexloop.rig.simulated import DayReport, Neurons
    from cortexloop.rig.simulated.report import GenerationRow


@rig.command()
@telling_interruptions()
def simulate(
    day: Annotated[str, typer.Option("--day", help="good, or bad: all that can go wrong in one day.")] = "good",
    config: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10 as well
        typer.Option(
            "--config", help="Session as a configuration file says; an evolution for one neuron if not given."
        ),
    ] = None,
    generations: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--generations", help="Of the evolution, 20 if not given; with --config or --address: batches."),
    ] = None,
    neuron: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--neuron", help="For which images evolve; curve_up, or the first of --models, if not given."),
    ] = None,
    models: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--models", help="Compact models that take the neurons' place; nine textbook neurons if not given."
        ),
    ] = None,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--address", help="Of a server, tcp://host:port: in real time. In this process if not given."),
    ] = None,
    secret_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--secret-file", help="File with the server's secret."),
    ] = None,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--folder", help="Keep the session here; not kept if not given."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 0,
    json: Json = False,
) -> None:
    """Run a session with simulated display, acquisition and neurons; exit code 1 if a response was lost or wrong.

    With --config, neurons get the names of the units that the configuration scores, unless they have them already; with
    --address, too, it says which units score a stream of the server.
    """
    from cortexloop.rig.simulated import DAYS

    if day not in DAYS:
        raise BadInputError(f"--day should be one of {', '.join(DAYS)}, got {day!r}")
    if generations is not None and generations < 1:
        raise BadInputError(f"--generations should be at least 1, got {generations}")
    if seed < 0:
        raise BadInputError(f"--seed should be at least 0, got {seed}")
    if address is not None and folder is not None:
        raise BadInputError("--folder goes without --address: a server keeps its session itself")
    tell = None if json else _print_generation
    if address is not None:
        found = _over_network(day, config, generations, models, address, secret_file, seed, tell)
    else:
        with _kept_in(folder) as place:
            found = _in_process(place, day, config, generations, neuron, models, seed, tell)
    if json:
        print_json(_plain(found))
    else:
        _print(found, day)
        if address is not None and config is None:
            stdout().print("means are over all units; with --config, over those that score a stream", soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


@contextlib.contextmanager
def _kept_in(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="cortexloop-simulated-") as place:
        yield Path(place) / "session"


def _in_process(
    place: Path,
    day: str,
    config: Path | None,
    generations: int | None,
    neuron: str | None,
    models: Path | None,
    seed: int,
    tell: Any,
) -> DayReport:
    from cortexloop.realtime.journal import JournalError
    from cortexloop.rig.simulated import DAYS, example
    from cortexloop.rig.simulated import simulate as run

    try:
        with bad_input():
            if config is None:
                neurons = _neurons(models, [], seed)
                unit = neuron or ("curve_up" if models is None else neurons.units[0])
                if unit not in neurons.units:
                    raise ValueError(f"--neuron should be one of {', '.join(neurons.units[:20])}, got {unit!r}")
                settings, sources, references = example(unit, generations=generations or 20, seed=seed)
                kept, batches = None, None

                def again() -> dict[str, Source]:
                    return example(unit, generations=generations or 20, seed=seed)[1]
            else:
                from cortexloop.rig.config import build, load

                found = load(config)
                settings, kept = found.settings, found.kept
                neurons = _neurons(models, [unit for stream in settings.streams for unit in stream.units], seed)
                sources, references = build(found)
                batches = generations

                def again() -> dict[str, Source]:
                    return build(found)[0]

        try:
            return run(place, settings, sources, references, neurons, DAYS[day], seed=seed, batches=batches,
                       config=kept, sources_again=again, on_generation=tell)  # fmt: skip
        except FileExistsError as error:
            raise BadInputError(f"{str(place)!r} has a session already; choose another --folder") from error
    except JournalError as error:
        raise BadInputError(sentence(error)) from error


def _over_network(
    day: str,
    config: Path | None,
    batches: int | None,
    models: Path | None,
    address: str,
    secret_file: Path | None,
    seed: int,
    tell: Any,
) -> DayReport:
    import uuid

    from cortexloop.rig.client import RigError
    from cortexloop.rig.simulated import DAYS, SimulatedRig
    from cortexloop.rig.simulated.rig import RefusedError
    from cortexloop.rig.simulated.world import NetworkLine, RealWorld

    score_units: dict[str, list[str]] = {}
    with bad_input():
        if config is not None:
            from cortexloop.rig.config import load

            score_units = {stream.name: stream.units for stream in load(config).settings.streams}
        neurons = _neurons(models, [unit for units in score_units.values() for unit in units], seed)
        secret = None if secret_file is None else secret_file.read_text(encoding="utf-8").strip()
        line = NetworkLine(address, secret)
        simulated = SimulatedRig(line, RealWorld(), neurons, DAYS[day], seed=seed, score_units=score_units,
                                 prefix=f"rig-{uuid.uuid4().hex[:8]}", on_generation=tell)  # fmt: skip
    try:
        return simulated.run(batches)
    except (RefusedError, RigError, TimeoutError) as error:
        raise BadInputError(sentence(error)) from error
    finally:
        line.close()


def _neurons(models: Path | None, wanted: list[str], seed: int) -> Neurons:
    """Simulated neurons; the first of them are called as wanted, if not all these names are there."""
    from cortexloop.rig.simulated import Neurons
    from cortexloop.rig.simulated.neurons import textbook_neurons

    names = list(dict.fromkeys(wanted))
    if models is None:
        neurons = textbook_neurons(seed)
        return neurons if set(names) <= set(neurons.units) else textbook_neurons(seed, names)
    from cortexloop.cli.inputs import load_bank

    bank = load_bank(models)
    return Neurons(bank, seed, [] if set(names) <= set(bank.names) else names)


# ---------------------------------------------------------------------------------------------- output


def _print_generation(row: GenerationRow) -> None:
    references = "" if row.references is None else f", references {row.references:5.1f}"
    numbers = (
        "no responses"
        if math.isnan(row.mean)
        else f"mean {row.mean:5.1f}, best {row.best:5.1f}{references} spikes/s, {row.images} images"
    )
    stdout().print(f"{escape(row.stream)} generation {row.generation:3d}: {numbers}", soft_wrap=True)


def _print(found: DayReport, day: str) -> None:
    table = Table(title=f"a {day} day", box=None, pad_edge=False, show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("found", justify="right")
    shown = found.presentations
    status = found.status
    in_vain = ", ".join(f"{count} {name}" for name, count in shown.items() if name != "ok") or "none"
    rows: list[tuple[str, str]] = [
        ("time at the rig", f"{found.session_s / 60:.1f} min"),
        ("batches", ", ".join(f"{count} {kind}" for kind, count in found.batches.items()) or "none"),
        ("presentations that went well", str(shown.get("ok", 0))),
        ("presentations in vain", in_vain),
        ("responses", ", ".join(f"{count} {name}" for name, count in found.responses.items()) or "none"),
        ("onset known too badly", str(found.unsure)),
    ]
    if status is not None:
        uncertainty = status.clock_uncertainty_us
        rows += [
            ("presentations shown again", str(status.reshown)),
            ("deadlines missed", str(status.deadline_misses)),
            ("clock uncertainty", "unknown" if uncertainty is None else f"{uncertainty / 1e3:.2f} ms"),
        ]
    rows += [
        ("clocks stepped, and noticed", f"{found.clock_steps + found.acquisition_restarts}, {_or(found.steps_found)}"),
        ("messages lost and sent again", str(found.resent)),
        ("messages that came twice", str(found.repeated)),
        ("acquisition messages lost", str(found.packets_lost)),
        ("server killed", str(found.server_crashes)),
        ("program, acquisition started anew", f"{found.client_restarts}, {found.acquisition_restarts}"),
    ]
    rows += [
        (f"onset by {by}, from light", f"{median:+.2f} ms, worst {worst:+.2f} ms")
        for by, (median, worst) in sorted(found.onset_error_ms.items())
    ]
    rows += [
        ("onsets worse than they claim", _verdict(None if found.lost is None else found.onsets_beyond)),
        ("responses other than what was fired", _verdict(found.wrong)),
        ("responses lost", _verdict(found.lost)),
    ]
    for what, text in rows:
        table.add_row(what, text)
    stdout().print(table)


def _or(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _verdict(number: int | None) -> str:
    if number is None:
        return "not looked at: the server has the journal"
    return f"[red]{number}[/]" if number else "[green]0[/]"


def _plain(found: DayReport) -> dict[str, Any]:
    import msgspec

    plain = asdict(found)
    plain["status"] = None if found.status is None else msgspec.to_builtins(found.status)
    plain["ok"] = found.ok
    return plain
