"""The state of a session: what follows from the records of its journal, one after the other, and from nothing else."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cortexloop.realtime import messages as m
from cortexloop.realtime import records as r
from cortexloop.realtime.jobs import Advance, Lesson
from cortexloop.realtime.rounds import BatchState, Round
from cortexloop.realtime.settings import SessionSettings, StreamSettings
from cortexloop.realtime.source import Proposal, Source
from cortexloop.realtime.timing import ClockEstimator

BEST = 8
"""How many of the best images are remembered, to be shown as fillers."""
FILLERS_KEPT = 100
"""Of the fillers that nobody tells of, the last ones; what comes of earlier ones is late."""


_ENCODER = msgspec.msgpack.Encoder()


class ResumeError(RuntimeError):
    """A session cannot go on from its journal; the message says what differs."""


@dataclass(eq=False)
class Stream:
    """A source, and what it has proposed so far."""

    settings: StreamSettings
    source: Source
    rounds: list[Round] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)
    """Of the rounds that are not learned yet, oldest first."""
    job: Future[Advance] | None = None
    learning: Round | None = None
    """What the job learns from: its responses do not change any more."""
    finished: bool = False
    """The source has no more to show."""
    stalled: bool = False
    """Too few responses, and images were shown again often enough: waits for `Resume`."""
    best: list[tuple[float, m.Item, str]] = field(default_factory=list)
    """Highest scores so far, their images and these images' full SHA-256."""
    mean: float | None = None
    """Score of the images learned last."""

    @property
    def name(self) -> str:
        """As in the settings."""
        return self.settings.name

    @property
    def open(self) -> list[Round]:
        """Proposals that are not learned yet, oldest first."""
        return self.rounds[len(self.rounds) - len(self.proposals) :]

    @property
    def done(self) -> bool:
        """Whether everything is shown and learned."""
        return self.finished and not self.proposals and self.job is None

    def columns(self, current: Round) -> list[int] | None:
        """Which of the units told make this stream's score; None for all."""
        return self.columns_of(next((batch.units for batch in current.batches if batch.units is not None), None))

    def columns_of(self, units: tuple[str, ...] | None) -> list[int] | None:
        """Which of these units make this stream's score; None for all."""
        if units is None or not self.settings.units:
            return None
        return [units.index(unit) for unit in self.settings.units]

    def lesson(self, settings: SessionSettings) -> Lesson | None:
        """What the source can learn now: the oldest proposal, if all that can be had of it is told."""
        if self.stalled or not self.proposals:
            return None
        current = self.open[0]
        if not current.told:
            return None
        if current.lacking() and (
            current.may_show_again(settings.max_reshow) or current.fraction() < settings.min_fraction
        ):
            return None
        scores, responses = current.results(self.columns(current))
        return Lesson(current.batches[0].made.batch_id, scores, responses)


class SessionState:
    """What is known. Changed by `apply` only.

    Args:
        settings: of the session.
        sources: one for each stream.
    """

    def __init__(self, settings: SessionSettings, sources: Mapping[str, Source]) -> None:
        self.settings = settings
        self.batches: list[BatchState] = []
        """In the order in which they are shown."""
        self.by_id: dict[str, BatchState] = {}
        self._fillers: deque[BatchState] = deque()
        self.streams = {s.name: Stream(s, sources[s.name]) for s in settings.streams}
        self.clocks: dict[str, ClockEstimator] = {}
        self.acks: dict[str, m.Ack] = {}
        """What was answered to each request that took effect."""
        self.contents: dict[str, bytes] = {}
        """What each of them said, by `content`."""
        self.stopped = False
        self.paused: str | None = None
        self.fault: str | None = None
        self.reference_mean: float | None = None
        self.last_tell: str | None = None
        self.counts = {"told": 0, "deadline_misses": 0, "reshown": 0, "late": 0, "gaps": 0, "fillers": 0}
        self.replaying = False
        """While it is, sources are led along; else they have moved already when a record says so."""

    # ------------------------------------------------------------------------------------------ questions

    @property
    def state(self) -> m.State:
        """Of the whole session."""
        if self.fault is not None:
            return "fault"
        if self.stopped or all(stream.done for stream in self.streams.values()):
            return "finished"
        going = [stream for stream in self.streams.values() if not stream.done]
        if self.paused is not None or all(stream.stalled for stream in going):
            return "paused"
        return "running" if any(batch.served for batch in self.batches) else "ready"

    @property
    def text(self) -> str:
        """What there is to say about that."""
        state = self.state
        if state == "fault":
            return self.fault or ""
        if state == "finished":
            return "the session was stopped" if self.stopped else "every stream has shown and learned all it had"
        if self.paused is not None:
            return f"the session is paused: {self.paused or 'no reason was given'}; send resume to go on"
        names = ", ".join(repr(stream.name) for stream in self.streams.values() if stream.stalled)
        if not names:
            return ""
        return f"too few responses came for stream {names}; send resume to show the missing images again"

    def next_batch(self, after: str | None) -> BatchState | None:
        """The first batch behind this one that is not told completely; fillers are nobody's next."""
        start = 0 if after is None else self.by_id[after].number + 1
        for number in range(start, len(self.batches)):
            batch = self.batches[number]
            if batch.made.batch_kind != "filler" and not batch.closed and not batch.complete:
                return batch
        return None

    def open_batches(self) -> list[BatchState]:
        """Batches of which something is still expected, in order."""
        rounds = (current for stream in self.streams.values() for current in stream.open)
        return sorted(
            (batch for current in rounds for batch in current.batches if not batch.complete), key=lambda b: b.number
        )

    def batch_of_presentation(self, pres_id: str) -> BatchState:
        """The batch that a presentation belongs to.

        Raises:
            Refusal: there is none.
        """
        batch = self.by_id.get(pres_id.rpartition(".")[0])
        if batch is None or not batch.has(pres_id):
            raise m.Refusal("UNKNOWN_ITEM", f"there is no presentation {pres_id!r}")
        return batch

    # ------------------------------------------------------------------------------------------ records

    def apply(self, record: r.Record) -> None:
        """Change as a record says.

        Raises:
            ResumeError: on replay, a source does something else than it did.
        """
        match record:
            case r.Opened():
                self.clocks.clear()  # they were related to a monotonic clock that may have begun anew
            case r.BatchMade():
                self._apply_batch(record)
            case r.Served():
                self.by_id[record.batch_id].served = True
            case r.Told():
                self._apply_told(record)
            case r.ShownEvents():
                accepted, ignored = 0, []
                for event in record.events:
                    taken, left = self.batch_of_presentation(event.pres_id).note([event], record.late)
                    accepted += taken
                    ignored += left
                self.acks[record.id] = m.Ack(id=record.id, accepted=accepted, ignored=ignored)
            case r.Update():
                self._apply_update(record)
            case r.ClockMapping():
                self.clocks.setdefault(record.clock, ClockEstimator(record.clock)).add(record.exchanges)
                self.acks[record.id] = m.Ack(id=record.id, accepted=len(record.exchanges))
            case r.Control():
                self._apply_control(record)
        request = _request_of(record)
        if request is not None:
            self.contents[request.id] = content(request, record.responses.data if isinstance(record, r.Told) else None)

    def _apply_batch(self, made: r.BatchMade) -> None:
        batch = BatchState(made, len(self.batches))
        if made.stream is None:
            self.counts["fillers"] += 1
            self._fillers.append(batch)
            if len(self._fillers) > FILLERS_KEPT:
                self._fillers.popleft().close()
        else:
            stream = self.streams[made.stream]
            if made.batch_kind == "gen":
                item_ids = [item.item_id for item in made.items if item.kind == "gen"]
                if self.replaying:
                    stream.proposals.append(_propose_again(stream, made, len(item_ids)))
                stream.rounds.append(Round(stream.name, made.generation, item_ids, self.settings.repeats, [batch]))
            else:
                stream.rounds[made.generation].batches.append(batch)
                self.counts["reshown"] += len(made.order)
        self.batches.append(batch)
        self.by_id[made.batch_id] = batch

    def _apply_told(self, record: r.Told) -> None:
        tell = record.header
        batch = self.by_id[tell.batch_id]
        accepted, ignored = batch.take(tell, record.responses.numpy().astype(np.float64))
        self.acks[tell.id] = m.Ack(id=tell.id, accepted=accepted, ignored=ignored)
        self.last_tell = tell.id
        self.counts["told"] += accepted
        self.counts["late"] += sum(x.why == "late" for x in ignored)
        self.counts["gaps"] += sum(status == "gap" for status in tell.status or ())
        if batch.complete and not batch.closed:
            if batch.made.stream is None:
                batch.close()
                return
            mean = batch.reference_mean(self.streams[batch.made.stream].columns_of(batch.units))
            self.reference_mean = self.reference_mean if mean is None else mean

    def _apply_update(self, record: r.Update) -> None:
        stream = self.streams[record.stream]
        current = stream.open[0]
        scores, responses = current.results(stream.columns(current))
        if self.replaying:
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
        made = current.batches[0].made
        by_id = {item.item_id: (item, sha) for item, sha in zip(made.items, made.shas, strict=True)}
        told = [(float(s), *by_id[x]) for x, s in zip(current.item_ids, scores, strict=True) if math.isfinite(s)]
        stream.best = sorted([*stream.best, *told], key=lambda x: (-x[0], x[1].item_id))[:BEST]
        stream.mean = sum(score for score, _, _ in told) / len(told) if told else stream.mean
        stream.proposals.pop(0)
        current.close()

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
                if not self.replaying:  # a restart is another try
                    self.fault = record.text
        if record.id is not None:
            self.acks[record.id] = m.Ack(id=record.id, accepted=1)


def content(request: m.Request, buffer: bytes | memoryview | None) -> bytes:
    """What tells a request that is sent again from another one under the same id."""
    found = hashlib.blake2b(_ENCODER.encode(request), digest_size=16)
    found.update(buffer or b"")
    return found.digest()


def _request_of(record: r.Record) -> m.Request | None:
    """The request that a record came of, None if it came of none."""
    match record:
        case r.Told():
            return record.header
        case r.ShownEvents():
            return m.Shown(id=record.id, events=record.events)
        case r.ClockMapping():
            return m.ClockReport(id=record.id, clock=record.clock, exchanges=record.exchanges)
        case r.Control(id=str(id), what="note"):
            return m.Note(id=id, text=record.text)
        case r.Control(id=str(id), what="pause"):
            return m.Pause(id=id, reason=record.text)
        case r.Control(id=str(id), what="resume"):
            return m.Resume(id=id)
        case r.Control(id=str(id), what="stop"):
            return m.Stop(id=id, reason=record.text)
    return None


def _propose_again(stream: Stream, made: r.BatchMade, count: int) -> Proposal:
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
    return proposal
