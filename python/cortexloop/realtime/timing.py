"""When something happened: clocks of a rig related to the server's, and the onset of each presentation.

A raw time is never changed. A mapping from a client's clock to the server's is a finding of its own, with a date and an
uncertainty, and a better one may replace it later. All times here are nanoseconds in Python integers, so that clocks
with far apart zeros lose nothing to rounding.

A leaf of the room: it imports the messages.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cortexloop.realtime.messages import Event, Number

Exchange = tuple[int, int, int, int]
"""(t1, t2, t3, t4): sent, received, answered, arrived; t1 and t4 by the client's clock, t2 and t3 by the server's."""

MAX_DRIFT_PPM = 500.0
"""What a clock's rate may be off while it is not measured: the most that network time daemons slew."""
CARRIED_DRIFT_PPM = 20.0
"""What a rate may be off that was measured before the clock stepped."""
WANDER_PPM = 1.0
"""How much a measured rate changes with temperature."""
BACKWARD_TOLERANCE_NS = 1_000_000
"""Mapped time that goes back by more than this is a fault."""

_BURSTS = 64  # in a fit: five minutes at one burst every five seconds, well below the time in which rates wander
_FLOOR_NS = 5_000.0  # scatter of a time stamp, in the operating system


@dataclass(frozen=True)
class Step:
    """A clock that did not go on as expected.

    Attributes:
        clock: its name.
        at_ns: server time at which it was noticed; it happened since `since_ns`, the last burst before.
        jump_ns: how much later (more: sooner if negative) mapped times are now than before.
        kind: "jump" for another offset, from which on a new segment counts; "back" if a better estimate set mapped
            time back by more than `BACKWARD_TOLERANCE_NS`.
    """

    clock: str
    at_ns: int
    since_ns: int
    jump_ns: int
    kind: Literal["jump", "back"]

    def __str__(self) -> str:
        jump = f"{self.jump_ns / 1e6:+.3f} ms"
        if self.kind == "back":
            return f"the better estimate of clock {self.clock} sets mapped times back: {jump}"
        seconds = (self.at_ns - self.since_ns) / 1e9
        return f"clock {self.clock} stepped against the server's within {seconds:.1f} s: mapped times move by {jump}"


@dataclass(frozen=True)
class ClockFit:
    """server = t + offset + drift * (t - at).

    Attributes:
        at_ns: client time at which `offset_ns` holds.
        offset_ns: the server's clock minus the client's.
        drift_ppm: how much faster than the client's clock the server's runs.
        uncertainty_ns: of mapped times between `first_ns` and `last_ns`: half the shortest round trip, because the two
            ways may differ by all of it, and the scatter around the fit.
        drift_uncertainty_ppm: what it grows by outside.
        first_ns, last_ns: client times of the bursts that were used.
        bursts: how many of them.
        step: what the last burst revealed, if anything.
    """

    at_ns: int
    offset_ns: int
    drift_ppm: float
    uncertainty_ns: float
    drift_uncertainty_ppm: float
    first_ns: int
    last_ns: int
    bursts: int
    step: Step | None = None

    def to_server_ns(self, t_ns: int) -> int:
        """Server time of a client time."""
        return t_ns + self.offset_ns + round(self.drift_ppm * 1e-6 * (t_ns - self.at_ns))

    def to_client_ns(self, server_ns: int) -> int:
        """Client time of a server time."""
        since = server_ns - self.offset_ns - self.at_ns
        return self.at_ns + round(since / (1 + self.drift_ppm * 1e-6))

    def uncertainty_at(self, t_ns: int) -> float:
        """Nanoseconds by which a mapped client time may be off."""
        outside = max(self.first_ns - t_ns, t_ns - self.last_ns, 0)
        return self.uncertainty_ns + self.drift_uncertainty_ppm * 1e-6 * outside


@dataclass(frozen=True)
class _Burst:
    """The exchange of a burst that took least: at_ns by the client's clock, server_ns at the same moment."""

    at_ns: int
    server_ns: int
    half_rtt_ns: float

    @property
    def offset_ns(self) -> int:
        return self.server_ns - self.at_ns


@dataclass(frozen=True)
class _Rate:
    """What is known of a clock's rate when a segment begins, as fractions."""

    slope: float = 0.0
    uncertainty: float = MAX_DRIFT_PPM * 1e-6

    @classmethod
    def after(cls, fit: ClockFit | None) -> _Rate:
        """The oscillator is still the same after a step."""
        if fit is None:
            return cls()
        return cls(fit.drift_ppm * 1e-6, max(fit.drift_uncertainty_ppm, CARRIED_DRIFT_PPM) * 1e-6)


@dataclass
class _Segment:
    """A stretch of a clock between two steps. fits[i] was made when bursts[i] was there, and is kept."""

    rate: _Rate
    bursts: list[_Burst] = field(default_factory=list)
    fits: list[ClockFit] = field(default_factory=list)

    def fit_for(self, t_ns: int) -> ClockFit:
        """Of all fits, that of the first burst after t: with exchanges on both sides of it, if there are."""
        position = bisect.bisect_left(self.bursts, t_ns, key=lambda burst: burst.at_ns)
        return self.fits[min(position, len(self.fits) - 1)]


class ClockEstimator:
    """One client's clock against the server's, from bursts of exchanges as in the Network Time Protocol.

    Of each burst the exchange with the shortest round trip counts; its offset ((t2 - t1) + (t3 - t4)) / 2 is wrong by
    no more than half that round trip, however unequal the two ways are. A line through the bursts of the last minutes
    gives the drift. A burst whose interval cannot contain what the line predicts is a step: a new segment begins, and
    old times keep the mapping they had.

    The result depends on the calls of `add` and their order only. Where the server's own clock starts anew (after the
    machine was restarted), an estimator has to, too.

    Args:
        name: of the clock, as in `Event.clock`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[Step] = []
        self._segments: list[_Segment] = []

    @property
    def mapping(self) -> ClockFit | None:
        """The latest, None before the first burst."""
        return self._segments[-1].fits[-1] if self._segments else None

    @property
    def uncertainty_ns(self) -> float | None:
        """Of the latest mapping, at its last burst."""
        return None if self.mapping is None else self.mapping.uncertainty_ns

    def add(self, exchanges: Sequence[Exchange]) -> ClockFit:
        """Take a burst of exchanges, four to eight in a row; one that is older than the last changes nothing.

        Returns:
            the mapping from now on; its `step` says whether this burst revealed one.

        Raises:
            ValueError: no exchange whose times are in order.
        """
        burst, fit, anew = self._next(exchanges)
        if burst is None:
            return fit
        if anew:
            self._segments.append(_Segment(_Rate.after(self.mapping)))
        self._segments[-1].bursts.append(burst)
        self._segments[-1].fits.append(fit)
        if fit.step is not None:
            self.steps.append(fit.step)
        return fit

    def preview(self, exchanges: Sequence[Exchange]) -> ClockFit:
        """What `add` would return; nothing changes.

        Raises:
            ValueError: as `add`.
        """
        return self._next(exchanges)[1]

    def _next(self, exchanges: Sequence[Exchange]) -> tuple[_Burst | None, ClockFit, bool]:
        """The burst (None if it is old news), the mapping that follows, and whether a segment begins with it."""
        burst = _best(self.name, exchanges)
        before = self.mapping
        if before is None:
            return burst, _fit([burst], _Rate(), None, None), True
        segment = self._segments[-1]
        last = segment.bursts[-1]
        if burst.server_ns <= last.server_ns:
            return None, dataclasses.replace(before, step=None), False
        jump = burst.server_ns - before.to_server_ns(burst.at_ns)
        allowed = burst.half_rtt_ns + before.uncertainty_at(burst.at_ns) + 2 * _FLOOR_NS
        if burst.at_ns <= last.at_ns or abs(jump) > allowed:
            step = Step(self.name, burst.server_ns, last.server_ns, jump, "jump")
            return burst, _fit([burst], _Rate.after(before), None, step), True
        fit = _fit([*segment.bursts[1 - _BURSTS :], burst], segment.rate, before, None)
        back = before.to_server_ns(burst.at_ns) - fit.to_server_ns(burst.at_ns)
        if back > BACKWARD_TOLERANCE_NS:
            step = Step(self.name, burst.server_ns, last.server_ns, -back, "back")
            fit = dataclasses.replace(fit, step=step)
        return burst, fit, False

    def to_server_ns(self, t_ns: int, received_ns: int | None = None) -> tuple[int, float]:
        """Server time of a client time, and its uncertainty, in nanoseconds.

        Args:
            t_ns: by the client's clock.
            received_ns: when the server heard of it. It tells apart what a clock that was set back said before and
                after: the latest time before it counts. Without it, the last segment in which t can have been.

        Raises:
            ValueError: no exchange with this clock yet.
        """
        if not self._segments:
            raise ValueError(f"nothing is known of the clock {self.name!r}: send a clock report first")
        found: list[tuple[float, int, int, float]] = []  # how far outside its segment, segment, time, uncertainty
        for i, segment in enumerate(self._segments):
            fit = segment.fit_for(t_ns)
            server, uncertainty = fit.to_server_ns(t_ns), fit.uncertainty_at(t_ns)
            begin, end = self._gap(i - 1)[0], self._gap(i)[1]
            if received_ns is not None:
                end = min(end, received_ns + uncertainty)
            found.append((max(begin - server, server - end, 0), i, server, uncertainty))
        nearest = min(outside for outside, _, _, _ in found)
        possible = [(i, server, uncertainty) for outside, i, server, uncertainty in found if outside == nearest]
        # Reports are prompt: of what is possible, the latest.
        i, server, uncertainty = max(possible, key=lambda x: x[1] if received_ns is not None else x[0])
        # Between the last burst before a step and the first after it, nobody knows on which side t was.
        spread = 0
        for other, t, _ in possible:
            first, last = self._gap(min(i, other))
            if abs(other - i) == 1 and first <= min(t, server) and max(t, server) <= last:
                spread = max(spread, abs(t - server))
        return server, uncertainty + spread

    def _gap(self, i: int) -> tuple[float, float]:
        """Server times of the last burst of segment i and of the first of the next: between them it stepped."""
        before = self._segments[i].bursts[-1].server_ns if i >= 0 else -math.inf
        after = self._segments[i + 1].bursts[0].server_ns if i + 1 < len(self._segments) else math.inf
        return before, after


def exchange_of_pair(client_ns: int, server_ns: int, uncertainty_ns: int) -> Exchange:
    """An exchange that says: the client's clock read `client_ns` at the server's time `server_ns`, within so much.

    For clocks that cannot be read for an exchange, as of an acquisition system: the moments that both clocks know
    (flips and their photodiode signals, digital pulses) relate it to the server's.
    """
    return client_ns - uncertainty_ns, server_ns, server_ns, client_ns + uncertainty_ns


def _best(name: str, exchanges: Sequence[Exchange]) -> _Burst:
    """The exchange with the shortest round trip."""
    in_order = [x for x in exchanges if x[3] >= x[0] and x[2] >= x[1] and x[3] - x[0] >= x[2] - x[1]]
    if not in_order:
        raise ValueError(
            f"clock {name!r}: an exchange is (t1, t2, t3, t4) with t1 <= t4 by the client's clock, t2 <= t3 by the "
            f"server's and t4 - t1 >= t3 - t2, in nanoseconds; none of {len(exchanges)} is"
        )
    t1, t2, t3, t4 = min(in_order, key=lambda x: (x[3] - x[0]) - (x[2] - x[1]))
    return _Burst((t1 + t4) // 2, (t2 + t3) // 2, ((t4 - t1) - (t3 - t2)) / 2)


def _fit(bursts: Sequence[_Burst], rate: _Rate, before: ClockFit | None, step: Step | None) -> ClockFit:
    """A weighted line through bursts of one segment.

    A burst's error against the others is bounded by how much longer its way was than the shortest: its weight.

    Args:
        rate: what was known of the rate when the segment began; it yields to the bursts as these come to say more.
        before: the mapping so far, None if there is none in this segment.
        step: to be kept with the mapping.
    """
    last = bursts[-1]
    shortest = min(burst.half_rtt_ns for burst in bursts)
    floor = max(_FLOOR_NS, shortest / 4)
    weights = [1 / ((burst.half_rtt_ns - shortest) + floor) ** 2 for burst in bursts]
    total = sum(weights)
    x = [float(burst.at_ns - last.at_ns) for burst in bursts]
    y = [float(burst.offset_ns - last.offset_ns) for burst in bursts]
    mean_x = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    mean_y = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    spread = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    product = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    known = 1 / rate.uncertainty**2
    slope = (product + known * rate.slope) / (spread + known)
    squares = sum(w * (b - mean_y - slope * (a - mean_x)) ** 2 for w, a, b in zip(weights, x, y, strict=True))
    scatter = math.sqrt(squares / total)
    # The truth is within half a round trip of both ends of any chord, which bounds what the rate can be.
    bounds = [
        (last.half_rtt_ns + burst.half_rtt_ns) / -a + abs(b / a - slope)
        for burst, a, b in zip(bursts[:-1], x[:-1], y[:-1], strict=True)
    ]
    bounds.append(rate.uncertainty + abs(slope - rate.slope))
    if before is not None:
        bounds.append(before.drift_uncertainty_ppm * 1e-6 + abs(slope - before.drift_ppm * 1e-6))
    return ClockFit(
        at_ns=last.at_ns,
        offset_ns=last.offset_ns + round(mean_y - slope * mean_x),
        drift_ppm=slope * 1e6,
        uncertainty_ns=shortest + scatter,
        drift_uncertainty_ppm=max(WANDER_PPM, min(bounds) * 1e6),
        first_ns=bursts[0].at_ns,
        last_ns=last.at_ns,
        bursts=len(bursts),
        step=step,
    )


class MonotonicCheck:
    """Whether the mapped times of one stream of events go forward."""

    def __init__(self, tolerance_ns: int = BACKWARD_TOLERANCE_NS) -> None:
        self.tolerance_ns = tolerance_ns
        self.latest_ns: int | None = None

    def back_ns(self, t_ns: int) -> int:
        """How far this time lies before the latest one, 0 if no more than tolerated. After a fault it starts anew."""
        back = 0 if self.latest_ns is None else self.latest_ns - t_ns
        if back > self.tolerance_ns:
            self.latest_ns = t_ns
            return back
        self.latest_ns = t_ns if self.latest_ns is None else max(self.latest_ns, t_ns)
        return 0


# ---------------------------------------------------------------------------------------------- onsets

Truth = Literal["photodiode", "ttl", "flip", "received"]
"""Where an onset is from, best first; "received" is only known to be too late."""

_EARLIEST_NS = 3_600_000_000_000  # an onset an hour before its report is one in other units
_LATEST_NS = 5_000_000  # and one after it is impossible but for the uncertainty of clocks


@dataclass(frozen=True)
class Onset:
    """t_ns: server time. by: where it is from. problems: why better sources of it were passed over."""

    t_ns: int
    by: Truth
    uncertainty_ns: float
    problems: tuple[str, ...] = ()


def onset(
    event: Event,
    clocks: Mapping[str, ClockEstimator],
    units: Mapping[str, float],
    received_ns: int,
) -> Onset:
    """When a presentation began, by the best source that there is: photodiode, digital pulse, flip time, receipt.

    Args:
        event: as the rig reported it; it is not changed.
        clocks: by name, with the exchanges so far.
        units: nanoseconds per unit of each clock (1e9 for seconds, 1e9 / 30000 for samples at 30 kHz); those not named
            count nanoseconds.
        received_ns: server time at which the report came. An onset that lies after it, or more than an hour before, is
            not believed.
    """
    problems: list[str] = []
    sources: list[tuple[Truth, Number | None, str | None]] = [
        ("photodiode", event.diode, event.acquisition),
        ("ttl", event.ttl, event.acquisition),
        ("flip", event.t_on, event.clock),
    ]
    for by, value, clock in sources:
        if value is None:
            continue
        if clock is None or clock not in clocks or clocks[clock].mapping is None:
            which = "a clock without a name" if clock is None else f"clock {clock}, for which there is no clock report"
            problems.append(f"{by}: by {which}")
            continue
        raw_ns = in_ns(value, units.get(clock, 1.0))
        t_ns, uncertainty = clocks[clock].to_server_ns(raw_ns, received_ns)
        if t_ns > received_ns + _LATEST_NS + uncertainty or t_ns < received_ns - _EARLIEST_NS:
            away = (t_ns - received_ns) / 1e9
            problems.append(f"{by}: {away:+.3f} s from its report by clock {clock}; are its units configured rightly?")
            continue
        return Onset(t_ns, by, uncertainty, tuple(problems))
    return Onset(received_ns, "received", math.inf, tuple(problems))


def in_ns(value: Number, ns_per_unit: float) -> int:
    """A raw time in nanoseconds; integers of a clock that counts nanoseconds stay exact.

    Raises:
        ValueError: not a number, or one beyond 64 bits.
    """
    if not abs(value * ns_per_unit) < 2.0**63:  # also NaN
        raise ValueError(f"a time should be a finite number below 2^63 nanoseconds (292 years), got {value}")
    exact = isinstance(value, int) and ns_per_unit == int(ns_per_unit)
    return round(value * int(ns_per_unit)) if exact else round(value * ns_per_unit)


class Watermark:
    """How far the acquisition's data has come: only what lies before that may be counted.

    Times are nanoseconds of one clock, whichever; a window is complete when data has come to its end and a guard
    further, since spikes come in buffers that overtake each other.

    Args:
        guard_ms: 30 covers the buffers of Open Ephys (10 ms of USB and 20 ms of the program).
    """

    def __init__(self, guard_ms: float = 30.0) -> None:
        if guard_ms < 0 or not math.isfinite(guard_ms):
            raise ValueError(f"guard_ms should be a finite number of at least 0, got {guard_ms}")
        self.guard_ns = round(guard_ms * 1e6)
        self.passed_ns: int | None = None

    def passed(self, t_ns: int) -> None:
        """All data up to here has come. Going back has no effect: what has come stays."""
        self.passed_ns = t_ns if self.passed_ns is None else max(self.passed_ns, t_ns)

    def complete(self, t_on_ns: int, window_end_ms: float) -> bool:
        """Whether a window that ends so long after its onset can be counted."""
        return self.passed_ns is not None and self.passed_ns >= self.due_ns(t_on_ns, window_end_ms)

    def due_ns(self, t_on_ns: int, window_end_ms: float) -> int:
        """The time data must have come to for that."""
        return t_on_ns + round(window_end_ms * 1e6) + self.guard_ns


def bursts_needed(last_ns: int | None, now_ns: int, every_ns: int = 5_000_000_000) -> bool:
    """Whether it is time for another burst of exchanges with the server."""
    return last_ns is None or now_ns - last_ns >= every_ns


def latest_uncertainty_ns(clocks: Iterable[ClockEstimator], server_ns: int) -> float | None:
    """The largest uncertainty of these clocks at this server time, None if none of them is known."""
    fits = [clock.mapping for clock in clocks if clock.mapping is not None]
    return max((fit.uncertainty_at(fit.to_client_ns(server_ns)) for fit in fits), default=None)
