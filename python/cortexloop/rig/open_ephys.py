"""Spikes from Open Ephys: its plugin "ZMQ Interface", whose messages are numbered, so that losses are noticed.

A message has three frames: an envelope, a JSON header with `message_num`, `type` and what belongs to the type, and raw
data. Of continuous data only the header counts: how far the stream has come. Times are sample numbers; the header's
`timestamp` is the program's wall clock in milliseconds and is not used.

The plugin shows a client as connected, and answers it, while it gets a heartbeat every two seconds on the port after
that of the data.

Format: open-ephys/gui-docs, "ZMQ Interface". The plugin sends one stream; use one receiver for each.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import zmq

from cortexloop.rig.counting import SequenceCheck, SpikeCounter

MAX_HEADER = 64_000
"""Bytes of a header; what the plugin itself takes."""
BEAT_S = 2.0
"""Between heartbeats; after five seconds without one the plugin counts a client as lost."""


@dataclass(frozen=True)
class Progress:
    """Continuous data of a channel up to a sample has come."""

    message_num: int
    stream: str
    channel: int
    sample_num: int
    num_samples: int
    sample_rate: float


@dataclass(frozen=True)
class Pulse:
    """A digital line changed."""

    message_num: int
    stream: str
    sample_num: int
    line: int
    state: bool


@dataclass(frozen=True)
class Spike:
    """unit: name of the electrode, and a colon and the number of the sorted unit where that is not 0."""

    message_num: int
    stream: str
    sample_num: int
    unit: str


@dataclass(frozen=True)
class Other:
    """A message that says nothing about time or spikes (text, parameters); its number counts."""

    message_num: int


Packet = Progress | Pulse | Spike | Other


def parse(frames: Sequence[bytes]) -> Packet:
    """What a message of the plugin says.

    Args:
        frames: as received; 2 or 3.

    Raises:
        ValueError: not a message of this format.
    """
    if len(frames) not in (2, 3):
        raise ValueError(f"a message of Open Ephys' ZMQ Interface has 2 or 3 frames, got {len(frames)}")
    if len(frames[1]) > MAX_HEADER:
        raise ValueError(f"a header should have at most {MAX_HEADER} bytes, got {len(frames[1])}")
    try:
        header = json.loads(frames[1].rstrip(b"\0"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header of a message of Open Ephys' ZMQ Interface should be JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"the header should be an object, got {type(header).__name__}")
    number = _integer(header, "message_num")
    kind = header.get("type")
    if kind == "data":
        content = _part(header, "content")
        return Progress(
            number,
            _text(content, "stream"),
            _integer(content, "channel_num"),
            _integer(content, "sample_num"),
            _integer(content, "num_samples"),
            _positive(content, "sample_rate"),
        )
    if kind == "spike":
        content = _part(header, "spike")
        sorted_id = content.get("sorted_id", 0)
        electrode = _text(content, "electrode")
        unit = electrode if sorted_id in (0, "0") else f"{electrode}:{sorted_id}"
        return Spike(number, _text(content, "stream"), _integer(content, "sample_num"), unit)
    data = frames[2] if len(frames) == 3 else b""
    if kind == "event" and len(data) == 10:  # line, state, and the word of all lines; messages have other lengths
        content = _part(header, "content")
        return Pulse(number, _text(content, "stream"), _integer(content, "sample_num"), data[0], data[1] != 0)
    return Other(number)


def _part(header: dict[str, Any], name: str) -> dict[str, Any]:
    part = header.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"the header of a {header.get('type')} message lacks {name!r}")
    return part


def _integer(part: dict[str, Any], name: str) -> int:
    value = part.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} should be an integer, got {value!r}")
    return value


def _positive(part: dict[str, Any], name: str) -> float:
    value = part.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} should be a number above 0, got {value!r}")
    return float(value)


def _text(part: dict[str, Any], name: str) -> str:
    value = part.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} should be a text, got {value!r}")
    return value


def heartbeat(application: str, identity: str | None = None) -> bytes:
    """What keeps a client connected; send it every two seconds to the listening port (that of the data plus one)."""
    return json.dumps({"application": application, "uuid": identity or str(uuid.uuid4()), "type": "heartbeat"}).encode()


class StreamError(ValueError):
    """The stream is not the one that was expected: none of its messages can be used."""


class Receiver:
    """Feeds a `SpikeCounter` with the plugin's messages.

    What was between the last message and one whose number jumped is a gap, and the counter's guard on both sides of it:
    the guard should be no shorter than the program's buffers. When numbers or samples begin anew, the
    acquisition was restarted: presentations that wait are lost.

    Args:
        counter: takes spikes, progress and gaps.
        sample_rate: Hz, of the stream; sample numbers become nanoseconds by it. It is compared with what the stream
            says.
        on_pulse: called with each change of a digital line, its time in nanoseconds.
        on_restart: called with the presentations that a restart has lost.

    Attributes:
        sequence: how many messages were lost, how often the stream restarted.
    """

    def __init__(
        self,
        counter: SpikeCounter,
        sample_rate: float,
        *,
        on_pulse: Callable[[Pulse, int], None] | None = None,
        on_restart: Callable[[list[Any]], None] | None = None,
    ) -> None:
        if not sample_rate > 0:
            raise ValueError(f"sample_rate should be above 0, got {sample_rate}")
        self.counter, self.sample_rate = counter, float(sample_rate)
        self.sequence = SequenceCheck()
        self._on_pulse, self._on_restart = on_pulse, on_restart
        self._latest = 0
        """Time that data has come to, in nanoseconds."""

    def ns(self, sample_num: int) -> int:
        """Nanoseconds of a sample number."""
        whole, rest = divmod(sample_num, round(self.sample_rate))
        if round(self.sample_rate) == self.sample_rate:
            return whole * 1_000_000_000 + round(rest * 1e9 / self.sample_rate)
        return round(sample_num * 1e9 / self.sample_rate)

    def take(self, frames: Sequence[bytes]) -> Packet:
        """Take a message.

        Raises:
            ValueError: not a message of the plugin; its number will be missing.
            StreamError: the stream has another sampling rate.
        """
        packet = parse(frames)
        if isinstance(packet, Progress) and not math.isclose(packet.sample_rate, self.sample_rate, rel_tol=1e-6):
            raise StreamError(
                f"stream {packet.stream!r} has {packet.sample_rate} samples per second, expected {self.sample_rate}"
            )
        missing = self.sequence.missing(packet.message_num)
        if missing < 0:
            lost = self.counter.restart()
            self._latest = 0
            if self._on_restart is not None:
                self._on_restart(lost)
        begin, end = self._span(packet)
        if missing > 0:
            # A lost spike may lie as far on either side as buffers are long, for which the guard stands.
            guard = self.counter.watermark.guard_ns
            self.counter.gap(min(self._latest, begin) - guard, max(self._latest, end) + guard)
        if isinstance(packet, Spike):
            self.counter.spikes(packet.unit, [begin])
        elif isinstance(packet, Pulse):
            if self._on_pulse is not None:
                self._on_pulse(packet, begin)
        elif isinstance(packet, Progress):
            self._latest = max(self._latest, end)
            self.counter.passed(self._latest)
        return packet

    def _span(self, packet: Packet) -> tuple[int, int]:
        """Beginning and end of what a message is about, in nanoseconds."""
        if isinstance(packet, Other):
            return self._latest, self._latest
        samples = packet.num_samples if isinstance(packet, Progress) else 0
        return self.ns(packet.sample_num), self.ns(packet.sample_num + samples)


class Subscriber:
    """A connection to the plugin: its messages go to a receiver, and heartbeats back.

    The plugin publishes, so what is not fetched in time is lost (and noticed): call `receive` often, at best from a
    thread of its own, and select one continuous channel only, which is enough to know how far the stream has come.

    Args:
        receiver: takes the messages.
        address: of the plugin's data port, "tcp://host:5556".
        application: the name that the plugin's editor shows.
        listening: address of its listening port; that of the data plus one if None.

    Raises:
        ValueError: an address without a port.

    Attributes:
        refused: messages that could not be understood.
    """

    def __init__(
        self, receiver: Receiver, address: str, *, application: str = "cortexloop", listening: str | None = None
    ) -> None:
        host, colon, port = address.rpartition(":")
        if not colon or not port.isdigit():
            raise ValueError(f'the address of the plugin looks like "tcp://127.0.0.1:5556", got {address!r}')
        self.receiver, self.refused = receiver, 0
        self._application, self._identity = application, str(uuid.uuid4())
        self._context = zmq.Context()
        self._data = self._context.socket(zmq.SUB)
        self._beats = self._context.socket(zmq.REQ)
        for which in (self._data, self._beats):
            which.setsockopt(zmq.LINGER, 0)
        self._data.setsockopt(zmq.RCVHWM, 100_000)
        self._data.setsockopt(zmq.SUBSCRIBE, b"")
        self._beats.setsockopt(zmq.REQ_RELAXED, 1)  # a lost answer does not end it
        self._beats.setsockopt(zmq.REQ_CORRELATE, 1)
        self._data.connect(address)
        self._beats.connect(listening or f"{host}:{int(port) + 1}")
        self._next_beat = time.monotonic()
        self._answered: float | None = None

    @property
    def connected(self) -> bool:
        """Whether the plugin has answered a heartbeat in the last five seconds."""
        return self._answered is not None and time.monotonic() - self._answered < 5.0

    def receive(self, timeout_ms: int = 10) -> int:
        """Take all messages that are there, waiting for the first; how many.

        Raises:
            StreamError: the stream has another sampling rate than the receiver expects.
        """
        self._beat()
        taken = 0
        while self._data.poll(0 if taken else timeout_ms):
            message = self._data.recv_multipart()
            taken += 1
            try:
                self.receiver.take(message)
            except StreamError:
                raise
            except ValueError:
                self.refused += 1
        return taken

    def close(self) -> None:
        """Close the connection."""
        self._data.close()
        self._beats.close()
        self._context.term()

    def _beat(self) -> None:
        if self._beats.poll(0):
            self._beats.recv()
            self._answered = time.monotonic()
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_S
            self._beats.send(heartbeat(self._application, self._identity), zmq.NOBLOCK)
