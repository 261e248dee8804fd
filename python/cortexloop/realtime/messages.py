"""What a rig and a session say to each other, whatever carries it: one structure for each message.

A message may come with one buffer of raw bytes, C-contiguous, little-endian: the images of a `Batch`, the responses of
a `Tell`. Field names, types and bounds are checked when a message is decoded (`cortexloop.rig.protocol`).

All `*_ns` fields are nanoseconds. Times by a rig's own clocks (`t_on`, `diode`, ...) stay in that clock's units.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

VERSION = 1
"""Of the protocol. A client says which versions it speaks, a server answers with the one that counts."""

Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._:\-]+\Z")]
"""Chosen by the client, different for each request; a request that is sent again keeps it."""
Text = Annotated[str, Meta(max_length=4000)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
MAX_ITEMS = 100_000
Count = Annotated[int, Meta(ge=0, le=MAX_ITEMS)]
Integer = Annotated[int, Meta(ge=-(2**62), le=2**62)]
"""Whole numbers that fit into 64 bits, and so do their differences."""
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
"""Bounds that NaN and infinity, which msgpack can carry, do not satisfy."""
Number = Integer | Finite
Window = tuple[Finite, Finite]
"""Milliseconds from stimulus onset, beginning and end."""

Outcome = Literal["ok", "no_fix", "abort", "late_flip", "not_shown"]
"""How a presentation went. Only "ok" counts; all others are shown again."""
Status = Literal["ok", "missing", "artifact", "gap"]
"""What a response is worth. Only "ok" counts; all others are shown again."""


class _Message(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    pass


# ---------------------------------------------------------------------------------------------- requests


class Hello(_Message, frozen=True, kw_only=True, tag="hello"):
    """Who is there. The first message of a connection."""

    id: Id
    client: Name
    roles: Annotated[list[Literal["display", "acquisition", "viewer"]], Meta(max_length=10)] = []
    versions: Annotated[list[int], Meta(max_length=100)] = msgspec.field(default_factory=lambda: [VERSION])
    secret: Text | None = None


class ClockRequest(_Message, frozen=True, kw_only=True, tag="clock"):
    """Ask for the server's time; four or eight of these in a row make a `ClockReport`."""

    id: Id
    t1_ns: Integer
    """The client's monotonic time when it sent this."""


class ClockReport(_Message, frozen=True, kw_only=True, tag="clock_report"):
    """Exchanges from which the server estimates a client's clock."""

    id: Id
    clock: Name
    """Name of the client's clock, as in `Event.clock`."""
    exchanges: Annotated[list[tuple[Integer, Integer, Integer, Integer]], Meta(min_length=1, max_length=1000)]
    """(t1, t2, t3, t4) in nanoseconds: sent, received, answered, arrived; t1 and t4 by the client's clock."""


class Ask(_Message, frozen=True, kw_only=True, tag="ask"):
    """Ask for a batch of images to show. Answered by the same batch until it is told.

    after: the batch that was shown last (also a filler); the answer is the one that follows. None: the first that is
    not told completely. within_ms: when a batch has to be there, else a filler comes; the session's own if None.
    max_items, part: for clients that cannot take a whole batch at once: images part * max_items and following.
    need: "header" for a batch without pixels.
    """

    id: Id
    after: Name | None = None
    within_ms: Annotated[float, Meta(ge=0, le=600000)] | None = None
    max_items: Annotated[int, Meta(ge=1, le=MAX_ITEMS)] | None = None
    part: Count = 0
    need: Literal["images", "header"] = "images"


class Event(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One presentation. Times by the rig's clocks, as these gave them.

    t_on, t_off: by the clock named `clock` (its units as the session's configuration says). frame: the display's frame
    number. missed: frames missed during the presentation. diode, ttl: onset by the acquisition system's clock, named
    `acquisition`, from a photodiode and from a digital pulse; None: not measured.
    """

    pres_id: Name
    outcome: Outcome = "ok"
    t_on: Number | None = None
    t_off: Number | None = None
    clock: Name | None = None
    frame: Integer | None = None
    missed: Count = 0
    diode: Number | None = None
    ttl: Number | None = None
    acquisition: Name | None = None


class Shown(_Message, frozen=True, kw_only=True, tag="shown"):
    """What was shown when."""

    id: Id
    events: Annotated[list[Event], Meta(min_length=1, max_length=MAX_ITEMS)]


class Tell(_Message, frozen=True, kw_only=True, tag="tell"):
    """Responses; the buffer is float32 or float64 [rows, units].

    A row belongs to one presentation (`pres_ids`), or else to an item and all its presentations (`item_ids` alone).
    status: per row, "ok" if None; a row that is not ok may hold NaN. final: nothing more will come for this batch, what
    is lacking is missing. window_ms, baseline_ms: the counting window. kind: what the numbers are.
    """

    id: Id
    batch_id: Name
    item_ids: Annotated[list[Name], Meta(max_length=MAX_ITEMS)]
    units: Annotated[list[Name], Meta(max_length=100_000)]
    pres_ids: Annotated[list[Name], Meta(max_length=MAX_ITEMS)] | None = None
    dtype: Literal["float32", "float64"] = "float32"
    status: Annotated[list[Status], Meta(max_length=MAX_ITEMS)] | None = None
    kind: Literal["count", "rate", "score"] = "rate"
    window_ms: Window | None = None
    baseline_ms: Window | None = None
    final: bool = False


class Note(_Message, frozen=True, kw_only=True, tag="note"):
    """A remark of the experimenter, for the journal."""

    id: Id
    text: Text


class Pause(_Message, frozen=True, kw_only=True, tag="pause"):
    """No more batches until `Resume`; responses are still taken."""

    id: Id
    reason: Text = ""


class Resume(_Message, frozen=True, kw_only=True, tag="resume"):
    """Go on, also after too many missing responses (which are then shown again)."""

    id: Id


class Stop(_Message, frozen=True, kw_only=True, tag="stop"):
    """The session is over; nothing more is shown or told."""

    id: Id
    reason: Text = ""


class StatusRequest(_Message, frozen=True, kw_only=True, tag="status"):
    """How is it going? Answered by `StatusReply`."""

    id: Id


class Heartbeat(_Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Still here."""

    id: Id


# ---------------------------------------------------------------------------------------------- replies


class ResumePoint(msgspec.Struct, kw_only=True, frozen=True):
    """Where a session stands: the batch being shown, how many batches are told, the id of the last tell."""

    batch_id: str | None = None
    told: int = 0
    last_tell_id: str | None = None


class Welcome(_Message, frozen=True, kw_only=True, tag="welcome"):
    """Answer to `Hello`. config: SHA-256 of the session's configuration."""

    id: str
    session: str
    version: int
    server_clock_ns: int
    resume: ResumePoint
    config: str


class ClockReply(_Message, frozen=True, kw_only=True, tag="clock_reply"):
    """The server's time: received at t2_ns, answered at t3_ns."""

    id: str
    t1_ns: int
    t2_ns: int
    t3_ns: int


class Item(msgspec.Struct, kw_only=True, frozen=True):
    """One image of a batch.

    sha: the first 16 hexadecimal digits of the SHA-256 of its pixels. kind: "ref" is one of the session's references.
    stream: whose image it is, None for a reference. label: what its source calls it, a file's name for example.
    """

    item_id: str
    kind: Literal["gen", "ref"]
    sha: str
    stream: str | None = None
    label: str | None = None


class Batch(_Message, frozen=True, kw_only=True, tag="batch"):
    """Answer to `Ask`. The buffer: images uint8 sRGB [n, height, width, 3] of `items[first : first + n]`.

    order: the presentations, each as an index into `items`, references first. pres_ids: a name for each of them.
    kind: "gen", "repair" (what was missing of an earlier batch) or "filler" (shown because the next batch was not
    ready; nothing is learned from it). more: items follow; ask for the next part.
    """

    id: str
    batch_id: str
    stream: str | None
    generation: int
    kind: Literal["gen", "repair", "filler"]
    items: list[Item]
    order: list[int]
    pres_ids: list[str]
    shape: tuple[int, int, int, int]
    first: int = 0
    more: bool = False
    dtype: Literal["uint8"] = "uint8"
    colour: Literal["sRGB8"] = "sRGB8"


class Ignored(msgspec.Struct, kw_only=True, frozen=True):
    """A row or event that changed nothing, and why: "late": its batch is closed; "not_ok": its status says so."""

    item_id: str
    why: Literal["duplicate", "late", "not_ok"]


class Ack(_Message, frozen=True, kw_only=True, tag="ack"):
    """The request took effect, and is on disk. dup: it had already, when the same id came before."""

    id: str
    accepted: int = 0
    ignored: list[Ignored] = []
    dup: bool = False
    journaled: bool = True


Code = Literal[
    "STALE_BATCH",  # the batch is unknown or closed
    "UNKNOWN_ITEM",  # an item or presentation that the batch does not have
    "BAD_SHAPE",  # buffer or lists of another length than the header says
    "NAN",  # NaN or infinity where a response is said to be ok
    "BAD_MESSAGE",  # cannot be decoded, or a field is out of bounds
    "TOO_LARGE",  # more bytes than the server takes
    "VERSION",  # no version of the protocol in common
    "AUTH",  # no secret, or another one
    "NO_HELLO",  # say hello first (after the server was restarted, for example)
    "PAUSED",  # no batches while the session is paused
    "FINISHED",  # no batches any more
    "BUSY",  # the request waits already, or too many do
    "FAULT",  # the session is in the state "fault": nothing is recorded
]


class Error(_Message, frozen=True, kw_only=True, tag="error"):
    """The request had no effect. retry: the same request may succeed later. text: what was expected, what came."""

    id: str
    code: Code
    text: str
    retry: bool = False


class StreamStatus(msgspec.Struct, kw_only=True, frozen=True):
    """One stream: generations told, best and last mean score, whether its source has nothing more to show, whether its
    next batch is ready."""

    name: str
    generation: int
    best: float | None
    mean: float | None
    finished: bool
    ready: bool


class Link(msgspec.Struct, kw_only=True, frozen=True):
    """One client: when it was last heard, and whether that is too long ago."""

    client: str
    roles: list[str]
    last_heard_s: float
    stale: bool


State = Literal["ready", "running", "paused", "finished", "fault"]


class StatusReply(_Message, frozen=True, kw_only=True, tag="status_reply"):
    """How it is going. reference_mean: mean response to the references in the last batch that was told."""

    id: str
    session: str
    state: State
    text: str
    streams: list[StreamStatus]
    reference_mean: float | None
    open_batches: list[str]
    batches: int
    told: int
    deadline_misses: int
    reshown: int
    late: int
    gaps: int
    clock_uncertainty_us: float | None
    links: list[Link]
    disk_free_bytes: int | None
    last_sync_ms: float | None


Request = (
    Hello | ClockRequest | ClockReport | Ask | Shown | Tell | Note | Pause | Resume | Stop | StatusRequest | Heartbeat
)
Reply = Welcome | ClockReply | Batch | Ack | Error | StatusReply


class Refusal(Exception):  # noqa: N818
    """A request that cannot take effect; becomes an `Error`."""

    def __init__(self, code: Code, text: str, *, retry: bool = False) -> None:
        super().__init__(text)
        self.code, self.text, self.retry = code, text, retry

    def to(self, id: str) -> Error:
        """The reply to the request with this id."""
        return Error(id=id, code=self.code, text=self.text, retry=self.retry)
