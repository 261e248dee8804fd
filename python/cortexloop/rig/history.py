"""A session as its journal tells it, for tables, reports and checks; reads only, whether the session runs or not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.journal import JOURNAL, JournalError, Scan, scan
from cortexloop.realtime.messages import Event
from cortexloop.realtime.pixels import PixelStore
from cortexloop.realtime.records import (
    BatchMade,
    ClockMapping,
    Closed,
    Control,
    OnsetFound,
    Opened,
    Record,
    Served,
    ShownEvents,
    Start,
    Told,
    Update,
)
from cortexloop.realtime.rounds import BatchState


class Report(NamedTuple):
    """What the rig said of one presentation, what followed for its onset then, and in which record."""

    event: Event
    onset: OnsetFound | None
    record: ShownEvents


@dataclass(eq=False)
class BatchHistory:
    """One batch and what became of it.

    Attributes:
        state: which presentations were told; in place of the responses it has (number of the tell, row in it).
        codes_shape: of the codes that its images were made from; the codes themselves are left out.
        events: of each presentation, what the rig reported; what went wrong comes before what went well.
    """

    state: BatchState
    codes_shape: tuple[int, ...] | None
    codes_dtype: str | None
    served: Served | None = None
    update: Update | None = None
    events: dict[str, Report] = field(default_factory=dict)

    @property
    def made(self) -> BatchMade:
        """Its record, without codes."""
        return self.state.made

    def count(self, kind: str) -> int:
        """Number of its items of a kind."""
        return sum(item.kind == kind for item in self.made.items)


class History:
    """All records of a session, without codes; responses stay as they came.

    Records that fit nowhere (a tell of an unknown batch, say) are kept in their lists and change nothing else.
    """

    def __init__(self) -> None:
        self.start: Start | None = None
        self.batches: dict[str, BatchHistory] = {}
        self.batch_of_presentation: dict[str, BatchHistory] = {}
        self._rounds: dict[tuple[str | None, int], list[BatchHistory]] = {}
        self.opened: list[Opened] = []
        self.closed: list[Closed] = []
        self.tells: list[Told] = []
        self.shown: list[ShownEvents] = []
        self.updates: list[Update] = []
        self.clocks: list[ClockMapping] = []
        self.controls: list[Control] = []

    @classmethod
    def of(cls, records: Iterable[Record]) -> History:
        """The history that these records tell."""
        history = cls()
        for record in records:
            history.add(record)
        return history

    def add(self, record: Record) -> None:
        """Take the next record."""
        match record:
            case Start():
                self.start = record
            case Opened():
                self.opened.append(record)
            case Closed():
                self.closed.append(record)
            case BatchMade():
                self._add_batch(record)
            case Served():
                batch = self.batches.get(record.batch_id)
                if batch is not None and batch.served is None:
                    batch.served = record
            case ShownEvents():
                self._add_events(record)
            case Told():
                self._add_tell(record)
            case Update():
                self._add_update(record)
            case ClockMapping():
                self.clocks.append(record)
            case Control():
                self.controls.append(record)

    def _add_batch(self, made: BatchMade) -> None:
        if made.batch_id in self.batches or len(made.order) != len(made.pres_ids) or _outside(made):
            return
        codes = made.codes
        batch = BatchHistory(
            BatchState(msgspec.structs.replace(made, codes=None), len(self.batches)),
            None if codes is None else codes.shape,
            None if codes is None else codes.dtype,
        )
        self.batches[made.batch_id] = batch
        if made.batch_kind != "filler":
            self._rounds.setdefault((made.stream, made.generation), []).append(batch)
        for pres in made.pres_ids:
            self.batch_of_presentation.setdefault(pres, batch)

    def _add_events(self, record: ShownEvents) -> None:
        self.shown.append(record)
        for position, event in enumerate(record.events):
            batch = self.batch_of_presentation.get(event.pres_id)
            if batch is None:
                continue
            known = batch.events.get(event.pres_id)
            late = batch.state.closed or event.pres_id in record.late
            if known is None or (known.event.outcome == "ok" and event.outcome != "ok" and not late):
                onset = record.onsets[position] if position < len(record.onsets) else None
                batch.events[event.pres_id] = Report(event, onset, record)
            batch.state.note([event], record.late)

    def _add_tell(self, record: Told) -> None:
        batch = self.batches.get(record.header.batch_id)
        if batch is not None and not row_problems(record, batch):
            rows = len(record.header.item_ids)
            tags = np.stack([np.full(rows, len(self.tells), np.float64), np.arange(rows, dtype=np.float64)], axis=1)
            batch.state.take(record.header, tags)
            if batch.made.batch_kind == "filler" and batch.state.complete:
                batch.state.closed = True
        self.tells.append(record)

    def _add_update(self, record: Update) -> None:
        self.updates.append(record)
        batch = self.batches.get(record.batch_id)
        if batch is None:
            return
        batch.update = batch.update or record
        for part in self.round(batch):
            part.state.closed = True

    def round(self, batch: BatchHistory) -> list[BatchHistory]:
        """A batch and those in which what it missed was shown again; a filler alone."""
        made = batch.made
        if made.batch_kind == "filler":
            return [batch]
        return self._rounds[made.stream, made.generation]

    def of_item(self, batch: BatchHistory, item_id: str) -> list[NDArray[np.float64]]:
        """Responses [units] to an item of one batch that count, in the order of presentation."""
        found = []
        for tag in batch.state.of_item(item_id):
            told = self.tells[int(tag[0])]
            found.append(told.responses.numpy()[int(tag[1])].astype(np.float64))
        return found

    def score_units(self, stream: str | None) -> list[str]:
        """Names of the units whose mean is a stream's score, as the session's settings say; none for all of them."""
        config = self.start.config if self.start is not None else {}
        settings = config.get("settings") or {}
        for entry in settings.get("streams") or []:
            if entry.get("name") == stream:
                return list(entry.get("units") or [])
        return []

    def reference_mean(self, batch: BatchHistory) -> float | None:
        """Mean response to the references of a batch, over the units that make its stream's score; None without any."""
        wanted = self.score_units(batch.made.stream)
        means = []
        for item in batch.made.items:
            for tag in batch.state.of_item(item.item_id) if item.kind == "ref" else []:
                told = self.tells[int(tag[0])]
                columns = [i for i, unit in enumerate(told.header.units) if not wanted or unit in wanted]
                if columns:
                    means.append(float(told.responses.numpy()[int(tag[1])].astype(np.float64)[columns].mean()))
        return float(np.mean(means)) if means else None


def _outside(made: BatchMade) -> bool:
    return any(not 0 <= index < len(made.items) for index in made.order)


def row_problems(record: Told, batch: BatchHistory) -> list[str]:
    """What does not fit between a tell and its batch; nothing in a sound journal."""
    header, rows = record.header, len(record.header.item_ids)
    found = []
    if tuple(record.responses.shape) != (rows, len(header.units)):
        found.append(
            f"has responses of shape {list(record.responses.shape)} for {rows} rows of {len(header.units)} units"
        )
    found += [
        f"has {len(given)} {name} for {rows} rows"
        for name, given in (("pres_ids", header.pres_ids), ("status", header.status))
        if given is not None and len(given) != rows
    ]
    unknown = [item for item in header.item_ids if item not in batch.state.presentations]
    if unknown:
        found.append(f"names {len(unknown)} items that the batch does not have, {unknown[0]!r} first")
    for item, pres in zip(header.item_ids, header.pres_ids or [], strict=False):
        if batch.state.item_of.get(pres) != item:
            found.append(f"names presentation {pres!r} of item {item!r}, which the batch does not have")
            break
    return found


@dataclass(frozen=True, eq=False)
class Recording:
    """A session on the disk: its journal read once, its images at hand.

    Attributes:
        scan: what the journal's check said.
        history: all of it but codes.
        pixels: the images; None if there is no such file.
    """

    scan: Scan
    history: History
    pixels: PixelStore | None

    @property
    def start(self) -> Start:
        """The first record."""
        start = self.history.start
        assert start is not None  # `open` saw to that
        return start

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a session's folder, or one of its journal's files.

        Raises:
            FileNotFoundError: there is no journal.
            JournalError: the journal is damaged; `cortexloop rig recover` writes a file that this reads.
        """
        checked = scan(existing(path))
        if checked.problem is not None:
            raise JournalError(checked.problem)
        history = History.of(checked.records())
        return cls(checked, history, open_pixels(checked.path.parent))

    def codes(self) -> Iterator[BatchMade]:
        """The batches that have codes, with them, one at a time."""
        for record in self.scan.records():
            if isinstance(record, BatchMade) and record.codes is not None:
                yield record

    def close(self) -> None:
        """Let go of the images."""
        if self.pixels is not None:
            self.pixels.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def existing(path: str | os.PathLike[str]) -> Path:
    """The journal's file for a session's folder or a journal.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    file = path / JOURNAL if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no session: there is no {str(file)!r}")
    return file


def open_pixels(folder: Path) -> PixelStore | None:
    """The images of a session, for reading; None if it has none."""
    try:
        return PixelStore(folder, readonly=True)
    except FileNotFoundError:
        return None
