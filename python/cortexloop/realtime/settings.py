"""Settings of a session, checked when they are read from a file (`cortexloop.rig.config`) or made in Python."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cortexloop.realtime.messages import Name

Positive = Annotated[float, Meta(gt=0, le=1e12)]


class StreamSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stream. units: whose mean response is the score of an image; all units that are told if empty."""

    name: Annotated[str, Meta(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9_\-]+\Z")]
    units: list[Name] = []


class SessionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One session.

    repeats, reference_repeats: presentations of each image and of each reference in a batch. within_ms: when a batch
    has to be ready after it is asked for; else a filler is shown: the references, or the best images so far.
    max_reshow: how often missing images are shown again. min_fraction: a source learns from a generation of which at
    least this share has responses; below it the stream stalls until it is resumed. stale_after_s: without a word from a
    client for so long, its link counts as lost. clock_tolerance_ms: from this uncertainty of a clock, or backward step,
    on there is a warning. clock_units: nanoseconds per unit of each clock that does not count nanoseconds, by name: 1e9
    for one that counts seconds, 33333.333 for samples at 30 kHz.
    """

    session: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._\-]+\Z")]
    streams: Annotated[list[StreamSettings], Meta(min_length=1)]
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    repeats: Annotated[int, Meta(ge=1, le=100)] = 1
    reference_repeats: Annotated[int, Meta(ge=1, le=100)] = 1
    within_ms: Annotated[float, Meta(ge=0, le=600_000)] = 150.0
    filler: Literal["references", "best"] = "references"
    max_reshow: Annotated[int, Meta(ge=0, le=100)] = 3
    min_fraction: Annotated[float, Meta(gt=0, le=1)] = 0.8
    stale_after_s: Positive = 3.0
    clock_tolerance_ms: Positive = 5.0
    clock_units: dict[Name, Positive] = {}
