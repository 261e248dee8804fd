"""A session without a wire: for simulations, for tests, and for rigs that are programs in Python themselves."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from cortexloop.realtime import messages as m
from cortexloop.realtime.session import Outgoing, Session

T = TypeVar("T", bound=m.Reply)


class RequestError(RuntimeError):
    """A session refused a request. code: see `cortexloop.realtime.messages.Code`. retry: it may succeed later."""

    def __init__(self, error: m.Error) -> None:
        super().__init__(f"{error.code}: {error.text}")
        self.code, self.retry = error.code, error.retry


class Loop:
    """Ask, show, tell, in one process; the same messages, checks and journal as over a network.

        loop = Loop(session)
        batch, images = loop.ask()
        loop.tell(batch, responses)              # [items, units]

    Args:
        session: of which this is the only user; one thread at a time.
        client: the name in the journal.
        roles: as in `Hello`.
    """

    def __init__(
        self, session: Session, client: str = "in-process", roles: Sequence[str] = ("display", "acquisition")
    ) -> None:
        self.session, self.client = session, client
        self._done = threading.Event()
        session.wake = self._done.set
        run = secrets.token_hex(4)  # or ids of before a restart would come again
        self._ids = (f"{client}-{run}-{number}" for number in itertools.count())
        self.welcome = self.request(msgspec.convert({"type": "hello", "id": self.new_id(), "client": client,
                                                     "roles": list(roles)}, m.Hello))[0]  # fmt: skip

    def new_id(self) -> str:
        """For a request: one that was not used before, neither here nor before a restart."""
        return next(self._ids)

    def request(self, request: m.Request, buffer: bytes | memoryview | None = None) -> Outgoing:
        """Send a message and wait for its reply, also an error.

        Asks wait in real time, whatever the session's clock is.
        """
        reply = self.session.handle(self.client, request, buffer)
        while reply is None:
            self._done.clear()
            reply = next((out for client, out in self.session.poll() if client == self.client), None)
            if reply is None:
                due = self.session.next_wake_ns()
                wait = 0.05 if due is None else max(0.0, (due - self.session.now_ns()) / 1e9)
                self._done.wait(min(wait, 0.05) + 1e-4)
        return reply

    def ask(self, after: str | None = None, within_ms: float | None = None) -> tuple[m.Batch, NDArray[np.uint8]]:
        """The batch to show, and its images uint8 [items, H, W, 3]; see `cortexloop.realtime.messages.Ask`.

        Raises:
            RequestError: there is none, because the session is paused, finished or faulty.
        """
        reply = self.request(m.Ask(id=self.new_id(), after=after, within_ms=within_ms))
        batch = _good(reply.message, m.Batch)
        assert reply.buffer is not None
        return batch, np.frombuffer(reply.buffer, np.uint8).reshape(batch.shape)

    def shown(self, events: Sequence[m.Event]) -> m.Ack:
        """Report presentations.

        Raises:
            RequestError: unknown presentations.
        """
        return _good(self.request(m.Shown(id=self.new_id(), events=list(events))).message, m.Ack)

    def tell(
        self,
        batch: m.Batch,
        responses: ArrayLike,
        *,
        units: Sequence[str] | None = None,
        item_ids: Sequence[str] | None = None,
        pres_ids: Sequence[str] | None = None,
        status: Sequence[str] | None = None,
        final: bool = False,
        kind: str = "rate",
    ) -> m.Ack:
        """Tell responses [rows, units], or [rows] of one unit.

        Args:
            batch: which they are about.
            responses: one row per item of the batch, or per name in `item_ids` or `pres_ids`.
            units: names, "0", "1", ... if None.
            item_ids, pres_ids, status, final, kind: see `cortexloop.realtime.messages.Tell`.

        Raises:
            RequestError: they do not fit the batch.
        """
        values = np.asarray(responses, np.float64)
        values = values[:, None] if values.ndim == 1 else values
        if pres_ids is not None and item_ids is None:
            of = dict(zip(batch.pres_ids, batch.order, strict=True))
            item_ids = [batch.items[of[pres]].item_id if pres in of else "unknown" for pres in pres_ids]
        fields: dict[str, Any] = {
            "type": "tell",
            "id": self.new_id(),
            "batch_id": batch.batch_id,
            "item_ids": [item.item_id for item in batch.items] if item_ids is None else list(item_ids),
            "pres_ids": None if pres_ids is None else list(pres_ids),
            "units": [str(i) for i in range(values.shape[1])] if units is None else list(units),
            "status": None if status is None else list(status),
            "dtype": "float64",
            "kind": kind,
            "final": final,
        }
        tell = msgspec.convert(fields, m.Tell)
        return _good(self.request(tell, np.ascontiguousarray(values, "<f8").tobytes()).message, m.Ack)

    def control(self, kind: type[m.Note] | type[m.Pause] | type[m.Resume] | type[m.Stop], text: str = "") -> m.Ack:
        """Send a note, or pause, resume or stop the session.

        Raises:
            RequestError: it is over.
        """
        if kind is m.Note:
            request: m.Request = m.Note(id=self.new_id(), text=text)
        elif kind is m.Resume:
            request = m.Resume(id=self.new_id())
        else:
            assert kind is m.Pause or kind is m.Stop
            request = kind(id=self.new_id(), reason=text)
        return _good(self.request(request).message, m.Ack)


def _good(reply: m.Reply, kind: type[T]) -> T:
    if isinstance(reply, m.Error):
        raise RequestError(reply)
    assert isinstance(reply, kind)
    return reply
