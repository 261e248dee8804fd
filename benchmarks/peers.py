"""Other engines that evaluate the same models: each as strong as its own documentation makes it.

Every peer takes images in the form it likes best, made before the clock starts: float32, recentred, in its own memory
layout. The candidate takes uint8 images and recentres them while the clock runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cases import Case
from cortexloop.packing import fold
from cortexloop.weights import CompactWeights, same_padding
from record import Contender


def _from_callable(name: str, run: Callable[[], Any], convert: Callable[[Any], NDArray[np.float64]]) -> Contender:
    return Contender(name, run, lambda: convert(run()))


def torch_network(model: CompactWeights, *, folded: bool) -> nn.Sequential:
    """The model as torch users write it: pad, convolve, normalise, rectify; images [B, 3, H, W] -> [B, 1].

    Args:
        folded: fold batch norm into the convolutions, as a careful user does before deployment.
    """
    steps: list[nn.Module] = []
    height, width = model.height, model.width
    for layer in model.layers:
        k, stride, c, o = layer.kernel_size, layer.stride, layer.in_channels, layer.out_channels
        out_h, top, bottom = same_padding(height, k, stride)
        out_w, left, right = same_padding(width, k, stride)
        symmetric = top == bottom == left == right
        if not symmetric:
            steps.append(nn.ZeroPad2d((left, right, top, bottom)))
        padding = top if symmetric else 0
        mixing, bias = fold(layer) if folded else (layer.kernel, layer.bias)
        if layer.kernel is not None:
            convolution = nn.Conv2d(c, o, k, stride, padding)
            _set(convolution.weight, np.asarray(mixing).transpose(3, 2, 0, 1))
        else:
            assert layer.depthwise is not None
            depthwise = nn.Conv2d(c, c, k, stride, padding, groups=c, bias=False)
            _set(depthwise.weight, layer.depthwise.transpose(2, 0, 1)[:, None])
            steps.append(depthwise)
            convolution = nn.Conv2d(c, o, 1)
            _set(convolution.weight, np.asarray(mixing if folded else layer.pointwise).T[:, :, None, None])
        assert convolution.bias is not None
        _set(convolution.bias, bias)
        steps.append(convolution)
        if not folded:
            norm = nn.BatchNorm2d(o, eps=layer.epsilon)
            for target, value in (
                (norm.weight, layer.gamma),
                (norm.bias, layer.beta),
                (norm.running_mean, layer.mean),
                (norm.running_var, layer.variance),
            ):
                assert target is not None
                _set(target, value)
            steps.append(norm)
        steps.append(nn.ReLU())
        height, width = out_h, out_w
    readout = nn.Linear(model.readout.size, 1)
    _set(readout.weight, model.readout.transpose(2, 0, 1).reshape(1, -1))
    _set(readout.bias, [model.readout_bias])
    steps += [nn.Flatten(), readout]
    return nn.Sequential(*steps).eval().requires_grad_(False)


def _set(target: torch.Tensor, value: NDArray[np.floating] | Sequence[float]) -> None:
    with torch.no_grad():
        target.copy_(torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64)))


def _torch_networks(case: Case, *, folded: bool, compiled: bool) -> tuple[list[Callable[..., Any]], torch.Tensor]:
    images = torch.from_numpy(case.recentred()).permute(0, 3, 1, 2)
    networks: list[Any] = [torch_network(m, folded=folded) for m in case.models]
    if folded:  # the fast layout, found by trying both
        networks = [n.to(memory_format=torch.channels_last) for n in networks]
    else:
        images = images.contiguous()
    if compiled:
        networks = [torch.compile(n, dynamic=False) for n in networks]
    return networks, images


def torch_forward(case: Case, *, folded: bool, compiled: bool = False) -> Contender:
    """A loop over the models in torch, without gradients."""
    networks, images = _torch_networks(case, folded=folded, compiled=compiled)

    def run() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [network(images) for network in networks]

    return _from_callable(_torch_name(folded, compiled), run, lambda out: torch.cat(out, dim=1).double().numpy())


def torch_gradient(case: Case, *, folded: bool, compiled: bool = False) -> Contender:
    """Gradient of the sum of all responses with respect to the images, weights frozen."""
    networks, images = _torch_networks(case, folded=folded, compiled=compiled)
    images.requires_grad_()

    def run() -> torch.Tensor:
        total = torch.zeros_like(images, requires_grad=False)
        for network in networks:
            total += torch.autograd.grad(network(images).sum(), images)[0]
        return total

    return _from_callable(
        _torch_name(folded, compiled), run, lambda grad: grad.permute(0, 2, 3, 1).double().contiguous().numpy()
    )


def _torch_name(folded: bool, compiled: bool) -> str:
    if compiled:
        return "torch.compile"
    return "torch eager, folded, channels last" if folded else "torch eager"


def onnx_graph(model: CompactWeights, batch: int) -> bytes:
    """The model as ONNX, batch norm folded, images [batch, 3, H, W]: what both runtimes like best."""
    import onnx
    from onnx import helper, numpy_helper

    nodes, tensors = [], []
    current = "images"

    def tensor(name: str, value: Any) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name))
        return name

    def node(kind: str, *inputs: str, **attributes: Any) -> None:
        nonlocal current
        output = f"value{len(nodes)}"
        nodes.append(helper.make_node(kind, [current, *inputs], [output], **attributes))
        current = output

    height, width = model.height, model.width
    for index, layer in enumerate(model.layers):
        k, stride = layer.kernel_size, layer.stride
        height, top, bottom = same_padding(height, k, stride)
        width, left, right = same_padding(width, k, stride)
        spatial = {"strides": [stride, stride], "pads": [top, left, bottom, right]}
        mixing, bias = fold(layer)
        if layer.kernel is not None:
            kernel = tensor(f"kernel{index}", mixing.transpose(3, 2, 0, 1))
            node("Conv", kernel, tensor(f"bias{index}", bias), **spatial)
        else:
            assert layer.depthwise is not None
            depthwise = tensor(f"depthwise{index}", layer.depthwise.transpose(2, 0, 1)[:, None])
            node("Conv", depthwise, group=layer.in_channels, **spatial)
            node("Conv", tensor(f"pointwise{index}", mixing.T[:, :, None, None]), tensor(f"bias{index}", bias))
        node("Relu")
    node("Flatten")
    readout = tensor("readout", model.readout.transpose(2, 0, 1).reshape(-1, 1))
    node("Gemm", readout, tensor("readout_bias", [model.readout_bias]))
    graph = helper.make_graph(
        nodes,
        "compact_model",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [batch, 3, model.height, model.width])],
        [helper.make_tensor_value_info(current, onnx.TensorProto.FLOAT, [batch, 1])],
        tensors,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _channels_first(case: Case) -> NDArray[np.float32]:
    return np.ascontiguousarray(case.recentred().transpose(0, 3, 1, 2))


def onnxruntime_forward(case: Case, threads: int) -> Contender:
    """ONNX Runtime with all graph optimisations (its default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = [
        onnxruntime.InferenceSession(onnx_graph(m, case.batch), options, providers=["CPUExecutionProvider"])
        for m in case.models
    ]
    feed = {"images": _channels_first(case)}
    return _from_callable(
        "ONNX Runtime",
        lambda: [session.run(None, feed)[0] for session in sessions],
        lambda out: np.concatenate(out, axis=1).astype(np.float64),
    )


def openvino_forward(case: Case, threads: int, precision: str) -> Contender:
    """OpenVINO with its latency hint, images shared without a copy.

    Args:
        precision: "f32" or "bf16".
    """
    import openvino

    core = openvino.Core()
    images = _channels_first(case)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    requests = []
    for model in case.models:
        compiled = core.compile_model(core.read_model(onnx_graph(model, case.batch)), "CPU", options)
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))
        requests.append(request)

    def run(memory: NDArray[np.float32] = images) -> None:  # requests do not keep their images alive; this does
        for request in requests:
            request.infer()

    def fetch() -> NDArray[np.float64]:
        run()
        return np.concatenate([r.get_output_tensor().data for r in requests], axis=1).astype(np.float64)

    return Contender(f"OpenVINO {precision}", run, fetch)
