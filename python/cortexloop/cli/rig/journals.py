"""The commands `cortexloop rig verify`, `recover`, `export` and `replay`: what is on the disk of a session."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from cortexloop.cli.console import BadInputError, bad_input, print_json, sentence, stdout, telling_interruptions
from cortexloop.cli.parameters import Json
from cortexloop.cli.rig import rig

if TYPE_CHECKING:
    from cortexloop.rig.history import Recording

Folder = Annotated[Path, typer.Argument(help="Folder of a session, or one of its journals (session.rigj).")]


@rig.command()
@telling_interruptions()
def verify(folder: Folder, json: Json = False) -> None:
    """Check every byte of a session and what its records say of each other; exit code 1 if something is wrong."""
    from cortexloop.realtime.journal import JournalError
    from cortexloop.rig.verify import verify as check

    try:
        with bad_input():
            found = check(folder)
    except JournalError as error:
        raise BadInputError(sentence(error)) from error
    if json:
        print_json({
            "path": str(found.path), "sound": found.sound,
            "checks": [
                {"name": c.name, "looked": c.looked, "wrong": c.wrong, "problems": c.problems, "notes": c.notes}
                for c in found.checks.values()
            ],
        })  # fmt: skip
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("checked")
        table.add_column("number", justify="right")
        table.add_column("result")
        for c in found.checks.values():
            table.add_row(c.name, str(c.looked), f"[red]{c.wrong} wrong[/]" if c.wrong else "[green]sound[/]")
        console = stdout()
        console.print(table)
        for c in found.checks.values():
            for text in c.problems:
                console.print(f"[red]{c.name}:[/] {escape(text)}", soft_wrap=True)
            if c.wrong > len(c.problems):
                console.print(f"[red]{c.name}:[/] and {c.wrong - len(c.problems)} more")
            for text in c.notes:
                console.print(f"[yellow]{c.name}:[/] {escape(text)}", soft_wrap=True)
            if c.noted > len(c.notes):
                console.print(f"[yellow]{c.name}:[/] and {c.noted - len(c.notes)} more")
    if not found.sound:
        raise typer.Exit(1)


@rig.command()
@telling_interruptions()
def recover(folder: Folder) -> None:
    """Write what is good of a damaged journal into new files beside it; the journal itself stays as it is."""
    from cortexloop.realtime.journal import JournalError
    from cortexloop.rig.recover import recover as run

    try:
        with bad_input():
            found = run(folder)
    except JournalError as error:
        raise BadInputError(sentence(error)) from error
    console = stdout()
    if found.problem is None or found.resumable is None:
        torn = (
            f"; {found.torn_bytes} unfinished bytes at its end are cut off when the session is resumed"
            if found.torn_bytes
            else ""
        )
        console.print(f"{escape(str(found.path))} needs no recovery{torn}", soft_wrap=True)
        return
    console.print(f"[red]{escape(found.problem)}[/]", soft_wrap=True)
    console.print(
        f"{escape(str(found.resumable))}: the {found.before} records before the damage. To go on from there, keep "
        f"{escape(found.path.name)} under another name and give this file its name.",
        soft_wrap=True,
    )
    if found.rescued is not None:
        console.print(
            f"{escape(str(found.rescued))}: these and {found.behind} good records behind the damage, for "
            "`cortexloop rig export`; a session cannot go on from it.",
            soft_wrap=True,
        )


@rig.command()
@telling_interruptions()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option("--to", help="csv, parquet, images or xdream.")] = "csv",
    out: Annotated[Path, typer.Option("--out", help="Folder for the files; made if missing.")] = Path("export"),
    json: Json = False,
) -> None:
    """Write a session for other tools: tables of presentations, responses and more, or files as XDREAM has them."""
    from cortexloop.realtime.journal import JournalError
    from cortexloop.rig.export import export as run

    try:
        with bad_input(), _opened(folder) as recording:
            files = run(recording, to, out)
    except JournalError as error:
        raise BadInputError(sentence(error)) from error
    if json:
        print_json({"files": [str(path) for path in files]})
        return
    console = stdout()
    shown = files if len(files) <= 20 else files[-10:]
    if len(shown) < len(files):
        console.print(f"{len(files) - len(shown)} files, and")
    for path in shown:
        console.print(escape(str(path)), soft_wrap=True)


@rig.command()
@telling_interruptions()
def replay(
    folder: Folder,
    check: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--check", help="Configuration of the session: repeat all of it instead, and compare."),
    ] = None,
) -> None:
    """Tell what happened in a session; or with --check, let its sources do all of it again, and compare to the bit.

    Exit code 1 if something comes out differently.
    """
    if check is not None:
        _repeat(folder, check)
        return
    from cortexloop.realtime.journal import JournalError

    try:
        with bad_input(), _opened(folder) as recording:
            _tell(recording)
    except JournalError as error:
        raise BadInputError(sentence(error)) from error


def _opened(folder: Path) -> Recording:
    from cortexloop.rig.history import Recording

    return Recording.open(folder)


_STYLES = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red"}


def _tell(recording: Recording) -> None:
    from cortexloop.rig.timeline import summaries, timeline

    console = stdout()
    for line in timeline(recording):
        minutes, seconds = divmod(line.seconds, 60)
        style = _STYLES[line.tone]
        what = f"[{style}]{line.what:<13}[/]" if style else f"{line.what:<13}"
        console.print(f"{int(minutes):4d}:{seconds:06.3f}  {what} {escape(line.text)}", soft_wrap=True)
    for stream in summaries(recording.history):
        table = Table(
            title=f"stream {stream.name}", box=None, pad_edge=False, header_style="bold", title_justify="left"
        )
        for column in ("generation", "mean score", "best score", "references"):
            table.add_column(column, justify="right")
        for number, values in enumerate(zip(stream.means, stream.bests, stream.references, strict=True)):
            table.add_row(str(number), *("-" if value != value else f"{value:.4g}" for value in values))
        console.print()
        console.print(table)


def _repeat(folder: Path, path: Path) -> None:
    from cortexloop.realtime.journal import JournalError
    from cortexloop.realtime.state import ResumeError
    from cortexloop.rig.config import build, load
    from cortexloop.rig.replay import repeat

    console = stdout()
    try:
        with bad_input():
            config = load(path)
            sources, references = build(config)
            found = repeat(folder, config.settings, sources, references, config=config.kept)
    except JournalError as error:
        raise BadInputError(sentence(error)) from error
    except ResumeError as error:
        console.print(f"[red]it does not repeat:[/] {escape(sentence(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(
        f"[green]repeated to the bit:[/] codes, scores and states of {found.batches} batches, "
        f"{found.learned} generations learned",
        soft_wrap=True,
    )
    if found.different:
        console.print(
            f"[red]{len(found.different)} of {found.images} images[/] come out with other pixels, "
            f"{escape(found.different[0])} first; the session's folder has those that were shown",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    console.print(f"[green]pixels equal:[/] {found.images} images rendered again")
