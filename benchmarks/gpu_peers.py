"""The bank in torch on a GPU: a loop of networks (eager, captured, compiled), and all models as grouped convolutions.

Every peer takes images in the form it likes best, made before the clock starts: recentred, in its own dtype, channels
last. "fp32" forbids TF32, "tf32" allows it for float32, "fp16" converts the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cases import Case
from cortexloop.packing import fold
from cortexloop.weights import CompactWeights, same_padding
from gpu_measure import GpuContender, precision
from peers import torch_network

KINDS = ("fp32", "tf32", "fp16")


def networks(models: Sequence[CompactWeights], kind: str, device: torch.device) -> list[nn.Module]:
    """Batch norm folded, weights frozen, channels last."""
    dtype = torch.float16 if kind == "fp16" else torch.float32
    return [
        torch_network(m, folded=True).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for m in models
    ]


def inputs(case: Case, kind: str, device: torch.device, sets: int) -> list[Tensor]:
    """Sets of the case's images, each in another order, [B, 3, H, W]."""
    dtype = torch.float16 if kind == "fp16" else torch.float32
    images = torch.from_numpy(case.recentred()).to(device=device, dtype=dtype).permute(0, 3, 1, 2)
    return [images.roll(i, dims=0).contiguous(memory_format=torch.channels_last) for i in range(sets)]


def _double(columns: Sequence[Tensor]) -> NDArray[np.float64]:
    return torch.cat(list(columns), dim=1).double().cpu().numpy()


def _contender(
    name: str, kind: str, run: Callable[[int], Any], fetch: Callable[[], NDArray[np.float64]]
) -> GpuContender:
    return GpuContender(f"{name}, {kind}", run, fetch, lambda: precision(kind), reduced=kind != "fp32")


def eager(case: Case, kind: str, device: torch.device, sets: int) -> GpuContender:
    """One network after another."""
    nets, images = networks(case.models, kind, device), inputs(case, kind, device, sets)

    def run(i: int) -> list[Tensor]:
        with torch.inference_mode():
            return [net(images[i % sets]) for net in nets]

    return _contender("torch eager", kind, run, lambda: _double(run(0)))


def captured(case: Case, kind: str, device: torch.device, sets: int) -> GpuContender:
    """The loop as one CUDA graph."""
    nets, images = networks(case.models, kind, device), inputs(case, kind, device, sets)
    precision(kind)
    replay, out = _graph(nets, images[0])

    def run(i: int) -> Tensor:
        return replay(images[i % sets])

    return _contender("torch, CUDA graph", kind, run, lambda: _double([run(0) if out is None else run(0).clone()]))


def _graph(nets: Sequence[nn.Module], example: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """(a function from images to responses [B, N] that replays one graph, its output); plain calls on a CPU."""
    static = example.clone()

    def work() -> Tensor:
        with torch.no_grad():
            return torch.cat([net(static) for net in nets], dim=1)

    if not example.is_cuda:

        def plain(images: Tensor) -> Tensor:
            static.copy_(images)
            return work()

        return plain, None
    lane = torch.cuda.Stream()
    lane.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(lane):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(lane)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()

    def replay(images: Tensor) -> Tensor:
        static.copy_(images)
        graph.replay()
        return out

    return replay, out


def compiled(case: Case, kind: str, device: torch.device, sets: int, *, mode: str = "max-autotune") -> GpuContender:
    """torch.compile of each network; compiling happens at the first run."""
    nets = [torch.compile(net, mode=mode, dynamic=False) for net in networks(case.models, kind, device)]
    images = inputs(case, kind, device, sets)

    def run(i: int) -> list[Tensor]:
        with torch.inference_mode():
            return [net(images[i % sets]) for net in nets]

    def fetch() -> NDArray[np.float64]:
        precision(kind)
        return _double([column.clone() for column in run(0)])

    return _contender("torch.compile", kind, run, fetch)


class GroupedBank(nn.Module):
    """All models as one network of grouped convolutions; channels padded to the largest model, layer by layer.

    Images [B, 3, H, W] -> responses [B, N].

    Raises:
        ValueError: models of different depth, kernel sizes or strides.
    """

    def __init__(self, models: Sequence[CompactWeights]) -> None:
        super().__init__()
        forms = {tuple((layer.kernel_size, layer.stride) for layer in m.layers) for m in models}
        if len(forms) != 1:
            raise ValueError(f"grouped convolutions need models of one form, got {len(forms)} forms")
        self.n, self.steps = len(models), []
        height, width, channels = models[0].height, models[0].width, 3
        for index, (k, stride) in enumerate(forms.pop()):
            out = max(m.layers[index].out_channels for m in models)
            height, top, bottom = same_padding(height, k, stride)
            width, left, right = same_padding(width, k, stride)
            bias = np.zeros((self.n, out))
            spatial = np.zeros((self.n, out, 3, k, k) if index == 0 else (self.n, channels, k, k))
            mixing = np.zeros((self.n, out, channels))
            for n, model in enumerate(models):
                layer = model.layers[index]
                folded, offsets = fold(layer)
                bias[n, : layer.out_channels] = offsets
                if layer.kernel is not None:
                    spatial[n, : layer.out_channels] = folded.transpose(3, 2, 0, 1)
                else:
                    assert layer.depthwise is not None
                    spatial[n, : layer.in_channels] = layer.depthwise.transpose(2, 0, 1)
                    mixing[n, : layer.out_channels, : layer.in_channels] = folded.T
            self.steps.append(((left, right, top, bottom), stride))
            shape = (-1, 3 if index == 0 else 1, k, k)
            self.register_buffer(f"spatial{index}", torch.from_numpy(spatial.reshape(shape)).float())
            self.register_buffer(f"mixing{index}", torch.from_numpy(mixing.reshape(-1, channels, 1, 1)).float())
            self.register_buffer(f"bias{index}", torch.from_numpy(bias.ravel()).float())
            channels = out
        readout = np.zeros((self.n, channels, height, width))
        for n, model in enumerate(models):
            readout[n, : model.readout.shape[2]] = model.readout.transpose(2, 0, 1)
        self.register_buffer("readout", torch.from_numpy(readout).float())
        self.register_buffer("readout_bias", torch.tensor([float(m.readout_bias) for m in models]))

    def forward(self, x: Tensor) -> Tensor:
        for index, (padding, stride) in enumerate(self.steps):
            spatial, bias = getattr(self, f"spatial{index}"), getattr(self, f"bias{index}")
            x = F.pad(x, padding)
            if index == 0:
                x = F.conv2d(x, spatial, bias, stride=stride)
            else:
                x = F.conv2d(x, spatial, stride=stride, groups=spatial.shape[0])
                x = F.conv2d(x, getattr(self, f"mixing{index}"), bias, groups=self.n)
            x = F.relu(x)
        x = x.view(x.shape[0], self.n, -1, *x.shape[2:])
        return (x * self.readout).sum(dim=(2, 3, 4)) + self.readout_bias


def grouped(case: Case, kind: str, device: torch.device, sets: int, *, memory: float = 16e9) -> GpuContender:
    """`GroupedBank`, as many images at a time as its largest map leaves room for."""
    dtype = torch.float16 if kind == "fp16" else torch.float32
    bank = GroupedBank(case.models).to(device=device, dtype=dtype)
    images = [x.contiguous() for x in inputs(case, kind, device, sets)]
    first = case.models[0]
    map_bytes = bank.spatial0.shape[0] * first.height * first.width * dtype.itemsize
    step = max(1, min(case.batch, int(memory / (4 * map_bytes))))

    def run(i: int) -> list[Tensor]:
        with torch.inference_mode():
            return [bank(part) for part in images[i % sets].split(step)]

    return _contender("torch, grouped convolutions", kind, run, lambda: torch.cat(run(0)).double().cpu().numpy())


def eager_gradient_of_pairs(case: Case, kind: str, device: torch.device, sets: int) -> GpuContender:
    """Image i with model i modulo N, each model on its own images: autograd, weights frozen; [B, H, W, 3]."""
    nets, images = networks(case.models, kind, device), inputs(case, kind, device, sets)
    n = len(nets)

    def run(i: int) -> list[Tensor]:
        grads = []
        for k, net in enumerate(nets):
            leaf = images[i % sets][k::n].detach().requires_grad_()
            if len(leaf):
                grads.append(torch.autograd.grad(net(leaf).sum(), leaf)[0])
        return grads

    def fetch() -> NDArray[np.float64]:
        out = torch.empty(case.images.shape, dtype=torch.float64)
        for k, grad in enumerate(run(0)):
            out[k::n] = grad.permute(0, 2, 3, 1).double().cpu()
        return out.numpy()

    return _contender("torch eager", kind, run, fetch)


def captured_latency(case: Case, kind: str, device: torch.device) -> Callable[[], Tensor]:
    """Host to host: pinned images in, the loop as one CUDA graph, pinned responses out; one call of it."""
    nets = networks(case.models, kind, device)
    example = inputs(case, kind, device, 1)[0]
    precision(kind)
    replay, _ = _graph(nets, example)
    pin = device.type == "cuda"
    source = torch.from_numpy(case.images).clone()
    target = torch.empty(case.batch, len(nets), dtype=example.dtype)
    if pin:
        source, target = source.pin_memory(), target.pin_memory()
    mean = torch.tensor(case.models[0].image_mean, device=device, dtype=example.dtype)

    def run() -> Tensor:
        pixels = source.to(device, non_blocking=True)
        images = (pixels.to(example.dtype) - mean).permute(0, 3, 1, 2)
        target.copy_(replay(images), non_blocking=True)
        if pin:
            torch.cuda.current_stream().synchronize()
        return target

    return run
