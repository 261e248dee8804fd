"""The journal of a session: one file to which records are appended, and which a crash cannot make unreadable.

Layout, little-endian: 8 bytes `MAGIC`, then one frame for each record:

    u32  length of the payload, 1 .. MAX_RECORD
    u32  CRC-32 of the length's four bytes and the payload
    ...  the payload: one record, msgpack (`cortexloop.realtime.records`)

The first record is `Start`. Nothing is ever changed; the only thing that is ever cut off is a frame at the end that a
crash left unfinished, and its bytes are kept in a file beside. A frame that is broken with a good one behind it was not
left by a crash of the writer: such a journal is not opened before somebody has looked at it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, overload

import filelock

from cortexloop.realtime.durable import BINARY, JournalError, keep_aside, reason, sync_file, sync_folder, write_all
from cortexloop.realtime.records import Record, Start, decode, encode

__all__ = [
    "FORMAT",
    "JOURNAL",
    "LOCK",
    "MAGIC",
    "MAX_RECORD",
    "Journal",
    "JournalError",
    "Records",
    "Scan",
    "frame",
    "good_records",
    "scan",
]

MAGIC = b"rigj\r\n\x1a\x01"
"""With both kinds of line ends, so that a transfer as text shows."""
FORMAT = 1
"""Of the records, for `Start.format`."""
JOURNAL = "session.rigj"
LOCK = "session.lock"
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


class _Reader:
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
        with _reading(self._path) as file:
            return self._read(file, offset)

    def __iter__(self) -> Iterator[Record]:
        """All of them, one at a time.

        Raises:
            JournalError: the file has changed.
        """
        with _reading(self._path) as file:
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
def _reading(path: Path) -> Iterator[BinaryIO]:
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
    with _reading(path) as file:
        reader = _Reader(path, file)
        for _ in reader:
            pass
        return Scan(path, reader.count, reader.good, reader.size - reader.good, reader.problem, reader.offsets)


def good_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Every good record of a file, wherever it is, also behind damage: for rescuing what a damaged journal holds.

    Raises:
        JournalError: the file cannot be read.
    """
    with _reading(Path(path)) as file:
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


class Journal:
    """The journal of one session, open for appending; one process at a time. Made by `create` or `open`.

    Not for concurrent use within the process either: one thread writes.

    Attributes:
        path: the file.
        start: its first record.
        torn_bytes: bytes of an unfinished record that were cut off when it was opened.
    """

    def __init__(self, path: Path, start: Start, lock: filelock.BaseFileLock, *, torn_bytes: int = 0) -> None:
        self.path, self.start, self.torn_bytes = path, start, torn_bytes
        self._lock = lock
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | BINARY)
        self._synced = os.fstat(self._fd).st_size
        self._pending = bytearray()
        self._refusal: str | None = None

    @classmethod
    def create(cls, folder: str | os.PathLike[str], first: Start) -> Journal:
        """Begin a journal in a folder, which is made if it is missing; on disk when this returns.

        Raises:
            FileExistsError: the folder has a journal already.
            JournalError: it is in use by another process, or cannot be written.
        """
        folder = Path(folder)
        path = folder / JOURNAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(f"{str(folder)!r} cannot be made: {reason(error)}") from error
        lock = _locked(folder)
        try:
            if path.exists():
                raise FileExistsError(f"{str(path)!r} exists already: resume that session, or take another folder")
            # The name appears only once the first record is complete.
            fresh = path.with_name(f"{JOURNAL}.new")
            with _failing(path):
                fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o644)
                try:
                    write_all(fd, MAGIC + frame(first))
                    sync_file(fd)
                finally:
                    os.close(fd)
                fresh.rename(path)
                sync_folder(folder)
                return cls(path, first, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> tuple[Journal, Records]:
        """Take up the journal in a folder: everything in it, ready for more.

        An unfinished record at its end is cut off; its bytes are kept as `session.rigj.torn-<n>`.

        Raises:
            FileNotFoundError: the folder has no journal.
            JournalError: it is in use by another process, damaged, or of another format.
        """
        folder = Path(folder)
        path = folder / JOURNAL
        if not path.is_file():
            raise FileNotFoundError(f"{str(folder)!r} has no {JOURNAL}: no session was begun there")
        lock = _locked(folder)
        try:
            with _reading(path) as file:
                reader = _Reader(path, file)
                for _ in reader:
                    pass
                if reader.problem is not None:
                    raise JournalError(reader.problem)
                records = Records(path, reader.offsets)
                start = records[0]
                assert isinstance(start, Start)  # the reader saw to that
                file.seek(reader.good)
                torn = file.read(reader.size - reader.good)
            with _failing(path):
                if torn:
                    keep_aside(path, torn)
                    with path.open("r+b") as file:
                        file.truncate(reader.good)
                        os.fsync(file.fileno())
                return cls(path, start, lock, torn_bytes=len(torn)), records
        except BaseException:
            lock.release()
            raise

    @property
    def failed(self) -> bool:
        """Whether a `sync` failed, after which nothing more is taken."""
        return self._refusal is not None

    def append(self, record: Record) -> None:
        """Take a record; it counts from the next `sync` on.

        Raises:
            ValueError: it is larger than MAX_RECORD.
            JournalError: the journal is closed, or failed before.
        """
        self._check()
        self._pending += frame(record)

    def sync(self) -> float:
        """Bring all that was appended onto the disk; return how many milliseconds that took.

        Raises:
            JournalError: that failed. What was appended since the last success is cut off again as far as possible, and
                the journal takes nothing any more.
        """
        self._check()
        if not self._pending:
            return 0.0
        begun = time.perf_counter()
        try:
            write_all(self._fd, self._pending)
            sync_file(self._fd)
        except BaseException as error:
            self._refusal = f"{str(self.path)!r} failed before and takes no more records; restart when the disk is well"
            self._pending = bytearray()
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._synced)
                sync_file(self._fd)
            if isinstance(error, OSError):
                raise JournalError(f"{str(self.path)!r} cannot be written: {reason(error)}") from error
            raise
        self._synced += len(self._pending)
        self._pending = bytearray()
        return (time.perf_counter() - begun) * 1e3

    def close(self) -> None:
        """Sync what is left, and let go of the file and its lock. Closing again does nothing.

        Raises:
            JournalError: the rest could not be written; it is closed nevertheless.
        """
        if self._fd < 0:
            return
        try:
            if self._refusal is None:
                self.sync()
        finally:
            os.close(self._fd)
            self._fd = -1
            self._lock.release()

    def _check(self) -> None:
        if self._fd < 0:
            raise JournalError(f"{str(self.path)!r} is closed")
        if self._refusal is not None:
            raise JournalError(self._refusal)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _locked(folder: Path) -> filelock.BaseFileLock:
    # Not bound to a thread: a server may close a session from another thread than began it.
    lock = filelock.FileLock(str(folder / LOCK), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise JournalError(f"the session in {str(folder)!r} is in use by another process") from error
    except (OSError, NotImplementedError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise JournalError(f"the session in {str(folder)!r} cannot be locked: {why}") from error
    return lock


@contextlib.contextmanager
def _failing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise JournalError(f"{str(path)!r} cannot be written: {reason(error)}") from error
