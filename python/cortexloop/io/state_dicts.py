"""Weights of networks: PyTorch state dictionaries and safetensors files -> named arrays. Nothing in a file can run."""

from __future__ import annotations

import io
import math
import os
import pickletools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from cortexloop.io._archive import Archive
from cortexloop.io._pickle import StateDict, Symbol, is_shape, is_symbol, unpickle
from cortexloop.io.paths import existing_file, naming

MAX_BYTES = 2**30
"""Largest set of weights that is read."""

# torch's storages: the type code of NumPy; bfloat16, which NumPy lacks, by that of its bits
_STORAGES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": "u2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "u1",
}
_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How files begin that torch wrote before its zip format (1.6); the published generators are that old."""

_MAX_DOTS = 100  # in a name, as a measure of depth


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """The tensors of a file of weights by name.

    Args:
        path: what `torch.save` wrote of a state dictionary, in its zip format or that before, or a safetensors file;
            told apart by content.

    Returns:
        Arrays in the types of the file, but bfloat16 as float32. In nested dictionaries names are joined by dots;
        what is no tensor is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: damaged, hostile, too large, or none of these formats.
    """
    file = existing_file(path)
    with naming(file):
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, and more than {MAX_BYTES} are not read")
        with open(file, "rb") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about odd texts in damaged pickles
            start = opened.read(len(_MAGIC))
            if start == _MAGIC:
                return _old_torch(opened)
            return _zipped_torch(opened) if start.startswith(b"PK") else _safetensors(file)


def _safetensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with safetensors.safe_open(path, "np") as file:
            return {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no dict
    except (safetensors.SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"it is no state dictionary of torch, and as a safetensors file unusable: {error}") from error


# --- torch ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """A named piece of memory, and how many numbers of which type it holds."""

    key: str
    kind: str
    count: int

    @property
    def code(self) -> str:
        return _STORAGES[self.kind]


@dataclass(frozen=True)
class _Tensor:
    """What torch._utils._rebuild_tensor_v2 is given, checked for type only."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, memory: NDArray[Any]) -> NDArray[Any]:
        """The tensor, out of the numbers of its storage; every bound checked."""
        count = math.prod(self.shape)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if count > memory.size or (count and last >= memory.size):
            raise ValueError("the pickle holds a tensor that is larger than its storage")
        if not count:
            return np.zeros(self.shape, memory.dtype)
        steps = [step * memory.itemsize for step in self.strides]
        view = np.lib.stride_tricks.as_strided(memory[self.offset :], self.shape, steps)
        array = np.array(view, memory.dtype.newbyteorder("="), order="C")
        if self.storage.kind == "BFloat16Storage":  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(bool) if self.storage.kind == "BoolStorage" else array


def _tensor(arguments: tuple[Any, ...]) -> _Tensor:
    storage, offset, shape, strides = arguments[:4] if len(arguments) >= 4 else (None,) * 4
    if not isinstance(storage, _Storage) or not is_shape((offset,)) or not is_shape(shape) or not is_shape(strides):
        raise ValueError("the pickle holds a damaged tensor")
    if len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("the pickle holds a damaged tensor")
    return _Tensor(storage, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> _Tensor:
    tensor: object = arguments[0] if arguments else None
    if not isinstance(tensor, _Tensor):
        raise ValueError("the pickle holds a damaged parameter")
    return tensor


def _storage(reference: Any) -> _Storage:
    """("storage", type, key, device, count), and before the zip format a last None (no view of another storage)."""
    if isinstance(reference, tuple) and len(reference) in (5, 6):
        what, symbol, key, _, count = reference[:5]
        if isinstance(what, str) and what == "storage" and is_symbol(symbol) and isinstance(key, str):
            view = reference[5] if len(reference) == 6 else None
            if symbol[0] == "torch" and symbol[1] in _STORAGES and is_shape((count,)) and view is None:
                return _Storage(key, symbol[1], count)
    raise ValueError("the pickle refers to something that is not a storage of torch")


def _tensors(program: bytes) -> tuple[dict[str, _Tensor], dict[str, _Storage]]:
    """The tensors that a pickled state dictionary is made of, by name, and all storages that it mentions, by key."""
    storages: dict[str, _Storage] = {}

    def mentioned(reference: Any) -> _Storage:
        storage = _storage(reference)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError("the pickle refers to one storage in two ways")
        return storage

    admitted: dict[Symbol, Callable[[tuple[Any, ...]], Any] | None] = {("torch", name): None for name in _STORAGES}
    admitted["collections", "OrderedDict"] = lambda arguments: StateDict()
    admitted["torch._utils", "_rebuild_tensor_v2"] = _tensor
    admitted["torch._utils", "_rebuild_parameter"] = _parameter
    found: dict[str, _Tensor] = {}
    _collect(unpickle(program, admitted, mentioned), "", found, set())
    if not found:
        raise ValueError("it holds no tensors by name; save the state_dict() of the network, not the network")
    return found, storages


def _collect(value: Any, name: str, found: dict[str, _Tensor], seen: set[int]) -> None:
    """Walk dictionaries, each once however often it is referred to."""
    if isinstance(value, _Tensor) and name:
        found[name] = value
    elif isinstance(value, StateDict) and id(value) not in seen:
        seen.add(id(value))
        if name.count(".") > _MAX_DOTS:
            raise ValueError("its dictionaries are nested too deeply")
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}" if name else key, found, seen)


def _arrays(tensors: Mapping[str, _Tensor], read: Callable[[_Storage], NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All tensors; each storage is read once."""
    storages = {tensor.storage for tensor in tensors.values()}
    if sum(s.count * np.dtype(s.code).itemsize for s in storages) > MAX_BYTES:
        raise ValueError(f"it claims more than {MAX_BYTES} bytes, which are not read")
    memory = {storage: read(storage) for storage in storages}
    if sum(math.prod(t.shape) * memory[t.storage].itemsize for t in tensors.values()) > MAX_BYTES:
        raise ValueError(f"it claims more than {MAX_BYTES} bytes, which are not read")
    return {name: tensor.array(memory[tensor.storage]) for name, tensor in tensors.items()}


def _zipped_torch(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    archive = Archive(file)
    try:
        programs = [name for name in archive.names if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError("it should be a zip archive as torch.save writes it, with one data.pkl")
        folder = programs[0].removesuffix("data.pkl")
        marked = f"{folder}byteorder" in archive.names
        order = _byte_order(archive.read([f"{folder}byteorder"])[f"{folder}byteorder"] if marked else b"little")

        def read(storage: _Storage) -> NDArray[Any]:
            name = f"{folder}data/{storage.key}"
            data = archive.read([name])[name]
            if len(data) != storage.count * np.dtype(storage.code).itemsize:
                raise ValueError("the pickle refers to a storage that is not in the file")
            return np.frombuffer(data, order + storage.code)

        tensors, _ = _tensors(archive.read(programs)[programs[0]])
        return _arrays(tensors, read)
    finally:
        archive.close()


def _byte_order(name: bytes) -> str:
    order = {b"little": "<", b"big": ">"}.get(name)
    if order is None:
        raise ValueError("its byte order should be little or big")
    return order


def _old_torch(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    """Five pickles (magic number, version, machine, dictionary, order of storages), then each storage with its size."""
    version, machine, program, listed = (_next_pickle(file) for _ in range(4))
    system = unpickle(machine, {})
    if unpickle(version, {}) != 1001 or not isinstance(system, StateDict):
        raise ValueError("it is of an unknown version of torch's format")
    order = "<" if system.get("little_endian") is True else ">"
    (tensors, storages), keys = _tensors(program), unpickle(listed, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or storages.keys() != set(keys):
        raise ValueError("its list of storages is damaged")
    places: dict[str, int] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little" if order == "<" else "big")
        if count != storages[key].count:
            raise ValueError("its storages do not have the sizes of its tensors")
        places[key] = file.tell()
        file.seek(count * np.dtype(storages[key].code).itemsize, io.SEEK_CUR)

    def read(storage: _Storage) -> NDArray[Any]:
        wanted = storage.count * np.dtype(storage.code).itemsize
        file.seek(places[storage.key])
        data = file.read(wanted)
        if len(data) != wanted:
            raise ValueError("the file ends within a tensor")
        return np.frombuffer(data, order + storage.code)

    return _arrays(tensors, read)


def _next_pickle(file: IO[bytes]) -> bytes:
    """The bytes from here to the end of a pickle."""
    start = file.tell()
    try:
        for opcode, _, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                end = file.tell()
                file.seek(start)
                return file.read(end - start)
    except (OverflowError, LookupError) as error:
        raise ValueError(f"the pickle is damaged ({error})") from error
    raise ValueError("the pickle is cut short")
