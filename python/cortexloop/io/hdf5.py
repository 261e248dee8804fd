"""A small reader of the HDF5 files that Keras and h5py write by default.

It knows superblocks 0 and 1, version-1 object headers, symbol-table groups, contiguous and compact datasets of floats
and integers, and string attributes: all that a Keras weight file consists of. The HDF5 library is not used, because on
damaged files it was seen to loop without end; here every address is checked and every structure is visited once.
Source: HDF5 File Format Specification Version 2.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cortexloop.io._archive import array_from_bytes

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_STEPS = 500_000  # header messages, group entries and heap objects read from one file: a model takes about 1,000
_DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x01, 0x03, 0x08, 0x0C, 0x10, 0x11
_SHARED = 0x02
# (class bit field, properties) of the IEEE little-endian floats; the float class has many exotic variants.
_FLOATS = {
    4: (b"\x20\x1f\x00", b"\x00\x00\x20\x00\x17\x08\x00\x17\x7f\x00\x00\x00"),
    8: (b"\x20\x3f\x00", b"\x00\x00\x40\x00\x34\x0b\x00\x34\xff\x03\x00\x00"),
}


@dataclass(frozen=True)
class _Type:
    kind: str  # "number", "string" or "text" (variable length)
    size: int
    code: str = ""  # NumPy code of a number


class Hdf5File:
    """An HDF5 file held in memory: `group(path)`, `dataset(path)` and `attribute(path, name)`.

    Paths are "/"-separated from the root; the root is "".

    Raises:
        ValueError: the file is damaged, or uses a part of HDF5 that Keras' weight files do not.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._steps = data, 0
        if data[:8] != _SIGNATURE:
            raise ValueError("it is not an HDF5 file")
        version = self._uint(8, 1)
        if version > 1:
            raise ValueError(f"its HDF5 superblock has version {version}; save the model again with h5py's defaults")
        if self._uint(13, 1) != 8 or self._uint(14, 1) != 8:
            raise ValueError("its HDF5 addresses and lengths should have 8 bytes each")
        start = 24 if version == 0 else 28
        if self._uint(start, 8) != 0:
            raise ValueError("its HDF5 base address should be 0")
        root = self._uint(start + 32 + 8, 8)
        self._headers: dict[int, dict[int, list[bytes]]] = {}
        self._groups: dict[int, dict[str, int]] = {}
        self._root = root

    def group(self, path: str) -> dict[str, int]:
        """Names in a group, each with the address of its object header."""
        return self._group(self._find(path), path)

    def dataset(self, path: str) -> NDArray[np.generic]:
        """All numbers of a dataset, in native byte order."""
        header = self._header(self._find(path))
        if not {_DATASPACE, _DATATYPE, _LAYOUT} <= header.keys():
            raise ValueError(f"{path!r} should be an HDF5 dataset")
        shape = _shape(header[_DATASPACE][0])
        kind = _datatype(header[_DATATYPE][0])
        layout = header[_LAYOUT][0]
        if kind.kind != "number":
            raise ValueError(f"dataset {path!r} should hold numbers")
        if layout[:1] != b"\x03" or layout[1:2] not in (b"\x00", b"\x01"):
            raise ValueError(f"dataset {path!r} is chunked or compressed; save the model without compression")
        size = math.prod(shape) * kind.size
        if layout[1] == 0:
            raw = layout[4 : 4 + int.from_bytes(layout[2:4], "little")]
        else:
            address = int.from_bytes(layout[2:10], "little")
            raw = self._slice(address, size) if size else b""
        return array_from_bytes(raw, kind.code, shape)

    def attribute(self, path: str, name: str) -> str | list[str] | None:
        """A string attribute, or a list for an array of strings; None if the object has no attribute of that name."""
        for message in self._header(self._find(path)).get(_ATTRIBUTE, []):
            label, kind, space, body = _attribute(message)
            if label == name.encode():
                break
        else:
            return None
        if kind.kind not in ("string", "text"):
            raise ValueError(f"attribute {name!r} should hold text")
        shape = _shape(space)
        if math.prod(shape) * kind.size > len(body):
            raise ValueError(f"attribute {name!r} is cut short")
        texts = []
        for i in range(math.prod(shape)):
            item = body[i * kind.size : (i + 1) * kind.size]
            texts.append(_text(self._heap_object(item) if kind.kind == "text" else item.rstrip(b"\0")))
        return texts if shape else texts[0]

    def _slice(self, address: int, length: int) -> bytes:
        if address > len(self._data) or length > len(self._data) - address:
            raise ValueError("an HDF5 address lies beyond the end of the file; it is damaged or cut short")
        return self._data[address : address + length]

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise ValueError(f"its HDF5 structure has more than {_MAX_STEPS} entries; it is damaged or no model file")

    def _uint(self, address: int, size: int) -> int:
        return int.from_bytes(self._slice(address, size), "little")

    def _find(self, path: str) -> int:
        address = self._root
        for part in path.split("/") if path else []:
            names = self._group(address, path)
            if part not in names:
                raise ValueError(f"it does not hold {path!r}, which a model file of this kind has")
            address = names[part]
        return address

    def _header(self, address: int) -> dict[int, list[bytes]]:
        """Messages of a version-1 object header by type."""
        if address in self._headers:
            return self._headers[address]
        if self._uint(address, 1) != 1:
            raise ValueError("an HDF5 object header is damaged or of an unknown version")
        messages: dict[int, list[bytes]] = {}
        blocks = [(address + 16, self._uint(address + 8, 4))]
        for block, length in blocks:  # grows while it is walked
            self._slice(block, length)
            position = block
            while position + 8 <= block + length:
                self._step()
                kind, size, flags = self._uint(position, 2), self._uint(position + 2, 2), self._uint(position + 4, 1)
                if position + 8 + size > block + length:
                    raise ValueError("an HDF5 object header is damaged")
                body = self._slice(position + 8, size)
                position += 8 + size
                if kind in (_DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _SYMBOL_TABLE) and flags & _SHARED:
                    raise ValueError("an HDF5 object uses shared messages, which are not read")
                if kind == _CONTINUATION and len(body) >= 16:
                    following = (int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little"))
                    if following in blocks or len(blocks) > 1000:
                        raise ValueError("an HDF5 object header continues in a circle")
                    blocks.append(following)
                messages.setdefault(kind, []).append(body)
        self._headers[address] = messages
        return messages

    def _group(self, address: int, path: str) -> dict[str, int]:
        if address in self._groups:
            return self._groups[address]
        header = self._header(address)
        if _SYMBOL_TABLE not in header:
            raise ValueError(f"{path!r} should be an HDF5 group of the classic kind; save again with h5py's defaults")
        body = header[_SYMBOL_TABLE][0]
        tree, heap = int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")
        if self._slice(heap, 4) != b"HEAP":
            raise ValueError("an HDF5 local heap is damaged")
        names = self._slice(self._uint(heap + 24, 8), self._uint(heap + 8, 8))
        entries: dict[str, int] = {}
        for node in self._tree_leaves(tree, set()):
            if self._slice(node, 4) != b"SNOD":
                raise ValueError("an HDF5 symbol table is damaged")
            for i in range(self._uint(node + 6, 2)):
                self._step()
                entry = node + 8 + 40 * i
                name = self._uint(entry, 8)
                end = names.find(b"\0", name)
                if not 0 <= name < len(names) or end < 0:
                    raise ValueError("an HDF5 symbol table is damaged")
                entries[_text(names[name:end])] = self._uint(entry + 8, 8)
        self._groups[address] = entries
        return entries

    def _tree_leaves(self, address: int, seen: set[int]) -> Iterator[int]:
        """Addresses of the symbol-table nodes under a version-1 B-tree node."""
        pending = [address]
        while pending:
            node = pending.pop()
            if self._slice(node, 4) != b"TREE" or self._uint(node + 4, 1) != 0 or node in seen:
                raise ValueError("an HDF5 group index is damaged")
            seen.add(node)
            level = self._uint(node + 5, 1)
            children = [self._uint(node + 24 + 8 + 16 * i, 8) for i in range(self._uint(node + 6, 2))]
            if level > 0:
                pending.extend(children)
                continue
            for child in children:
                self._step()
                if child in seen:
                    raise ValueError("an HDF5 group index is damaged")
                seen.add(child)
                yield child

    def _heap_object(self, reference: bytes) -> bytes:
        """Bytes of a variable-length string: (length, global heap collection, index)."""
        length, collection = int.from_bytes(reference[:4], "little"), int.from_bytes(reference[4:12], "little")
        index = int.from_bytes(reference[12:16], "little")
        if length == 0:
            return b""
        if self._slice(collection, 4) != b"GCOL":
            raise ValueError("an HDF5 global heap is damaged")
        end = collection + self._uint(collection + 8, 8)
        position = collection + 16
        while position + 16 <= end:
            self._step()
            found, size = self._uint(position, 2), self._uint(position + 8, 8)
            if found == index:
                return self._slice(position + 16, min(length, size))
            if found == 0:
                break
            position += 16 + -(-size // 8) * 8
        raise ValueError("an HDF5 global heap does not hold the text that is referred to")


def _shape(message: bytes) -> tuple[int, ...]:
    """Dimensions from a dataspace message; () for a scalar."""
    if len(message) < 4 or message[0] not in (1, 2):
        raise ValueError("an HDF5 dataspace is damaged or of an unknown version")
    rank, start = message[1], 8 if message[0] == 1 else 4
    if len(message) < start + 8 * rank or (message[0] == 2 and message[3] == 2):
        raise ValueError("an HDF5 dataspace is damaged or empty")
    return tuple(int.from_bytes(message[start + 8 * i : start + 8 * i + 8], "little") for i in range(rank))


def _datatype(message: bytes) -> _Type:
    if len(message) < 8:
        raise ValueError("an HDF5 datatype is damaged")
    kind, bits, size = message[0] & 0x0F, message[1:4], int.from_bytes(message[4:8], "little")
    if kind == 0 and size in (1, 2, 4, 8) and not bits[0] & 1:
        return _Type("number", size, f"<{'i' if bits[0] & 8 else 'u'}{size}")
    if kind == 1 and size in _FLOATS and (bits, message[8:20]) == _FLOATS[size]:
        return _Type("number", size, f"<f{size}")
    if kind == 3 and size > 0:
        return _Type("string", size)
    if kind == 9 and size == 16 and bits[0] & 0x0F == 1:
        return _Type("text", size)
    raise ValueError(f"an HDF5 datatype (class {kind}, {size} bytes) is not one that weight files use")


def _attribute(message: bytes) -> tuple[bytes, _Type, bytes, bytes]:
    """(name, datatype, dataspace message, data) of an attribute message."""
    if len(message) < 9 or message[0] not in (1, 2, 3) or (message[0] > 1 and message[1] != 0):
        raise ValueError("an HDF5 attribute is damaged or of an unknown version")
    sizes = [int.from_bytes(message[i : i + 2], "little") for i in (2, 4, 6)]
    position = 9 if message[0] == 3 else 8
    parts = []
    for size in sizes:
        parts.append(message[position : position + size])
        position += -(-size // 8) * 8 if message[0] == 1 else size
    name, datatype, space = parts
    if position > len(message):
        raise ValueError("an HDF5 attribute is damaged")
    return name.rstrip(b"\0"), _attribute_type(datatype), space, message[position:]


def _attribute_type(message: bytes) -> _Type:
    """As `_datatype`; numeric and other attributes, which nobody asks for, pass unread."""
    if len(message) >= 8 and message[0] & 0x0F not in (3, 9):
        return _Type("other", 1)
    return _datatype(message)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("an HDF5 text is not UTF-8") from error
