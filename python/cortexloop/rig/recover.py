"""What can be had from a damaged journal, written beside it; the journal itself is left as it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cortexloop.io import atomic_path
from cortexloop.realtime.journal import MAGIC, JournalError, frame, good_records, scan
from cortexloop.realtime.records import Record, Start
from cortexloop.rig.history import existing

__all__ = ["Recovered", "recover"]


@dataclass(frozen=True)
class Recovered:
    """What was written.

    Attributes:
        problem: what is wrong with the journal; None if nothing is, and then nothing was written.
        torn_bytes: unfinished bytes at its end.
        resumable: a journal of all records before the damage, from which the session can go on.
        before: how many.
        rescued: a journal of all good records, also those behind the damage: to export, not to go on from. None if
            there are none behind it.
        behind: how many of them are behind the damage.
    """

    path: Path
    problem: str | None
    torn_bytes: int
    resumable: Path | None = None
    before: int = 0
    rescued: Path | None = None
    behind: int = 0


def recover(path: str | os.PathLike[str]) -> Recovered:
    """Write `session.rigj.recovered`, and `session.rigj.rescued` where good records follow the damage.

    Raises:
        FileNotFoundError: there is no journal.
        JournalError: not even its first record is good, or it cannot be read.
        OSError: the copies cannot be written.
    """
    file = existing(path)
    checked = scan(file)
    if checked.problem is None:
        return Recovered(file, None, checked.torn_bytes)
    if checked.count == 0:
        raise JournalError(f"{checked.problem}; nothing can be recovered without the first record")
    resumable = file.with_name(f"{file.name}.recovered")
    _write(resumable, checked.records())
    total = sum(1 for _ in good_records(file))
    rescued = None
    if total > checked.count:
        rescued = file.with_name(f"{file.name}.rescued")
        _write(rescued, (r for i, r in enumerate(good_records(file)) if i == 0 or not isinstance(r, Start)))
    return Recovered(
        file, checked.problem, checked.torn_bytes, resumable, checked.count, rescued, total - checked.count
    )


def _write(path: Path, records: Iterable[Record]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        out.write(MAGIC)
        for record in records:
            out.write(frame(record))
