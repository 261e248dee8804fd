"""What all commands share: two consoles, progress bars, and bad input told in one sentence."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


class BadInputError(Exception):
    """Something that the user gave cannot be used; the message is one sentence. The exit code is 2."""


class InterruptedCommandError(Exception):
    """Ctrl-C, before anything was written. The exit code is 130."""


@contextlib.contextmanager
def telling_interruptions() -> Iterator[None]:
    """Turn Ctrl-C within the block into an exception that gets through to `run`.

    Newer versions of typer take a KeyboardInterrupt for themselves and end without a word, older ones with Abort.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedCommandError from error


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Errors of readers and writers within the block are the input's fault, not the program's.

    Keep it around calls that meet files and options; elsewhere a ValueError is a bug and keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise BadInputError(sentence(error)) from error


def sentence(error: BaseException) -> str:
    """The message of an error on one line, without the number that OSError puts before it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {str(error.filename)!r}"
    return " ".join(text.split()) or type(error).__name__


def guarded(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; an error while the next one is read (not while it is used) is bad input."""
    while True:
        with bad_input():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def stdout() -> Console:
    """Made anew for each use, so that a replaced sys.stdout is respected."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    return Console(file=sys.stderr, highlight=False)


def complain(message: str) -> None:
    """Print `error: <sentence>` on stderr, unwrapped."""
    stderr().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show warnings as `warning: <sentence>` on stderr instead of with a line of source code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        stderr().print(f"[yellow]warning:[/] {escape(' '.join(str(message).split()))}", soft_wrap=True)

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


class Bar:
    """One bar of a `progress` block."""

    def __init__(self, progress: Progress | None, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, n: int = 1) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, n)


@contextlib.contextmanager
def progress(what: str, total: int, *, quiet: bool) -> Iterator[Bar]:
    """A progress bar on stderr that vanishes at the end; nothing with `quiet`, or where stderr is no terminal."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield Bar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        yield Bar(shown, shown.add_task(what, total=total))


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; NaN and infinity, which JSON does not know, become null."""
    print(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
