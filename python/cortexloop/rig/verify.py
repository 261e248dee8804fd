"""Is a session on the disk sound? Every byte, every image, and what the records say of each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cortexloop.realtime.journal import JournalError, scan
from cortexloop.realtime.pixels import PixelStore
from cortexloop.realtime.records import (
    BatchMade,
    ClockMapping,
    Control,
    Opened,
    Record,
    Served,
    ShownEvents,
    Start,
    Told,
    Update,
)
from cortexloop.rig.history import History, existing, open_pixels, row_problems

__all__ = ["Check", "Verified", "verify"]

_LISTED = 20


@dataclass
class Check:
    """One kind of check.

    Attributes:
        name: what was looked at.
        looked: how many of them.
        wrong: how many are not as they should be.
        problems: the first of these, one sentence each.
        noted: how many are in order, but worth knowing.
        notes: the first of these.
    """

    name: str
    looked: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)
    noted: int = 0
    notes: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        """Count a problem."""
        self.wrong += 1
        if len(self.problems) < _LISTED:
            self.problems.append(text)

    def note(self, text: str) -> None:
        """Count something worth knowing."""
        self.noted += 1
        if len(self.notes) < _LISTED:
            self.notes.append(text)


@dataclass
class Verified:
    """The result: checks by name, in the order in which they were made."""

    path: Path
    checks: dict[str, Check] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Check:
        return self.checks.setdefault(name, Check(name))

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.wrong == 0 for check in self.checks.values())


def verify(path: str | os.PathLike[str]) -> Verified:
    """Check a session's folder, or a journal; changes nothing, and may run while the session does.

    Raises:
        FileNotFoundError: there is no journal.
        JournalError: the file cannot be read.
    """
    file = existing(path)
    found = Verified(file)
    checked = scan(file)
    journal = found["journal"]
    journal.looked = checked.count
    if checked.problem is not None:
        journal.fail(checked.problem)
    elif checked.torn_bytes:
        journal.note(
            f"{checked.torn_bytes} bytes of an unfinished record at the end: the session is being written, or its "
            "process was killed; they are cut off when it is resumed"
        )
    kept = sorted(file.parent.glob("*.torn-*"))
    if kept:
        journal.note(f"cut off earlier and kept: {', '.join(p.name for p in kept)}")
    records = _Records(found)
    try:
        for record in checked.records():
            records.check(record)
    except JournalError as error:
        journal.fail(str(error))
    _check_pixels(found, file.parent, records)
    return found


class _Records:
    """Checks each record against those before it."""

    def __init__(self, found: Verified) -> None:
        self.found = found
        self.history = History()
        self.shas: dict[str, str] = {}
        """Of every image that a record names, with where it is named first."""
        self.shape: tuple[int, int, int] | None = None
        self._ids: dict[str, str] = {}
        self._mono = self._wall = 0
        self._generation: dict[str | None, int] = {}
        self._onsets: dict[str, float] = {}
        for name in ("batches", "presentations", "tells", "updates", "clocks"):
            found[name]

    def check(self, record: Record) -> None:
        """Check one, then take it."""
        self._check_time(record)
        match record:
            case Start():
                self.shape = record.image_shape
                for sha in record.references:
                    self.shas.setdefault(sha, "the references")
            case BatchMade():
                self._report("batches", f"batch {record.batch_id!r}", self._batch(record))
            case Served():
                if record.batch_id not in self.history.batches:
                    self.found["batches"].fail(f"a batch {record.batch_id!r} was served that was never made")
            case ShownEvents():
                self._report("presentations", f"report {record.id!r}", self._shown(record))
            case Told():
                self._report("tells", f"tell {record.header.id!r}", self._told(record))
            case Update():
                self._report("updates", f"update of batch {record.batch_id!r}", self._update(record))
            case ClockMapping():
                self._report("clocks", f"estimate {record.id!r} of clock {record.clock!r}", self._clock(record))
            case Control():
                self._control(record)
            case Opened():
                if len(self.history.opened) > len(self.history.closed):
                    self.found["journal"].note("a process ended without closing the session, which was resumed then")
            case _:
                pass
        self.history.add(record)

    def _report(self, name: str, what: str, problems: Iterator[str]) -> None:
        check = self.found[name]
        check.looked += 1
        for problem in problems:
            check.fail(f"{what} {problem}")

    def _check_time(self, record: Record) -> None:
        check = self.found["times"]
        check.looked += 1
        if isinstance(record, (Start, Opened)):
            self._mono = record.mono_ns
        if record.mono_ns < self._mono:
            back = (self._mono - record.mono_ns) / 1e6
            check.fail(f"record {check.looked} ({type(record).__name__}) is {back:.3f} ms before the record before it")
        if record.wall_ns < self._wall:
            back = (self._wall - record.wall_ns) / 1e6
            check.note(f"the computer's calendar clock stepped back by {back:.3f} ms at record {check.looked}")
        self._mono, self._wall = record.mono_ns, record.wall_ns

    def _once(self, id: str | None, what: str) -> Iterator[str]:
        if id is None:
            return
        if id in self._ids:
            yield f"has the id of {self._ids[id]}, and was recorded all the same"
        self._ids.setdefault(id, what)

    def _batch(self, made: BatchMade) -> Iterator[str]:
        history = self.history
        if made.batch_id in history.batches:
            yield "was made twice"
        if len(made.order) != len(made.pres_ids):
            yield f"has an order of {len(made.order)} and names of {len(made.pres_ids)} presentations"
        if any(not 0 <= index < len(made.items) for index in made.order):
            yield f"orders presentations of items beyond its {len(made.items)}"
        if len(made.shas) != len(made.items) or any(
            sha[:16] != item.sha for sha, item in zip(made.shas, made.items, strict=False)
        ):
            yield "has items whose checksums are not those of its images"
        again = {pres for pres in made.pres_ids if pres in history.batch_of_presentation}
        if again or len(set(made.pres_ids)) != len(made.pres_ids):
            yield f"has names of presentations that occur before, {min(again or made.pres_ids)!r} for example"
        generated = sum(item.kind == "gen" for item in made.items)
        if made.codes is not None and (not made.codes.shape or made.codes.shape[0] != generated):
            yield f"has codes of shape {list(made.codes.shape)} for {generated} images"
        streams = set(history.start.sources) if history.start is not None else set()
        if made.batch_kind != "filler" and made.stream not in streams:
            yield f"is of stream {made.stream!r}, which the session does not have"
        if made.batch_kind == "gen":
            expected = self._generation.get(made.stream, -1) + 1
            if made.generation != expected:
                yield f"is generation {made.generation} of its stream, {expected} was next"
            self._generation[made.stream] = made.generation
        if made.repairs is not None and made.repairs not in history.batches:
            yield f"shows again what {made.repairs!r} missed, which was never made"
        for sha in made.shas:
            self.shas.setdefault(sha, f"batch {made.batch_id!r}")

    def _shown(self, record: ShownEvents) -> Iterator[str]:
        yield from self._once(record.id, f"report {record.id!r}")
        if len(record.onsets) != len(record.events):
            yield f"has {len(record.onsets)} onsets for {len(record.events)} presentations"
        unknown = [e.pres_id for e in record.events if e.pres_id not in self.history.batch_of_presentation]
        if unknown:
            yield f"is about {len(unknown)} presentations that no batch has, {unknown[0]!r} first"
        check = self.found["presentations"]
        for event in record.events:
            if event.clock is None or event.t_on is None:
                continue
            if event.t_on < self._onsets.get(event.clock, event.t_on):
                check.note(f"clock {event.clock!r} went back at presentation {event.pres_id!r}, or it began anew")
            self._onsets[event.clock] = event.t_on

    def _told(self, record: Told) -> Iterator[str]:
        header = record.header
        yield from self._once(header.id, f"tell {header.id!r}")
        batch = self.history.batches.get(header.batch_id)
        if batch is None:
            yield f"is about batch {header.batch_id!r}, which was never made"
            return
        if batch.served is None:
            self.found["tells"].note(f"tell {header.id!r} is about batch {header.batch_id!r} before it was served")
        problems = row_problems(record, batch)
        yield from problems
        if problems:
            return
        status = header.status or ["ok"] * len(header.item_ids)
        counts = np.array([s == "ok" for s in status], bool)
        try:
            values = record.responses.numpy()
        except (ValueError, TypeError) as error:
            yield f"has responses that cannot be read: {error}"
            return
        if not np.isfinite(values[counts]).all():
            yield "has responses that count and are no numbers"

    def _update(self, record: Update) -> Iterator[str]:
        batch = self.history.batches.get(record.batch_id)
        if batch is None:
            yield "is about a batch that was never made"
            return
        if batch.update is not None:
            yield "is the second of this batch"
        if batch.made.stream != record.stream:
            yield f"is of stream {record.stream!r}, its batch of {batch.made.stream!r}"
        if tuple(record.scores.shape) != (batch.count("gen"),):
            yield f"has scores of shape {list(record.scores.shape)} for {batch.count('gen')} images"

    def _clock(self, record: ClockMapping) -> Iterator[str]:
        yield from self._once(record.id, f"estimate {record.id!r}")
        if any(t4 < t1 or t3 < t2 for t1, t2, t3, t4 in record.exchanges):
            yield "has exchanges that ended before they began"
        if not np.isfinite([record.drift_ppm, record.uncertainty_ns]).all():
            yield "is not a number"

    def _control(self, record: Control) -> None:
        for problem in self._once(record.id, f"{record.what} {record.id!r}"):
            self.found["tells"].fail(f"{record.what} {record.id!r} {problem}")
        if record.what in ("fault", "stalled"):
            self.found["journal"].note(f"{record.what}: {record.text}")


def _check_pixels(found: Verified, folder: Path, records: _Records) -> None:
    check = found["images"]
    check.looked = len(records.shas)
    try:
        pixels = open_pixels(folder)
    except (JournalError, ValueError) as error:
        check.fail(str(error))
        return
    if pixels is None:
        if records.shas:
            check.fail(f"there are no images: {len(records.shas)} are named, and there is no file of them")
        return
    with pixels:
        if records.shape is not None and pixels.shape != tuple(records.shape):
            check.fail(f"the images are of shape {pixels.shape}, the session's of {tuple(records.shape)}")
        _check_each(check, pixels, records.shas)
        if pixels.damaged_bytes:
            check.fail(f"{pixels.damaged_bytes} bytes between images are damaged")
        if pixels.torn_bytes:
            check.note(f"{pixels.torn_bytes} bytes of an unfinished image at the end")


def _check_each(check: Check, pixels: PixelStore, named: dict[str, str]) -> None:
    stored = pixels.shas()
    for problem in filter(None, (_problem(pixels, sha) for sha in stored)):
        check.fail(problem)
    there = set(stored)
    missing = [sha for sha in named if sha not in there]
    for sha in missing:
        check.fail(f"image {sha[:16]} is missing, which {named[sha]} has")
    unnamed = len(there - set(named))
    if unnamed:
        check.note(f"{unnamed} images that no batch has: made, and then the process ended")


def _problem(pixels: PixelStore, sha: str) -> str | None:
    try:
        pixels.get(sha)
    except JournalError as error:
        return str(error)
    return None
