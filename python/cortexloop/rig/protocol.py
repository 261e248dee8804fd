"""Bytes and messages: what a transport hands to a session, and what it sends back. No sockets here.

A message is a header, one of the structures of `cortexloop.realtime.messages`, and at most one buffer of raw bytes. The
header is JSON where its first byte is "{", else msgpack; a reply comes in the encoding of its request. ZeroMQ carries
header and buffer as two frames; a plain TCP connection carries, both ways,

    u32 length of the header | u32 length of the buffer (0: none) | header | buffer        lengths big-endian

Whatever cannot be understood, is too large, or comes from a stranger is answered by an `Error` and goes no further.
"""

from __future__ import annotations

import hmac
import struct
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from cortexloop.realtime.messages import VERSION, Code, Error, Hello, Reply, Request, Tell

Bytes = bytes | bytearray | memoryview
Encoding = Literal["json", "msgpack"]

Size = Annotated[int, Meta(ge=1, le=2**31)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much a server takes.

    header_bytes, buffer_bytes: of one request. stranger_bytes: of a TCP client's header before its hello, when it can
    have no buffer. clients: connections at once of each transport. output_bytes, stall_s: what may lie unread for a TCP
    client, and for how long nothing may move, before it is cut off. hello_s: how long a TCP connection may take to say
    hello.
    """

    header_bytes: Size = 8 * 2**20
    buffer_bytes: Size = 64 * 2**20
    stranger_bytes: Size = 16 * 2**10
    clients: Annotated[int, Meta(ge=1, le=1000)] = 32
    output_bytes: Size = 256 * 2**20
    stall_s: Seconds = 10.0
    hello_s: Seconds = 10.0


class Refused(Exception):  # noqa: N818
    """A request that goes no further; `reply` says why, in the encoding of the request."""

    def __init__(self, reply: Error, encoding: Encoding) -> None:
        super().__init__(reply.text)
        self.reply, self.encoding = reply, encoding


class FrameError(ValueError):
    """Bytes of a TCP connection after which there is no telling where the next message begins."""


# ---------------------------------------------------------------------------------------------- headers

_ENCODERS: dict[Encoding, Any] = {"json": msgspec.json.Encoder(), "msgpack": msgspec.msgpack.Encoder()}
_REQUESTS: dict[Encoding, Any] = {"json": msgspec.json.Decoder(Request), "msgpack": msgspec.msgpack.Decoder(Request)}
_REPLIES: dict[Encoding, Any] = {"json": msgspec.json.Decoder(Reply), "msgpack": msgspec.msgpack.Decoder(Reply)}


class _Glance(msgspec.Struct):
    """What is looked for in a header that is no request."""

    id: Any = None
    type: Any = None
    versions: Any = None


_GLANCES: dict[Encoding, Any] = {"json": msgspec.json.Decoder(_Glance), "msgpack": msgspec.msgpack.Decoder(_Glance)}
_UNREADABLE = (msgspec.MsgspecError, RecursionError, ValueError, OverflowError)


def encoding_of(header: Bytes) -> Encoding:
    """JSON begins with a brace, which no msgpack map does."""
    return "json" if header[:1] == b"{" else "msgpack"


def encode(message: Reply | Request, encoding: Encoding = "json") -> bytes:
    """The header of a message."""
    encoded: bytes = _ENCODERS[encoding].encode(message)
    return encoded


def decode_reply(header: Bytes) -> Reply:
    """The reply in a header.

    Raises:
        ValueError: it is none.
    """
    try:
        reply: Reply = _REPLIES[encoding_of(header)].decode(header)
    except _UNREADABLE as error:
        raise ValueError(f"not a reply of a session: {error}") from error
    return reply


def decode_request(header: Bytes) -> Request:
    """The request in a header.

    Raises:
        Refused: it is none; the reply names the field, and has the request's id if that can be read, else "?".
    """
    encoding = encoding_of(header)
    try:
        request: Request = _REQUESTS[encoding].decode(header)
    except _UNREADABLE as error:
        glance = _glance(header, encoding)
        if glance.type == "hello" and isinstance(glance.versions, list) and VERSION not in glance.versions:
            raise Refused(_no_version(_id(glance), glance.versions), encoding) from error
        text = f"the header is no request of protocol version {VERSION}: {error}"
        raise Refused(Error(id=_id(glance), code="BAD_MESSAGE", text=text), encoding) from error
    return request


def refuse(header: Bytes, code: Code, text: str, *, retry: bool = False) -> Refused:
    """What to raise for a request that is not even looked at, with its id if that can be read."""
    encoding = encoding_of(header)
    return Refused(Error(id=_id(_glance(header, encoding)), code=code, text=text, retry=retry), encoding)


def _glance(header: Bytes, encoding: Encoding) -> _Glance:
    try:
        glance: _Glance = _GLANCES[encoding].decode(header)
    except _UNREADABLE:
        return _Glance()
    return glance


def _id(glance: _Glance) -> str:
    return glance.id if isinstance(glance.id, str) and 0 < len(glance.id) <= 64 else "?"


def _no_version(id: str, versions: list[Any]) -> Error:
    offered = ", ".join(str(version) for version in versions[:10] if isinstance(version, int)) or "none"
    text = f"the server speaks version {VERSION} of the protocol, the client {offered}; update the older of the two"
    return Error(id=id, code="VERSION", text=text)


# ---------------------------------------------------------------------------------------------- who may ask what


_HELLO_FIRST = "say hello first; the server may have been restarted"


class Peer:
    """One connection, or what else requests come from. client: its name, None before its hello."""

    def __init__(self, client: str | None = None) -> None:
        self.client = client

    def send(self, header: bytes, buffer: Bytes | None) -> None:
        """Hand over a reply; never waits. What cannot be delivered is lost: clients ask again."""
        raise NotImplementedError


class Admitted(NamedTuple):
    """A request that a session may see, and the encoding of its reply."""

    request: Request
    encoding: Encoding


class Desk:
    """Checks each request before a session sees it: size, encoding, version, secret, and that there was a hello.

    Args:
        secret: what a hello has to bring; None: nothing.
        limits: sizes.
    """

    def __init__(self, secret: str | None = None, limits: Limits | None = None) -> None:
        self._secret = None if secret is None else secret.encode()
        self.limits = limits or Limits()

    def admit(self, peer: Peer, header: Bytes, buffer: Bytes | None) -> Admitted:
        """The request, if it may pass. A hello that may names the peer, and goes on without its secret.

        Raises:
            Refused: with the reply.
        """
        if len(header) > self.limits.header_bytes:
            text = f"a header may have {self.limits.header_bytes} bytes, it has {len(header)}"
            raise Refused(Error(id="?", code="TOO_LARGE", text=text), encoding_of(header))
        if peer.client is None and len(header) > self.limits.stranger_bytes:
            raise refuse(header, "NO_HELLO", _HELLO_FIRST, retry=True)
        if buffer is not None and len(buffer) > self.limits.buffer_bytes:
            text = f"a buffer may have {self.limits.buffer_bytes} bytes, it has {len(buffer)}"
            raise refuse(header, "TOO_LARGE", text)
        encoding = encoding_of(header)
        request = decode_request(header)
        if isinstance(request, Hello):
            return Admitted(self._welcome(peer, request, encoding), encoding)
        if peer.client is None:
            raise Refused(Error(id=request.id, code="NO_HELLO", text=_HELLO_FIRST, retry=True), encoding)
        if buffer is not None and len(buffer) > 0 and not isinstance(request, Tell):
            text = f"only a tell has a buffer, this {request.__struct_config__.tag} came with {len(buffer)} bytes"
            raise Refused(Error(id=request.id, code="BAD_MESSAGE", text=text), encoding)
        return Admitted(request, encoding)

    def _welcome(self, peer: Peer, hello: Hello, encoding: Encoding) -> Hello:
        if self._secret is not None and not hmac.compare_digest((hello.secret or "").encode(), self._secret):
            peer.client = None
            text = "the secret is missing or wrong; give the one in the configuration of the server"
            raise Refused(Error(id=hello.id, code="AUTH", text=text), encoding)
        if VERSION not in hello.versions:
            raise Refused(_no_version(hello.id, hello.versions), encoding)
        peer.client = hello.client
        return msgspec.structs.replace(hello, secret=None)


# ---------------------------------------------------------------------------------------------- TCP

_LENGTHS = struct.Struct(">II")


def frame(header: bytes, buffer: Bytes | None = None) -> list[Bytes]:
    """What goes over a TCP connection for one message."""
    start = _LENGTHS.pack(len(header), 0 if buffer is None else len(buffer)) + header
    return [start] if buffer is None or len(buffer) == 0 else [start, buffer]


class FrameReader:
    """Messages out of the bytes of a TCP connection, in whatever pieces they come.

    Lengths are checked as soon as they are there: no memory is taken for what was only announced.

    Args:
        header_bytes, buffer_bytes: the most that a message may have; may be changed between messages.
    """

    def __init__(self, header_bytes: int, buffer_bytes: int) -> None:
        self.header_bytes, self.buffer_bytes = header_bytes, buffer_bytes
        self._data = bytearray()

    def feed(self, data: Bytes) -> None:
        """Take what came."""
        self._data += data

    def ready(self) -> bool:
        """Whether `next` has something to say: a message, or an error."""
        if len(self._data) < _LENGTHS.size:
            return False
        header, buffer = _LENGTHS.unpack_from(self._data)
        fits = 0 < header <= self.header_bytes and buffer <= self.buffer_bytes
        return not fits or len(self._data) >= _LENGTHS.size + header + buffer

    def next(self) -> tuple[bytes, bytes | None] | None:
        """The next header and buffer, None if it is not complete.

        Raises:
            FrameError: a length of zero or beyond the limits; the connection is of no use any more.
        """
        if len(self._data) < _LENGTHS.size:
            return None
        header, buffer = _LENGTHS.unpack_from(self._data)
        if not 0 < header <= self.header_bytes:
            raise FrameError(f"a header may have 1 to {self.header_bytes} bytes here, {header} were announced")
        if buffer > self.buffer_bytes:
            raise FrameError(f"a buffer may have {self.buffer_bytes} bytes here, {buffer} were announced")
        middle, end = _LENGTHS.size + header, _LENGTHS.size + header + buffer
        if len(self._data) < end:
            return None
        message = bytes(self._data[_LENGTHS.size : middle]), bytes(self._data[middle:end]) if buffer else None
        del self._data[:end]
        return message
