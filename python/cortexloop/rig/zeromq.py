"""ZeroMQ: a ROUTER socket that drops what its clients do not read."""

from __future__ import annotations

import collections
import contextlib

import zmq

from cortexloop.rig.protocol import Bytes, Limits, Peer, encode, encoding_of, refuse

_UNREAD = 64  # replies that are kept for a client


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """A context that ends at once."""
    context = zmq.Context()
    context.set(zmq.BLOCKY, 0)  # never wait for unread replies at the end
    return context


def host_of(address: str) -> str:
    """The host of an address; this computer's own for sockets that are no network.

    Raises:
        ValueError: it is no address for ZeroMQ.
    """
    if address.startswith(("ipc://", "inproc://")):
        return "localhost"
    if not address.startswith("tcp://") or ":" not in address[6:]:
        raise ValueError(f'an address for ZeroMQ looks like "tcp://127.0.0.1:5557", got {address!r}')
    return address[6:].rpartition(":")[0]


class RouterPeer(Peer):
    """One connection of a ZeroMQ client, which has a routing id that ZeroMQ made."""

    def __init__(self, router: Router, identity: bytes) -> None:
        super().__init__()
        self._router, self.identity = router, identity
        self.delimited = False
        """Whether it puts an empty frame before its header, as REQ sockets do."""

    def send(self, header: bytes, buffer: Bytes | None) -> None:
        """See `Peer`."""
        frames: list[Bytes] = [self.identity, *([b""] if self.delimited else []), header]
        self._router.send(frames if buffer is None else [*frames, buffer])


class Router:
    """The ROUTER socket. It forgets the client that was silent longest when there are too many; that client says hello
    again."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, limits: Limits) -> None:
        self._peers: collections.OrderedDict[bytes, RouterPeer] = collections.OrderedDict()
        self._clients = limits.clients
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 500)
        self.socket.setsockopt(zmq.SNDHWM, _UNREAD)
        # Beyond this ZeroMQ closes the connection unheard; below, there is an answer.
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * max(limits.buffer_bytes, limits.header_bytes))
        self.socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        self.socket.setsockopt(zmq.IPV6, "[" in address)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise OSError(error.errno, f"cannot listen on {address}: {error.strerror}") from error
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def receive(self) -> tuple[RouterPeer, Bytes, Bytes | None] | None:
        """The next message, None if there is none. What has no meaning is answered here."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            identity, *parts = frames
            peer = self._peers.get(identity) or RouterPeer(self, identity)
            if identity in self._peers:
                self._peers.move_to_end(identity)
            peer.delimited = len(parts) > 1 and not parts[0]
            parts = parts[1:] if peer.delimited else parts
            problem = None
            if len(parts) not in (1, 2):
                problem = f"a message has a header and at most one buffer, this one had {len(parts)} frames"
            elif not identity.startswith(b"\0"):
                # Anyone could take over such an id, and with it the hello of the client that had it before.
                problem = "the routing id of the socket was set; leave that to ZeroMQ"
            if problem is None:
                return peer, parts[0], parts[1] if len(parts) == 2 else None
            refused = refuse(parts[0] if parts else b"", "BAD_MESSAGE", problem)
            peer.send(encode(refused.reply, encoding_of(parts[0] if parts else b"{")), None)

    def remember(self, peer: Peer) -> None:
        """Keep a peer that said hello."""
        if isinstance(peer, RouterPeer) and peer.identity not in self._peers:
            self._peers[peer.identity] = peer
            while len(self._peers) > self._clients:
                self._peers.popitem(last=False)

    def send(self, frames: list[Bytes]) -> None:
        """Send, or drop what a client does not read."""
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart(frames, zmq.NOBLOCK)

    def close(self) -> None:
        """Unsent replies have half a second left."""
        self.socket.close()
