"""A session with a rig: a state machine between sources of stimuli, a rig's messages and a journal.

Each change of state is first written as a record and then applied (`state`); a restart applies the records of the
journal again. So nothing is lost or told twice, whenever the process ends. Messages may come any number of times and in
any order: a request that came before gets the answer it had.

One thread calls `handle` and `poll`. Learning, proposing and rendering run beside it and are collected by `poll`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from cortexloop.realtime import batches, checks
from cortexloop.realtime import messages as m
from cortexloop.realtime import records as r
from cortexloop.realtime.clock import Clock, SystemClock
from cortexloop.realtime.jobs import Advance, advance, check_images
from cortexloop.realtime.journal import FORMAT, Journal, JournalError
from cortexloop.realtime.pixels import PixelStore
from cortexloop.realtime.rounds import BatchState, Round
from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.state import ResumeError, SessionState, Stream, content
from cortexloop.realtime.status import Client, environment, report
from cortexloop.realtime.timing import ClockEstimator, onset

__all__ = ["Outgoing", "ResumeError", "Session"]

log = logging.getLogger("cortexloop.realtime")

ANSWERS_KEPT = 10_000
"""Answers to asks that are remembered for when they are sent again."""
CLIENTS_KEPT = 100
"""More are forgotten once they are lost, those that said hello first before others."""

R = TypeVar("R", bound=r.Record)


class Outgoing(NamedTuple):
    """A reply and the raw bytes that belong to it."""

    message: m.Reply
    buffer: bytes | memoryview | None = None


@dataclass(eq=False)
class Waiting:
    """An ask without an answer yet."""

    client: str
    ask: m.Ask
    asked_ns: int
    deadline_ns: int


class Session:
    """See the module; made by `Session.create` or `Session.resume`, and a context manager."""

    def __init__(
        self,
        journal: Journal,
        pixels: PixelStore,
        start: r.Start,
        state: SessionState,
        references: Images,
        clock: Clock,
        executor: Executor | None,
    ) -> None:
        self.settings, self.known, self.references = state.settings, state, references
        self.clients: dict[str, Client] = {}
        self.wake: Callable[[], None] | None = None
        """Called, from another thread, when `poll` has something to collect."""
        self.last_sync_ms: float | None = None
        self._journal, self._pixels, self._start, self._clock = journal, pixels, start, clock
        self._own_executor = executor is None
        self._executor = executor or ThreadPoolExecutor(1, "cortexloop-sources")
        self._asked: OrderedDict[tuple[str, str, str | None], str] = OrderedDict()
        self._waiting: dict[str, Waiting] = {}
        self._uncertain: set[str] = set()
        self._images: dict[str, Images] = {}
        self._closed = False
        self._changed = False
        """Since the waiting asks were looked at."""

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
        references, size = checks.check_parts(settings, sources, references)
        kept = checks.plain({"settings": settings, "config": config or {}})
        start = r.Start(
            mono_ns=clock.monotonic_ns(),
            wall_ns=clock.wall_ns(),
            format=FORMAT,
            session=settings.session,
            config=kept,
            config_sha=checks.digest(kept),
            sources={name: checks.plain(source.settings()) for name, source in sources.items()},
            environment=environment(),
            references=[checks.image_sha(image) for image in references],
            image_shape=(*size, 3),
        )
        journal = Journal.create(folder, start)
        return cls._begin(journal, start, SessionState(settings, sources), references, clock, executor)

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
            ValueError: as for `create`.
        """
        references, _ = checks.check_parts(settings, sources, references)
        kept = checks.plain({"settings": settings, "config": config or {}})
        journal, records = Journal.open(folder)
        with _released(journal):
            start = checks.check_start(records[0], kept, sources, references)
            state = SessionState(settings, sources)
            state.replaying = True
            for record in records[1:]:
                state.apply(record)
            state.replaying = False
        return cls._begin(journal, start, state, references, clock or SystemClock(), executor)

    @classmethod
    def _begin(
        cls,
        journal: Journal,
        start: r.Start,
        state: SessionState,
        references: Images,
        clock: Clock,
        executor: Executor | None,
    ) -> Session:
        with _released(journal), contextlib.ExitStack() as opened_files:
            pixels = opened_files.enter_context(PixelStore(journal.path.parent, start.image_shape))
            session = cls(journal, pixels, start, state, references, clock, executor)
            if len(references):
                pixels.put(references)
            about = environment()
            opened = session._stamp(
                r.Opened, pid=os.getpid(), host=about["host"], environment=about, torn_bytes=journal.torn_bytes
            )
            session._write(opened)
            session._sync()
            session._follow_up()
            opened_files.pop_all()
        return session

    def close(self) -> None:
        """Let go of the folder. What the sources were busy with is dropped, and done again on `resume`.

        Raises:
            JournalError: the end could not be written; everything acknowledged was.
        """
        if self._closed:
            return
        self._closed = True
        self.wake = None
        if self._own_executor:
            self._executor.shutdown(wait=True, cancel_futures=True)
        try:
            if not self._journal.failed:
                self._collect()
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

    # ------------------------------------------------------------------------------------------ messages

    def handle(self, client: str, request: m.Request, buffer: bytes | memoryview | None = None) -> Outgoing | None:
        """Take a request.

        Args:
            client: who sends it; every reply of `poll` names it again.
            request: the message.
            buffer: the bytes that came with it.

        Returns:
            the reply; None for an `Ask` that has to wait, whose reply comes from `poll`.
        """
        return self._answering(request.id, lambda: self._handle(client, request, buffer))

    def _answering(self, id: str, answer: Callable[[], Outgoing | None]) -> Outgoing | None:
        """The answer, or why there is none."""
        try:
            return answer()
        except m.Refusal as refusal:
            return Outgoing(refusal.to(id))
        except (JournalError, ResumeError) as error:
            self.known.fault = str(error)  # from here on nothing happens that would go unrecorded
            self._changed = True
            return Outgoing(m.Refusal("FAULT", str(error)).to(id))

    def _handle(self, client: str, request: m.Request, buffer: bytes | memoryview | None) -> Outgoing | None:
        self._heard(client)
        match request:
            case m.Hello():
                return Outgoing(self._hello(client, request))
            case m.Heartbeat():
                return Outgoing(m.Ack(id=request.id, journaled=False))
            case m.StatusRequest():
                return Outgoing(report(self, request.id))
            case m.ClockRequest():
                received = self.now_ns()
                return Outgoing(m.ClockReply(id=request.id, t1_ns=request.t1_ns, t2_ns=received, t3_ns=self.now_ns()))
            case m.Ask():
                return self._ask(client, request)
        if self._journal.failed:
            raise m.Refusal("FAULT", f"nothing can be recorded: {self.known.fault}")
        earlier = self.known.acks.get(request.id)
        if earlier is not None:
            if self.known.contents[request.id] != content(request, buffer):
                text = f"id {request.id!r} was used for another request already; every request needs an id of its own"
                raise m.Refusal("BAD_MESSAGE", text)
            return Outgoing(m.Ack(id=earlier.id, accepted=earlier.accepted, ignored=earlier.ignored, dup=True))
        if self.known.stopped:
            raise m.Refusal("FINISHED", "the session was stopped; nothing more is recorded")
        record = self._record_of(self._name(client), request, buffer)
        self._journal.append(record)
        self._sync()
        self._changed = True
        self._apply(record)
        self._follow_up()
        return Outgoing(self.known.acks[request.id])

    def _record_of(self, client: str, request: m.Request, buffer: bytes | memoryview | None) -> r.Record:
        """The record of a request that changes something.

        Raises:
            Refusal: it does not fit what is known.
        """
        match request:
            case m.Tell():
                responses = checks.check_tell(self.known, request, buffer)
                return self._stamp(r.Told, client=client, header=request, responses=responses)
            case m.Shown():
                onsets = [self._onset(event) for event in request.events]
                late = [event.pres_id for event in request.events if event.outcome != "ok" and self._learned(event)]
                return self._stamp(
                    r.ShownEvents, id=request.id, client=client, events=request.events, onsets=onsets, late=late
                )
            case m.ClockReport():
                return self._clock_record(client, request)
            case m.Note():
                return self._control("note", request.text, id=request.id, client=client)
            case m.Pause():
                return self._control("pause", request.reason, id=request.id, client=client)
            case m.Resume():
                return self._control("resume", "", id=request.id, client=client)
            case m.Stop():
                return self._control("stop", request.reason, id=request.id, client=client)
        raise m.Refusal("BAD_MESSAGE", f"a request was expected, got {type(request).__name__}")

    def _onset(self, event: m.Event) -> r.OnsetFound:
        self.known.batch_of_presentation(event.pres_id)
        try:
            found = onset(event, self.known.clocks, self.settings.clock_units, self.now_ns())
        except ValueError as error:
            raise m.Refusal("BAD_MESSAGE", f"presentation {event.pres_id!r}: {error}") from error
        return r.OnsetFound(
            t_ns=found.t_ns, by=found.by, uncertainty_ns=found.uncertainty_ns, problems=list(found.problems)
        )

    def _learned(self, event: m.Event) -> bool:
        """Whether a source is learning from a presentation just now, and so what is known of it must stay."""
        batch = self.known.batch_of_presentation(event.pres_id)
        return any(x.learning is not None and batch in x.learning.batches for x in self.known.streams.values())

    def _clock_record(self, client: str, request: m.ClockReport) -> r.ClockMapping:
        """Exchanges with a clock and what follows from them; warnings go before it."""
        estimator = self.known.clocks.get(request.clock) or ClockEstimator(request.clock)
        try:
            fit = estimator.preview(request.exchanges)
        except ValueError as error:
            raise m.Refusal("BAD_MESSAGE", str(error)) from error
        if fit.step is not None:
            self._write(self._control("clock_step", str(fit.step), client=client))
        uncertain = fit.uncertainty_ns > self.settings.clock_tolerance_ms * 1e6
        if uncertain and request.clock not in self._uncertain:
            text = f"clock {request.clock!r} is known to {fit.uncertainty_ns / 1e6:.1f} ms only"
            self._write(self._control("clock_uncertain", text, client=client))
        (self._uncertain.add if uncertain else self._uncertain.discard)(request.clock)
        return self._stamp(
            r.ClockMapping,
            id=request.id,
            client=client,
            clock=request.clock,
            exchanges=request.exchanges,
            at_ns=fit.at_ns,
            offset_ns=fit.offset_ns,
            drift_ppm=fit.drift_ppm,
            uncertainty_ns=fit.uncertainty_ns,
        )

    def _hello(self, client: str, hello: m.Hello) -> m.Welcome:
        self.clients.pop(client, None)
        self.clients[client] = Client(hello.client, list(hello.roles), self.now_ns())
        lost = [name for name, known in self.clients.items() if known.lost]
        for name in lost[: max(0, len(self.clients) - CLIENTS_KEPT)]:
            self.forget(name)
        current = next((batch for batch in self.known.open_batches() if batch.served), None)
        return m.Welcome(
            id=hello.id,
            session=self.settings.session,
            version=m.VERSION,
            server_clock_ns=self.now_ns(),
            resume=m.ResumePoint(
                batch_id=None if current is None else current.made.batch_id,
                told=self.known.counts["told"],
                last_tell_id=self.known.last_tell,
            ),
            config=self._start.config_sha,
        )

    # ------------------------------------------------------------------------------------------ asks

    def _ask(self, client: str, ask: m.Ask) -> Outgoing | None:
        answered = self._asked.get((client, ask.id, ask.after))
        if answered is not None:
            return self._serve(client, ask, self.known.by_id[answered])
        self._collect()
        if ask.after is not None and ask.after not in self.known.by_id:
            raise m.Refusal("STALE_BATCH", f"there is no batch {ask.after!r} in session {self.settings.session!r}")
        now = self.now_ns()
        within = self.settings.within_ms if ask.within_ms is None else ask.within_ms
        waiting = self._waiting.get(client)
        if waiting is not None and waiting.ask.id == ask.id:
            del self._waiting[client]
        else:
            waiting = Waiting(client, ask, now, now + round(within * 1e6))
        answer = self._answer(waiting, now)
        if answer is None:
            self._waiting[client] = waiting
        return answer

    def _answer(self, waiting: Waiting, now: int) -> Outgoing | None:
        state = self.known.state
        refusal: dict[str, m.Code] = {"fault": "FAULT", "finished": "FINISHED", "paused": "PAUSED"}
        if state in refusal:
            raise m.Refusal(refusal[state], self.known.text, retry=state == "paused")
        batch = self.known.next_batch(waiting.ask.after)
        late_ms = max(0.0, (now - waiting.deadline_ns) / 1e6)
        if batch is None:
            if now < waiting.deadline_ns:
                return None
            batch = self._filler(waiting)
        return self._serve(waiting.client, waiting.ask, batch, late_ms)

    def _serve(self, client: str, ask: m.Ask, batch: BatchState, late_ms: float = 0.0) -> Outgoing:
        made = batch.made
        if batch.closed:
            raise m.Refusal("STALE_BATCH", f"batch {made.batch_id!r} is told completely; ask for the next")
        items = len(made.items)
        first, last = 0, items
        if ask.max_items is not None:
            first = ask.part * ask.max_items
            last = min(first + ask.max_items, items)
        if first >= items:
            raise m.Refusal("BAD_SHAPE", f"batch {made.batch_id!r} has {items} items, part {ask.part} is empty")
        pixels = None if ask.need == "header" else self.images_of(made.batch_id)[first:last].data.cast("B")
        self._asked[client, ask.id, ask.after] = made.batch_id
        while len(self._asked) > ANSWERS_KEPT:
            self._asked.popitem(last=False)
        if not batch.served and not self._journal.failed:
            # Not synced, so that the display does not wait for the disk: nothing depends on this record.
            self._write(self._stamp(r.Served, batch_id=made.batch_id, client=self._name(client), late_ms=late_ms))
        reply = m.Batch(
            id=ask.id,
            batch_id=made.batch_id,
            stream=made.stream,
            generation=made.generation,
            kind=made.batch_kind,
            items=made.items,
            order=made.order,
            pres_ids=made.pres_ids,
            shape=(last - first, *self.references.shape[1:3], 3),
            first=first,
            more=last < items,
        )
        return Outgoing(reply, pixels)

    def images_of(self, batch_id: str) -> Images:
        """The images of a batch that is not learned yet, uint8 [items, H, W, 3].

        Raises:
            KeyError: no such batch.
            ResumeError: its pixels were lost in a crash, and its source now renders others.
        """
        if batch_id in self._images:
            return self._images[batch_id]
        made = self.known.by_id[batch_id].made
        if made.batch_kind == "filler":
            return self._stored(made)
        self._images[batch_id] = self._stored(made)
        return self._images[batch_id]

    def _stored(self, made: r.BatchMade) -> Images:
        if not all(self._pixels.has(sha) for sha in made.shas):
            for stream in self.known.streams.values():
                for proposal in stream.proposals:
                    self._pixels.put(check_images(proposal.render(), proposal.count, stream.source.size))
        lost = [x.item_id for x, sha in zip(made.items, made.shas, strict=True) if not self._pixels.has(sha)]
        if lost:
            raise ResumeError(
                f"the pixels of {checks.few(lost)} are not in the session's folder, and their source now renders "
                "others (another GPU or version?)"
            )
        return np.stack([self._pixels.get(sha) for sha in made.shas])

    def poll(self) -> list[tuple[str, Outgoing]]:
        """Collect what the sources have done, and answer the asks that waited for it or have waited long enough."""
        self._changed = False
        try:
            self._collect()
            self._watch_links()
        except (JournalError, ResumeError) as error:
            self.known.fault = str(error)
        replies = []
        now = self.now_ns()
        for client, waiting in list(self._waiting.items()):
            try:
                answer = self._answering(waiting.ask.id, lambda waiting=waiting: self._answer(waiting, now))  # type: ignore[misc]
            except Exception as error:
                log.exception("an ask of client %r failed", client)
                answer = Outgoing(m.Refusal("FAULT", f"{type(error).__name__}: {error}").to(waiting.ask.id))
            if answer is not None:
                del self._waiting[client]
                replies.append((client, answer))
        return replies

    def next_wake_ns(self) -> int | None:
        """When `poll` has something to do, by the session's monotonic clock; None: only after `wake`."""
        stale = round(self.settings.stale_after_s * 1e9)
        times = [waiting.deadline_ns for waiting in self._waiting.values()]
        if times and self._changed:
            return self.now_ns()
        times += [client.heard_ns + stale for client in self.clients.values() if not client.lost]
        return min(times, default=None)

    def _filler(self, waiting: Waiting) -> BatchState:
        """A batch for a display that may not wait.

        Raises:
            Refusal: there is nothing to show.
        """
        chosen = batches.reference_items(self._start.references)
        if self.settings.filler == "best" or not chosen[0]:
            best = batches.best_items(self.known)
            chosen = best if best[0] else chosen
        if not chosen[0]:
            raise m.Refusal(
                "BUSY",
                "the next batch is not ready, and there are no references to show meanwhile; ask again",
                retry=True,
            )
        name = f"filler-{self.known.counts['fillers']:04d}"
        within = (waiting.deadline_ns - waiting.asked_ns) / 1e6
        text = f"no batch was ready {within:g} ms after it was asked for; {name} is shown"
        self._write(self._control("deadline_miss", text, client=self._name(waiting.client)))
        self._write(self._made(name, None, 0, "filler", chosen, [1] * len(chosen[0])))
        self._sync()
        return self.known.batches[-1]

    # ------------------------------------------------------------------------------------------ sources

    def _follow_up(self) -> None:
        """Whatever the state calls for next: images to show again, sources to learn and propose."""
        if self.known.stopped or self.known.fault is not None or self._closed:
            return
        written = False
        for stream in self.known.streams.values():
            written = self._follow_up_stream(stream) or written
            if self.state == "fault":
                return
        if written:
            self._sync()

    def _follow_up_stream(self, stream: Stream) -> bool:
        """The same for one stream; whether anything was written that is not synced."""
        written = False
        try:
            for current in stream.open:
                written = self._repair(stream, current) or written
            self._start_job(stream)
        except (JournalError, ResumeError):
            raise
        except Exception as error:  # its source cannot render again what is missing
            self._fail(stream, error)
        return written

    def _repair(self, stream: Stream, current: Round) -> bool:
        """Show the missing images of a round again, or say that it stalls; whether anything was written."""
        if stream.stalled or not current.told or not current.lacking():
            return False
        if current.may_show_again(self.settings.max_reshow):
            chosen, counts, places = batches.lacking_items(current)
            first = current.batches[0].made.batch_id
            name = batches.batch_name(stream.name, current.generation, len(current.batches))
            self._images[name] = self.images_of(first)[places]
            self._write(self._made(name, stream.name, current.generation, "repair", chosen, counts, repairs=first))
            return True
        if current is not stream.open[0] or current.fraction() >= self.settings.min_fraction:
            return False
        text = (
            f"generation {current.generation} of {stream.name!r} has responses for {current.fraction():.0%} of its "
            f"images after it was shown {len(current.batches)} times, at least {self.settings.min_fraction:.0%} are "
            "needed"
        )
        self._write(self._control("stalled", text, stream=stream.name))
        return True

    def _start_job(self, stream: Stream) -> None:
        """Let the source learn and propose, as far as it can."""
        if stream.job is not None:
            return
        lesson = stream.lesson(self.settings)
        room = len(stream.proposals) - (lesson is not None) < stream.source.max_open
        propose = room and not stream.finished
        if lesson is None and not propose:
            return
        stream.learning = None if lesson is None else stream.open[0]
        stream.job = self._executor.submit(advance, stream.source, lesson, propose, self._pixels)
        stream.job.add_done_callback(self._job_done)

    def _job_done(self, _: object) -> None:
        wake = self.wake
        if wake is not None:
            wake()

    def _collect(self) -> None:
        """Take over what jobs have done, and start the next."""
        progress = self.known.fault is None
        while progress:
            progress = False
            for stream in self.known.streams.values():
                if stream.job is None or not stream.job.done() or stream.job.cancelled():
                    continue
                job, stream.job, stream.learning = stream.job, None, None
                error = job.exception()
                if isinstance(error, JournalError):
                    raise error
                if error is None:
                    try:
                        self._take_over(stream, job.result())
                    except (JournalError, ResumeError):
                        raise
                    except Exception as unrecorded:  # a decision that is no plain data, a record that is too large
                        error = unrecorded
                if error is not None:
                    self._fail(stream, error)
                    return
                progress = True
            if progress:
                self._follow_up()

    def _fail(self, stream: Stream, error: BaseException) -> None:
        """Whatever a source comes up with: no more is asked of it before a restart; responses are still recorded."""
        log.error("stream %r failed", stream.name, exc_info=error)
        text = f"stream {stream.name!r}: {type(error).__name__}: {error}"
        text = text.encode("utf-8", "backslashreplace").decode()  # names of files may be in there
        self._write(self._control("fault", text, stream=stream.name))
        self._sync()

    def _take_over(self, stream: Stream, done: Advance) -> None:
        """Record what a job has done."""
        if done.lesson is not None and done.digest is not None:
            for batch in stream.open[0].batches:
                self._images.pop(batch.made.batch_id, None)
            self._write(
                self._stamp(
                    r.Update,
                    stream=stream.name,
                    batch_id=done.lesson.batch_id,
                    scores=r.Array.of(done.lesson.scores),
                    digest=done.digest,
                )
            )
        stream.finished = stream.finished or done.finished
        if done.proposal is not None and done.images is not None:
            generation = len(stream.rounds)
            references, their_shas = batches.reference_items(self._start.references)
            items, shas = batches.proposed_items(stream.name, generation, done.proposal, done.shas)
            counts = [self.settings.reference_repeats] * len(references) + [self.settings.repeats] * len(items)
            name = batches.batch_name(stream.name, generation)
            self._images[name] = np.concatenate([self.references, done.images])
            stream.proposals.append(done.proposal)
            self._write(
                self._made(
                    name,
                    stream.name,
                    generation,
                    "gen",
                    (references + items, their_shas + shas),
                    counts,
                    codes=None if done.proposal.codes is None else r.Array.of(done.proposal.codes),
                    decision=checks.plain(done.proposal.decision),
                )
            )
        self._sync()

    # ------------------------------------------------------------------------------------------ records

    def _stamp(self, kind: Callable[..., R], **fields: Any) -> R:
        return kind(mono_ns=self.now_ns(), wall_ns=self._clock.wall_ns(), **fields)

    def _control(self, what: str, text: str, **about: Any) -> r.Control:
        return self._stamp(r.Control, what=what, text=text, **about)

    def _made(
        self,
        name: str,
        stream: str | None,
        generation: int,
        kind: Literal["gen", "repair", "filler"],
        chosen: batches.Items,
        counts: Sequence[int],
        **more: Any,
    ) -> r.BatchMade:
        items, shas = chosen
        order = batches.presentation_order(self.settings.seed, name, items, counts)
        return self._stamp(
            r.BatchMade,
            batch_id=name,
            stream=stream,
            generation=generation,
            batch_kind=kind,
            items=items,
            shas=shas,
            order=order,
            pres_ids=[f"{name}.{k:04d}" for k in range(len(order))],
            **more,
        )

    def _write(self, record: r.Record) -> None:
        """Append and apply; `_sync` before anything that follows from it leaves the process."""
        self._journal.append(record)
        self._apply(record)

    def _apply(self, record: r.Record) -> None:
        """Change the state as a record says that the journal has."""
        try:
            self.known.apply(record)
        except Exception as error:
            # A bug. Journal and state no longer agree, so nothing may follow from it; a restart reads the journal.
            self.known.fault = (
                f"a record could not be applied: {type(error).__name__}: {error}; start the session again"
            )
            raise

    def _sync(self) -> None:
        self.last_sync_ms = self._journal.sync()

    # ------------------------------------------------------------------------------------------ clients

    def _name(self, client: str) -> str:
        known = self.clients.get(client)
        return client if known is None else known.name

    def _heard(self, client: str) -> None:
        known = self.clients.get(client)
        if known is None:
            return
        known.heard_ns = self.now_ns()
        if known.lost:
            known.lost = False
            self._note_link("link_back", known, "is back")

    def _watch_links(self) -> None:
        now = self.now_ns()
        for client in self.clients.values():
            silent = (now - client.heard_ns) / 1e9
            if not client.lost and silent >= self.settings.stale_after_s:
                client.lost = True
                self._note_link("link_lost", client, f"has not been heard for {silent:.1f} s")

    def _note_link(self, what: str, client: Client, text: str) -> None:
        if not self._journal.failed:
            self._write(self._control(what, f"{client.name!r} {text}", client=client.name))

    def forget(self, client: str) -> None:
        """A client has left: nothing waits for it any more."""
        self._waiting.pop(client, None)
        self.clients.pop(client, None)

    # ------------------------------------------------------------------------------------------ questions

    @property
    def state(self) -> m.State:
        """Of the whole session."""
        return self.known.state

    def status(self) -> m.StatusReply:
        """How it is going."""
        return report(self, "status")

    def now_ns(self) -> int:
        """By the session's monotonic clock."""
        return self._clock.monotonic_ns()

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._journal.path.parent


@contextlib.contextmanager
def _released(journal: Journal) -> Iterator[None]:
    """Close the journal if the block fails."""
    try:
        yield
    except BaseException:
        journal.close()
        raise
