"""A client for rigs: this one file, the standard library and pyzmq. Copy it to the rig's computer; Python >= 3.8.

    from client import RigClient

    with RigClient("tcp://192.168.1.10:5557", "psychopy", secret="...") as rig:
        rig.sync_clock()
        for batch in rig.batches():
            for presentation in batch.presentations():
                ...show presentation.image, remember when...
            rig.shown([{"pres_id": p.pres_id, "t_on": t, "clock": "psychopy"}, ...])
            rig.tell(batch, responses, units=["u1"])

A request that gets no answer is sent again, under the same id and over a new connection, so that it takes effect once.
"""

from __future__ import annotations

import array
import contextlib
import json
import math
import socket
import struct
import sys
import threading
import time
import uuid
from typing import Any, Callable, Dict, Iterator, NamedTuple, Sequence  # noqa: UP035

VERSION = 1
Header = Dict[str, Any]  # noqa: UP006 - Python 3.8 evaluates this


class RigError(Exception):
    """The server refused a request. code: see `text`; retry: the same request may succeed later."""

    def __init__(self, code: str, text: str, retry: bool = False) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text, self.retry = code, text, retry


class RigTimeout(RigError):  # noqa: N818
    """No answer, however often the request was sent."""

    def __init__(self, text: str) -> None:
        super().__init__("TIMEOUT", text, True)


class Presentation(NamedTuple):
    """One showing of one image: its name, the image's, whether it is a reference, and pixels (see `Batch.image`)."""

    pres_id: str
    item_id: str
    kind: str
    image: Any


class Batch:
    """A batch of images to show.

    Attributes:
        batch_id, stream, generation, kind, items, order, pres_ids: as the server sent them.
        shape: (number of images, height, width, 3).
        pixels: the bytes of all images, uint8 sRGB; empty if only the header was asked for.
    """

    def __init__(self, header: Header, pixels: bytes | bytearray) -> None:
        self.batch_id: str = header["batch_id"]
        self.stream: str | None = header["stream"]
        self.generation: int = header["generation"]
        self.kind: str = header["kind"]
        self.items: list[Header] = header["items"]
        self.order: list[int] = header["order"]
        self.pres_ids: list[str] = header["pres_ids"]
        self.shape: tuple[int, int, int, int] = (len(self.items), *header["shape"][1:])
        self.pixels = pixels

    @property
    def images(self) -> Any:
        """All images as a NumPy array [n, height, width, 3]."""
        import numpy

        return numpy.frombuffer(self.pixels, numpy.uint8).reshape(self.shape)

    def image(self, index: int) -> Any:
        """One image [height, width, 3]: a NumPy array if NumPy is there, else a memoryview of that shape."""
        if not self.pixels:
            return None
        _, height, width, channels = self.shape
        size = height * width * channels
        part = memoryview(self.pixels)[index * size : (index + 1) * size]
        try:
            import numpy
        except ImportError:
            return part.cast("B", (height, width, channels))
        return numpy.frombuffer(part, numpy.uint8).reshape(height, width, channels)

    def presentations(self) -> Iterator[Presentation]:
        """What to show, in this order."""
        for index, pres_id in zip(self.order, self.pres_ids):  # noqa: B905
            item = self.items[index]
            yield Presentation(pres_id, item["item_id"], item["kind"], self.image(index))

    def items_of(self, pres_ids: Sequence[str]) -> list[str]:
        """The item of each of these presentations."""
        index_of = dict(zip(self.pres_ids, self.order))  # noqa: B905
        return [self.items[index_of[pres_id]]["item_id"] for pres_id in pres_ids]

    def __repr__(self) -> str:
        return f"Batch({self.batch_id!r}, {len(self.items)} images, {len(self.order)} presentations)"


class RigClient:
    """A link to a server. Not for use by several threads at once; give each its own.

    Args:
        address: "tcp://host:port" for ZeroMQ, "tcp-raw://host:port" for a plain TCP connection.
        name: of this program, as it is to appear in the journal.
        secret: the server's, if it has one.
        roles: "display", "acquisition", "viewer".
        timeout: seconds until a request is sent again.
        retries: how often, before `RigTimeout`.
        heartbeat: seconds between signs of life, sent from a thread of their own; None: none.
        clock_ns: the clock whose readings `sync_clock` relates to the server's.

    Attributes:
        welcome: what the server answered to the last hello.
        resent: requests that had to be sent again so far.
    """

    def __init__(
        self,
        address: str,
        name: str = "python",
        *,
        secret: str | None = None,
        roles: Sequence[str] = ("display", "acquisition"),
        timeout: float = 2.0,
        retries: int = 10,
        heartbeat: float | None = 1.0,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.address, self.name, self.timeout, self.retries = address, name, timeout, retries
        self.welcome: Header = {}
        self.resent = 0
        self._secret, self._roles, self._clock_ns = secret, list(roles), clock_ns
        self._link: _Link | None = None
        _check_address(address)
        self._prefix, self._number = uuid.uuid4().hex[:12], 0
        self._closed = threading.Event()
        self._beating: threading.Thread | None = None
        if heartbeat is not None:
            self._beating = threading.Thread(target=self._beat, args=(heartbeat,), daemon=True)
            self._beating.start()

    def __enter__(self) -> RigClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the session goes on."""
        self._closed.set()
        if self._beating is not None and self._beating is not threading.current_thread():
            self._beating.join(self.timeout + 1.0)
        self._drop()

    # ------------------------------------------------------------------------------------ what a rig says

    def hello(self) -> Header:
        """Connect and introduce this program; every other call does it first where needed.

        Returns: the server's welcome: session, server_clock_ns, resume (batch_id, told, last_tell_id), config.
        """
        self._drop()
        return self.request({"type": "hello"})[0]

    def ask(
        self,
        after: Batch | str | None = None,
        *,
        within_ms: float | None = None,
        max_items: int | None = None,
        need: str = "images",
    ) -> Batch:
        """The batch to show after another one (None: the first that is not told); the same until it is told.

        Args:
            after: the batch that was shown last.
            within_ms: when it has to be here; else a filler comes, of kind "filler". The session's own if None.
            max_items: fetch the images in parts of so many.
            need: "header" for no pixels.

        Raises:
            RigError: code PAUSED (ask again later), FINISHED, ...
        """
        header: Header = {"type": "ask", "need": need}
        if after is not None:
            header["after"] = after.batch_id if isinstance(after, Batch) else after
        if within_ms is not None:
            header["within_ms"] = within_ms
        if max_items is not None:
            header["max_items"] = max_items
        # All parts under one id: the server knows by it which batch it answered with, also for a filler.
        header["id"] = self._next_id()
        reply, pixels = self.request(header)
        first, parts = reply, bytearray(pixels)
        while reply["more"]:
            header["part"] = header.get("part", 0) + 1
            for _ in range(self.retries + 1):
                reply, pixels = self.request(header)
                if reply["first"] == header["part"] * first["shape"][0]:  # not an earlier part that came twice
                    break
            else:
                raise RigTimeout(f"part {header['part']} of batch {first['batch_id']} was asked for, others came")
            if reply["batch_id"] != first["batch_id"]:  # the server was restarted meanwhile
                return self.ask(after, within_ms=within_ms, max_items=max_items, need=need)
            parts += pixels
        return Batch(first, bytes(parts))

    def batches(self, after: Batch | str | None = None, *, pause: float = 0.25) -> Iterator[Batch]:
        """One batch after the other until the session is over; while it is paused, ask every `pause` seconds."""
        while True:
            try:
                batch = self.ask(after)
            except RigError as error:
                if error.code == "FINISHED":
                    return
                if not error.retry or isinstance(error, RigTimeout):
                    raise
                time.sleep(0.01 if error.code == "BUSY" else pause)  # "BUSY" came after waiting for the deadline
                continue
            yield batch
            after = batch

    def shown(self, events: Sequence[Header]) -> Header:
        """What was shown when. Each event: pres_id, and what is known of outcome ("ok", "no_fix", "abort", "late_flip",
        "not_shown"), t_on, t_off, clock, frame, missed, diode, ttl, acquisition."""
        return self.request({"type": "shown", "events": list(events)})[0]

    def tell(
        self,
        batch: Batch | str,
        responses: Any,
        *,
        units: Sequence[str],
        item_ids: Sequence[str] | None = None,
        pres_ids: Sequence[str] | None = None,
        status: Sequence[str] | None = None,
        kind: str = "rate",
        window_ms: Sequence[float] | None = None,
        baseline_ms: Sequence[float] | None = None,
        final: bool = False,
    ) -> Header:
        """Responses [rows, units].

        Rows are presentations (`pres_ids`), else items (`item_ids`); with neither, the presentations of `batch` in
        their order.

        Args:
            batch: what they are responses to.
            responses: a NumPy array or a list of rows; float64 arrays keep their precision, all else goes as float32.
            units: a name for each column.
            item_ids, pres_ids: what the rows belong to.
            status: per row "ok", "missing", "artifact" or "gap"; what is not ok is shown again.
            kind: "count", "rate" or "score".
            window_ms, baseline_ms: counting windows from stimulus onset.
            final: nothing more will come for this batch.

        Returns: accepted (rows), ignored, dup.
        """
        batch_id = batch
        if isinstance(batch, Batch):
            batch_id = batch.batch_id
            if pres_ids is None and item_ids is None:
                pres_ids = batch.pres_ids
            if pres_ids is not None and item_ids is None:
                item_ids = batch.items_of(pres_ids)
        if item_ids is None:
            raise ValueError("item_ids are needed, or a batch that was asked for instead of its name")
        data, dtype = _numbers(responses, len(item_ids), len(units))
        header: Header = {
            "type": "tell",
            "batch_id": batch_id,
            "item_ids": list(item_ids),
            "units": list(units),
            "dtype": dtype,
            "kind": kind,
            "final": final,
        }
        optional = {
            "pres_ids": pres_ids,
            "status": status,
            "window_ms": window_ms,
            "baseline_ms": baseline_ms,
        }
        header.update({name: list(value) for name, value in optional.items() if value is not None})
        return self.request(header, data)[0]

    def status(self) -> Header:
        """How it is going: state, streams, deadline_misses, ..."""
        return self.request({"type": "status"})[0]

    def note(self, text: str) -> Header:
        """Put a remark into the journal."""
        return self.request({"type": "note", "text": text})[0]

    def pause(self, reason: str = "") -> Header:
        """No more batches until `resume`."""
        return self.request({"type": "pause", "reason": reason})[0]

    def resume(self) -> Header:
        """Go on."""
        return self.request({"type": "resume"})[0]

    def stop(self, reason: str = "") -> Header:
        """End the session for good."""
        return self.request({"type": "stop", "reason": reason})[0]

    def heartbeat(self) -> Header:
        """Tell the server that this client is still here."""
        return self.request({"type": "heartbeat"})[0]

    def sync_clock(self, clock: str | None = None, exchanges: int = 8) -> Header:
        """Let the server estimate the offset of this computer's clock: at the start, then every few seconds.

        Args:
            clock: its name, as in the events of `shown`; this client's name if None.
            exchanges: how many; the fastest counts.
        """
        rows = []
        for _ in range(exchanges):
            t1 = self._clock_ns()
            reply, _ = self.request({"type": "clock", "t1_ns": t1})
            # Sent again after a loss, the reply belongs to a later sending: the round trip says so, and it loses.
            rows.append([t1, reply["t2_ns"], reply["t3_ns"], self._clock_ns()])
        return self.request({"type": "clock_report", "clock": clock or self.name, "exchanges": rows})[0]

    # ------------------------------------------------------------------------------------ requests

    def request(self, header: Header, buffer: Any = b"") -> tuple[Header, bytes]:
        """Send a message until it is answered; the reply and its buffer. The header gets an id if it has none.

        Raises:
            RigError: the server refused it.
            RigTimeout: no answer after all retries.
        """
        message = dict(header)
        message.setdefault("id", self._next_id())
        is_hello = message["type"] == "hello"
        if is_hello:
            message.update(self._hello())
        patience = self.timeout + (message.get("within_ms") or 0) / 1e3
        for attempt in range(self.retries + 1):
            self.resent += attempt > 0
            try:
                if self._link is None:
                    self._link = _connect(self.address, self.timeout)
                    if not is_hello:
                        self._introduce()
                reply, data = self._exchange(message, buffer, patience)
            except (OSError, _Lost):
                self._drop()
                if attempt < self.retries:
                    self._closed.wait(min(0.05 * attempt, 1.0))
                continue
            if reply["type"] != "error":
                if is_hello:
                    self.welcome = reply
                return reply, data
            if reply["code"] != "NO_HELLO" or is_hello:
                raise RigError(reply["code"], reply["text"], bool(reply.get("retry")))
            self._drop()
        raise RigTimeout(
            f"no answer from {self.address} to {message['type']}, sent {self.retries + 1} times, "
            f"{patience:g} s each; is the server running there?"
        )

    def _next_id(self) -> str:
        self._number += 1
        return f"{self._prefix}-{self._number}"

    def _hello(self) -> Header:
        hello = {"type": "hello", "client": self.name, "roles": self._roles, "versions": [VERSION]}
        return hello if self._secret is None else {**hello, "secret": self._secret}

    def _introduce(self) -> None:
        reply, _ = self._exchange({**self._hello(), "id": self._next_id()}, b"", self.timeout)
        if reply["type"] == "error":
            raise RigError(reply["code"], reply["text"], bool(reply.get("retry")))
        self.welcome = reply

    def _exchange(self, message: Header, buffer: Any, patience: float) -> tuple[Header, bytes]:
        link = self._link
        assert link is not None
        link.send(json.dumps(message, allow_nan=False).encode(), buffer)
        until = time.monotonic() + patience
        while True:
            header, data = link.receive(max(0.0, until - time.monotonic()))
            try:
                reply = json.loads(header)
                id = reply["id"]
                whole = reply["type"] != "batch" or len(data) in (0, math.prod(reply["shape"]))
            except (ValueError, KeyError, TypeError) as error:
                raise _Lost from error
            if not whole:
                raise _Lost
            if id == message["id"] or (id == "?" and reply["type"] == "error"):
                return reply, data
            # The answer to what was given up long ago.

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _beat(self, every: float) -> None:
        """Signs of life over a connection of their own, as the other may be waiting for a batch."""
        with RigClient(
            self.address, self.name, secret=self._secret, roles=self._roles, timeout=self.timeout, retries=0,
            heartbeat=None,
        ) as other:  # fmt: skip
            while not self._closed.wait(every):
                with contextlib.suppress(RigError):  # the other connection will find out, too
                    other.heartbeat()


def _numbers(responses: Any, rows: int, columns: int) -> tuple[bytes, str]:
    """Little-endian bytes in C order, and their type."""
    if hasattr(responses, "dtype"):
        import numpy

        values = numpy.asarray(responses)
        values = values[:, None] if values.ndim == 1 and columns == 1 else values
        if values.shape != (rows, columns):
            raise ValueError(f"responses should be [{rows}, {columns}] (rows, units), got {list(values.shape)}")
        dtype = "float64" if values.dtype == numpy.float64 else "float32"
        return numpy.ascontiguousarray(values, "<f8" if dtype == "float64" else "<f4").tobytes(), dtype
    lists = [list(row) if isinstance(row, (list, tuple)) else [row] for row in responses]
    if len(lists) != rows or any(len(row) != columns for row in lists):
        raise ValueError(f"responses should have {rows} rows of {columns} units each")
    numbers = array.array("f", [float(value) for row in lists for value in row])
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes(), "float32"


# ---------------------------------------------------------------------------------------- connections


class _Lost(Exception):  # noqa: N818
    """The connection is of no use any more, or nothing came in time."""


class _Link:
    def send(self, header: bytes, buffer: Any) -> None:
        raise NotImplementedError

    def receive(self, seconds: float) -> tuple[bytes, bytes]:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def _check_address(address: str) -> None:
    scheme, _, rest = address.partition("://")
    port = rest.rpartition(":")[2]
    if scheme in ("ipc", "inproc") and rest:
        return
    if scheme not in ("tcp", "tcp-raw") or not port.isdigit() or int(port) > 65535 or rest == port:
        raise ValueError(f'an address looks like "tcp://127.0.0.1:5557" or "tcp-raw://127.0.0.1:5558", got {address!r}')


def _connect(address: str, timeout: float) -> _Link:
    if address.startswith("tcp-raw://"):
        return _Tcp(address[len("tcp-raw://") :], timeout)
    return _Zmq(address)


class _Zmq(_Link):
    def __init__(self, address: str) -> None:
        import zmq

        self._zmq = zmq
        self._socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise ValueError(f"{address!r} is no address for ZeroMQ: {error}") from error

    def send(self, header: bytes, buffer: Any) -> None:
        try:
            self._socket.send_multipart([header, buffer] if len(buffer) else [header], self._zmq.NOBLOCK)
        except self._zmq.ZMQError as error:
            raise _Lost from error

    def receive(self, seconds: float) -> tuple[bytes, bytes]:
        if not self._socket.poll(int(seconds * 1000) + 1):
            raise _Lost
        frames = self._socket.recv_multipart()
        if len(frames) > 2:
            raise _Lost
        return frames[0], frames[1] if len(frames) == 2 else b""

    def close(self) -> None:
        self._socket.close()


class _Tcp(_Link):
    def __init__(self, address: str, timeout: float) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timeout = timeout

    def send(self, header: bytes, buffer: Any) -> None:
        self._socket.settimeout(self._timeout)
        self._socket.sendall(struct.pack(">II", len(header), len(buffer)) + header)
        if len(buffer):
            self._socket.sendall(buffer)

    def receive(self, seconds: float) -> tuple[bytes, bytes]:
        until = time.monotonic() + seconds
        lengths = self._exactly(8, until)
        header, buffer = struct.unpack(">II", lengths)
        if header > 2**28 or buffer > 2**31:
            raise _Lost
        return self._exactly(header, until), self._exactly(buffer, until)

    def _exactly(self, count: int, until: float) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            left = until - time.monotonic()
            if left <= 0:
                raise _Lost
            self._socket.settimeout(left)
            got = self._socket.recv_into(view)
            if got == 0:
                raise _Lost
            view = view[got:]
        return bytes(data)

    def close(self) -> None:
        self._socket.close()
