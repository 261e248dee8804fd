"""Readers of the published repository's formats that are not Keras': the .npz pack, .npy object arrays and .pt files.

Source: github.com/cowleygroup/V4_compact_models (folders model_weights_npy and models_torch).
"""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.io._archive import Archive, decode_npy, read_file
from cortexloop.io._pickle import StateDict, Symbol, is_shape, is_symbol, unpickle, unpickle_arrays
from cortexloop.io.assemble import Geometry, compact_from_tensors, layer_keys
from cortexloop.weights import CompactWeights

Path = str | os.PathLike[str]

_READOUT = "/readout/kernel.npy"


class Pack:
    """An .npz archive of many models, `<model name>/<tensor>`; a model is read when it is asked for.

    Raises:
        ValueError: it is damaged, or holds no compact model.
    """

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self._geometry = geometry
        self._archive = Archive(path)
        self._members: dict[str, list[str]] = {
            name.removesuffix(_READOUT): [] for name in self._archive.names if name.endswith(_READOUT)
        }
        for member in self._archive.names:
            for end in (i for i, character in enumerate(member) if character == "/"):
                if member[:end] in self._members:
                    self._members[member[:end]].append(member)
        self.names = tuple(self._members)

    def close(self) -> None:
        self._archive.close()

    def read(self, name: str) -> CompactWeights:
        return compact_from_tensors(name, read_tensors(self._archive, name, self._members[name]), self._geometry)


def read_tensors(archive: Archive, prefix: str, members: list[str]) -> dict[str, NDArray[Any]]:
    """Arrays of the given members by their names after `<prefix>/`; ValueError for anything but numbers."""
    tensors = {}
    for member, data in archive.read(members).items():
        array = decode_npy(data)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{member!r} should hold numbers, got Python objects, which are not read here")
        tensors[member.removeprefix(f"{prefix}/").removesuffix(".npy")] = array
    return tensors


def read_npy(path: Path, name: str, geometry: Geometry) -> CompactWeights:
    """A model from a pickled object array of Keras' `get_weights()`; nothing but arrays is unpickled.

    Raises:
        ValueError: damaged, hostile, or not such an array.
    """
    decoded = decode_npy(read_file(path))
    if isinstance(decoded, np.ndarray):
        raise ValueError("it is an array of numbers and no list of weights; model files are object arrays of tensors")
    shape, pickle = decoded
    arrays = unpickle_arrays(pickle)
    if shape != (len(arrays),):
        raise ValueError(f"its header declares {shape} tensors, but it holds {len(arrays)}")
    depth, rest = divmod(len(arrays) - 1, 7)
    if depth < 1 or rest:
        raise ValueError(f"a model of n layers has 7 n + 1 tensors, got {len(arrays)}")
    keys = [key for keys in layer_keys(depth) for key in keys]
    return compact_from_tensors(name, dict(zip(keys, arrays, strict=True)), geometry)


# --- .pt: torch's zip container -------------------------------------------------------------------------------------

_STORAGES = {"FloatStorage": "f4", "DoubleStorage": "f8", "LongStorage": "i8"}
_TORCH_TO_KERAS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def read_pt(path: Path, name: str, geometry: Geometry) -> CompactWeights:
    """A model from a published PyTorch state dictionary, as the same model that Keras has.

    The published files are float64 copies of float32 parameters, with two quirks of the epsilon: `running_var` of the
    layers after the first is Keras' variance + 0.001, computed in float32, and that of the first layer is Keras'
    variance itself; the authors' module then adds another 1e-5. Here every layer gets Keras' epsilon 0.001, the first
    layer's variance as it is, and the others' minus 0.001. That difference is Keras' variance exactly wherever the sum
    lost no digit, and elsewhere within half a unit in the last place of the float32 sum (6e-8 of variance + epsilon),
    because a digit that the sum lost is gone; all other parameters are Keras' bit for bit. Parameters that float32
    holds without loss are given as float32.

    Raises:
        ValueError: damaged, hostile, or not a state dictionary of that kind.
    """
    state = _torch_state(read_file(path))
    tensors: dict[str, NDArray[Any]] = {}
    for key, value in state.items():
        target = _keras_key(key)
        if target is not None:
            tensors[target] = _keras_layout(target, _narrow(value))
    for key in [key for key in tensors if key.endswith("moving_variance") and not key.startswith("layer0/")]:
        stored = tensors[key]
        if not np.all(np.isfinite(stored)):
            raise ValueError(f"{key} should be finite, got NaN or infinity")
        epsilon = np.float64(np.float32(1e-3)) if stored.dtype == np.float32 else np.float64(1e-3)
        variance = stored.astype(np.float64) - epsilon
        if np.any(variance < 0):
            raise ValueError(
                f"{key} is below 0.001: it should be Keras' variance + 0.001 as in the published files; "
                "save other models in cortexloop's own format"
            )
        tensors[key] = variance.astype(stored.dtype)
    return compact_from_tensors(name, tensors, geometry)


def _keras_key(key: str) -> str | None:
    """Tensor name of a state-dictionary key; None for batch norm's step counter."""
    head, _, leaf = key.removeprefix("layers.").partition(".")
    if key.startswith("layers.") and head == "Beta" and leaf in ("weight", "bias"):
        return "readout/kernel" if leaf == "weight" else "readout/bias"
    layer, _, part = head.partition("_")
    number = layer.removeprefix("layer")
    if key.startswith("layers.") and layer.startswith("layer") and number.isascii() and number.isdigit():
        if part == "bn" and leaf == "num_batches_tracked":
            return None
        if part == "bn" and leaf in _TORCH_TO_KERAS:
            return f"{layer}/{_TORCH_TO_KERAS[leaf]}"
        names = {"conv": "kernel", "conv_depth": "depthwise_kernel", "conv_point": "pointwise_kernel"}
        if part in names and leaf == "weight":
            return f"{layer}/{names[part]}"
        if part in ("conv", "conv_point") and leaf == "bias":
            return f"{layer}/bias"
    raise ValueError("it holds a tensor that is not named as in the published PyTorch models, such as layers.Beta.bias")


def _keras_layout(key: str, tensor: NDArray[Any]) -> NDArray[Any]:
    """From torch's axis order (output, input, row, column) to Keras'."""
    if key == "readout/kernel" and tensor.ndim == 2:
        return np.swapaxes(tensor, 0, 1)  # [1, h * w * k], rows in the same (h, w, k) order
    if tensor.ndim == 4:
        axes = (2, 3, 0, 1) if key.endswith("depthwise_kernel") else (2, 3, 1, 0)
        return np.ascontiguousarray(tensor.transpose(axes))
    return tensor


def _narrow(tensor: NDArray[Any]) -> NDArray[Any]:
    """As float32 if that loses nothing."""
    if tensor.dtype != np.float64:
        return tensor
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are refused later, with the tensor's name
        narrow = tensor.astype(np.float32)
        return narrow if np.array_equal(narrow, tensor) else tensor


def _torch_state(data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a zipped torch state dictionary by key; ValueError for anything else."""
    archive = Archive(io.BytesIO(data))
    programs = [name for name in archive.names if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError("it should be a zip archive as torch.save writes it, with one data.pkl")
    folder = programs[0].removesuffix("data.pkl")
    members = archive.read(archive.names)
    order = {b"little": "<", b"big": ">", b"": "<"}.get(members.get(f"{folder}byteorder", b""))
    if order is None:
        raise ValueError("its byte order should be little or big")

    def storage(reference: Any) -> NDArray[Any]:
        if not isinstance(reference, tuple) or len(reference) != 5:
            raise ValueError("the pickle refers to something that is not a storage of torch")
        kind, symbol, key, _, _ = reference
        if not isinstance(kind, str) or kind != "storage" or not is_symbol(symbol) or not isinstance(key, str):
            raise ValueError("the pickle refers to a damaged storage")
        code = _STORAGES.get(symbol[1]) if symbol[0] == "torch" else None
        raw = members.get(f"{folder}data/{key}")
        if code is None or raw is None or len(raw) % int(code[1]):
            raise ValueError("the pickle refers to a storage that is not in the file")
        return np.frombuffer(raw, order + code)

    admitted: dict[Symbol, Any] = {("torch", name): None for name in _STORAGES}
    admitted["collections", "OrderedDict"] = lambda arguments: StateDict()
    admitted["torch._utils", "_rebuild_tensor_v2"] = _rebuild_tensor
    admitted["torch._utils", "_rebuild_parameter"] = _rebuild_parameter
    state = unpickle(members[programs[0]], admitted, storage)
    if not isinstance(state, StateDict) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise ValueError("it should hold a dictionary of tensors and nothing else")
    return state


def _rebuild_tensor(arguments: tuple[Any, ...]) -> NDArray[Any]:
    """What torch._utils._rebuild_tensor_v2 makes of (storage, offset, shape, strides, ...), every bound checked."""
    if len(arguments) < 4:
        raise ValueError("the pickle holds a damaged tensor")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or not is_shape((offset,)):
        raise ValueError("the pickle holds a damaged tensor")
    if not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("the pickle holds a damaged tensor")
    count = 1
    for size in shape:
        count *= size
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count == 0 or count > storage.size or last >= storage.size:
        raise ValueError("the pickle holds a tensor that is larger than its storage")
    step = storage.itemsize
    view = np.lib.stride_tricks.as_strided(storage[offset:], shape, [stride * step for stride in strides])
    return np.array(view, storage.dtype.newbyteorder("="), order="C")


def _rebuild_parameter(arguments: tuple[Any, ...]) -> NDArray[Any]:
    tensor: object = arguments[0] if arguments else None
    if not isinstance(tensor, np.ndarray):
        raise ValueError("the pickle holds a damaged parameter")
    return tensor
