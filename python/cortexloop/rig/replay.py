"""Repeat a whole session from its journal, on a copy: do its sources still propose and learn the same, bit by bit?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cortexloop.realtime.journal import JOURNAL
from cortexloop.realtime.pixels import PIXELS
from cortexloop.realtime.session import Session
from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.source import Images, Source
from cortexloop.rig.history import existing

__all__ = ["Repeated", "repeat"]

T = TypeVar("T")


@dataclass(frozen=True)
class Repeated:
    """What was repeated: batches made, generations learned; all came out as recorded."""

    batches: int
    learned: int


class _Idle(Executor):
    """An executor that never begins: nothing new is to be learned or proposed."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return Future()


def repeat(
    path: str | os.PathLike[str],
    settings: SessionSettings,
    sources: Mapping[str, Source],
    references: Images | None = None,
    *,
    config: dict[str, Any] | None = None,
) -> Repeated:
    """Lead new sources through all that a session recorded; the session's own files are only read.

    Args:
        path: the session's folder, or a journal.
        settings, sources, references, config: as for `Session.resume`; the sources as at the session's start.

    Raises:
        FileNotFoundError: there is no journal.
        JournalError: it is damaged.
        ResumeError: something comes out differently; the message says what.
    """
    file = existing(path)
    with tempfile.TemporaryDirectory(prefix="cortexloop-replay-") as name:
        copy = Path(name)
        shutil.copyfile(file, copy / JOURNAL)
        if (file.parent / PIXELS).is_file():
            shutil.copyfile(file.parent / PIXELS, copy / PIXELS)
        with Session.resume(copy, settings, sources, references, config=config, executor=_Idle()) as session:
            learned = sum(x.learned for stream in session.streams.values() for x in stream.rounds)
            return Repeated(len(session.batches), learned)
