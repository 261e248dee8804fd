"""The command `cortexloop rig example`: configurations and programs to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from cortexloop.cli.console import BadInputError, bad_input, stdout
from cortexloop.cli.rig import rig


@rig.command()
def example(
    name: Annotated[
        Optional[str],  # noqa: UP045 - typer evaluates this on Python 3.10 as well
        typer.Argument(help="Which; all are listed if not given."),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder to write it to; made if missing, nothing there is overwritten."),
    ] = Path(),
) -> None:
    """Write an example to start from: a configuration, a client, a program for a rig."""
    folder = resources.files("cortexloop.rig")
    places = [folder / "examples", folder / "matlab"]
    files = {file.name: file for place in places if place.is_dir() for file in place.iterdir() if "." in file.name}
    files["client.py"] = folder / "client.py"
    files = {file: files[file] for file in sorted(files) if not file.endswith(".pyc")}
    if name is None:
        for file in files:
            stdout().print(escape(file))
        return
    if name not in files:
        raise BadInputError(f"there is no example {name!r}; there are {', '.join(files)}")
    target = out / name
    with bad_input():
        out.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("xb") as written:
                written.write(files[name].read_bytes())
        except FileExistsError as error:
            raise BadInputError(f"{str(target)!r} exists already") from error
    stdout().print(escape(str(target)), soft_wrap=True)
