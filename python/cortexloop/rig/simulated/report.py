"""What came of a simulated day."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.journal import scan
from cortexloop.realtime.messages import Batch, Item, StatusReply
from cortexloop.realtime.records import BatchMade, ShownEvents, Told


@dataclass(frozen=True)
class GenerationRow:
    """Responses to one generation of a stream: means over presentations, in spikes per second.

    mean, best: over its images; NaN if none has a response. references: mean over the references shown with it, None if
    there are none.
    """

    stream: str
    generation: int
    images: int
    mean: float
    best: float
    references: float | None


class Scores:
    """Responses as they are told, by generation.

    Args:
        units: all that are told.
        score_units: for each stream, those whose mean is the score; all for streams that are not named.
    """

    def __init__(self, units: Sequence[str], score_units: Mapping[str, Sequence[str]]) -> None:
        self._columns = {stream: [units.index(u) for u in chosen] for stream, chosen in score_units.items() if chosen}
        self._found: dict[tuple[str, int], dict[str, tuple[Item, float]]] = {}

    def add(self, batch: Batch, item: Item, pres_id: str, responses: NDArray[np.float32]) -> None:
        """One response [units] that counts."""
        if batch.stream is None:
            return
        columns = self._columns.get(batch.stream)
        score = float((responses if columns is None else responses[columns]).mean())
        self._found.setdefault((batch.stream, batch.generation), {})[pres_id] = (item, score)

    def discard(self, batch: Batch, pres_id: str) -> None:
        """A presentation that went wrong does not count, also if it was told of: it was shown again after a crash."""
        if batch.stream is not None:
            self._found.get((batch.stream, batch.generation), {}).pop(pres_id, None)

    def row(self, stream: str, generation: int) -> GenerationRow:
        """What is known of one generation so far."""
        items: dict[str, list[float]] = {}
        references: list[float] = []
        for item, score in self._found.get((stream, generation), {}).values():
            (references if item.kind == "ref" else items.setdefault(item.item_id, [])).append(score)
        means = [float(np.mean(values)) for values in items.values()]
        return GenerationRow(
            stream=stream,
            generation=generation,
            images=len(means),
            mean=float(np.mean(means)) if means else float("nan"),
            best=max(means, default=float("nan")),
            references=float(np.mean(references)) if references else None,
        )

    def rows(self) -> Iterator[GenerationRow]:
        """All generations, in the order in which they were first told."""
        return (self.row(*key) for key in self._found)


@dataclass
class DayReport:
    """A day in numbers.

    Attributes:
        generations: as far as responses came.
        presentations: by outcome, as the display saw them.
        responses: by status, as they were told.
        batches: by kind.
        session_s: how long it took, in the world's time.
        requests, resent, repeated: messages; those sent again because no answer came; those that came once more.
        server_crashes, client_restarts, acquisition_restarts, clock_steps, silences, resumed: mishaps, and how often
            the experimenter had to let the session go on.
        packets_lost: messages of the acquisition.
        late_spikes: that came after their window could have been counted.
        steps_found: steps of clocks that the session noticed; a restarted acquisition is one, too.
        wrong: responses that differ from what the neurons fired; has to be 0.
        unsure: presentations whose onset was known too badly to be counted.
        lost: responses that were acknowledged and are not in the journal as they were told; has to be 0. None: there
            was no journal to look at.
        onset_error_ms: difference between where the session places an onset and when light came on, by the source of
            the onset: median and largest. Photodiodes see light, flips come before it.
        onsets_beyond: onsets that are further off than their uncertainty says; has to be 0.
        status: the session's own view at the end.
    """

    generations: list[GenerationRow] = field(default_factory=list)
    presentations: dict[str, int] = field(default_factory=dict)
    responses: dict[str, int] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)
    session_s: float = 0.0
    requests: int = 0
    resent: int = 0
    repeated: int = 0
    server_crashes: int = 0
    client_restarts: int = 0
    acquisition_restarts: int = 0
    clock_steps: int = 0
    silences: int = 0
    resumed: int = 0
    packets_lost: int = 0
    late_spikes: int = 0
    wrong: int = 0
    unsure: int = 0
    lost: int | None = None
    steps_found: int | None = None
    onset_error_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    onsets_beyond: int = 0
    status: StatusReply | None = None

    @property
    def ok(self) -> bool:
        """Nothing was lost, nothing was counted wrongly, no onset was claimed better than it was known."""
        return self.wrong == 0 and not self.lost and self.onsets_beyond == 0


@dataclass(frozen=True)
class Acknowledged:
    """A response that the session said it has: responses float32 [units]."""

    batch_id: str
    pres_id: str
    status: str
    responses: NDArray[np.float32]


_ALLOWED_MS = {"photodiode": 0.1, "flip": 0.0}
"""Between light and an onset, beyond the uncertainty of clocks: a few samples of the acquisition."""


def check_journal(
    report: DayReport,
    folder: Path,
    acknowledged: Sequence[Acknowledged],
    light_ns: Mapping[tuple[str, float], int],
    light_ms: tuple[float, float],
) -> None:
    """Enter into a report what a session's journal says, against what the rig knows.

    Args:
        report: gets `lost`, `steps_found`, `onset_error_ms` and `onsets_beyond`.
        folder: of the session.
        acknowledged: all responses that were.
        light_ns: when light came on, by the session's monotonic clock, for each presentation that counted (named by
            `pres_id` and `t_on`: after a crash the same presentation is shown again).
        light_ms: from flip to light, mean and standard deviation, of which an onset by flip cannot know.
    """
    kept: dict[tuple[str, str], list[tuple[str, NDArray[Any]]]] = {}
    errors: dict[str, list[float]] = {}
    steps = 0
    for record in scan(folder / "session.rigj").records():
        if isinstance(record, Told):
            header = record.header
            status = header.status or ["ok"] * len(header.item_ids)
            for pres, worth, row in zip(header.pres_ids or [], status, record.responses.numpy(), strict=True):
                kept.setdefault((header.batch_id, pres), []).append((worth, row))
        elif isinstance(record, ShownEvents):
            for event, found in zip(record.events, record.onsets, strict=True):
                light = light_ns.get((event.pres_id, float(event.t_on or 0)))
                if light is None or found.by == "received":
                    continue
                error = (found.t_ns - light) / 1e6
                errors.setdefault(found.by, []).append(error)
                allowed = found.uncertainty_ns / 1e6 + _ALLOWED_MS.get(found.by, 0.0)
                if found.by == "flip":
                    allowed += 6 * light_ms[1]
                    error += light_ms[0]
                report.onsets_beyond += abs(error) > allowed
        elif not isinstance(record, BatchMade) and getattr(record, "what", None) == "clock_step":
            steps += 1
    lost = 0
    for one in acknowledged:
        found_rows = kept.get((one.batch_id, one.pres_id), [])
        same = any(
            worth == one.status and (worth != "ok" or np.array_equal(row, one.responses)) for worth, row in found_rows
        )
        lost += not same
    report.lost, report.steps_found = lost, steps
    report.onset_error_ms = {by: (float(np.median(e)), float(max(e, key=abs))) for by, e in errors.items()}
