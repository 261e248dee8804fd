"""Clocks that a session is given, so that tests and replays can run on a clock of their own."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where a session gets its time from."""

    def monotonic_ns(self) -> int:
        """Nanoseconds of a clock that never steps back; its zero means nothing."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since 1970 (UTC) by the computer's calendar clock, which may step."""
        ...


class SystemClock:
    """The computer's clocks."""

    def monotonic_ns(self) -> int:
        """See `Clock`."""
        return time.perf_counter_ns()

    def wall_ns(self) -> int:
        """See `Clock`."""
        return time.time_ns()


class ManualClock:
    """A clock that stands still until it is moved: for tests and simulated rigs.

    Args:
        monotonic_ns, wall_ns: where the two clocks start.
    """

    def __init__(self, monotonic_ns: int = 0, wall_ns: int = 1_700_000_000_000_000_000) -> None:
        self._monotonic, self._wall = monotonic_ns, wall_ns

    def monotonic_ns(self) -> int:
        """See `Clock`."""
        return self._monotonic

    def wall_ns(self) -> int:
        """See `Clock`."""
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: a negative number of seconds, which the monotonic clock cannot do.
        """
        if seconds < 0:
            raise ValueError(f"time goes forward only, got {seconds} s; use step_wall for a step of the wall clock")
        step = round(seconds * 1e9)
        self._monotonic += step
        self._wall += step

    def step_wall(self, seconds: float) -> None:
        """Set the calendar clock forward or back, as a time server does; the monotonic clock goes on."""
        self._wall += round(seconds * 1e9)
