"""The file of a session's journal: how records stand in it, and how they are read back and checked.

Layout, little-endian: 8 bytes `MAGIC`, then one frame for each record:

    u32  length of the payload, 1 .. MAX_RECORD
    u32  CRC-32 of the length's four bytes and the payload
    ...  the payload: one record, msgpack (`cortexloop.realtime.records`)

The first record is `Start`. Nothing is ever changed; the only thing that is ever cut off is what a crash left
unfinished at the end, and its bytes are kept in a file beside. A broken frame with good ones behind it is something
else: no killed process leaves it, a bad disk does (or, on some file systems, a power cut amid several records that
nobody was told of). Such a journal is not opened before somebody has looked at it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, overload

from cortexloop.realtime.durable import JournalError, reason
from cortexloop.realtime.records import Record, Start, decode, encode

MAGIC = b"rigj\r\n\x1a\x01"
"""With both kinds of line ends, so that a transfer as text shows."""
FORMAT = 1
"""Of the records, for `Start.format`."""
JOURNAL = "session.rigj"
MAX_RECORD = 1 << 28
"""Largest payload, bytes."""

_HEADER = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
# The name of the first field of every record. Before it stands the number of fields: one byte up to 15, else three.
_KIND = b"\xa4kind"
_WINDOW = 1 << 20


def _checksum(payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_LENGTH.pack(len(payload))))


def frame(record: Record) -> bytes:
    """The bytes of one record in the file.

    Raises:
        ValueError: the record is larger than MAX_RECORD.
    """
    payload = encode(record)
    if len(payload) > MAX_RECORD:
        raise ValueError(
            f"a record may have at most {MAX_RECORD} bytes, this {type(record).__name__} has {len(payload)}"
        )
    return _HEADER.pack(len(payload), _checksum(payload)) + payload


def _payload(file: BinaryIO, offset: int, size: int) -> bytes | None:
    """The payload of the frame at this place of a file of `size` bytes, None if there is no good one."""
    if size - offset < _HEADER.size:
        return None
    file.seek(offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    if not 1 <= length <= min(MAX_RECORD, size - offset - _HEADER.size):
        return None
    payload = file.read(length)
    return payload if len(payload) == length and _checksum(payload) == checksum else None


def _next_good(file: BinaryIO, offset: int, size: int) -> int | None:
    """Where the first good frame behind this place begins; found by the first bytes that all payloads share."""
    overlap = len(_KIND) - 1
    while offset < size:
        file.seek(offset)
        window = file.read(_WINDOW)
        if not window:
            return None
        at = window.find(_KIND)
        while at >= 0:
            for before in (1, 3):
                start = offset + at - before - _HEADER.size
                if start >= len(MAGIC) and _payload(file, start, size) is not None:
                    return start
            at = window.find(_KIND, at + 1)
        if offset + len(window) >= size:
            return None
        offset += len(window) - overlap
    return None


class Reader:
    """Goes through the records of a file, one at a time; afterwards knows how far it got and why no further."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        # A session that runs may append while this reads; what it appends from here on is left alone.
        self.size = os.fstat(file.fileno()).st_size
        self.good = 0
        self.offsets = array("Q")
        """Where each good record's frame begins."""
        self.problem: str | None = None

    @property
    def count(self) -> int:
        """Good records so far."""
        return len(self.offsets)

    def __iter__(self) -> Iterator[Record]:
        name = str(self._path)
        self._file.seek(0)
        magic = self._file.read(len(MAGIC))
        if magic != MAGIC:
            self.problem = f"{name!r} is no journal of a session: it begins with {magic!r}, not with {MAGIC!r}"
            return
        self.good = len(MAGIC)
        while self.good < self.size:
            payload = _payload(self._file, self.good, self.size)
            if payload is None:
                behind = _next_good(self._file, self.good + 1, self.size)
                if behind is not None:
                    self.problem = (
                        f"{name!r} is damaged: bytes {self.good} to {behind} (after {self.count} good records) are not "
                        "what was written, and good records follow; `cortexloop rig recover` copies what comes before"
                    )
                elif self.count == 0:
                    self.problem = f"{name!r} is damaged: it has no first record"
                return
            try:
                record = decode(payload)
                if isinstance(record, Start) != (self.count == 0):
                    raise ValueError(f"a {type(record).__name__} cannot come here")
                if isinstance(record, Start) and record.format != FORMAT:
                    raise ValueError(f"format {record.format}, and this version of cortexloop reads format {FORMAT}")
            except ValueError as error:
                self.problem = f"{name!r} cannot be read from byte {self.good} on (record {self.count + 1}): {error}"
                return
            self.offsets.append(self.good)
            self.good += _HEADER.size + len(payload)
            yield record
        if self.count == 0:
            self.problem = f"{name!r} is damaged: it has no first record"


class Records(Sequence[Record]):
    """Records of a journal that stay in the file until they are asked for, so that no session is too long.

    Args:
        path: the file.
        offsets: where the frame of each begins.
    """

    def __init__(self, path: Path, offsets: array[int]) -> None:
        self._path, self._offsets = path, offsets

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> Record | Records:
        """One record, or some of them, which stay in the file.

        Raises:
            IndexError: there are fewer.
            JournalError: the file has changed.
        """
        if isinstance(index, slice):
            return Records(self._path, self._offsets[index])
        offset = self._offsets[index]
        with reading(self._path) as file:
            return self._read(file, offset)

    def __iter__(self) -> Iterator[Record]:
        """All of them, one at a time.

        Raises:
            JournalError: the file has changed.
        """
        with reading(self._path) as file:
            for offset in self._offsets:
                yield self._read(file, offset)

    def _read(self, file: BinaryIO, offset: int) -> Record:
        payload = _payload(file, offset, os.fstat(file.fileno()).st_size)
        if payload is None:
            raise JournalError(f"{str(self._path)!r} has changed while it was read")
        return decode(payload)


@dataclass(frozen=True)
class Scan:
    """What is in a journal.

    Attributes:
        path: the file.
        count: good records from the beginning on.
        good_bytes: the length of the file up to their end.
        torn_bytes: bytes behind them.
        problem: why the journal cannot be opened, in one sentence; None if it can. A torn tail alone is no problem.
    """

    path: Path
    count: int
    good_bytes: int
    torn_bytes: int
    problem: str | None
    _offsets: array[int] = field(repr=False, compare=False)

    def records(self) -> Records:
        """The good records, read again as they are asked for.

        Raises:
            JournalError: the file has changed meanwhile, other than by growing.
        """
        return Records(self.path, self._offsets)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading.

    Raises:
        JournalError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise JournalError(f"{str(path)!r} cannot be read: {reason(error)}") from error


def scan(path: str | os.PathLike[str]) -> Scan:
    """Check every record of a journal (the file, or its session's folder) without changing or locking anything.

    Raises:
        JournalError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    path = path / JOURNAL if path.is_dir() else path
    with reading(path) as file:
        reader = Reader(path, file)
        for _ in reader:
            pass
        return Scan(path, reader.count, reader.good, reader.size - reader.good, reader.problem, reader.offsets)


def good_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Every good record of a file, wherever it is, also behind damage: for rescuing what a damaged journal holds.

    Raises:
        JournalError: the file cannot be read.
    """
    with reading(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        offset: int | None = len(MAGIC)
        while offset is not None:
            payload = _payload(file, offset, size)
            if payload is None:
                offset = _next_good(file, offset + 1, size)
                continue
            with contextlib.suppress(ValueError):
                yield decode(payload)
            offset += _HEADER.size + len(payload)
