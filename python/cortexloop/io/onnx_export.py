"""Compact models as ONNX graphs, built node by node from their arrays (extra `onnx`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.io.atomic import atomic_path
from cortexloop.weights import CompactWeights, LayerWeights, same_padding

OPSET = 17
IR_VERSION = 8  # what belongs to opset 17; older ONNX Runtimes read it too


def export_onnx(weights: CompactWeights, path: str | os.PathLike[str], *, fold: bool = False) -> None:
    """Write one model as an ONNX file; see `onnx_model`. On any failure nothing is left and an existing file stays.

    Raises:
        ModuleNotFoundError: the package onnx is not installed.
        ValueError: the weights are not valid.
        OSError: the file cannot be written.
    """
    data = onnx_model(weights, fold=fold).SerializeToString()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def onnx_model(weights: CompactWeights, *, fold: bool = False) -> Any:
    """The model as an `onnx.ModelProto` with one input and one output in the dtype of the weights.

    Input "images" [B, height, width, 3]: recentred RGB (pixel 0..255 minus `image_mean`), B free.
    Output "responses" [B].

    Args:
        weights: the model.
        fold: fold batch normalisation into the convolutions (in float64, rounded once) instead of
            BatchNormalization nodes.

    Raises:
        ModuleNotFoundError: the package onnx is not installed.
        ValueError: the weights are not valid.
    """
    weights.validate()
    onnx = _onnx()
    graph = _Graph(onnx, weights.readout.dtype)
    maps = graph.add("Transpose", ["images"], perm=[0, 3, 1, 2])
    h, w = weights.height, weights.width
    for i, layer in enumerate(weights.layers):
        maps = _layer(graph, f"layer{i}", maps, layer, (h, w), fold)
        h = same_padding(h, layer.kernel_size, layer.stride)[0]
        w = same_padding(w, layer.kernel_size, layer.stride)[0]
    flat = graph.add("Flatten", [maps], axis=1)  # the maps stay [B, C, h, w], so the readout is turned instead
    readout = graph.constant("readout/kernel", weights.readout.transpose(2, 0, 1).reshape(-1, 1))
    bias = graph.constant("readout/bias", np.array([weights.readout_bias]))
    response = graph.add("Add", [graph.add("MatMul", [flat, readout]), bias])
    graph.add("Squeeze", [response, graph.constant("axis", np.array([1]), np.int64)], output="responses")
    return graph.model(weights)


def _layer(graph: _Graph, name: str, maps: str, layer: LayerWeights, size: tuple[int, int], fold: bool) -> str:
    """Nodes of one layer; the name of its output."""
    _, top, bottom = same_padding(size[0], layer.kernel_size, layer.stride)
    _, left, right = same_padding(size[1], layer.kernel_size, layer.stride)
    window: dict[str, Any] = {"pads": [top, left, bottom, right], "strides": [layer.stride] * 2}
    if layer.depthwise is not None:
        depthwise = graph.constant(f"{name}/depthwise", layer.depthwise.transpose(2, 0, 1)[:, None])
        maps = graph.add("Conv", [maps, depthwise], group=layer.in_channels, **window)
        assert layer.pointwise is not None
        kernel, window = layer.pointwise.T[:, :, None, None], {}
    else:
        assert layer.kernel is not None
        kernel = layer.kernel.transpose(3, 2, 0, 1)
    bias = layer.bias
    if fold:
        scale = layer.gamma.astype(np.float64) / np.sqrt(layer.variance.astype(np.float64) + layer.epsilon)
        kernel = kernel * scale[:, None, None, None]
        bias = (bias.astype(np.float64) - layer.mean) * scale + layer.beta
    maps = graph.add(
        "Conv", [maps, graph.constant(f"{name}/kernel", kernel), graph.constant(f"{name}/bias", bias)], **window
    )
    if not fold:
        # ONNX holds epsilon in float32; what that rounds off goes into the variance, which may be float64.
        epsilon = np.float32(layer.epsilon)
        variance = layer.variance + (layer.epsilon - np.float64(epsilon))
        norm = [graph.constant(f"{name}/{key}", getattr(layer, key)) for key in ("gamma", "beta", "mean")]
        norm.append(graph.constant(f"{name}/variance", variance))
        maps = graph.add("BatchNormalization", [maps, *norm], epsilon=float(epsilon))
    return graph.add("Relu", [maps])


class _Graph:
    """Nodes and constants collected so far; every intermediate value gets a number for a name."""

    def __init__(self, onnx: Any, dtype: np.dtype[np.floating]) -> None:
        self._onnx, self._dtype = onnx, dtype
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, name: str, value: NDArray[Any], dtype: Any = None) -> str:
        array = np.ascontiguousarray(value, self._dtype if dtype is None else dtype)
        self._constants.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"value{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def model(self, weights: CompactWeights) -> Any:
        helper = self._onnx.helper
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self._dtype))
        images = helper.make_tensor_value_info("images", kind, ["batch", weights.height, weights.width, 3])
        responses = helper.make_tensor_value_info("responses", kind, ["batch"])
        graph = helper.make_graph(self._nodes, weights.name, [images], [responses], self._constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, producer_name="cortexloop", opset_imports=opsets, ir_version=IR_VERSION)
        helper.set_model_props(model, {"image_mean": " ".join(repr(float(value)) for value in weights.image_mean)})
        self._onnx.checker.check_model(model, full_check=True)
        return model


def _onnx() -> Any:
    if importlib.util.find_spec("onnx") is None:
        raise ModuleNotFoundError('writing ONNX needs the package onnx: pip install "cortexloop[onnx]"', name="onnx")
    return importlib.import_module("onnx")
