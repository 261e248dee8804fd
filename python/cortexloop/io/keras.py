"""Readers of Keras' model files: `.keras` (Keras 3), `.weights.h5` (Keras 3, weights only) and `.h5` (Keras 2)."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.io._archive import Archive, read_file
from cortexloop.io.assemble import MAX_DEPTH, NORM_NAMES, Geometry, compact_from_tensors, layer_keys
from cortexloop.io.hdf5 import Hdf5File
from cortexloop.weights import CompactWeights

Path = str | os.PathLike[str]
Tensors = dict[str, NDArray[Any]]


def read_keras(path: Path, name: str, geometry: Geometry) -> CompactWeights:
    """A model from a Keras 3 zip file. Strides, input size and epsilons are those of its configuration.

    Raises:
        ValueError: damaged, or not the architecture of a compact model.
    """
    members = Archive(io.BytesIO(read_file(path))).read(["config.json", "model.weights.h5"])
    known = merge(geometry, parse_config(members["config.json"].decode("utf-8")))
    return compact_from_tensors(name, keras3_tensors(Hdf5File(members["model.weights.h5"])), known)


def read_h5(path: Path, name: str, geometry: Geometry) -> CompactWeights:
    """A model from an HDF5 file of Keras: a Keras 3 weight file or a whole Keras 2 model, told apart by content.

    Raises:
        ValueError: damaged, or not the architecture of a compact model.
    """
    file = Hdf5File(read_file(path))
    if "layers" in file.group(""):
        return compact_from_tensors(name, keras3_tensors(file), geometry)
    config = file.attribute("", "model_config")
    if not isinstance(config, str):
        raise ValueError("it is neither a Keras 3 weight file (group 'layers') nor a Keras 2 model ('model_config')")
    return compact_from_tensors(name, keras2_tensors(file), merge(geometry, parse_config(config)))


def merge(given: Geometry, configured: Geometry) -> Geometry:
    """The configured geometry, after a check that what was given by hand does not contradict it."""
    for what in ("strides", "input_size"):
        by_hand, own = getattr(given, what), getattr(configured, what)
        if by_hand is not None and by_hand != own:
            raise ValueError(f"{what} {by_hand} was asked for, but the file itself says {own}")
    return configured


def keras3_tensors(file: Hdf5File) -> Tensors:
    """Tensors of a Keras 3 weight file: `layers/<kind>[_<n>]/vars/<i>`, numbered by kind."""
    layers = file.group("layers")
    depth = 1
    while _numbered("separable_conv2d", depth - 1) in layers and depth <= MAX_DEPTH:
        depth += 1
    groups = ["conv2d", *(_numbered("separable_conv2d", i) for i in range(depth - 1))]
    tensors: Tensors = {}
    *layer_names, readout_names = layer_keys(depth)
    for i, names in enumerate(layer_names):
        convolution = [name for name in names if name.rpartition("/")[2] not in NORM_NAMES]
        norm = names[len(convolution) :]
        sources = ((groups[i], convolution), (_numbered("batch_normalization", i), norm), ("dense", readout_names))
        for group, keys in sources:
            for j, key in enumerate(keys):
                tensors[key] = file.dataset(f"layers/{group}/vars/{j}")
    return tensors


def _numbered(kind: str, number: int) -> str:
    return f"{kind}_{number}" if number else kind


def keras2_tensors(file: Hdf5File) -> Tensors:
    """Tensors of a Keras 2 model: `model_weights/<layer>/<path>`, the paths listed in each layer's `weight_names`."""
    tensors: Tensors = {}
    for layer in file.group("model_weights"):
        group = f"model_weights/{layer}"
        if not file.group(group):
            continue  # a layer without weights, whose list of names is an empty array of numbers
        names = file.attribute(group, "weight_names")
        if not isinstance(names, list):
            raise ValueError(f"layer {layer!r} has no list of weight names")
        prefix = "readout" if layer == "Beta" else layer.partition("_")[0]
        for path in names:
            leaf = path.rpartition("/")[2].partition(":")[0]
            tensors[f"{prefix}/{leaf}"] = file.dataset(f"{group}/{path}")
    return tensors


# --- configuration --------------------------------------------------------------------------------------------------


def parse_config(text: str) -> Geometry:
    """Strides, input size and epsilons from a Keras model configuration (Keras 2 or 3).

    Raises:
        ValueError: not JSON, or not input, (convolution, batch normalisation, ReLU) * n, flatten, dense.
    """
    try:
        layers = [(layer["class_name"], layer["config"]) for layer in json.loads(text)["config"]["layers"]]
        return _parse_layers(layers)
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"its model configuration is damaged ({error!r})") from error


def _parse_layers(layers: list[tuple[str, dict[str, Any]]]) -> Geometry:
    kinds = [kind for kind, _ in layers]
    depth = (len(layers) - 3) // 3
    convolutions = ["Conv2D", *["SeparableConv2D"] * (depth - 1)]
    expected = ["InputLayer"]
    for kind in convolutions:
        expected += [kind, "BatchNormalization", "Activation"]
    expected += ["Flatten", "Dense"]
    if depth < 1 or kinds != expected:
        raise ValueError(
            "its layers should be an input, then convolution, BatchNormalization and Activation for each layer "
            f"(Conv2D first, then SeparableConv2D), then Flatten and Dense, got {len(kinds)} others"
        )
    source = layers[0][1]
    shape = source["batch_shape"] if "batch_shape" in source else source["batch_input_shape"]
    if len(shape) != 4 or shape[3] != 3 or not all(type(size) is int and size > 0 for size in shape[1:]):
        raise ValueError(f"its input should be [None, height, width, 3], got {shape}")
    strides, epsilons = [], []
    for i in range(depth):
        convolution, norm, activation = (config for _, config in layers[1 + 3 * i : 4 + 3 * i])
        where = f"layer {i} of its configuration"
        _require(where, convolution, padding="same", data_format="channels_last", use_bias=True, activation="linear")
        _require(where, convolution, dilation_rate=[1, 1])
        _require(where, convolution, **({"depth_multiplier": 1} if i else {}))
        _require(where, norm, center=True, scale=True)
        _require(where, activation, activation="relu")
        stride, epsilon = convolution["strides"], norm["epsilon"]
        if stride not in ([1, 1], [2, 2]):
            raise ValueError(f"{where}: strides should be [1, 1] or [2, 2]")
        if not isinstance(epsilon, float) or not np.isfinite(epsilon) or epsilon <= 0:
            raise ValueError(f"{where}: epsilon should be a positive number")
        strides.append(int(stride[0]))
        epsilons.append(epsilon)
    _require("the readout of its configuration", layers[-1][1], units=1, activation="linear", use_bias=True)
    return Geometry(tuple(strides), (shape[1], shape[2]), tuple(epsilons))


def _require(where: str, config: dict[str, Any], **expected: object) -> None:
    for key, value in expected.items():
        if config[key] != value:
            raise ValueError(f"{where}: {key} should be {value!r}, got {config[key]!r}")
