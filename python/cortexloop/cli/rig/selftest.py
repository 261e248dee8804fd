"""The command `cortexloop rig selftest`: how fast a session answers here."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape
from rich.table import Table

from cortexloop.cli.console import BadInputError, bad_input, print_json, sentence, stderr, stdout, telling_interruptions
from cortexloop.cli.parameters import Json
from cortexloop.cli.rig import rig

if TYPE_CHECKING:
    from cortexloop.rig.selftest import SelfTest


@rig.command()
@telling_interruptions()
def selftest(
    config: Annotated[
        Optional[Path],  # noqa: UP045 - typer evaluates this on Python 3.10 as well
        typer.Option("--config", help="Measure the sources of this configuration; its session is not touched."),
    ] = None,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--address", help="Measure a running server, tcp://host:port or tcp-raw://host:port, from here."),
    ] = None,
    secret_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--secret-file", help="File with the running server's secret."),
    ] = None,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--folder", help="On the disk where sessions are to be kept; the system's temporary folder if not given."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", "--repetitions", help="Of what is short.")] = 200,
    batches: Annotated[int, typer.Option("--batches", help="Of what takes a batch.")] = 20,
    deadline_ms: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--deadline-ms", help="For the next batch; the configuration's, or 150, if not given."),
    ] = None,
    json: Json = False,
) -> None:
    """Measure messages, images, responses and whole rounds; exit code 1 if batches come too late.

    Without --address a server is started in a process of its own. With it, the session is asked for its current batch
    and told nothing.
    """
    from cortexloop.rig.client import RigError
    from cortexloop.rig.selftest import selftest as here
    from cortexloop.rig.selftest import selftest_of as there

    if address is not None and (config is not None or folder is not None):
        raise BadInputError("--address measures a running server; --config and --folder are for one that is started")
    if deadline_ms is not None and not deadline_ms > 0:
        raise BadInputError(f"--deadline-ms should be above 0, got {deadline_ms}")

    def say(what: str) -> None:
        if not json:
            stderr().print(f"[dim]measuring: {escape(what)}[/]", soft_wrap=True)

    try:
        with bad_input(), contextlib.ExitStack() as stack:
            if address is not None:
                secret = None if secret_file is None else secret_file.read_text(encoding="utf-8").strip()
                found = there(address, secret=secret, n=n, deadline_ms=deadline_ms or 150.0)
            else:
                if folder is not None and not folder.is_dir():
                    raise ValueError(f"--folder should be a folder, there is none at {str(folder)!r}")
                place = stack.enter_context(tempfile.TemporaryDirectory(prefix="cortexloop-selftest-", dir=folder))
                found = here(Path(place), config=config, n=n, batches=batches, deadline_ms=deadline_ms, progress=say)
    except (RigError, RuntimeError) as error:
        raise BadInputError(sentence(error)) from error
    if json:
        print_json({
            "where": found.where, "deadline_ms": found.deadline_ms, "ok": found.ok, "notes": found.notes,
            "milliseconds": {row.name: {**row.summary(), "loop": row.loop} for row in found.rows},
        })  # fmt: skip
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(1)


def _print(found: SelfTest) -> None:
    table = Table(
        title=f"{found.where}, milliseconds", box=None, pad_edge=False, title_justify="left", header_style="bold"
    )
    table.add_column("what")
    for name in ("n", "median", "99 %", "99.9 %", "longest"):
        table.add_column(name, justify="right")
    for row in found.rows:
        numbers = row.summary()
        late = row.loop and numbers["p99"] > found.deadline_ms
        shown = [f"{numbers[key]:.2f}" for key in ("p50", "p99", "p99.9", "max")]
        table.add_row(escape(row.name), str(numbers["n"]), *(f"[red]{x}[/]" if late else x for x in shown))
    console = stdout()
    console.print(table)
    for note in found.notes:
        console.print(escape(note), soft_wrap=True)
    in_time, waits = found.kept
    if waits:
        verdict = "[green]in time[/]" if found.ok else "[red]too late[/]"
        console.print(f"{verdict}: {in_time} of {waits} batches within {found.deadline_ms:g} ms", soft_wrap=True)
