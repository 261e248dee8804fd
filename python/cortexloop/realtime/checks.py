"""What a session refuses: parts that do not belong together, another session's journal, responses that cannot be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cortexloop.realtime import messages as m
from cortexloop.realtime import records as r
from cortexloop.realtime.rounds import BatchState
from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.source import Images, Source, sha256
from cortexloop.realtime.state import ResumeError, SessionState

LARGEST = 1e30
"""Of a response's absolute value: float32 has it, and means and sums of squares stay finite."""
OWN_NAMES = ("filler", "ref")


def image_sha(image: Images) -> str:
    """SHA-256 of an image's pixels, hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def few(names: Sequence[str]) -> str:
    """The first of these, for a message."""
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def plain(value: Any) -> Any:
    """As it comes back from the journal: numbers, texts, lists and dicts.

    Raises:
        TypeError: it has something else.
    """
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value, enc_hook=_builtin))


def _builtin(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"settings and decisions should be numbers, texts, lists and dicts, got {type(value).__name__}")


def digest(value: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return sha256(json.dumps(value, sort_keys=True))


def check_parts(
    settings: SessionSettings, sources: Mapping[str, Source], references: Images | None
) -> tuple[Images, tuple[int, int]]:
    """References (maybe none) and the size of all images.

    Raises:
        ValueError: parts that do not belong together.
    """
    names = [stream.name for stream in settings.streams]
    if sorted(names) != sorted(sources) or len(set(names)) != len(names):
        raise ValueError(
            f"there should be one source for each stream, {few(names)}, got sources for {few(list(sources))}"
        )
    if any(name in OWN_NAMES for name in names):
        raise ValueError(f"the names {few(OWN_NAMES)} are the session's own; call the stream something else")
    sizes = {tuple(source.size) for source in sources.values()}
    if len(sizes) != 1:
        raise ValueError(f"all streams should show images of one size, got {sorted(sizes)}; give them a placement")
    height, width = next(iter(sizes))
    if references is None:
        return np.zeros((0, height, width, 3), np.uint8), (height, width)
    if references.dtype != np.uint8 or references.ndim != 4 or references.shape[1:] != (height, width, 3):
        raise ValueError(
            f"references should be uint8 [R, {height}, {width}, 3], got {references.dtype} {list(references.shape)}"
        )
    return np.ascontiguousarray(references), (height, width)


def check_start(start: r.Record, kept: Any, sources: Mapping[str, Source], references: Images) -> r.Start:
    """The start record of a journal, if these are the parts that the session began with.

    Raises:
        ResumeError: the first thing that differs.
    """
    if not isinstance(start, r.Start):
        raise ResumeError(f"the journal should begin with a start record, got {type(start).__name__}")
    if digest(kept) != start.config_sha:
        where, before, now = _difference(start.config, kept)
        raise ResumeError(f"the configuration has changed: {where} was {before!r:.80} and is now {now!r:.80}")
    for name, source in sources.items():
        now = plain(source.settings())
        if now != start.sources.get(name):
            where, before, now = _difference(start.sources.get(name), now)
            raise ResumeError(
                f"the source of stream {name!r} is another: {where} was {before!r:.80} and is now {now!r:.80}"
            )
    if [image_sha(image) for image in references] != start.references:
        raise ResumeError("the reference images are not those that the session began with")
    return start


def _difference(before: Any, now: Any, where: str = "") -> tuple[str, Any, Any]:
    """The first place where two nested values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    return where or "it", before, now


def check_tell(state: SessionState, tell: m.Tell, buffer: bytes | memoryview | None) -> r.Array:
    """The responses in a tell's buffer, [rows, units], if they can be about its batch.

    Raises:
        Refusal: see `cortexloop.realtime.messages.Code`.
    """
    batch = state.by_id.get(tell.batch_id)
    if batch is None:
        raise m.Refusal("STALE_BATCH", f"there is no batch {tell.batch_id!r} in session {state.settings.session!r}")
    rows, units = len(tell.item_ids), len(tell.units)
    for name, given in (("pres_ids", tell.pres_ids), ("status", tell.status)):
        if given is not None and len(given) != rows:
            raise m.Refusal("BAD_SHAPE", f"{name} should have {rows} entries as item_ids has, got {len(given)}")
    dtype = np.dtype(tell.dtype).newbyteorder("<")
    expected, got = rows * units * dtype.itemsize, 0 if buffer is None else len(memoryview(buffer).cast("B"))
    if expected != got:
        raise m.Refusal("BAD_SHAPE", f"{rows} rows of {units} units in {tell.dtype} are {expected} bytes, got {got}")
    for row, item in enumerate(() if batch.closed else tell.item_ids):
        if item not in batch.presentations:
            raise m.Refusal("UNKNOWN_ITEM", f"batch {tell.batch_id!r} has no item {item!r}")
        if tell.pres_ids is not None and batch.item_of.get(tell.pres_ids[row]) != item:
            raise m.Refusal(
                "UNKNOWN_ITEM", f"batch {tell.batch_id!r} has no presentation {tell.pres_ids[row]!r} of {item!r}"
            )
    values = np.frombuffer(buffer or b"", dtype).reshape(rows, units)
    counts = np.array([status == "ok" for status in tell.status or ["ok"] * rows], bool)
    bad = np.flatnonzero(counts & ~(np.abs(values) <= LARGEST).all(axis=1))
    if len(bad):
        raise m.Refusal(
            "NAN",
            f"the response to {tell.item_ids[bad[0]]!r} is NaN or infinite or beyond {LARGEST:g}; give its status as "
            "missing instead",
        )
    if counts.any() and not batch.closed:
        _check_units(state, batch, tell)
    return r.Array.of(values)


def _check_units(state: SessionState, batch: BatchState, tell: m.Tell) -> None:
    if not tell.units:
        raise m.Refusal("BAD_SHAPE", "responses need at least one unit")
    if len(set(tell.units)) != len(tell.units):
        raise m.Refusal("BAD_SHAPE", "every unit should be named once")
    known = batch.units
    if known is None and batch.made.stream is not None:
        round_units = (x.units for x in state.streams[batch.made.stream].rounds[batch.made.generation].batches)
        known = next((units for units in round_units if units is not None), None)
    if known is not None and known != tuple(tell.units):
        raise m.Refusal(
            "BAD_SHAPE",
            f"the units should be those of the first tell of this generation, {few(known)}, got {few(tell.units)}",
        )
    wanted = [] if batch.made.stream is None else state.streams[batch.made.stream].settings.units
    lacking = [unit for unit in wanted if unit not in tell.units]
    if lacking:
        raise m.Refusal(
            "BAD_SHAPE",
            f"stream {batch.made.stream!r} is scored by {few(wanted)}; of these, {few(lacking)} is not told",
        )
