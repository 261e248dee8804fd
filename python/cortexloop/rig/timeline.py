"""A session as a story: what happened when, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

import numpy as np

from cortexloop.realtime.records import BatchMade, Closed, Control, Opened, Served, Start, Told, Update
from cortexloop.rig.history import BatchHistory, History, Recording

__all__ = ["Line", "StreamSummary", "summaries", "timeline"]

Tone = Literal["plain", "good", "warning", "bad"]
_TONES: dict[str, Tone] = {
    "note": "plain", "pause": "plain", "resume": "plain", "stop": "plain", "link_back": "plain", "fault": "bad",
    "stalled": "bad",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line: seconds since the session began, by the calendar clock; what; in words."""

    seconds: float
    what: str
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class StreamSummary:
    """One stream: mean and best score of each generation, and mean response to the references shown with it."""

    name: str
    means: list[float]
    bests: list[float]
    references: list[float]


def timeline(recording: Recording) -> Iterator[Line]:
    """The story of a session, read from its journal."""
    start = recording.start
    history = History()
    ended = False
    for record in recording.scan.records():
        history.add(record)
        seconds = (record.wall_ns - start.wall_ns) / 1e9
        match record:
            case Start():
                begun = datetime.fromtimestamp(record.wall_ns / 1e9, timezone.utc)
                streams = ", ".join(record.sources) or "none"
                yield Line(
                    0.0, "start", f"session {record.session!r}, {begun:%Y-%m-%d %H:%M:%S} UTC, streams: {streams}"
                )
            case Opened():
                text = f"process {record.pid} on {record.host}"
                if len(history.opened) > 1 and not ended:
                    text += "; the one before ended without closing"
                if record.torn_bytes:
                    text += f"; {record.torn_bytes} bytes of an unfinished record cut off"
                yield Line(seconds, "opened", text, "plain" if ended or len(history.opened) == 1 else "warning")
                ended = False
            case Closed():
                ended = True
                yield Line(seconds, "closed", "in good order")
            case BatchMade() if record.batch_kind != "gen":
                again = f", what {record.repairs!r} missed" if record.repairs else ""
                yield Line(
                    seconds,
                    record.batch_kind,
                    f"{record.batch_id}: {len(record.order)} presentations{again}",
                    "warning",
                )
            case BatchMade():
                yield Line(seconds, "batch", _batch(history, record))
            case Served():
                late = f", {record.late_ms:.1f} ms late" if record.late_ms > 0 else ""
                yield Line(
                    seconds, "served", f"{record.batch_id} to {record.client!r}{late}", "warning" if late else "plain"
                )
            case Told():
                yield _told(history, record, seconds)
            case Update():
                yield Line(seconds, "learned", _learned(history, record), "good")
            case Control():
                where = f"{record.stream}: " if record.stream else ""
                who = f" ({record.client})" if record.client else ""
                yield Line(seconds, record.what, f"{where}{record.text}{who}", _TONES.get(record.what, "warning"))
            case _:
                pass


def _batch(history: History, made: BatchMade) -> str:
    batch = history.batches.get(made.batch_id)
    references = 0 if batch is None else batch.count("ref")
    beside = f" and {references} references" if references else ""
    return f"{made.batch_id}: {len(made.items) - references} images{beside}, {len(made.order)} presentations"


def _told(history: History, record: Told, seconds: float) -> Line:
    header = record.header
    batch = history.batches.get(header.batch_id)
    if batch is None:
        return Line(seconds, "told", f"{header.batch_id}: no such batch", "bad")
    told = batch.state.told
    lost = sum(x is None for x in told.values())
    text = f"{header.batch_id}: {len(header.item_ids)} rows of {len(header.units)} units; {len(told) - lost} of "
    text += f"{len(batch.made.order)} presentations count" + (f", {lost} were in vain" if lost else "")
    return Line(seconds, "told", text, "warning" if lost else "plain")


def _learned(history: History, record: Update) -> str:
    scores = record.scores.numpy()
    known = scores[np.isfinite(scores)]
    text = f"{record.batch_id}: "
    text += f"mean {known.mean():.4g}, best {known.max():.4g}" if len(known) else "no scores"
    if len(known) < len(scores):
        text += f", {len(scores) - len(known)} of {len(scores)} missing"
    batch = history.batches.get(record.batch_id)
    reference = None if batch is None else history.reference_mean(batch)
    return text + (f", references {reference:.4g}" if reference is not None else "")


def summaries(history: History) -> list[StreamSummary]:
    """Scores per generation of each stream that learned something."""
    found: dict[str, list[BatchHistory]] = {}
    for batch in history.batches.values():
        if batch.update is not None and batch.made.stream is not None:
            found.setdefault(batch.made.stream, []).append(batch)
    result = []
    for name, batches in found.items():
        means, bests, references = [], [], []
        for batch in batches:
            assert batch.update is not None
            scores = batch.update.scores.numpy()
            known = scores[np.isfinite(scores)]
            means.append(float(known.mean()) if len(known) else float("nan"))
            bests.append(float(known.max()) if len(known) else float("nan"))
            reference = history.reference_mean(batch)
            references.append(float("nan") if reference is None else reference)
        result.append(StreamSummary(name, means, bests, references))
    return result
