"""The journal of a session: one file to which records are appended, and which a crash cannot make unreadable.

How it stands in the file: `cortexloop.realtime.frames`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import filelock

from cortexloop.realtime.durable import BINARY, JournalError, keep_aside, reason, sync_file, sync_folder, write_all
from cortexloop.realtime.frames import (
    FORMAT,
    JOURNAL,
    MAGIC,
    MAX_RECORD,
    Reader,
    Records,
    Scan,
    frame,
    good_records,
    reading,
    scan,
)
from cortexloop.realtime.records import Record, Start

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

LOCK = "session.lock"


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
            with reading(path) as file:
                reader = Reader(path, file)
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
