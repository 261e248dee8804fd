"""A session with a rig: a state machine between sources of stimuli, a rig's messages and a journal.

Each change of state is first written as a record and then applied; a restart applies the records of the journal again.
So nothing is lost or told twice, whenever the process ends. Messages may come any number of times and in any order:
a request that came before gets the answer it had.

One thread calls `handle` and `poll`. Learning, proposing and rendering run beside it and are collected by `poll`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from cortexloop.realtime import messages as m
from cortexloop.realtime import records as r
from cortexloop.realtime.clock import Clock, SystemClock
from cortexloop.realtime.jobs import Advance, Lesson, advance, check_images
from cortexloop.realtime.journal import Journal, JournalError
from cortexloop.realtime.pixels import PixelStore
from cortexloop.realtime.rounds import BatchState, Round
from cortexloop.realtime.settings import SessionSettings, StreamSettings
from cortexloop.realtime.source import Images, Proposal, Source, sha256
from cortexloop.realtime.status import environment, report
from cortexloop.realtime.timing import ClockEstimator, onset

FORMAT = 1
BEST_AS_FILLER = 8
ANSWERS_KEPT = 10_000
"""Answers to asks that are remembered for when they are sent again."""


class ResumeError(RuntimeError):
    """A session cannot go on from its journal; the message says what differs."""


class Outgoing(NamedTuple):
    """A reply and the raw bytes that belong to it."""

    message: m.Reply
    buffer: bytes | memoryview | None = None


@dataclass(eq=False)
class Stream:
    """A source, and what it has proposed so far."""

    settings: StreamSettings
    source: Source
    rounds: list[Round] = field(default_factory=list)
    job: Future[Advance] | None = None
    finished: bool = False
    """The source has no more to show."""
    stalled: bool = False
    """Too few responses, and images were shown again often enough: waits for `Resume`."""
    best: float | None = None
    mean: float | None = None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def open(self) -> list[Round]:
        """Proposals that are not learned yet, oldest first."""
        return [x for x in self.rounds if not x.learned]

    @property
    def done(self) -> bool:
        return self.finished and not self.open and self.job is None


@dataclass(eq=False)
class Waiting:
    """An ask without an answer yet."""

    client: str
    ask: m.Ask
    asked_ns: int
    deadline_ns: int


@dataclass(eq=False)
class Client:
    """Whoever said hello."""

    name: str
    roles: list[str]
    heard_ns: int
    lost: bool = False


R = TypeVar("R", bound=r.Record)


class Session:
    """See the module; made by `Session.create` or `Session.resume`."""

    def __init__(
        self,
        journal: Journal,
        pixels: PixelStore,
        start: r.Start,
        settings: SessionSettings,
        sources: Mapping[str, Source],
        references: Images,
        clock: Clock,
        executor: Executor | None,
    ) -> None:
        self.settings, self.references = settings, references
        self.wake: Callable[[], None] | None = None
        """Called, from another thread, when `poll` has something to collect."""
        self.batches: list[BatchState] = []
        """In the order in which they are shown."""
        self.streams = {s.name: Stream(s, sources[s.name]) for s in settings.streams}
        self.clocks: dict[str, ClockEstimator] = {}
        self.clients: dict[str, Client] = {}
        self.fault: str | None = None
        self.stopped = False
        self.paused: str | None = None
        self.reference_mean: float | None = None
        self.last_tell: str | None = None
        self.last_sync_ms: float | None = None
        self.counts = {"told": 0, "deadline_misses": 0, "reshown": 0, "late": 0, "gaps": 0}
        self._journal, self._pixels, self._clock = journal, pixels, clock
        self._config_sha = start.config_sha
        self._own_executor = executor is None
        self._executor = executor or ThreadPoolExecutor(1, "cortexloop-sources")
        self._by_id: dict[str, BatchState] = {}
        self._acks: dict[str, m.Ack] = {}
        self._asked: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._waiting: dict[str, Waiting] = {}
        self._uncertain: set[str] = set()
        self._images: dict[str, Images] = {}
        self._proposals: dict[str, list[Proposal]] = {}
        self._reference_shas: list[str] = []
        self._replaying = False
        self._broken = False
        self._closed = False

    # ------------------------------------------------------------------------------------------ beginning and end

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        settings: SessionSettings,
        sources: Mapping[str, Source],
        references: Images | None = None,
        *,
        config: dict[str, Any] | None = None,
        clock: Clock | None = None,
        executor: Executor | None = None,
    ) -> Session:
        """Begin a session in a folder that has none.

        Args:
            folder: made if missing; holds journal and pixels.
            settings: of the session.
            sources: one for each stream, by name; all of one image size.
            references: uint8 [R, H, W, 3], shown first in every batch.
            config: anything JSON-able to keep with the session, its configuration file for example.
            clock: the computer's if None.
            executor: runs the sources; a thread of its own if None.

        Raises:
            FileExistsError: the folder has a session.
            JournalError: the folder cannot be written, or another process is at work there.
            ValueError: sources and streams that do not belong together, images of different sizes.
        """
        clock = clock or SystemClock()
        references, size = _check(settings, sources, references)
        kept = _plain({"settings": settings, "config": config or {}})
        where = Path(folder)
        where.mkdir(parents=True, exist_ok=True)
        start = r.Start(
            mono_ns=clock.monotonic_ns(),
            wall_ns=clock.wall_ns(),
            format=FORMAT,
            session=settings.session,
            config=kept,
            config_sha=_digest(kept),
            sources={name: _plain(source.settings()) for name, source in sources.items()},
            environment=environment(),
            references=[sha256_of(image) for image in references],
            image_shape=(*size, 3),
        )
        journal = Journal.create(where, start)
        session = cls(journal, PixelStore(where, (*size, 3)), start, settings, sources, references, clock, executor)
        session._reference_shas = session._pixels.put(references) if len(references) else []
        session._begin()
        return session

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        settings: SessionSettings,
        sources: Mapping[str, Source],
        references: Images | None = None,
        *,
        config: dict[str, Any] | None = None,
        clock: Clock | None = None,
        executor: Executor | None = None,
    ) -> Session:
        """Go on with the session in a folder, from where its journal ends; arguments as for `create`.

        The sources have to be new ones, made as at the start: they are led through all that is recorded, and what they
        propose and become is compared with the journal's digests.

        Raises:
            FileNotFoundError: the folder has no session.
            JournalError: the journal is damaged, or another process is at work there.
            ResumeError: other settings, sources or references than the session began with, or a source that comes to
                another state.
        """
        clock = clock or SystemClock()
        references, size = _check(settings, sources, references)
        journal, records = Journal.open(Path(folder))
        try:
            start = records[0]
            if not isinstance(start, r.Start):
                raise ResumeError(f"the journal should begin with a start record, got {type(start).__name__}")
            kept = _plain({"settings": settings, "config": config or {}})
            _compare(start, kept, sources, references)
            pixels = PixelStore(Path(folder), (*size, 3))
            session = cls(journal, pixels, start, settings, sources, references, clock, executor)
            session._reference_shas = session._pixels.put(references) if len(references) else []
            session._replay(records[1:])
            session._begin()
        except BaseException:
            journal.close()
            raise
        return session

    def _begin(self) -> None:
        opened = self._stamp(
            r.Opened, pid=os.getpid(), host=environment()["host"], environment=environment(),
            torn_bytes=self._journal.torn_bytes,
        )  # fmt: skip
        self._write(opened)
        self._sync()
        self._follow_up()

    def close(self) -> None:
        """Let go of the folder; whatever the sources were busy with is dropped, and done again on `resume`."""
        if self._closed:
            return
        self._closed = True
        self.wake = None
        if self._own_executor:
            self._executor.shutdown(wait=True, cancel_futures=True)
        try:
            if not self._broken:
                self._journal.append(self._stamp(r.Closed))
                self._journal.sync()
                self._pixels.sync()
        finally:
            self._journal.close()
            self._pixels.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def state(self) -> m.State:
        """Of the whole session."""
        if self.fault is not None:
            return "fault"
        if self.stopped or all(stream.done for stream in self.streams.values()):
            return "finished"
        if self.paused is not None or self._all_stalled():
            return "paused"
        return "running" if any(batch.served for batch in self.batches) else "ready"

    def _all_stalled(self) -> bool:
        going = [stream for stream in self.streams.values() if not stream.done]
        return bool(going) and all(stream.stalled for stream in going)

    # ------------------------------------------------------------------------------------------ messages

    def handle(self, client: str, request: m.Request, buffer: bytes | memoryview | None = None) -> Outgoing | None:
        """Take a request.

        Args:
            client: who sends it; every reply of `poll` names it again.
            request: the message.
            buffer: the bytes that came with it.

        Returns: the reply; None for an `Ask` that has to wait, whose reply comes from `poll`.
        """
        self._heard(client)
        try:
            return self._handle(client, request, buffer)
        except m.Refusal as refusal:
            return Outgoing(refusal.to(request.id))
        except JournalError as error:
            self._break(str(error))
            return Outgoing(m.Refusal("FAULT", str(error)).to(request.id))

    def _handle(self, client: str, request: m.Request, buffer: bytes | memoryview | None) -> Outgoing | None:
        match request:
            case m.Hello():
                return Outgoing(self._hello(client, request))
            case m.Heartbeat():
                return Outgoing(m.Ack(id=request.id, journaled=False))
            case m.StatusRequest():
                return Outgoing(report(self, request.id))
            case m.ClockRequest():
                received = self._clock.monotonic_ns()
                return Outgoing(
                    m.ClockReply(id=request.id, t1_ns=request.t1_ns, t2_ns=received, t3_ns=self._clock.monotonic_ns())
                )
        if self._broken:
            raise m.Refusal("FAULT", f"nothing can be recorded: {self.fault}")
        if isinstance(request, m.Ask):
            return self._ask(client, request)
        if request.id in self._acks:
            known = self._acks[request.id]
            return Outgoing(m.Ack(id=known.id, accepted=known.accepted, ignored=known.ignored, dup=True))
        if self.stopped:
            raise m.Refusal("FINISHED", "the session was stopped; nothing more is recorded")
        record = self._record_of(client, request, buffer)
        self._journal.append(record)
        self._sync()
        self._apply(record)
        self._follow_up()
        return Outgoing(self._acks[request.id])

    def _record_of(self, client: str, request: m.Request, buffer: bytes | memoryview | None) -> r.Record:
        """The record of a request that changes something.

        Raises:
            Refusal: it does not fit what is known.
        """
        name = self._name(client)
        match request:
            case m.Tell():
                return self._stamp(r.Told, client=name, header=request, responses=self._responses(request, buffer))
            case m.Shown():
                for event in request.events:
                    self._batch_of_presentation(event.pres_id)
                return self._stamp(
                    r.ShownEvents,
                    id=request.id,
                    client=name,
                    events=request.events,
                    onsets=[self._onset(event) for event in request.events],
                )
            case m.ClockReport():
                return self._clock_record(name, request)
            case m.Note():
                return self._stamp(r.Control, what="note", text=request.text, id=request.id, client=name)
            case m.Pause():
                return self._stamp(r.Control, what="pause", text=request.reason, id=request.id, client=name)
            case m.Resume():
                return self._stamp(r.Control, what="resume", text="", id=request.id, client=name)
            case m.Stop():
                return self._stamp(r.Control, what="stop", text=request.reason, id=request.id, client=name)
        raise m.Refusal("BAD_MESSAGE", f"a request was expected, got {type(request).__name__}")

    def _clock_record(self, client: str, report: m.ClockReport) -> r.ClockMapping:
        """Take exchanges with a clock.

        The one change of state that comes before its record, which says what followed; if that cannot be written, the
        session ends anyway.
        """
        estimator = self.clocks.setdefault(report.clock, ClockEstimator(report.clock))
        try:
            fit = estimator.add(report.exchanges)
        except ValueError as error:
            raise m.Refusal("BAD_MESSAGE", str(error)) from error
        tolerance = self.settings.clock_tolerance_ms * 1e6
        if fit.step is not None:
            self._write(self._stamp(r.Control, what="clock_step", text=str(fit.step), client=client))
        if fit.uncertainty_ns > tolerance and report.clock not in self._uncertain:
            text = f"clock {report.clock!r} is known to {fit.uncertainty_ns / 1e6:.1f} ms only"
            self._write(self._stamp(r.Control, what="clock_uncertain", text=text, client=client))
        (self._uncertain.add if fit.uncertainty_ns > tolerance else self._uncertain.discard)(report.clock)
        return self._stamp(
            r.ClockMapping,
            id=report.id,
            client=client,
            clock=report.clock,
            exchanges=report.exchanges,
            at_ns=fit.at_ns,
            offset_ns=fit.offset_ns,
            drift_ppm=fit.drift_ppm,
            uncertainty_ns=fit.uncertainty_ns,
        )

    def _onset(self, event: m.Event) -> r.OnsetFound:
        try:
            found = onset(event, self.clocks, self.settings.clock_units, self._clock.monotonic_ns())
        except ValueError as error:
            raise m.Refusal("BAD_MESSAGE", f"presentation {event.pres_id!r}: {error}") from error
        return r.OnsetFound(
            t_ns=found.t_ns, by=found.by, uncertainty_ns=found.uncertainty_ns, problems=list(found.problems)
        )

    def _hello(self, client: str, hello: m.Hello) -> m.Welcome:
        self.clients[client] = Client(hello.client, list(hello.roles), self._clock.monotonic_ns())
        current = next((b for b in self.batches if b.served and not b.closed and not b.complete), None)
        return m.Welcome(
            id=hello.id,
            session=self.settings.session,
            version=m.VERSION,
            server_clock_ns=self._clock.monotonic_ns(),
            resume=m.ResumePoint(
                batch_id=None if current is None else current.made.batch_id,
                told=self.counts["told"],
                last_tell_id=self.last_tell,
            ),
            config=self._config_sha,
        )

    def _responses(self, tell: m.Tell, buffer: bytes | memoryview | None) -> r.Array:
        """What a tell's buffer holds, checked against the batch it is about.

        Raises:
            Refusal: see `cortexloop.realtime.messages.Code`.
        """
        batch = self._by_id.get(tell.batch_id)
        if batch is None:
            raise m.Refusal("STALE_BATCH", f"there is no batch {tell.batch_id!r} in session {self.settings.session!r}")
        rows, units = len(tell.item_ids), len(tell.units)
        for name, given in (("pres_ids", tell.pres_ids), ("status", tell.status)):
            if given is not None and len(given) != rows:
                raise m.Refusal("BAD_SHAPE", f"{name} should have {rows} entries as item_ids has, got {len(given)}")
        dtype = np.dtype(tell.dtype).newbyteorder("<")
        expected, got = rows * units * dtype.itemsize, 0 if buffer is None else len(memoryview(buffer).cast("B"))
        if expected != got:
            raise m.Refusal(
                "BAD_SHAPE",
                f"{rows} rows of {units} units in {tell.dtype} are {expected} bytes, got {got}",
            )
        for row, item in enumerate(tell.item_ids):
            if item not in batch.presentations:
                raise m.Refusal("UNKNOWN_ITEM", f"batch {tell.batch_id!r} has no item {item!r}")
            if tell.pres_ids is not None and batch.item_of.get(tell.pres_ids[row]) != item:
                raise m.Refusal(
                    "UNKNOWN_ITEM", f"batch {tell.batch_id!r} has no presentation {tell.pres_ids[row]!r} of {item!r}"
                )
        values = np.frombuffer(buffer or b"", dtype).reshape(rows, units)
        status = tell.status or ["ok"] * rows
        counts = np.array([s == "ok" for s in status], bool)
        if not np.isfinite(values[counts]).all():
            row = int(np.flatnonzero(counts & ~np.isfinite(values).all(axis=1))[0])
            raise m.Refusal(
                "NAN", f"the response to {tell.item_ids[row]!r} is NaN or infinite; give its status as missing instead"
            )
        if counts.any():
            self._check_units(batch, tell)
        return r.Array.of(values)

    def _check_units(self, batch: BatchState, tell: m.Tell) -> None:
        if batch.units is not None and batch.units != tuple(tell.units):
            raise m.Refusal(
                "BAD_SHAPE",
                f"the units should be those of the first tell of this batch, {_few(batch.units)}, "
                f"got {_few(tell.units)}",
            )
        if not tell.units:
            raise m.Refusal("BAD_SHAPE", "responses need at least one unit")
        wanted = [] if batch.made.stream is None else self.streams[batch.made.stream].settings.units
        lacking = [unit for unit in wanted if unit not in tell.units]
        if lacking:
            raise m.Refusal(
                "BAD_SHAPE",
                f"stream {batch.made.stream!r} is scored by {_few(wanted)}; of these, {_few(lacking)} is not told",
            )

    def _batch_of_presentation(self, pres_id: str) -> BatchState:
        batch = self._by_id.get(pres_id.rpartition(".")[0])
        if batch is None or pres_id not in batch.item_of:
            raise m.Refusal("UNKNOWN_ITEM", f"there is no presentation {pres_id!r}")
        return batch

    # ------------------------------------------------------------------------------------------ asks

    def _ask(self, client: str, ask: m.Ask) -> Outgoing | None:
        known = self._asked.get((client, ask.id))
        if known is not None:
            return self._serve(client, ask, self._by_id[known])
        self._refuse_when_idle()
        if ask.after is not None and ask.after not in self._by_id:
            raise m.Refusal("STALE_BATCH", f"there is no batch {ask.after!r} in session {self.settings.session!r}")
        self._collect()
        self._refuse_when_idle()
        batch = self._next(ask.after)
        if batch is not None:
            return self._serve(client, ask, batch)
        now = self._clock.monotonic_ns()
        within = self.settings.within_ms if ask.within_ms is None else ask.within_ms
        older = self._waiting.get(client)
        if older is not None and older.ask.id == ask.id:
            return None
        self._waiting[client] = Waiting(client, ask, now, now + round(within * 1e6))
        return None

    def _refuse_when_idle(self) -> None:
        state = self.state
        if state == "fault":
            raise m.Refusal("FAULT", self.fault or "")
        if state == "finished":
            raise m.Refusal("FINISHED", "the session is over: every stream has shown and learned all it had")
        if state == "paused":
            raise m.Refusal("PAUSED", self.why_paused(), retry=True)

    def why_paused(self) -> str:
        """What a paused session waits for."""
        if self.paused is not None:
            return f"the session is paused: {self.paused or 'no reason was given'}; send resume to go on"
        names = ", ".join(repr(s.name) for s in self.streams.values() if s.stalled)
        return f"too few responses came for stream {names}; send resume to show the missing images again"

    def _next(self, after: str | None) -> BatchState | None:
        """The batch to show now."""
        start = 0 if after is None else self._by_id[after].number + 1
        return next(
            (b for b in self.batches[start:] if b.made.batch_kind != "filler" and not b.complete and not b.closed), None
        )

    def _serve(self, client: str, ask: m.Ask, batch: BatchState, late_ms: float = 0.0) -> Outgoing:
        self._asked[client, ask.id] = batch.made.batch_id
        while len(self._asked) > ANSWERS_KEPT:
            self._asked.popitem(last=False)
        if not batch.served:
            # Not synced: only a power cut can lose it, and nothing depends on it.
            record = self._stamp(r.Served, batch_id=batch.made.batch_id, client=self._name(client), late_ms=late_ms)
            self._write(record)
        items = len(batch.made.items)
        first, last = 0, items
        if ask.max_items is not None:
            first = ask.part * ask.max_items
            last = min(first + ask.max_items, items)
        if first >= items:
            raise m.Refusal("BAD_SHAPE", f"batch {batch.made.batch_id!r} has {items} items, part {ask.part} is empty")
        reply = m.Batch(
            id=ask.id,
            batch_id=batch.made.batch_id,
            stream=batch.made.stream,
            generation=batch.made.generation,
            kind=batch.made.batch_kind,
            items=batch.made.items,
            order=batch.made.order,
            pres_ids=batch.made.pres_ids,
            shape=(last - first, *self.references.shape[1:3], 3),
            first=first,
            more=last < items,
        )
        if ask.need == "header":
            return Outgoing(reply)
        return Outgoing(reply, self.images_of(batch.made.batch_id)[first:last].data.cast("B"))

    def images_of(self, batch_id: str) -> Images:
        """The images of a batch, uint8 [items, H, W, 3].

        Raises:
            KeyError: no such batch. ResumeError: its pixels were lost, and cannot be made again.
        """
        if batch_id not in self._images:
            batch = self._by_id[batch_id]
            missing = [item for item, sha in zip(batch.made.items, batch.made.shas, strict=True)
                       if not self._pixels.has(sha)]  # fmt: skip
            if missing:
                self._render_again(batch)
            self._images[batch_id] = np.stack([self._pixels.get(sha) for sha in batch.made.shas])
        return self._images[batch_id]

    def _render_again(self, batch: BatchState) -> None:
        """Put back pixels that a crash took before they were on disk."""
        for sha, image in zip(self._reference_shas, self.references, strict=True):
            if sha in batch.made.shas:
                self._pixels.put(image[None])
        for stream in self.streams.values():
            for proposal in self._proposals.get(stream.name, []):
                self._pixels.put(check_images(proposal.render(), proposal.count, stream.source.size))
        lost = [item.item_id for item, sha in zip(batch.made.items, batch.made.shas, strict=True)
                if not self._pixels.has(sha)]  # fmt: skip
        if lost:
            raise ResumeError(
                f"the pixels of {_few(lost)} are not in the session's folder, and their source now renders others "
                "(another GPU or version?)"
            )

    def poll(self) -> list[tuple[str, Outgoing]]:
        """Collect what the sources have done, and answer the asks that waited for it or have waited long enough."""
        replies: list[tuple[str, Outgoing]] = []
        try:
            self._collect()
            self._watch_links()
        except JournalError as error:
            self._break(str(error))
        now = self._clock.monotonic_ns()
        for client, waiting in list(self._waiting.items()):
            try:
                answer = self._answer(waiting, now)
            except m.Refusal as refusal:
                answer = Outgoing(refusal.to(waiting.ask.id))
            except JournalError as error:
                self._break(str(error))
                answer = Outgoing(m.Refusal("FAULT", str(error)).to(waiting.ask.id))
            if answer is not None:
                del self._waiting[client]
                replies.append((client, answer))
        return replies

    def _answer(self, waiting: Waiting, now: int) -> Outgoing | None:
        self._refuse_when_idle()
        batch = self._next(waiting.ask.after)
        late_ms = max(0.0, (now - waiting.deadline_ns) / 1e6)
        if batch is not None:
            return self._serve(waiting.client, waiting.ask, batch, late_ms)
        if now < waiting.deadline_ns:
            return None
        return self._serve(waiting.client, waiting.ask, self._filler(waiting), late_ms)

    def next_wake_ns(self) -> int | None:
        """When `poll` has something to do, by the session's monotonic clock; None: only after `wake`."""
        times = [waiting.deadline_ns for waiting in self._waiting.values()]
        stale = round(self.settings.stale_after_s * 1e9)
        times += [client.heard_ns + stale for client in self.clients.values() if not client.lost]
        return min(times, default=None)

    def _filler(self, waiting: Waiting) -> BatchState:
        """A batch for a display that may not wait.

        Raises:
            Refusal: there is nothing to show.
        """
        items, shas = self._reference_items()
        if self.settings.filler == "best" or not items:
            items, shas = self._best_items() or (items, shas)
        if not items:
            raise m.Refusal(
                "BUSY", "the next batch is not ready, and there are no references to show meanwhile; ask again",
                retry=True,
            )  # fmt: skip
        number = sum(batch.made.batch_kind == "filler" for batch in self.batches)
        name = f"filler-{number:04d}"
        within = (waiting.deadline_ns - waiting.asked_ns) / 1e6
        made = self._make(name, None, 0, "filler", items, shas, repeats=1)
        self._write(
            self._stamp(
                r.Control, what="deadline_miss", client=self._name(waiting.client),
                text=f"no batch was ready {within:g} ms after it was asked for; {name} is shown",
            )
        )  # fmt: skip
        self._write(made)
        self._sync()
        return self.batches[-1]

    def _reference_items(self) -> tuple[list[m.Item], list[str]]:
        items = [m.Item(item_id=f"ref-{i:03d}", kind="ref", sha=sha[:16]) for i, sha in enumerate(self._reference_shas)]
        return items, list(self._reference_shas)

    def _best_items(self) -> tuple[list[m.Item], list[str]] | None:
        """The images with the highest scores so far, over all streams."""
        found: dict[str, tuple[float, m.Item, str]] = {}
        for stream in self.streams.values():
            for past in stream.rounds:
                if not past.learned:
                    continue
                scores, _ = past.results(self._columns(stream, past))
                made = past.batches[0].made
                by_id = {item.item_id: (item, sha) for item, sha in zip(made.items, made.shas, strict=True)}
                for item_id, score in zip(past.item_ids, scores, strict=True):
                    if math.isfinite(score):
                        found[item_id] = (float(score), *by_id[item_id])
        best = sorted(found.values(), key=lambda x: (-x[0], x[1].item_id))[:BEST_AS_FILLER]
        return ([item for _, item, _ in best], [sha for _, _, sha in best]) if best else None

    # ------------------------------------------------------------------------------------------ sources

    def _follow_up(self) -> None:
        """Whatever the state calls for next: images to show again, sources to learn and propose."""
        if self.stopped or self.fault is not None or self._replaying or self._closed:
            return
        written = False
        for stream in self.streams.values():
            for current in stream.open:
                written = self._repair(stream, current) or written
            self._start_job(stream)
        if written:
            self._sync()

    def _repair(self, stream: Stream, current: Round) -> bool:
        """Show the missing images of a round again, or tell that it stalls; whether anything was written."""
        if not current.told or stream.stalled:
            return False
        lacking = current.lacking()
        if not lacking:
            return False
        if current.may_show_again(self.settings.max_reshow):
            made = current.batches[0].made
            chosen = [i for i, item in enumerate(made.items) if item.item_id in lacking]
            order_counts = [lacking[made.items[i].item_id] for i in chosen]
            name = f"{stream.name}-{current.generation:04d}-r{len(current.batches)}"
            repair = self._make(
                name, stream.name, current.generation, "repair",
                [made.items[i] for i in chosen], [made.shas[i] for i in chosen], counts=order_counts,
                repairs=made.batch_id,
            )  # fmt: skip
            self._images[name] = self.images_of(made.batch_id)[chosen]
            self._write(repair)
            return True
        if current.fraction() >= self.settings.min_fraction:
            return False
        self._write(
            self._stamp(
                r.Control, what="stalled", stream=stream.name,
                text=f"generation {current.generation} of {stream.name!r} has responses for {current.fraction():.0%} "
                f"of its images after it was shown {len(current.batches)} times, at least "
                f"{self.settings.min_fraction:.0%} are needed",
            )
        )  # fmt: skip
        return True

    def _ready_to_learn(self, stream: Stream, current: Round) -> bool:
        if not current.told or stream.stalled:
            return False
        return not current.lacking() or (
            not current.may_show_again(self.settings.max_reshow) and current.fraction() >= self.settings.min_fraction
        )

    def _start_job(self, stream: Stream) -> None:
        if stream.job is not None:
            return
        still_open = stream.open
        lesson = None
        if still_open and self._ready_to_learn(stream, still_open[0]):
            scores, responses = still_open[0].results(self._columns(stream, still_open[0]))
            lesson = Lesson(still_open[0].batches[0].made.batch_id, scores, responses)
        room = len(still_open) - (lesson is not None) < stream.source.max_open
        propose = room and not stream.finished
        if lesson is None and not propose:
            return
        stream.job = self._executor.submit(advance, stream.source, lesson, propose, self._pixels)
        stream.job.add_done_callback(lambda _: self.wake() if self.wake is not None else None)

    def _columns(self, stream: Stream, current: Round) -> list[int] | None:
        """Which of the units told make this stream's score."""
        units = next((batch.units for batch in current.batches if batch.units is not None), None)
        if units is None or not stream.settings.units:
            return None
        return [units.index(unit) for unit in stream.settings.units]

    def _collect(self) -> None:
        """Take over what jobs have done, and start the next."""
        progress = True
        while progress:
            progress = False
            for stream in self.streams.values():
                if stream.job is None or not stream.job.done():
                    continue
                job, stream.job = stream.job, None
                error = job.exception()
                if error is not None:
                    self._fail(stream, error)
                    return
                self._take_over(stream, job.result())
                progress = True
            if progress:
                self._follow_up()

    def _take_over(self, stream: Stream, done: Advance) -> None:
        if done.lesson is not None:
            assert done.digest is not None
            self._write(
                self._stamp(
                    r.Update, stream=stream.name, batch_id=done.lesson.batch_id,
                    scores=r.Array.of(done.lesson.scores), digest=done.digest,
                )
            )  # fmt: skip
        stream.finished = stream.finished or done.finished
        if done.proposal is not None:
            assert done.images is not None
            made, images = self._propose(stream, done.proposal, done.images, done.shas)
            self._images[made.batch_id] = images
            self._proposals.setdefault(stream.name, []).append(done.proposal)
            self._write(made)
        self._sync()

    def _propose(
        self, stream: Stream, proposal: Proposal, images: Images, shas: list[str]
    ) -> tuple[r.BatchMade, Images]:
        generation = len(stream.rounds)
        items, all_shas = self._reference_items()
        items += [
            m.Item(
                item_id=f"{stream.name}-{generation:04d}-{i:03d}", kind="gen", sha=sha[:16], stream=stream.name,
                label=proposal.labels[i] if proposal.labels else None,
            )
            for i, sha in enumerate(shas)
        ]  # fmt: skip
        made = self._make(
            f"{stream.name}-{generation:04d}", stream.name, generation, "gen", items, all_shas + shas,
            codes=None if proposal.codes is None else r.Array.of(proposal.codes), decision=_plain(proposal.decision),
        )  # fmt: skip
        return made, np.concatenate([self.references, images])

    def _make(
        self,
        batch_id: str,
        stream: str | None,
        generation: int,
        kind: Any,
        items: list[m.Item],
        shas: list[str],
        *,
        repeats: int | None = None,
        counts: list[int] | None = None,
        **more: Any,
    ) -> r.BatchMade:
        """A batch with its order of presentations: references first, each group shuffled."""
        rng = np.random.default_rng([self.settings.seed, len(self.batches)])
        if counts is None:
            counts = [
                repeats or (self.settings.reference_repeats if item.kind == "ref" else self.settings.repeats)
                for item in items
            ]
        order: list[int] = []
        for kind_of_item in ("ref", "gen"):
            group = [i for i, item in enumerate(items) if item.kind == kind_of_item for _ in range(counts[i])]
            order += rng.permutation(np.array(group, np.int64)).tolist()
        return self._stamp(
            r.BatchMade, batch_id=batch_id, stream=stream, generation=generation, batch_kind=kind, items=items,
            shas=shas, order=order, pres_ids=[f"{batch_id}.{k:04d}" for k in range(len(order))], **more,
        )  # fmt: skip

    def _fail(self, stream: Stream, error: BaseException) -> None:
        """A source cannot go on: nothing more is asked of it, and the session says so."""
        text = f"stream {stream.name!r}: {type(error).__name__}: {error}"
        if isinstance(error, JournalError):
            raise error
        self._write(self._stamp(r.Control, what="fault", text=text, stream=stream.name))
        self._sync()

    # ------------------------------------------------------------------------------------------ records

    def _stamp(self, kind: Callable[..., R], **fields: Any) -> R:
        return kind(mono_ns=self._clock.monotonic_ns(), wall_ns=self._clock.wall_ns(), **fields)

    def _write(self, record: r.Record) -> None:
        """Append and apply; before anything that was written goes out, `_sync`."""
        self._journal.append(record)
        self._apply(record)

    def _sync(self) -> None:
        self.last_sync_ms = self._journal.sync()

    def _break(self, text: str) -> None:
        """The journal cannot be written: from here on nothing happens that would go unrecorded."""
        self.fault, self._broken = text, True

    def _replay(self, records: list[r.Record]) -> None:
        self._replaying = True
        for record in records:
            self._apply(record)
        self._replaying = False

    def _apply(self, record: r.Record) -> None:
        """Change the state as a record says; the only place where it changes."""
        match record:
            case r.Opened():
                self.clocks.clear()  # they were related to a monotonic clock that may have begun anew
            case r.BatchMade():
                self._apply_batch(record)
            case r.Served():
                self._by_id[record.batch_id].served = True
            case r.Told():
                self._apply_told(record)
            case r.ShownEvents():
                accepted, ignored = 0, []
                for event in record.events:
                    taken, left = self._batch_of_presentation(event.pres_id).note([event])
                    accepted += taken
                    ignored += left
                self._acks[record.id] = m.Ack(id=record.id, accepted=accepted, ignored=ignored)
            case r.Update():
                self._apply_update(record)
            case r.ClockMapping():
                if self._replaying:
                    self.clocks.setdefault(record.clock, ClockEstimator(record.clock)).add(record.exchanges)
                self._acks[record.id] = m.Ack(id=record.id, accepted=len(record.exchanges))
            case r.Control():
                self._apply_control(record)

    def _apply_batch(self, made: r.BatchMade) -> None:
        batch = BatchState(made, len(self.batches))
        if made.batch_kind != "filler":
            assert made.stream is not None
            stream = self.streams[made.stream]
            if made.batch_kind == "gen":
                item_ids = [item.item_id for item in made.items if item.kind == "gen"]
                if self._replaying:
                    self._propose_again(stream, made, len(item_ids))
                stream.rounds.append(Round(stream.name, made.generation, item_ids, self.settings.repeats, [batch]))
            else:
                stream.rounds[made.generation].batches.append(batch)
                self.counts["reshown"] += len(made.order)
        self.batches.append(batch)
        self._by_id[made.batch_id] = batch

    def _propose_again(self, stream: Stream, made: r.BatchMade, count: int) -> None:
        proposal = stream.source.propose(made.decision)
        if proposal is None or proposal.count != count:
            got = "nothing" if proposal is None else f"{proposal.count} images"
            raise ResumeError(
                f"batch {made.batch_id!r} had {count} images of stream {stream.name!r}, its source now proposes {got}"
            )
        codes = None if proposal.codes is None else r.Array.of(proposal.codes)
        if codes != made.codes:
            raise ResumeError(
                f"the codes of batch {made.batch_id!r} are not those that were recorded: the source of stream "
                f"{stream.name!r} was made differently, or runs on another machine or version"
            )
        self._proposals.setdefault(stream.name, []).append(proposal)

    def _apply_told(self, record: r.Told) -> None:
        batch = self._by_id[record.header.batch_id]
        accepted, ignored = batch.take(record.header, record.responses.numpy().astype(np.float64))
        self._acks[record.header.id] = m.Ack(id=record.header.id, accepted=accepted, ignored=ignored)
        self.last_tell = record.header.id
        self.counts["told"] += accepted
        self.counts["late"] += sum(x.why == "late" for x in ignored)
        self.counts["gaps"] += sum(status == "gap" for status in record.header.status or ())
        if batch.complete and not batch.closed:
            mean = batch.reference_mean(None)
            if mean is not None:
                self.reference_mean = mean

    def _apply_update(self, record: r.Update) -> None:
        stream = self.streams[record.stream]
        current = stream.open[0]
        scores, responses = current.results(self._columns(stream, current))
        if self._replaying:
            if r.Array.of(scores) != record.scores:
                raise ResumeError(
                    f"the scores of batch {record.batch_id!r} do not follow from the responses in the journal"
                )
            stream.source.learn(scores, responses)
            digest = stream.source.digest()
            if digest != record.digest:
                raise ResumeError(
                    f"after batch {record.batch_id!r}, the source of stream {stream.name!r} should have the digest "
                    f"{record.digest[:16]}, got {digest[:16]}: another machine or version?"
                )
        current.learned = True
        for batch in current.batches:
            batch.closed = True
            self._images.pop(batch.made.batch_id, None)
        self._proposals[stream.name].pop(0)
        known = scores[np.isfinite(scores)]
        if len(known):
            stream.mean = float(known.mean())
            stream.best = max(float(known.max()), -math.inf if stream.best is None else stream.best)

    def _apply_control(self, record: r.Control) -> None:
        match record.what:
            case "pause":
                self.paused = record.text
            case "resume":
                self.paused = None
                for stream in self.streams.values():
                    if stream.stalled:
                        stream.stalled = False
                        stream.open[0].grants += 1
            case "stop":
                self.stopped = True
            case "stalled":
                assert record.stream is not None
                self.streams[record.stream].stalled = True
            case "deadline_miss":
                self.counts["deadline_misses"] += 1
            case "fault":
                if not self._replaying:
                    self.fault = record.text
        if record.id is not None:
            self._acks[record.id] = m.Ack(id=record.id, accepted=1)

    # ------------------------------------------------------------------------------------------ links

    def _name(self, client: str) -> str:
        known = self.clients.get(client)
        return client if known is None else known.name

    def _heard(self, client: str) -> None:
        known = self.clients.get(client)
        if known is None:
            return
        known.heard_ns = self._clock.monotonic_ns()
        if known.lost:
            known.lost = False
            self._note_link("link_back", known, "is back")

    def _watch_links(self) -> None:
        now = self._clock.monotonic_ns()
        for client in self.clients.values():
            silent = (now - client.heard_ns) / 1e9
            if not client.lost and silent >= self.settings.stale_after_s:
                client.lost = True
                self._note_link("link_lost", client, f"has not been heard for {silent:.1f} s")

    def _note_link(self, what: Any, client: Client, text: str) -> None:
        if self.fault is None:
            self._write(self._stamp(r.Control, what=what, text=f"{client.name!r} {text}", client=client.name))

    def forget(self, client: str) -> None:
        """A client has left: nothing waits for it any more."""
        self._waiting.pop(client, None)
        self.clients.pop(client, None)

    def presentations(self) -> Iterator[tuple[BatchState, str, str]]:
        """(batch, presentation, item) of everything made so far, in order."""
        for batch in self.batches:
            for pres, item in batch.item_of.items():
                yield batch, pres, item

    def status(self) -> m.StatusReply:
        """How it is going."""
        return report(self, "status")

    def requests_so_far(self) -> int:
        """How many requests took effect so far: where a client in the same process may number its own from."""
        return len(self._acks) + len(self.batches)

    def now_ns(self) -> int:
        """By the session's monotonic clock."""
        return self._clock.monotonic_ns()

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._journal.path.parent


def sha256_of(image: Images) -> str:
    """SHA-256 of an image's pixels, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _plain(value: Any) -> Any:
    """As it comes back from the journal: numbers, texts, lists and dicts."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value, enc_hook=_builtin))


def _builtin(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"settings and decisions should be numbers, texts, lists and dicts, got {type(value).__name__}")


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True))


def _check(
    settings: SessionSettings, sources: Mapping[str, Source], references: Images | None
) -> tuple[Images, tuple[int, int]]:
    """References (maybe none) and the size of all images.

    Raises:
        ValueError: parts that do not belong together.
    """
    names = [stream.name for stream in settings.streams]
    if sorted(names) != sorted(sources) or len(set(names)) != len(names):
        raise ValueError(
            f"there should be one source for each stream, {_few(names)}, got sources for {_few(list(sources))}"
        )
    if any(name == "filler" or name == "ref" for name in names):
        raise ValueError("the names 'filler' and 'ref' are the session's own; call the stream something else")
    sizes = {tuple(source.size) for source in sources.values()}
    if len(sizes) != 1:
        raise ValueError(f"all streams should show images of one size, got {sorted(sizes)}; give them a placement")
    height, width = next(iter(sizes))
    if references is None:
        return np.zeros((0, height, width, 3), np.uint8), (height, width)
    if references.dtype != np.uint8 or references.ndim != 4 or references.shape[1:] != (height, width, 3):
        raise ValueError(
            f"references should be uint8 [R, {height}, {width}, 3], got {references.dtype} {list(references.shape)}"
        )
    return np.ascontiguousarray(references), (height, width)


def _compare(start: r.Start, kept: Any, sources: Mapping[str, Source], references: Images) -> None:
    """Refuse to go on with another session.

    Raises:
        ResumeError: the first thing that differs.
    """
    if start.format != FORMAT:
        raise ResumeError(f"the journal has format {start.format}, this version reads format {FORMAT}")
    if _digest(kept) != start.config_sha:
        where, ours, theirs = _difference(start.config, kept)
        raise ResumeError(f"the configuration has changed: {where} was {ours!r:.80} and is now {theirs!r:.80}")
    for name, source in sources.items():
        now = _plain(source.settings())
        if now != start.sources.get(name):
            where, ours, theirs = _difference(start.sources.get(name), now)
            raise ResumeError(
                f"the source of stream {name!r} is another: {where} was {ours!r:.80} and is now {theirs!r:.80}"
            )
    if [sha256_of(image) for image in references] != start.references:
        raise ResumeError("the reference images are not those that the session began with")


def _difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any]:
    """The first place where two nested values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    return where or "it", before, now
