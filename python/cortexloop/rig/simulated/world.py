"""Time at a simulated rig: a world that waits, clocks that drift and step, and a server within that world."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.messages import Error, Hello, Reply, Request
from cortexloop.realtime.session import Outgoing, Session
from cortexloop.rig.client import RigClient
from cortexloop.rig.links import ClientLink, Link
from cortexloop.rig.protocol import Bytes
from cortexloop.rig.simulated.days import Day

T = TypeVar("T")

Answer = tuple[Reply, bytes | memoryview | None]
"""A reply and its buffer."""


class World(Protocol):
    """The true time, nanoseconds; that of the server's clock."""

    def now_ns(self) -> int:
        """What time it is."""
        ...

    def until(self, t_ns: int) -> None:
        """Wait until then; a time in the past does not wait."""
        ...


class RealWorld:
    """The computer's own time."""

    def now_ns(self) -> int:
        """See `World`."""
        return time.perf_counter_ns()

    def until(self, t_ns: int) -> None:
        """See `World`."""
        while (left := t_ns - time.perf_counter_ns()) > 0:
            time.sleep(left / 1e9)


class RigClock:
    """A clock of a rig: reads (t - zero) * (1 + ppm / 10^6), and steps.

    Args:
        zero_ns: true time at which it read 0.
        ppm: how much faster than true time it runs.
    """

    def __init__(self, zero_ns: int, ppm: float) -> None:
        self.zero_ns, self.ppm, self.steps_ns = zero_ns, ppm, 0

    def read_ns(self, t_ns: int) -> int:
        """What it says at a true time."""
        since = t_ns - self.zero_ns
        return since + round(since * self.ppm * 1e-6) + self.steps_ns

    def true_ns(self, reading_ns: int) -> int:
        """When it says that."""
        return self.zero_ns + round((reading_ns - self.steps_ns) / (1 + self.ppm * 1e-6))

    def step(self, by_ns: int) -> None:
        """Set it forward or back."""
        self.steps_ns += by_ns


class Line(Link, Protocol):
    """A link whose program may crash: `connect` begins anew, as another connection."""

    def connect(self, name: str) -> None:
        """Be a client of this name from now on."""
        ...


class NetworkLine:
    """A line to a server over the network, see `RigClient` for addresses.

    Args:
        address: "tcp://host:port" for ZeroMQ, "tcp-raw://host:port" for a plain TCP connection.
        secret: the server's, if it has one.
    """

    def __init__(self, address: str, secret: str | None = None) -> None:
        self._address, self._secret = address, secret
        self._client: RigClient | None = None

    def connect(self, name: str) -> None:
        """See `Line`."""
        self.close()
        self._client = RigClient(self._address, name, secret=self._secret, heartbeat=None)

    def request(self, request: Request, buffer: Bytes | None = None) -> Answer:
        """See `cortexloop.rig.links.Link`."""
        if self._client is None:
            raise RuntimeError("connect first")
        return ClientLink(self._client).request(request, buffer)

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None


@dataclass(eq=False)
class _Job:
    due_ns: int
    future: Future[Any]
    work: Callable[[], Any]

    def finish(self) -> None:
        try:
            self.future.set_result(self.work())
        except BaseException as error:  # the future carries it to whoever asks for the result
            self.future.set_exception(error)


class SlowExecutor(Executor):
    """Does the work when it is due by a simulated clock, in the thread that moves the clock.

    Args:
        clock: the simulated clock.
        takes_ms: what the next piece of work takes.
    """

    def __init__(self, clock: ManualClock, takes_ms: Callable[[], float]) -> None:
        self._clock, self._takes_ms = clock, takes_ms
        self._jobs: list[_Job] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See `concurrent.futures.Executor`."""
        future: Future[T] = Future()
        due = self._clock.monotonic_ns() + round(self._takes_ms() * 1e6)
        self._jobs.append(_Job(due, future, lambda: fn(*args, **kwargs)))
        return future

    def due_ns(self) -> int | None:
        """When the next work is done."""
        return min((job.due_ns for job in self._jobs), default=None)

    def run(self) -> None:
        """Do what is due."""
        due = [job for job in self._jobs if job.due_ns <= self._clock.monotonic_ns()]
        self._jobs = [job for job in self._jobs if job not in due]
        for job in due:
            job.finish()


class SimulatedWorld:
    """A session in a world whose time passes only when somebody waits; and the link to it, with its mishaps.

    Everything happens in one thread and follows from the seed.

    Args:
        session: made with `clock` and `executor`.
        clock: the world's time.
        executor: the session's.
        day: how slow and unreliable network and server are.
        seed: of its mishaps.
        timeout_s: how long a client waits for a reply that got lost.
        restart: kills the session and starts it again, from what is on disk; None: it never crashes.
    """

    def __init__(
        self,
        session: Session,
        clock: ManualClock,
        executor: SlowExecutor,
        day: Day,
        seed: int = 0,
        timeout_s: float = 0.5,
        restart: Callable[[Session], tuple[Session, SlowExecutor]] | None = None,
    ) -> None:
        self.session, self.client = session, ""
        self._clock, self._executor, self._day = clock, executor, day
        self._rng = np.random.default_rng([seed, 1])
        self._timeout_ns = round(timeout_s * 1e9)
        self._arrived: dict[str, Outgoing] = {}
        self._again: list[tuple[str, Request, bytes | None]] = []
        self._restart = restart
        self._greeted: set[str] = set()
        self.repeated = 0
        """Requests that came once more."""
        self.crashes = 0
        """How often the server was killed."""

    def now_ns(self) -> int:
        """See `World`."""
        return self._clock.monotonic_ns()

    def until(self, t_ns: int) -> None:
        """See `World`. The session does what is due on the way."""
        while (now := self.now_ns()) < t_ns:
            self._advance(min(t_ns, self._next_ns(now) or t_ns))

    def connect(self, name: str) -> None:
        """See `Line`."""
        self.client = name
        self._arrived.pop(name, None)

    def request(self, request: Request, buffer: Bytes | None = None) -> Answer:
        """See `cortexloop.rig.links.Link`."""
        raw = None if buffer is None else bytes(buffer)
        self._travel()
        if self._rng.random() < self._day.lost_messages / 2:
            self._wait_in_vain()
        self._crash_perhaps()
        if self._again and self._rng.random() < 0.5:
            late = self._again.pop(0)
            self.repeated += 1
            self._handle(*late)
        if self._rng.random() < self._day.repeated_messages:
            self._again.append((self.client, request, raw))
        reply = self._handle(self.client, request, raw)
        while reply is None:
            now = self.now_ns()
            due = self._next_ns(now)
            if due is None:
                raise RuntimeError("the session waits for nothing, and the rig for the session")
            self._advance(due)
            reply = self._arrived.pop(self.client, None)
            if reply is not None and reply.message.id != request.id:
                reply = None  # to an earlier ask, which came once more
        self._crash_perhaps()
        if self._rng.random() < self._day.lost_messages / 2:
            self._wait_in_vain()
        self._travel()
        return reply.message, reply.buffer

    def _handle(self, client: str, request: Request, raw: bytes | None) -> Outgoing | None:
        """As a server does: nothing before a hello."""
        if isinstance(request, Hello):
            self._greeted.add(client)
        elif client not in self._greeted:
            return Outgoing(Error(id=request.id, code="NO_HELLO", text="say hello first", retry=True))
        return self.session.handle(client, request, raw)

    def _crash_perhaps(self) -> None:
        """The server is killed, and whoever waits for a reply waits in vain."""
        if self._restart is None or self._rng.random() >= self._day.server_crashes / 2:
            return
        self.crashes += 1
        self.session, self._executor = self._restart(self.session)
        self._greeted.clear()
        self._arrived.clear()
        self.until(self.now_ns() + 2_000_000_000)
        raise TimeoutError("the server was killed")

    def _travel(self) -> None:
        """One way through the network."""
        milliseconds = self._rng.exponential(self._day.network_ms / 2) + self._day.network_ms / 2
        if self._rng.random() < 0.02:
            milliseconds += self._rng.exponential(self._day.network_tail_ms)
        self.until(self.now_ns() + round(milliseconds * 1e6))

    def _wait_in_vain(self) -> None:
        self.until(self.now_ns() + self._timeout_ns)
        raise TimeoutError("a message got lost")

    def _next_ns(self, now: int) -> int | None:
        """When the session has something to do next; a little later than now at least."""
        times = [t for t in (self._executor.due_ns(), self.session.next_wake_ns()) if t is not None]
        return max(min(times), now + 1_000) if times else None

    def _advance(self, t_ns: int) -> None:
        self._clock.advance((t_ns - self.now_ns()) / 1e9)
        self._executor.run()
        self._arrived.update(self.session.poll())
