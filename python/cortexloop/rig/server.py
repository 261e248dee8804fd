"""The server: one thread between a session and its clients, which never waits for any of them.

ZeroMQ (ROUTER) and plain TCP are served beside each other, and threads of the same process by `Server.local`. All that
blocks (disks, models) is the session's business; what a client does not read is dropped or cuts the client off.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import queue
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import NamedTuple, Protocol

import zmq

from cortexloop.realtime.messages import Error, Refusal, Reply, Request
from cortexloop.rig.protocol import Bytes, Desk, Encoding, Limits, Peer, Refused, encode
from cortexloop.rig.tcp import Listener
from cortexloop.rig.zeromq import Router, host_of, new_context

log = logging.getLogger("cortexloop.rig")

Answer = tuple[Reply, bytes | memoryview | None]
"""A reply and its buffer."""

_AFTER_FAILURE_S = 0.5
_AT_ONCE = 64  # messages of one transport before the others have their turn


class _Waiting(NamedTuple):
    """The ask of a client that a session has not answered yet, and who is to have the answer."""

    id: str
    peer: Peer
    encoding: Encoding


class Serving(Protocol):
    """What a server needs of a session (`cortexloop.realtime.session.Session`)."""

    wake: Callable[[], None] | None

    def handle(self, client: str, request: Request, buffer: bytes | memoryview | None = None) -> Answer | None: ...

    def poll(self) -> Sequence[tuple[str, Answer]]: ...

    def next_wake_ns(self) -> int | None: ...

    def now_ns(self) -> int: ...


def check_address(host: str, *, secret: str | None, insecure: bool) -> None:
    """Refuse to listen to other computers without a secret.

    Raises:
        ValueError: `host` is not this computer's own, there is no secret, and `insecure` does not allow it.
    """
    if secret is not None or insecure or host == "localhost":
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host.strip("[]")).is_loopback:
            return
    raise ValueError(
        f"listening on {host!r} lets other computers in: set a secret, or insecure = true on a network that nobody "
        "else can reach, or listen on 127.0.0.1"
    )


class Server:
    """Serves one session until `stop()`.

    >>> server = Server(session, zmq="tcp://127.0.0.1:5557", tcp="127.0.0.1:5558")  # doctest: +SKIP
    >>> server.run()  # doctest: +SKIP

    Args:
        session: only the thread that calls `run` may use it from here on.
        zmq: address to bind, port 0 or "*" for any free one; None: no ZeroMQ.
        tcp: "host:port" for plain TCP connections; None: none.
        secret: what clients have to say in their hello.
        insecure: listen to other computers without a secret.
        limits: how much is taken.
        tick, tick_s: something to call, in the server's thread, about every so many seconds.

    Attributes:
        zmq_address, tcp_address: where it listens; None if it does not.

    Raises:
        ValueError: an address that cannot be understood, or must not be used without a secret.
        OSError: an address that is in use or not this computer's.
    """

    def __init__(
        self,
        session: Serving,
        *,
        zmq: str | None = None,
        tcp: str | None = None,
        secret: str | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        tick: Callable[[], None] | None = None,
        tick_s: float = 1.0,
    ) -> None:
        self.limits = limits or Limits()
        self._session = session
        self._desk = Desk(secret, self.limits)
        self._tick, self._tick_s = tick, tick_s
        self._waiting: dict[str, _Waiting] = {}
        self._jobs: queue.SimpleQueue[tuple[LocalPeer, Request, Bytes | None]] = queue.SimpleQueue()
        self._stopping, self._gone, self._woken = False, False, True
        self._patience = 0.0
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._context = new_context()
        self._router: Router | None = None
        self._listener: Listener | None = None
        try:
            if zmq is not None:
                check_address(host_of(zmq), secret=secret, insecure=insecure)
                self._router = Router(self._context, zmq, self.limits)
            if tcp is not None:
                host, port = split_address(tcp)
                check_address(host, secret=secret, insecure=insecure)
                self._listener = Listener(host, port, self.limits)
        except BaseException:
            self.close()
            raise
        self.zmq_address = None if self._router is None else self._router.address
        self.tcp_address = None if self._listener is None else self._listener.address
        session.wake = self.wake

    def wake(self) -> None:
        """Let the server look at its session; from any thread or signal handler."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it wakes up anyway; closed: nobody is there
            self._button.send(b"\0")

    def stop(self) -> None:
        """Let `run` return; from any thread or signal handler."""
        self._stopping = True
        self.wake()

    def local(self, client: str) -> LocalLink:
        """A link for another thread of this process, which needs no secret."""
        return LocalLink(self, client)

    def submit(self, peer: LocalPeer, request: Request, buffer: Bytes | None) -> None:
        """Queue a request of a thread of this process."""
        self._jobs.put((peer, request, buffer))
        self.wake()
        if self._gone:
            self._refuse_jobs()

    def run(self) -> None:
        """Serve until `stop`, then say so to those who wait, and close all connections. The session stays open."""
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        if self._router is not None:
            poller.register(self._router.socket, zmq.POLLIN)
        if self._listener is not None:
            self._listener.register(poller)
        next_tick = time.monotonic()
        try:
            while not self._stopping:
                if self._tick is not None and time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + self._tick_s
                    try:
                        self._tick()
                    except Exception:  # a terminal that was closed, for example
                        log.exception("what is called every %g s failed", self._tick_s)
                if self._listener is not None:
                    self._listener.tidy(poller)
                ready = dict(poller.poll(self._timeout_ms(next_tick)))
                if self._bell.fileno() in ready:
                    self._hear_bell()
                self._serve_local()
                if self._router is not None and self._router.socket in ready:
                    self._serve_router(self._router)
                if self._listener is not None:
                    for connection, header, buffer in self._listener.receive(ready, poller):
                        self._receive(connection, header, buffer)
                self._look_at_session()
            self._say_goodbye()
        finally:
            self.close()

    def close(self) -> None:
        """Close all connections; `run` does it."""
        self._session.wake = None
        if self._router is not None:
            self._router.close()
        if self._listener is not None:
            self._listener.close()
        self._context.term()
        self._bell.close()
        self._button.close()

    def _timeout_ms(self, next_tick: float) -> int:
        waits = [1000.0]
        due = self._session.next_wake_ns()
        if due is not None:
            waits.append(max((due - self._session.now_ns()) / 1e6, (self._patience - time.monotonic()) * 1e3))
        if self._tick is not None:
            waits.append((next_tick - time.monotonic()) * 1e3)
        if self._listener is not None:
            waits.append(self._listener.next_check_s() * 1e3)
        return math.ceil(max(0.0, min(waits)))

    def _hear_bell(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._bell.recv(4096):
                pass
        self._woken = True

    def _look_at_session(self) -> None:
        if time.monotonic() < self._patience:
            return
        due = self._session.next_wake_ns()
        if not self._woken and (due is None or due > self._session.now_ns()):
            return
        self._woken = False
        try:
            answers = self._session.poll()
        except Exception:
            log.exception("the session failed; it is looked at again in %g s", _AFTER_FAILURE_S)
            self._patience = time.monotonic() + _AFTER_FAILURE_S
            return
        for client, answer in answers:
            waiting = self._waiting.get(client)
            if waiting is not None and waiting.id == answer[0].id:
                del self._waiting[client]
                _send(waiting.peer, waiting.encoding, answer)

    def _serve_local(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                peer, request, buffer = self._jobs.get_nowait()
            except queue.Empty:
                return
            self._answer(peer, request, buffer, "msgpack")
        self.wake()

    def _serve_router(self, router: Router) -> None:
        for _ in range(_AT_ONCE):
            message = router.receive()
            if message is None:
                return
            self._receive(*message)

    def _receive(self, peer: Peer, header: Bytes, buffer: Bytes | None) -> None:
        try:
            request, encoding = self._desk.admit(peer, header, buffer)
        except Refused as refused:
            _send(peer, refused.encoding, (refused.reply, None))
            return
        if self._router is not None:
            self._router.remember(peer)
        self._answer(peer, request, buffer, encoding)

    def _answer(self, peer: Peer, request: Request, buffer: Bytes | None, encoding: Encoding) -> None:
        client = peer.client
        assert client is not None
        try:
            answer = self._session.handle(client, request, memoryview(buffer) if buffer is not None else None)
        except Refusal as refusal:
            answer = (refusal.to(request.id), None)
        except Exception:
            # A bug. The rig gets an answer and the others their images; what was acknowledged is on disk.
            log.exception("a %s of client %r failed", type(request).__name__, client)
            text = f"the server failed at this {type(request).__name__.lower()}; its log says more"
            answer = (Error(id=request.id, code="FAULT", text=text), None)
        if answer is not None:
            waiting = self._waiting.get(client)
            if waiting is not None and waiting.id == request.id:
                del self._waiting[client]
            _send(peer, encoding, answer)
            return
        # One ask of a client waits at a time. Sent again, perhaps over a new connection, its answer goes there.
        older = self._waiting.get(client)
        self._waiting[client] = _Waiting(request.id, peer, encoding)
        if older is not None and older.id != request.id:
            text = f"a later ask of client {client!r} waits instead"
            _send(older.peer, older.encoding, (Error(id=older.id, code="BUSY", text=text, retry=True), None))

    def _say_goodbye(self) -> None:
        """Tell those who wait to try again: another server may take the session up."""
        for waiting in self._waiting.values():
            text = "the server is closing; the session can be taken up by another"
            _send(waiting.peer, waiting.encoding, (Error(id=waiting.id, code="BUSY", text=text, retry=True), None))
        self._waiting.clear()
        self._gone = True
        self._refuse_jobs()
        if self._listener is not None:
            self._listener.finish(0.5)

    def _refuse_jobs(self) -> None:
        while True:
            try:
                peer, request, _ = self._jobs.get_nowait()
            except queue.Empty:
                return
            error = Error(id=request.id, code="BUSY", text="the server is closing", retry=True)
            _send(peer, "msgpack", (error, None))


def _send(peer: Peer, encoding: Encoding, answer: Answer) -> None:
    reply, buffer = answer
    try:
        if isinstance(peer, LocalPeer):
            peer.deliver(reply, buffer)
        else:
            peer.send(encode(reply, encoding), buffer)
    except Exception:  # a reply that is too large for its transport, for example; the others have theirs
        log.exception("a %s cannot be sent to client %r", type(reply).__name__, peer.client)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port".

    Raises:
        ValueError: it is no such address.
    """
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f'an address for TCP looks like "127.0.0.1:5558", got {address!r}')
    return host.strip("[]"), int(port)


# ---------------------------------------------------------------------------------------------- threads of this process


class LocalPeer(Peer):
    """A thread of this process."""

    def __init__(self, client: str) -> None:
        super().__init__(client)
        self._futures: dict[str, Future[Answer]] = {}

    def expect(self, id: str) -> Future[Answer]:
        """What will have the reply to the request with this id."""
        future: Future[Answer] = Future()
        self._futures[id] = future
        return future

    def deliver(self, reply: Reply, buffer: bytes | memoryview | None) -> None:
        """Hand over a reply without encoding it."""
        future = self._futures.pop(reply.id, None)
        if future is not None:
            future.set_result((reply, buffer))


class LocalLink:
    """A link of a thread of this process to a server."""

    def __init__(self, server: Server, client: str) -> None:
        self._server, self._peer = server, LocalPeer(client)

    def request(
        self, request: Request, buffer: Bytes | None = None, *, timeout: float | None = None
    ) -> tuple[Reply, bytes | memoryview | None]:
        """The reply and its buffer.

        Raises:
            TimeoutError: no reply within `timeout` seconds.
        """
        future = self._peer.expect(request.id)
        self._server.submit(self._peer, request, buffer)
        try:
            return future.result(timeout)
        except FutureTimeoutError as error:
            raise TimeoutError(f"no reply within {timeout} s") from error
