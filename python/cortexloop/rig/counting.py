"""Responses from a stream of spikes: each presentation is counted once the acquisition's data has come far enough.

All times are integers in nanoseconds of the acquisition's clock; onsets of another clock are mapped to it first
(`cortexloop.realtime.timing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cortexloop.realtime.messages import Status, Tell, Window
from cortexloop.realtime.timing import Watermark

_MS = 1e6  # nanoseconds


@dataclass(frozen=True)
class Presentation:
    """Something that was shown: t_on_ns by the acquisition's clock."""

    pres_id: str
    item_id: str
    t_on_ns: int


@dataclass(frozen=True)
class Counted:
    """Responses to presentations, in the order in which these began.

    responses: float32 [rows, units], NaN in rows whose status is not "ok".
    """

    presentations: list[Presentation]
    units: list[str]
    responses: NDArray[np.float32]
    status: list[Status]
    kind: Literal["count", "rate"]
    window_ms: Window
    baseline_ms: Window | None

    def __len__(self) -> int:
        return len(self.presentations)

    def tell(self, id: str, batch_id: str, *, final: bool = False) -> tuple[Tell, bytes]:
        """The message and its buffer; all presentations have to be of this batch."""
        message = Tell(
            id=id,
            batch_id=batch_id,
            item_ids=[p.item_id for p in self.presentations],
            pres_ids=[p.pres_id for p in self.presentations],
            units=self.units,
            status=self.status,
            kind=self.kind,
            window_ms=self.window_ms,
            baseline_ms=self.baseline_ms,
            final=final,
        )
        return message, self.responses.astype("<f4").tobytes()

    def only(self, pres_ids: Sequence[str]) -> Counted:
        """The rows of these presentations."""
        wanted = set(pres_ids)
        rows = [row for row, p in enumerate(self.presentations) if p.pres_id in wanted]
        return Counted(
            [self.presentations[row] for row in rows],
            self.units,
            self.responses[rows],
            [self.status[row] for row in rows],
            self.kind,
            self.window_ms,
            self.baseline_ms,
        )


@dataclass
class _Train:
    """Spike times of a unit: sorted up to what came last."""

    sorted: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    fresh: list[NDArray[np.int64]] = field(default_factory=list)

    def times(self) -> NDArray[np.int64]:
        if self.fresh:
            self.sorted = np.sort(np.concatenate([self.sorted, *self.fresh]))
            self.fresh = []
        return self.sorted


class SpikeCounter:
    """Counts spikes in a window after each onset, and none twice: windows hold their beginning, not their end.

    Order does not matter: spikes of several units, onsets and the acquisition's progress may come in any order, within
    `keep_s`. A presentation is counted when data has passed the end of its window and a guard; one that touches a gap
    has the status "gap" and no number.

    Args:
        units: names of those that are counted; others' spikes are dropped, and their number kept in `others`.
        window_ms: after onset.
        baseline_ms: whose rate is subtracted, for rates only.
        guard_ms: how much further data has to come, see `Watermark`.
        kind: "rate" in spikes per second, or "count".
        keep_s: how long spikes are kept for onsets that become known later than they. An onset older than that has the
            status "gap".

    Raises:
        ValueError: no units, a unit twice, windows that end before they begin, or a baseline for counts.

    Attributes:
        late: spikes that came after the data had passed them by more than the guard; what was counted by then lacks
            them.
    """

    def __init__(
        self,
        units: Sequence[str],
        *,
        window_ms: Window = (50.0, 200.0),
        baseline_ms: Window | None = None,
        guard_ms: float = 30.0,
        kind: Literal["count", "rate"] = "rate",
        keep_s: float = 10.0,
    ) -> None:
        self.units = list(units)
        if not self.units or len(set(self.units)) != len(self.units):
            raise ValueError(f"units should be at least one, and none twice, got {self.units}")
        if kind not in ("count", "rate"):
            raise ValueError(f'kind should be "count" or "rate", got {kind!r}')
        if baseline_ms is not None and kind == "count":
            raise ValueError("a baseline is subtracted from rates, not from counts; leave it out or ask for rates")
        if not keep_s > 0:
            raise ValueError(f"keep_s should be above 0, got {keep_s}")
        self.kind = kind
        self.window_ms = _window("window_ms", window_ms)
        self.baseline_ms = None if baseline_ms is None else _window("baseline_ms", baseline_ms)
        self.late = 0
        self.others = 0
        self.watermark = Watermark(guard_ms)
        windows = [self.window_ms, *([] if self.baseline_ms is None else [self.baseline_ms])]
        self._first_ns = round(min(w[0] for w in windows) * _MS)
        self._last_ms = max(w[1] for w in windows)
        self._keep_ns = round(keep_s * 1e9)
        self._trains = {unit: _Train() for unit in self.units}
        self._gaps: list[tuple[int, int]] = []
        self._waiting: dict[str, Presentation] = {}
        self._forgotten_ns: int | None = None

    @property
    def waiting(self) -> int:
        """Presentations that `ready` has not returned yet."""
        return len(self._waiting)

    @property
    def pending(self) -> int:
        """Presentations for which data has to come yet."""
        return sum(not self._complete(p) for p in self._waiting.values())

    def spikes(self, unit: str, times_ns: ArrayLike) -> None:
        """Spikes of one unit, in any order."""
        times = np.atleast_1d(np.asarray(times_ns))
        if times.dtype.kind not in "iu":
            raise TypeError(f"times should be integers (nanoseconds), got {times.dtype}")
        if unit not in self._trains:
            self.others += len(times)
            return
        times = times.astype(np.int64)
        if self.watermark.passed_ns is not None:
            self.late += int((times < self.watermark.passed_ns - self.watermark.guard_ns).sum())
        self._trains[unit].fresh.append(times)

    def passed(self, t_ns: int) -> None:
        """All data up to here has come."""
        self.watermark.passed(t_ns)

    def gap(self, from_ns: int, to_ns: int) -> None:
        """Data of this stretch is lost."""
        if to_ns < from_ns:
            raise ValueError(f"a gap should end after it begins, got {from_ns} to {to_ns}")
        self._gaps.append((from_ns, to_ns))

    def presented(self, pres_id: str, item_id: str, t_on_ns: int) -> None:
        """A presentation began. The same again changes nothing, so that a report may be repeated."""
        self._waiting.setdefault(pres_id, Presentation(pres_id, item_id, t_on_ns))

    def forget(self, pres_id: str) -> None:
        """A presentation will not be counted after all."""
        self._waiting.pop(pres_id, None)

    def restart(self) -> list[Presentation]:
        """The acquisition began anew, and its clock: what waits is lost and returned."""
        lost = list(self._waiting.values())
        self._waiting.clear()
        self._gaps.clear()
        self._trains = {unit: _Train() for unit in self.units}
        self.watermark.passed_ns = None
        self._forgotten_ns = None
        return lost

    def ready(self) -> Counted:
        """All presentations that can be counted now; each is returned once."""
        due = [p for p in self._waiting.values() if self._complete(p)]
        due.sort(key=lambda p: (p.t_on_ns, p.pres_id))
        for p in due:
            del self._waiting[p.pres_id]
        status: list[Status] = ["gap" if self._touches_gap(p) else "ok" for p in due]
        onsets = np.array([p.t_on_ns for p in due], np.int64)
        responses = self._responses(onsets)
        responses[[s != "ok" for s in status]] = np.nan
        self._prune()
        return Counted(
            due, list(self.units), responses.astype(np.float32), status, self.kind, self.window_ms, self.baseline_ms
        )

    def _complete(self, p: Presentation) -> bool:
        return self.watermark.complete(p.t_on_ns, self._last_ms)

    def _touches_gap(self, p: Presentation) -> bool:
        first, last = p.t_on_ns + self._first_ns, p.t_on_ns + round(self._last_ms * _MS)
        if self._forgotten_ns is not None and first < self._forgotten_ns:
            return True
        return any(begin < last and end > first for begin, end in self._gaps)

    def _responses(self, onsets: NDArray[np.int64]) -> NDArray[np.float64]:
        """[onsets, units]"""
        found = np.empty((len(onsets), len(self.units)))
        for column, unit in enumerate(self.units):
            times = self._trains[unit].times()
            found[:, column] = _count(times, onsets, self.window_ms)
            if self.kind == "rate":
                found[:, column] /= _seconds(self.window_ms)
                if self.baseline_ms is not None:
                    found[:, column] -= _count(times, onsets, self.baseline_ms) / _seconds(self.baseline_ms)
        return found

    def _prune(self) -> None:
        """Drop what is too old to be counted."""
        if self.watermark.passed_ns is None:
            return
        keep = self.watermark.passed_ns - self._keep_ns
        waiting = [p.t_on_ns + self._first_ns for p in self._waiting.values()]
        oldest = min([keep, *waiting])
        for train in self._trains.values():
            times = train.times()
            if len(times) and times[0] < oldest:
                train.sorted = times[np.searchsorted(times, oldest) :].copy()
        self._gaps = [(begin, end) for begin, end in self._gaps if end > oldest]
        self._forgotten_ns = oldest if self._forgotten_ns is None else max(self._forgotten_ns, oldest)


def _window(name: str, window: Window) -> Window:
    begin, end = float(window[0]), float(window[1])
    if not (math.isfinite(begin) and math.isfinite(end) and begin < end):
        raise ValueError(f"{name} should be (beginning, end) in milliseconds after onset, got {tuple(window)}")
    return begin, end


def _seconds(window_ms: Window) -> float:
    return (window_ms[1] - window_ms[0]) / 1e3


def _count(times: NDArray[np.int64], onsets: NDArray[np.int64], window_ms: Window) -> NDArray[np.int64]:
    """Spikes in [onset + beginning, onset + end) for each onset."""
    begin, end = (np.searchsorted(times, onsets + round(edge * _MS), "left") for edge in window_ms)
    return np.asarray(end - begin, np.int64)


class SequenceCheck:
    """Whether numbered messages come without gaps.

    Attributes:
        lost: messages that never came.
        restarts: how often the numbers began anew.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self.lost = 0
        self.restarts = 0

    def missing(self, number: int) -> int:
        """How many messages are missing right before this one; -1 if the numbers began anew with it."""
        last, self.last = self.last, number
        if last is None:
            return 0
        if number <= last:
            self.restarts += 1
            return -1
        self.lost += number - last - 1
        return number - last - 1
