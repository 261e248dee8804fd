"""What a session writes into its journal: one structure for each kind of record, encoded with msgpack.

The state of a session is a function of its records: while it runs, each change is written first and applied then; a
restart applies the same records again. Arrays are stored as `Array`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.messages import Event, Item, Tell


class Array(msgspec.Struct, frozen=True, array_like=True):
    """A NumPy array: dtype with byte order ("<f4"), shape, bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[Any]) -> Array:
        """Copy an array of numbers."""
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        return cls(little.dtype.str, array.shape, little.tobytes())

    def numpy(self) -> NDArray[Any]:
        """A read-only view.

        Raises:
            ValueError: bytes, dtype and shape do not belong together.
        """
        dtype = np.dtype(self.dtype)
        if dtype.hasobject:
            raise ValueError(f"an array of numbers was expected, got dtype {self.dtype!r}")
        return np.frombuffer(self.data, dtype).reshape(self.shape)


class _Record(msgspec.Struct, kw_only=True, frozen=True, tag_field="kind"):
    mono_ns: int
    """By the session's monotonic clock, which starts anew with each `Opened`."""
    wall_ns: int


class Start(_Record, frozen=True, kw_only=True, tag="start"):
    """The first record. config: as read, defaults filled in. sources: settings of each stream's source.
    environment: versions, machine, devices. references: full SHA-256 of each reference image."""

    format: int
    session: str
    config: dict[str, Any]
    config_sha: str
    sources: dict[str, Any]
    environment: dict[str, Any]
    references: list[str]
    image_shape: tuple[int, int, int]


class Opened(_Record, frozen=True, kw_only=True, tag="opened"):
    """A process took the session up: at the start, and after each restart."""

    pid: int
    host: str
    environment: dict[str, Any]
    torn_bytes: int = 0
    """Bytes of an unfinished record that were cut off and kept aside."""


class Closed(_Record, frozen=True, kw_only=True, tag="closed"):
    """The process let go of the session in good order."""


class BatchMade(_Record, frozen=True, kw_only=True, tag="batch"):
    """A batch exists from here on.

    shas: full SHA-256 of the pixels of each item. codes: [items that are not references, dim], None where a source has
    none. decision: what its source decided under time pressure, to be told on replay.
    """

    batch_id: str
    stream: str | None
    generation: int
    batch_kind: Literal["gen", "repair", "filler"]
    items: list[Item]
    shas: list[str]
    order: list[int]
    pres_ids: list[str]
    codes: Array | None = None
    decision: Any = None
    repairs: str | None = None
    """The batch whose missing items these are."""


class Served(_Record, frozen=True, kw_only=True, tag="served"):
    """A batch went to a client for the first time."""

    batch_id: str
    client: str
    late_ms: float = 0.0
    """How much later than asked for; above 0 is a missed deadline."""


class OnsetFound(msgspec.Struct, kw_only=True, frozen=True):
    """When a presentation began, by the best source at the time of its report (`timing.onset`).

    t_ns: by the server's monotonic clock. by: "photodiode", "ttl", "flip" or "received". problems: why better sources
    were passed over.
    """

    t_ns: int
    by: str
    uncertainty_ns: float
    problems: list[str] = []


class ShownEvents(_Record, frozen=True, kw_only=True, tag="shown"):
    """Presentations as the rig reported them, raw clocks; and what followed for their onsets then."""

    id: str
    client: str
    events: list[Event]
    onsets: list[OnsetFound]
    late: list[str] = []
    """Presentations that went wrong, which was heard only when their source was learning from them already."""


class Told(_Record, frozen=True, kw_only=True, tag="tell"):
    """Responses as they came."""

    client: str
    header: Tell
    responses: Array


class Update(_Record, frozen=True, kw_only=True, tag="update"):
    """A stream's source learned from a batch. scores: float64 [items that are not references], NaN = missing.
    digest: of the source's state afterwards."""

    stream: str
    batch_id: str
    scores: Array
    digest: str


class ClockMapping(_Record, frozen=True, kw_only=True, tag="clock"):
    """Exchanges with a client's clock, and what followed from all of them so far (see `timing.ClockFit`)."""

    id: str
    client: str
    clock: str
    exchanges: list[tuple[int, int, int, int]]
    at_ns: int
    offset_ns: int
    drift_ppm: float
    uncertainty_ns: float


class Control(_Record, frozen=True, kw_only=True, tag="control"):
    """Anything else that changes the session or that its owner should know."""

    what: Literal[
        "note",
        "pause",
        "resume",
        "stop",
        "fault",
        "deadline_miss",
        "stalled",
        "link_lost",
        "link_back",
        "clock_step",
        "clock_uncertain",
    ]
    text: str
    id: str | None = None
    client: str | None = None
    stream: str | None = None


Record = Start | Opened | Closed | BatchMade | Served | ShownEvents | Told | Update | ClockMapping | Control

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Record)


def encode(record: Record) -> bytes:
    """The bytes that are framed in the journal."""
    return _ENCODER.encode(record)


def decode(data: bytes | memoryview) -> Record:
    """The record in these bytes.

    Raises:
        ValueError: not a record of this format; the message names the field.
    """
    try:
        return _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a record of a session: {error}") from error
