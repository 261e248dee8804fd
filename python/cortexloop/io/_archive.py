"""Bounded reading of containers that may be damaged or hostile: zip archives and .npy arrays.

Every failure is a ValueError that says what is wrong; sizes are checked before anything of that size is allocated.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

MAX_MODEL_BYTES = 2**28
"""Largest model file or set of tensors of one model that is read: a thousand times the published models' size."""

# What zipfile raises on damaged archives, besides its own BadZipFile.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OSError,
    ValueError,
    OverflowError,
    LookupError,
)


class Archive:
    """A zip archive opened for reading: `names`, and `read(...)` of some members within the size limit.

    Raises:
        ValueError: it is no zip archive, or is damaged.
    """

    def __init__(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
        except _ZIP_ERRORS as error:
            raise ValueError(f"it is not a complete zip archive ({error})") from error
        self._infos = {info.filename: info for info in self._zip.infolist()}
        counts = Counter(info.filename for info in self._zip.infolist())
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            self.close()
            raise ValueError(f"the archive holds {twice[0]!r} twice")
        self.names = tuple(self._infos)

    def close(self) -> None:
        self._zip.close()

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """Contents of the named members, checked against their declared size and checksum."""
        infos = []
        for name in names:
            if name not in self._infos:
                raise ValueError(f"the archive does not hold {name!r}, which a model file of this kind has")
            infos.append(self._infos[name])
        check_size(sum(info.file_size for info in infos))
        return {info.filename: self._read(info) for info in infos}

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"member {info.filename!r} is packed by an unknown method ({info.compress_type})")
        try:
            with self._zip.open(info) as member:
                data = member.read(info.file_size)
        except _ZIP_ERRORS as error:
            raise ValueError(f"member {info.filename!r} of the archive is damaged ({error})") from error
        if len(data) != info.file_size:
            raise ValueError(f"member {info.filename!r} should have {info.file_size} bytes, got {len(data)}")
        return data


def check_size(size: int) -> None:
    """Raise ValueError if `size` bytes are more than one model may take."""
    if size > MAX_MODEL_BYTES:
        raise ValueError(f"it claims {size} bytes for one model, and more than {MAX_MODEL_BYTES} are not read")


def read_file(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a single-model file of a size that a model may have, and not empty."""
    size = os.path.getsize(path)
    check_size(size)
    if size == 0:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        return file.read(size)


# The header as NumPy writes it; nothing else is evaluated.
_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=]?)([a-zA-Z])(\d{0,2})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?),?\), ?\}\s*"
)


def decode_npy(data: bytes) -> NDArray[np.generic] | tuple[tuple[int, ...], bytes]:
    """An array from the bytes of a .npy file; for an object array (shape, pickle bytes), nothing unpickled.

    Raises:
        ValueError: not a .npy file, a dtype other than float or integer, or another size than declared.
    """
    if data[:6] != b"\x93NUMPY":
        raise ValueError("it is not a .npy array")
    if len(data) < 12 or data[6] not in (1, 2, 3):
        raise ValueError("it is a .npy array of an unknown version or is cut short")
    width = 2 if data[6] == 1 else 4
    start = 8 + width
    length = int.from_bytes(data[8:start], "little")
    match = _NPY_HEADER.fullmatch(data[start : start + length].decode("latin-1"))
    if match is None or len(data) < start + length:
        raise ValueError("the header of a .npy array is damaged")
    order, kind, itemsize, fortran, dims = match.groups()
    shape = tuple(int(dim) for dim in dims.replace(" ", "").split(",") if dim)
    body = data[start + length :]
    if kind == "O":
        return shape, body
    if kind not in "fiu" or itemsize not in ("1", "2", "4", "8") or (kind == "f" and itemsize == "1"):
        raise ValueError(f"the array should hold floats or integers, got {kind}{itemsize}")
    return array_from_bytes(body, order + kind + itemsize, shape, fortran=fortran == "True")


def array_from_bytes(data: bytes, dtype: str, shape: tuple[int, ...], *, fortran: bool = False) -> NDArray[np.generic]:
    """A fresh, writable, C-ordered array in native byte order; ValueError unless `data` has exactly its size."""
    stored = np.dtype(dtype)
    if len(shape) > 32 or any(dim < 0 for dim in shape):
        raise ValueError("an array has an impossible shape")
    expected = math.prod(shape) * stored.itemsize
    if len(data) != expected:
        raise ValueError(f"an array of shape {shape} and type {dtype} has {expected} bytes, got {len(data)}")
    array = np.frombuffer(data, stored).reshape(shape, order="F" if fortran else "C")
    return np.array(array, stored.newbyteorder("="), order="C")
