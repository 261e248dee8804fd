"""Small random models and writers of every published file format, so that readers are tested without the data pack."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from cortexloop.weights import CompactWeights, LayerWeights

ARRAYS = ("kernel", "depthwise", "pointwise", "bias", "gamma", "beta", "mean", "variance")
NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def v4_data() -> Path:
    """Folder of the V4 data pack; the test is skipped where it is not at hand."""
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("CORTEXLOOP_V4_DATA", root.parent / "shared" / "data" / "v4_compact"))
    if not (folder / "compact_models.npz").is_file():
        pytest.skip(f"no V4 data pack at {folder}: set CORTEXLOOP_V4_DATA")
    return folder


def random_weights(
    name: str = "model",
    filters: Sequence[int] = (4, 5, 3, 3, 3),
    kernels: Sequence[int] = (5, 5, 5, 5, 5),
    strides: Sequence[int] = (1, 2, 2, 1, 1),
    size: tuple[int, int] = (112, 112),
    dtype: type = np.float32,
    seed: int = 0,
    epsilon: float = 1e-3,
) -> CompactWeights:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    layers, c_in = [], 3
    for i, (c, k, s) in enumerate(zip(filters, kernels, strides, strict=True)):
        spatial = {"kernel": normal(k, k, 3, c)} if i == 0 else {"depthwise": normal(k, k, c_in)}
        if i:
            spatial["pointwise"] = normal(c_in, c)
        layers.append(
            LayerWeights(
                stride=s,
                epsilon=epsilon,
                bias=normal(c),
                gamma=normal(c) + dtype(2),
                beta=normal(c),
                mean=normal(c),
                variance=(10.0 ** rng.uniform(-5, 1, c)).astype(dtype),
                **spatial,
            )
        )
        c_in = c
    h, w = size
    for s in strides:
        h, w = -(-h // s), -(-w // s)
    readout = normal(h, w, c_in)
    return CompactWeights(name, tuple(layers), readout, float(normal(1)[0]), size[0], size[1]).validate()


def differences(a: CompactWeights, b: CompactWeights) -> list[str]:
    """What differs between two models, bit for bit; names and image means included."""
    found = [
        what for what in ("name", "height", "width", "image_mean", "filters") if getattr(a, what) != getattr(b, what)
    ]
    if len(a.layers) != len(b.layers):
        return [*found, "depth"]
    for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        if (x.stride, x.epsilon) != (y.stride, y.epsilon):
            found.append(f"layer{i} stride or epsilon")
        found += [f"layer{i} {key}" for key in ARRAYS if not same_bits(getattr(x, key), getattr(y, key))]
    if not same_bits(a.readout, b.readout):
        found.append("readout")
    if np.float64(a.readout_bias).tobytes() != np.float64(b.readout_bias).tobytes():
        found.append("readout bias")
    return found


def same_bits(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def keras_tensors(w: CompactWeights) -> list[tuple[str, np.ndarray]]:
    """(name, tensor) in Keras' layouts and `get_weights()` order."""
    out: list[tuple[str, np.ndarray]] = []
    for i, layer in enumerate(w.layers):
        if i == 0:
            out.append(("layer0/kernel", layer.kernel))
        else:
            out.append((f"layer{i}/depthwise_kernel", layer.depthwise[..., None]))
            out.append((f"layer{i}/pointwise_kernel", layer.pointwise[None, None]))
        out.append((f"layer{i}/bias", layer.bias))
        values = (layer.gamma, layer.beta, layer.mean, layer.variance)
        out += [(f"layer{i}/{key}", value) for key, value in zip(NORM, values, strict=True)]
    out.append(("readout/kernel", w.readout.reshape(-1, 1)))
    out.append(("readout/bias", np.array([w.readout_bias], w.readout.dtype)))
    return out


def write_npz(path: Path, *models: CompactWeights) -> None:
    np.savez_compressed(path, **{f"{w.name}/{key}": value for w in models for key, value in keras_tensors(w)})


def write_npy(path: Path, w: CompactWeights) -> None:
    tensors = keras_tensors(w)
    array = np.empty(len(tensors), object)
    for i, (_, value) in enumerate(tensors):
        array[i] = np.ascontiguousarray(value)
    np.save(path, array, allow_pickle=True)


def write_weights_h5(path: Path | io.BytesIO, w: CompactWeights) -> None:
    def numbered(kind: str, i: int) -> str:
        return f"{kind}_{i}" if i else kind

    with h5py.File(path, "w") as file:
        for key, value in keras_tensors(w):
            head, leaf = key.split("/")
            if head == "readout":
                target = f"dense/vars/{('kernel', 'bias').index(leaf)}"
            else:
                i = int(head.removeprefix("layer"))
                own = ("kernel", "bias") if i == 0 else ("depthwise_kernel", "pointwise_kernel", "bias")
                group = "conv2d" if i == 0 else numbered("separable_conv2d", i - 1)
                if leaf in own:
                    target = f"{group}/vars/{own.index(leaf)}"
                else:
                    target = f"{numbered('batch_normalization', i)}/vars/{NORM.index(leaf)}"
            file[f"layers/{target}"] = value
        file["optimizer/vars/0"] = np.int64(3)
        file.create_group("layers/flatten/vars")


def keras_config(w: CompactWeights) -> dict[str, Any]:
    """A configuration in Keras 3's form, of which `write_h5` makes Keras 2's."""
    shape = [None, w.height, w.width, 3]
    layers = [("InputLayer", {"name": "image_input", "batch_shape": shape})]
    for i, layer in enumerate(w.layers):
        convolution: dict[str, Any] = {
            "name": f"layer{i}_conv",
            "filters": layer.out_channels,
            "kernel_size": [layer.kernel_size] * 2,
            "strides": [layer.stride] * 2,
            "padding": "same",
            "data_format": "channels_last",
            "dilation_rate": [1, 1],
            "activation": "linear",
            "use_bias": True,
        }
        if i:
            convolution["depth_multiplier"] = 1
        norm = {"name": f"layer{i}_bn", "axis": -1, "epsilon": layer.epsilon, "center": True, "scale": True}
        layers += [("SeparableConv2D" if i else "Conv2D", convolution), ("BatchNormalization", norm)]
        layers.append(("Activation", {"name": f"layer{i}_act", "activation": "relu"}))
    layers.append(("Flatten", {"name": "embeddings", "data_format": "channels_last"}))
    layers.append(("Dense", {"name": "Beta", "units": 1, "activation": "linear", "use_bias": True}))
    named = [{"class_name": kind, "config": config, "name": config["name"]} for kind, config in layers]
    return {"class_name": "Functional", "config": {"name": "model", "layers": named}}


def write_keras(path: Path, w: CompactWeights) -> None:
    buffer = io.BytesIO()
    write_weights_h5(buffer, w)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.1.1"}')
        archive.writestr("config.json", json.dumps(keras_config(w)))
        archive.writestr("model.weights.h5", buffer.getvalue())


def write_h5(path: Path, w: CompactWeights) -> None:
    config = keras_config(w)
    config["class_name"] = "Model"
    source = config["config"]["layers"][0]["config"]
    source["batch_input_shape"] = source.pop("batch_shape")
    tensors: dict[str, list[tuple[str, np.ndarray]]] = {}
    for key, value in keras_tensors(w):
        head, leaf = key.split("/")
        layer = "Beta" if head == "readout" else f"{head}_{'bn' if leaf in NORM else 'conv'}"
        tensors.setdefault(layer, []).append((f"{layer}_1/{leaf}:0", value))
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(config)
        file.attrs["keras_version"] = "2.2.4-tf"
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [layer["name"].encode() for layer in config["config"]["layers"]]
        for layer in config["config"]["layers"]:
            group = root.create_group(layer["name"])
            own = tensors.get(layer["name"], [])
            group.attrs["weight_names"] = [name.encode() for name, _ in own]
            for name, value in own:
                group[name] = value


def pt_state(w: CompactWeights) -> dict[str, torch.Tensor]:
    """The published float64 state dictionary, with running_var of later layers shifted by 0.001 in float32."""
    state: dict[str, torch.Tensor] = {}

    def put(key: str, value: np.ndarray) -> None:
        state[key] = torch.from_numpy(np.array(value, np.float64))

    for i, layer in enumerate(w.layers):
        stem = f"layers.layer{i}"
        if layer.kernel is not None:
            put(f"{stem}_conv.weight", layer.kernel.transpose(3, 2, 0, 1))
            put(f"{stem}_conv.bias", layer.bias)
        else:
            put(f"{stem}_conv_depth.weight", layer.depthwise.transpose(2, 0, 1)[:, None])
            put(f"{stem}_conv_point.weight", layer.pointwise.T[:, :, None, None])
            put(f"{stem}_conv_point.bias", layer.bias)
        put(f"{stem}_bn.weight", layer.gamma)
        put(f"{stem}_bn.bias", layer.beta)
        put(f"{stem}_bn.running_mean", layer.mean)
        put(f"{stem}_bn.running_var", layer.variance + (layer.variance.dtype.type(1e-3) if i else 0))
        state[f"{stem}_bn.num_batches_tracked"] = torch.tensor(0)
    put("layers.Beta.weight", w.readout.reshape(1, -1))
    put("layers.Beta.bias", np.array([w.readout_bias]))
    return state


def write_pt(path: Path, w: CompactWeights) -> None:
    torch.save(pt_state(w), path)


WRITERS: dict[str, Callable[[Path, CompactWeights], None]] = {
    ".npz": write_npz,
    ".npy": write_npy,
    ".weights.h5": write_weights_h5,
    ".keras": write_keras,
    ".h5": write_h5,
    ".pt": write_pt,
}
