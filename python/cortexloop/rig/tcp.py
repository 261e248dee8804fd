"""Plain TCP connections, non-blocking: for MATLAB and whatever else has no ZeroMQ."""

from __future__ import annotations

import collections
import contextlib
import select
import socket
import time
from collections.abc import Iterator

import zmq

from cortexloop.realtime.messages import Code, Error
from cortexloop.rig.protocol import Bytes, FrameError, FrameReader, Limits, Peer, encode, frame

_PIECE = 256 * 1024  # bytes taken from a connection at once
_PIECES = 16  # before the others have their turn


class Connection(Peer):
    """One client. What it does not read is kept for it, up to the limits; meanwhile nothing more is taken from it."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        super().__init__()
        self.socket, self._limits = sock, limits
        self._reader = FrameReader(limits.stranger_bytes, 0)
        self._out: collections.deque[memoryview] = collections.deque()
        self._out_bytes = 0
        self._since = self._moved = time.monotonic()
        self.closed = False
        self.dismissed = False
        """Its last reply is on the way; what still comes is thrown away until the client closes, too."""

    @property
    def events(self) -> int:
        """What to poll for."""
        return zmq.POLLOUT if self._out else zmq.POLLIN

    @property
    def unsent(self) -> bool:
        """Whether replies are waiting for the client to read."""
        return bool(self._out)

    def send(self, header: bytes, buffer: Bytes | None) -> None:
        """See `Peer`."""
        if self.closed:
            return
        if not self._out:
            self._moved = time.monotonic()
        for part in frame(header, buffer):
            self._out.append(memoryview(part).cast("B"))
            self._out_bytes += len(part)
        self.flush()
        if self._out_bytes > self._limits.output_bytes:
            self.close()

    def flush(self) -> None:
        """Send what the network takes."""
        try:
            while self._out:
                sent = self.socket.send(self._out[0])
                self._moved = time.monotonic()
                self._out_bytes -= sent
                if sent == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][sent:]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if self.dismissed:
            # Closing at once would make the network throw the last reply away, if the client is still sending.
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def receive(self) -> Iterator[tuple[bytes, bytes | None]]:
        """The messages that are complete by now."""
        for _ in range(_PIECES):
            yield from self._messages()
            if self.closed or self._out:
                return
            try:
                data = self.socket.recv(_PIECE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            if not self.dismissed:
                self._reader.feed(data)
        yield from self._messages()

    def _messages(self) -> Iterator[tuple[bytes, bytes | None]]:
        while not (self.closed or self.dismissed or self._out):
            if self.client is not None:
                self._reader.header_bytes = self._limits.header_bytes
                self._reader.buffer_bytes = self._limits.buffer_bytes
            try:
                message = self._reader.next()
            except FrameError as error:
                self.dismiss("TOO_LARGE", f"{error}; the connection is closed")
                return
            if message is None:
                return
            yield message

    def dismiss(self, code: Code, text: str) -> None:
        """Say why, and hear no more."""
        self.dismissed, self._since = True, time.monotonic()
        self.send(encode(Error(id="?", code=code, text=text)), None)

    def overdue(self, now: float) -> bool:
        """Whether it reads nothing, or does not say hello, for too long."""
        if self._out:
            return now - self._moved > self._limits.stall_s
        return (self.client is None or self.dismissed) and now - self._since > self._limits.hello_s

    def pending(self) -> bool:
        """Whether a message is here already that was held back while replies were unread."""
        return not (self.closed or self.dismissed or self._out) and self._reader.ready()

    def close(self) -> None:
        """Forget the client; what it asked for has no receiver any more."""
        self.closed = True
        self._out.clear()
        self._out_bytes = 0
        self.socket.close()


class Listener:
    """Accepts connections, and goes round them.

    Raises:
        OSError: the address is in use or not this computer's.
    """

    def __init__(self, host: str, port: int, limits: Limits) -> None:
        self._limits = limits
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._socket.setblocking(False)
        found_host, found_port = self._socket.getsockname()[:2]
        self.address = f"[{found_host}]:{found_port}" if ":" in found_host else f"{found_host}:{found_port}"
        self._connections: dict[int, Connection] = {}
        self._next_check = time.monotonic()

    def register(self, poller: zmq.Poller) -> None:
        """Have new connections announced."""
        poller.register(self._socket, zmq.POLLIN)

    def next_check_s(self) -> float:
        """When `receive` has to be called even if nothing comes."""
        if not self._connections:
            return 1.0
        if any(connection.pending() for connection in self._connections.values()):
            return 0.0
        return max(0.0, self._next_check - time.monotonic())

    def receive(self, ready: dict[object, int], poller: zmq.Poller) -> Iterator[tuple[Connection, bytes, bytes | None]]:
        """All messages that are complete; answer each before taking the next."""
        if self._socket.fileno() in ready:
            self._accept(poller)
        for number, connection in list(self._connections.items()):
            if ready.get(number, 0) & zmq.POLLOUT:
                connection.flush()
            if number in ready or connection.pending():
                for header, buffer in connection.receive():
                    yield connection, header, buffer

    def tidy(self, poller: zmq.Poller) -> None:
        """Before each poll: what to poll for, who is cut off, who is gone."""
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + min(1.0, self._limits.stall_s / 4, self._limits.hello_s / 4)
            for connection in self._connections.values():
                if connection.overdue(now):
                    connection.close()
        for number, connection in list(self._connections.items()):
            if connection.closed:
                del self._connections[number]
                poller.unregister(number)
            else:
                poller.register(number, connection.events)

    def _accept(self, poller: zmq.Poller) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # gone before it was accepted, or no file descriptors left
                return
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            except OSError:  # some systems say so when the client has left already
                sock.close()
                continue
            connection = Connection(sock, self._limits)
            if len(self._connections) >= self._limits.clients:
                connection.dismiss("BUSY", f"{self._limits.clients} clients are connected already")
                connection.close()
                continue
            self._connections[sock.fileno()] = connection
            poller.register(sock.fileno(), connection.events)

    def finish(self, seconds: float) -> None:
        """Give the last replies a little time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            unsent = [c for c in self._connections.values() if c.unsent]
            if not unsent:
                return
            select.select([], [c.socket for c in unsent], [], max(0.0, until - time.monotonic()))
            for connection in unsent:
                connection.flush()

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.close()
        self._connections.clear()
        self._socket.close()
