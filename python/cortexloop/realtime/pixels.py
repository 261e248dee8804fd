"""The images of a session, each kept once, found by the SHA-256 of its pixels.

`images.seg`, little-endian: 8 bytes `MAGIC`, three u32 (height, width, 3), then one entry for each image, all of one
length:

    32 bytes  SHA-256 of the pixels
    u32       height * width * 3
    u32       CRC-32 of the 36 bytes before and of the pixels
    ...       the pixels, uint8 sRGB [height, width, 3] in C order

As they are: zlib takes 1.3 ms for an image of 112 x 112 pixels (one core of a server), just when the rig waits for it,
and saves 12% of an evolved image, 17% of a drawn one.

Kept because images cannot always be made again bit by bit from their codes, on another GPU for example. Written before
the journal names them: an image that no record names does no harm. Of a damaged entry nothing is handed out; the others
stay readable, and its image may be put again.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.durable import BINARY, JournalError, keep_aside, reason, sync_file, sync_folder, write_all

__all__ = ["MAGIC", "PIXELS", "PixelStore", "pixel_sha"]

MAGIC = b"rigp\r\n\x1a\x01"
PIXELS = "images.seg"

_SHAPE = struct.Struct("<III")
_ENTRY = struct.Struct("<32sII")
_START = len(MAGIC) + _SHAPE.size


def pixel_sha(image: NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels of one image [H, W, 3] in C order, hexadecimal: what `Item.sha` begins with."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def _checksum(entry: bytes) -> int:
    return zlib.crc32(memoryview(entry)[_ENTRY.size :], zlib.crc32(entry[:36]))


class PixelStore:
    """The images of one session. May be used from several threads.

    When it is opened for writing, what a crash left unfinished at the end is cut off and kept as `images.seg.torn-<n>`.

    Args:
        folder: of the session.
        shape: (height, width, 3) of all images; None takes what the file says.
        readonly: change nothing, and leave an unfinished end alone: for sessions that may be running.

    Attributes:
        path: the file.
        shape: of every image.
        torn_bytes: bytes of an unfinished entry at the end, when it was opened.
        damaged_bytes: of entries between others that are none, when it was opened.

    Raises:
        FileNotFoundError: `readonly` or no shape, and no file.
        ValueError: images of another shape are in the file, or a shape that is none of images.
        JournalError: the file is none of these, or cannot be read or written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], shape: tuple[int, int, int] | None = None, *, readonly: bool = False
    ) -> None:
        self.path = Path(folder) / PIXELS
        self._readonly = readonly
        self._lock = threading.Lock()
        self._places: dict[str, int] = {}  # where the entry of each image begins
        self._fd = -1
        self._broken = self._dirty = False
        if shape is not None and not (len(shape) == 3 and min(shape) >= 1 and shape[2] == 3 and max(shape) < 1 << 16):
            raise ValueError(f"shape should be (height, width, 3), got {shape}")
        if not self.path.is_file():
            if readonly or shape is None:
                raise FileNotFoundError(f"there is no {str(self.path)!r}")
            self._begin(shape)
        try:
            self._fd = os.open(self.path, (os.O_RDONLY if readonly else os.O_RDWR) | BINARY)
            self.shape = self._read_shape()
            if shape is not None and tuple(shape) != self.shape:
                raise ValueError(f"{str(self.path)!r} has images of shape {self.shape}, expected {tuple(shape)}")
            self._raw = self.shape[0] * self.shape[1] * self.shape[2]
            size = os.fstat(self._fd).st_size
            self._end = self._find_entries(size)
            self.torn_bytes = size - self._end
            if self.torn_bytes and not readonly:
                keep_aside(self.path, self._read(self._end, self.torn_bytes))
                os.ftruncate(self._fd, self._end)
                os.fsync(self._fd)
        except OSError as error:
            self.close()
            raise JournalError(f"{str(self.path)!r} cannot be opened: {reason(error)}") from error
        except BaseException:
            self.close()
            raise

    def _begin(self, shape: tuple[int, int, int]) -> None:
        fresh = self.path.with_name(f"{PIXELS}.new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o644)
            try:
                write_all(fd, MAGIC + _SHAPE.pack(*shape))
                sync_file(fd)
            finally:
                os.close(fd)
            fresh.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise JournalError(f"{str(self.path)!r} cannot be written: {reason(error)}") from error

    def _read(self, offset: int, length: int) -> bytes:
        """Exactly so many bytes, or fewer at the end of the file."""
        os.lseek(self._fd, offset, os.SEEK_SET)
        parts = []
        while length:
            part = os.read(self._fd, length)
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _read_shape(self) -> tuple[int, int, int]:
        head = self._read(0, _START)
        shape = _SHAPE.unpack(head[len(MAGIC) :]) if len(head) == _START else (0, 0, 0)
        if head[: len(MAGIC)] != MAGIC or min(shape) < 1 or shape[2] != 3 or max(shape) >= 1 << 16:
            raise JournalError(f"{str(self.path)!r} is no store of a session's images")
        return shape

    def _find_entries(self, size: int) -> int:
        """Note where each image is, by the heads of the entries; return where the good ones end."""
        stride = _ENTRY.size + self._raw
        found: list[tuple[str, int]] = []
        self.damaged_bytes = 0
        end = _START + (size - _START) // stride * stride
        # What a power cut left at the end may have its length and not its content.
        while end > _START and self._stored(end - stride) is None:
            end -= stride
        for offset in range(_START, end, stride):
            sha, length, _ = _ENTRY.unpack(self._read(offset, _ENTRY.size))
            if length == self._raw:
                found.append((sha.hex(), offset))
            else:
                self.damaged_bytes += stride
        self._places = dict(found)
        return end

    def _stored(self, offset: int) -> bytes | None:
        """The pixels of the entry there, None if its checksum is wrong."""
        entry = self._read(offset, _ENTRY.size + self._raw)
        if len(entry) != _ENTRY.size + self._raw:
            return None
        _, length, checksum = _ENTRY.unpack_from(entry)
        return entry[_ENTRY.size :] if length == self._raw and _checksum(entry) == checksum else None

    def put(self, images: NDArray[np.uint8]) -> list[str]:
        """Keep images, those that are new; on disk after the next `sync`.

        Args:
            images: uint8 [n, height, width, 3].

        Returns:
            The SHA-256 of each.

        Raises:
            ValueError: another dtype or shape.
            JournalError: they cannot be written; the file is as before.
        """
        array: NDArray[Any] = np.asarray(images)
        if array.dtype != np.uint8 or array.shape[1:] != self.shape or array.ndim != 4:
            raise ValueError(f"images should be uint8 [n, {self.shape}], got {array.dtype} {list(array.shape)}")
        shas: list[str] = []
        for image in array:
            pixels = np.ascontiguousarray(image).tobytes()
            digest = hashlib.sha256(pixels)
            shas.append(digest.hexdigest())
            if self.has(shas[-1]):
                continue
            head = digest.digest() + struct.pack("<I", len(pixels))
            checksum = zlib.crc32(pixels, zlib.crc32(head))
            self._add(shas[-1], b"".join((head, struct.pack("<I", checksum), pixels)))
        return shas

    def _add(self, sha: str, entry: bytes) -> None:
        with self._lock:
            self._check_writable()
            if sha in self._places:
                return
            try:
                os.lseek(self._fd, self._end, os.SEEK_SET)
                write_all(self._fd, entry)
            except BaseException as error:
                try:
                    os.ftruncate(self._fd, self._end)
                except OSError:
                    self._broken = True
                if isinstance(error, OSError):
                    raise JournalError(f"{str(self.path)!r} cannot be written: {reason(error)}") from error
                raise
            self._places[sha] = self._end
            self._end += len(entry)
            self._dirty = True

    def get(self, sha: str) -> NDArray[np.uint8]:
        """The image of this SHA-256 (all 64 digits), uint8 [height, width, 3], read-only.

        Raises:
            KeyError: it is not here.
            JournalError: its bytes are damaged.
        """
        with self._lock:
            if self._fd < 0:
                raise JournalError(f"{str(self.path)!r} is closed")
            place = self._places[sha]
            data = self._stored(place)
        if data is None or hashlib.sha256(data).hexdigest() != sha:
            with self._lock:  # so that it can be put again
                if self._places.get(sha) == place:
                    del self._places[sha]
            raise JournalError(f"image {sha[:16]} in {str(self.path)!r} is damaged")
        return np.frombuffer(data, np.uint8).reshape(self.shape)

    def has(self, sha: str) -> bool:
        """Whether the image of this SHA-256 is here."""
        with self._lock:
            return sha in self._places

    def shas(self) -> list[str]:
        """The SHA-256 of every image, in the order in which they came."""
        with self._lock:
            return sorted(self._places, key=lambda sha: self._places[sha])

    def __len__(self) -> int:
        return len(self._places)

    def sync(self) -> None:
        """Bring what was put onto the disk.

        Raises:
            JournalError: that failed; the store takes nothing any more.
        """
        with self._lock:
            self._check_writable()
            if not self._dirty:
                return
            self._dirty = False
            fd = os.dup(self._fd)
        # Without the lock, so that reading goes on meanwhile.
        try:
            sync_file(fd)
        except BaseException as error:
            self._broken = True
            if isinstance(error, OSError):
                raise JournalError(f"{str(self.path)!r} cannot be written: {reason(error)}") from error
            raise
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the file, without a sync. Closing again does nothing."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _check_writable(self) -> None:
        if self._fd < 0:
            raise JournalError(f"{str(self.path)!r} is closed")
        if self._readonly:
            raise JournalError(f"{str(self.path)!r} is open for reading only")
        if self._broken:
            raise JournalError(f"{str(self.path)!r} failed before and takes no more images")

    def __enter__(self) -> PixelStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
