"""Write a file so that it is either complete or absent: beside its destination first, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it replaces `path`, on any exception it is removed.

    The temporary name ends in the suffix of `path`, so that writers which look at the suffix choose the same format.
    The bytes are on the disk before the rename (fsync of the file, then of the folder), so that a crash leaves
    either the old file or the new one. An existing `path` stays untouched until then and keeps its permissions after.

    Raises:
        FileNotFoundError: the folder of `path` does not exist (or `path` is empty).
        IsADirectoryError: `path` is a folder.
        PermissionError: the folder may not be written.
        OSError: no space is left (errno ENOSPC or EDQUOT); nothing of the new file remains.
    """
    destination = Path(path)
    folder = destination.parent
    if destination.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"cannot write {str(path)!r}: it is a folder; give the name of a file")
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT,
            f"cannot write {destination.name!r}: the folder {str(folder)!r} does not exist; create it first",
        )
    try:
        handle, name = tempfile.mkstemp(prefix=f".{destination.name}.", suffix=destination.suffix, dir=folder)
    except OSError as error:
        raise _explained(error, destination) from error
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        _flush_to_disk(temporary)
        temporary.chmod(_permissions(destination))
        os.replace(temporary, destination)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, destination) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(folder)


def _permissions(destination: Path) -> int:
    """Mode bits of the file to be replaced, or what `open` would give a new one (mkstemp's 0600 would hide it)."""
    if destination.exists():
        return destination.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable; some systems (Windows, some network disks) cannot open or sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _explained(error: OSError, destination: Path) -> OSError:
    """The same kind of error with a sentence for people; errors that are not about the disk pass unchanged."""
    if error.errno in _NO_SPACE:
        return OSError(
            error.errno,
            f"no space left on the disk of {str(destination)!r}; nothing was written, free some space and try again",
        )
    if error.errno in _NO_PERMISSION and (error.filename is None or str(destination.parent) in str(error.filename)):
        return PermissionError(error.errno, f"no permission to write {str(destination)!r}; choose another folder")
    return error
