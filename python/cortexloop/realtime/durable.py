"""Bytes that stay: what the journal and the store of pixels share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

BINARY: int = getattr(os, "O_BINARY", 0)


class JournalError(RuntimeError):
    """A session cannot be recorded or read back: disk full, damaged, in use. The message is one sentence."""


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte, also where the system takes only some at a time.

    Raises:
        OSError: the disk is full, or fails; some of the bytes may have been written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_file(fd: int) -> None:
    """Return once what was written would survive a power cut, as far as the system and its disk can be believed.

    Raises:
        OSError: the disk failed. Whether the bytes are on it is unknown then, and asking again would not tell.
    """
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync leaves the bytes in the drive's own memory there
    elif hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """The same for the names in a folder. Windows has no such call and needs none.

    Raises:
        OSError: see `sync_file`.
    """
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def keep_aside(path: Path, data: bytes) -> Path:
    """Write bytes that are about to be cut off a file beside it, as `<name>.torn-1`, `-2`, ...; return where.

    Raises:
        OSError: they cannot be written.
    """
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.torn-{number}")
        try:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o644)
        except FileExistsError:
            number += 1
            continue
        try:
            write_all(fd, data)
            sync_file(fd)
        finally:
            os.close(fd)
        sync_folder(path.parent)
        return aside


def reason(error: OSError) -> str:
    """What the system says, in words that fit into a sentence."""
    return (error.strerror or str(error) or type(error).__name__).lower()
