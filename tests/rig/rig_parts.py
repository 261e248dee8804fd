"""Sessions, servers and neurons for the tests of the rig."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cortexloop.realtime import messages as m
from cortexloop.realtime.session import Session
from cortexloop.realtime.settings import SessionSettings, StreamSettings
from cortexloop.realtime.sources.fixed import FixedImages
from cortexloop.rig.server import Server

SIZE = (12, 10)
UNITS = ["a", "b"]


def pictures(n: int, seed: int = 0) -> np.ndarray:
    """uint8 [n, 12, 10, 3], all different."""
    return np.random.default_rng(seed).integers(0, 256, (n, *SIZE, 3), dtype=np.uint8)


def neurons(image: Any) -> list[float]:
    """The responses of two units to an image; exact in float32."""
    digest = hashlib.sha256(bytes(image)).digest()
    return [float(digest[0]), float(digest[1]) / 4]


def make_session(folder: Path, *, n: int = 12, per_batch: int = 4, rounds: int = 1, **settings: Any) -> Session:
    """A session that shows fixed images, two references first in each batch."""
    settings = {"within_ms": 5000.0, "stale_after_s": 600.0, **settings}
    return Session.create(
        folder,
        SessionSettings(session="test", streams=[StreamSettings(name="images")], **settings),
        {"images": FixedImages(pictures(n), per_batch=per_batch, rounds=rounds)},
        pictures(2, seed=99),
    )


class FakeSession:
    """Answers as it is told to; for what a real session does not do on demand."""

    def __init__(self, answer: Callable[[str, m.Request, Any], Any] | None = None) -> None:
        self.wake: Callable[[], None] | None = None
        self.seen: list[tuple[str, m.Request]] = []
        self.later: list[tuple[str, Any]] = []
        self.answer = answer or (lambda client, request, buffer: (m.Ack(id=request.id, journaled=False), None))

    def handle(self, client: str, request: m.Request, buffer: Any = None) -> Any:
        self.seen.append((client, request))
        if isinstance(request, m.Hello):
            point = m.ResumePoint()
            return (
                m.Welcome(id=request.id, session="fake", version=1, server_clock_ns=1, resume=point, config="0"),
                None,
            )
        return self.answer(client, request, buffer)

    def poll(self) -> list[tuple[str, Any]]:
        due, self.later = self.later, []
        return due

    def next_wake_ns(self) -> int | None:
        return None

    def now_ns(self) -> int:
        return 0


@contextlib.contextmanager
def serving(session: Any, **options: Any) -> Iterator[Server]:
    """A server in a thread of its own, on free ports; its thread has to end without an exception."""
    options = {"zmq": "tcp://127.0.0.1:*", "tcp": "127.0.0.1:0", **options}
    server = Server(session, **options)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"
        if failure:
            raise failure[0]


def addresses(server: Server) -> dict[str, str]:
    """By transport, as a client takes them."""
    return {"zmq": str(server.zmq_address), "tcp": f"tcp-raw://{server.tcp_address}"}


def play(rig: Any, *, shown: bool = True) -> list[str]:
    """Show and tell until the session is over; the names of the batches."""
    names = []
    for batch in rig.batches():
        names.append(batch.batch_id)
        presentations = list(batch.presentations())
        if shown:
            rig.shown([{"pres_id": p.pres_id, "t_on": 0.5, "clock": "screen"} for p in presentations])
        rig.tell(batch, np.array([neurons(p.image) for p in presentations], np.float32), units=UNITS)
    return names
