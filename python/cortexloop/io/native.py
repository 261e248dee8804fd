"""cortexloop's own model format: one safetensors file per bank, lazy per model, verified by checksums.

The format is documented in docs/format.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from typing import IO, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from cortexloop.io._archive import array_from_bytes, check_size
from cortexloop.io.atomic import atomic_path
from cortexloop.weights import CompactWeights, LayerWeights

Path = str | os.PathLike[str]

FORMAT = "cortexloop.compact-bank"
VERSION = 1

_DTYPES = {"F32": "<f4", "F64": "<f8"}
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format itself
_LAYER_TENSORS = ("kernel", "depthwise", "pointwise", "bias", "gamma", "beta", "mean", "variance")


def save_models(path: Path, models: Iterable[CompactWeights]) -> None:
    """Write a bank of models to one file; on any failure nothing is left and an existing file stays.

    Args:
        path: destination, conventionally ending in `.safetensors`.
        models: float32 or float64 models with different, non-empty names; the order is kept.

    Raises:
        ValueError: there is no model, two have one name, or one is not valid.
        OSError: the file cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for model in models:
        model.validate()
        _check_name(model.name)
        if model.name in entries:
            raise ValueError(f"two models are named {model.name!r}; names must differ within a file")
        own = _tensors_of(model)
        check_size(sum(tensor.nbytes for tensor in own.values()))
        description = _describe(model)
        entries[model.name] = {**description, "sha256": _digest(description, own)}
        tensors.update({f"{model.name}/{key}": tensor for key, tensor in own.items()})
    if not entries:
        raise ValueError("there is no model to save")
    metadata = {"format": FORMAT, "version": str(VERSION), "models": json.dumps(list(entries.values()))}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


class NativeBank:
    """A native file opened for reading: the header is read now, a model when it is asked for, verified.

    Raises:
        ValueError: it is damaged, not of this format, or of a newer version.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(open(path, "rb"))
            header, self._start = _read_header(self._file)
            metadata = header.pop("__metadata__", None)
            if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
                raise ValueError(f"it is a safetensors file, but not of the format {FORMAT}")
            _check_version(metadata.get("version"))
            self._tensors = header
            self._entries = _parse_entries(metadata.get("models"))
            self._opened = stack.pop_all()
        self.names = tuple(self._entries)

    def close(self) -> None:
        self._opened.close()

    def read(self, name: str) -> CompactWeights:
        """One model; ValueError naming it if its tensors are not those that were saved."""
        entry = self._entries[name]
        wanted = [key for key in _tensor_names(len(entry["strides"])) if f"{name}/{key}" in self._tensors]
        places = {key: _place(name, key, self._tensors[f"{name}/{key}"]) for key in wanted}
        check_size(sum(end - start for _, _, start, end in places.values()))
        tensors = {}
        for key, (dtype, shape, start, end) in places.items():
            self._file.seek(self._start + start)
            data = self._file.read(end - start)
            if len(data) != end - start:
                raise ValueError(f"model {name!r} is damaged: the file ends within its tensor {key!r}")
            tensors[key] = array_from_bytes(data, dtype, shape)
        description = {key: value for key, value in entry.items() if key != "sha256"}
        if _digest(description, tensors) != entry["sha256"]:
            raise ValueError(f"model {name!r} is damaged: its checksum differs; copy the file again from its source")
        return _rebuild(description, tensors).validate()


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and the position of its first tensor."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError("it is not a complete safetensors file")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ValueError("its safetensors header is damaged") from error
    if not isinstance(header, dict):
        raise ValueError("its safetensors header is damaged")
    return header, 8 + length


def _check_version(version: Any) -> None:
    if not isinstance(version, str) or not version.isascii() or not version.isdigit() or len(version) > 9:
        raise ValueError("its format version is damaged")
    if int(version) > VERSION:
        raise ValueError(f"it has format version {version}, this cortexloop reads up to {VERSION}; upgrade cortexloop")


def _place(name: str, key: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, byte after the last) of a tensor from its header entry."""
    if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and entry["dtype"] in _DTYPES:
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]:
            return _DTYPES[entry["dtype"]], tuple(shape), offsets[0], offsets[1]
    raise ValueError(f"model {name!r} is damaged: the header of its tensor {key!r} is not that of an F32 or F64 tensor")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)


def _check_name(name: str) -> None:
    """A name must be text that UTF-8 can hold, and not empty."""
    if not isinstance(name, str) or not name:
        raise ValueError("a model needs a name that is not empty to be saved")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the model name {name!r} cannot be written as UTF-8") from error


def _tensor_names(depth: int) -> list[str]:
    return [f"layer{i}/{key}" for i in range(depth) for key in _LAYER_TENSORS] + ["readout/kernel", "readout/bias"]


def _tensors_of(model: CompactWeights) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for i, layer in enumerate(model.layers):
        for key in _LAYER_TENSORS:
            if getattr(layer, key) is not None:
                tensors[f"layer{i}/{key}"] = getattr(layer, key)
    tensors["readout/kernel"] = model.readout
    tensors["readout/bias"] = np.array([model.readout_bias], np.float64)
    for key, tensor in tensors.items():
        if tensor.dtype not in (np.float32, np.float64):
            raise ValueError(f"model {model.name!r}: {key} should be float32 or float64, got {tensor.dtype}")
        tensors[key] = np.ascontiguousarray(tensor)
    return tensors


def _describe(model: CompactWeights) -> dict[str, Any]:
    return {
        "name": model.name,
        "height": int(model.height),
        "width": int(model.width),
        "image_mean": [float(value) for value in model.image_mean],
        "strides": [int(layer.stride) for layer in model.layers],
        "epsilons": [float(layer.epsilon) for layer in model.layers],
    }


def _digest(description: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> str:
    """SHA-256 over the description and every tensor's name, type, shape and little-endian bytes, in fixed order."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, separators=(",", ":")).encode())
    for key, tensor in tensors.items():
        code = "F32" if tensor.dtype == np.float32 else "F64"
        digest.update(f"\n{key} {code} {list(tensor.shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensor, _DTYPES[code]).tobytes())
    return digest.hexdigest()


def _parse_entries(text: Any) -> dict[str, dict[str, Any]]:
    """The checked descriptions of all models by name."""
    try:
        listed = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("its list of models is damaged") from error
    entries: dict[str, dict[str, Any]] = {}
    for entry in listed if isinstance(listed, list) else []:
        if not _is_entry(entry) or entry["name"] in entries:
            raise ValueError("its list of models is damaged")
        entries[entry["name"]] = entry
    if not entries:
        raise ValueError("its list of models is empty or damaged")
    return entries


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    fields: dict[str, type] = {"name": str, "height": int, "width": int, "sha256": str}
    fields |= {"image_mean": list, "strides": list, "epsilons": list}
    if entry.keys() != fields.keys() or any(type(entry[key]) is not kind for key, kind in fields.items()):
        return False
    depth = len(entry["strides"])
    return (
        entry["name"] != ""
        and len(entry["image_mean"]) == 3
        and 1 <= depth == len(entry["epsilons"])
        and all(type(value) is int for value in entry["strides"])
        and all(type(value) is float for value in (*entry["image_mean"], *entry["epsilons"]))
        and 0 < entry["height"] < 2**31
        and 0 < entry["width"] < 2**31
    )


def _rebuild(description: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> CompactWeights:
    """The model; a checksum that matches says that the tensors are those of a valid model."""
    name = description["name"]
    layers = []
    for i, (stride, epsilon) in enumerate(zip(description["strides"], description["epsilons"], strict=True)):
        own = {key: tensors[f"layer{i}/{key}"] for key in _LAYER_TENSORS if f"layer{i}/{key}" in tensors}
        if not {"bias", "gamma", "beta", "mean", "variance"} <= own.keys():
            raise ValueError(f"model {name!r} lacks a tensor of layer {i}")
        layers.append(LayerWeights(stride=stride, epsilon=epsilon, **own))
    bias = tensors.get("readout/bias")
    if "readout/kernel" not in tensors or bias is None or bias.shape != (1,):
        raise ValueError(f"model {name!r} lacks its readout")
    mean = description["image_mean"]
    return CompactWeights(
        name=name,
        layers=tuple(layers),
        readout=tensors["readout/kernel"],
        readout_bias=float(bias[0]),
        height=description["height"],
        width=description["width"],
        image_mean=(mean[0], mean[1], mean[2]),
    )
