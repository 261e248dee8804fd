"""Backward passes of many cotangents at once equal torch's own, one after another; float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cortexloop.features import ModuleFeatures, Preprocess
from cortexloop.features.replay import AT_ONCE, Replay
from cortexloop.testing import SmallResNet

K = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(function: Callable[[Tensor], Tensor], *shape: int) -> Replay:
    leaf = draw(*shape).requires_grad_()
    output = function(leaf)
    replay = Replay(output, leaf)
    cotangents = draw(K, *output.shape, seed=1)
    kept = cotangents.clone()
    expected = torch.stack([torch.autograd.grad(output, leaf, c, retain_graph=True)[0] for c in cotangents])
    for _ in range(2):  # what is prepared in the first run serves in the second
        torch.testing.assert_close(replay.run(cotangents), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(cotangents, kept)
    return replay


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("channels", [3, 6])
def test_convolutions(kernel: int, size: tuple[int, int], stride: Any, channels: int) -> None:
    """Few channels and stride 2 have a way of their own."""
    for padding in {0, kernel // 2, (kernel - 1, 0)}:
        layer = nn.Conv2d(channels, 4, kernel, stride, padding).double()
        check(layer, 2, channels, *size)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.Conv2d(6, 9, 3, 1, 2, dilation=2, groups=3),
        nn.Conv2d(6, 4, 3, 2, dilation=2),
        nn.Conv2d(6, 4, 3, padding="same"),
        nn.Conv2d(6, 4, (1, 3), (2, 1), (0, 1)),
        nn.ConvTranspose2d(6, 4, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.InstanceNorm2d(6),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.ELU(),
        nn.GELU(),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Sequential(nn.Conv2d(6, 4, 1), nn.Dropout(0.5)),
        nn.Sequential(nn.Flatten(), nn.Linear(6 * 63, 5), nn.ReLU(), nn.Linear(5, 2)),
        nn.Sequential(nn.ConvTranspose2d(6, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ZeroPad2d((1, 2, 0, 1))),
    ],
    ids=lambda layer: str(layer).split("\n")[0],
)
def test_layers(layer: nn.Module) -> None:
    layer = layer.double().eval()
    for part in layer.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(draw(len(part.running_mean)))
            part.running_var.copy_(1 + draw(len(part.running_var)).square())
            if part.affine:
                part.weight.data.copy_(draw(len(part.weight), seed=2))
    check(layer, 2, 6, 9, 7)


def test_sums_products_and_shared_parts() -> None:
    convolution, norm = nn.Conv2d(3, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double().eval()
    norm.running_var.fill_(3.0)

    def network(x: Tensor) -> Tensor:
        y = convolution(x)
        z = norm(y) + y  # a convolution whose output is used twice, once behind batch norm
        z = torch.relu(z) + torch.relu(convolution(z))
        z = z + x.mean((2, 3), keepdim=True)  # a sum that repeats one side
        z = z + 0.5 * x - torch.sub(x, z, alpha=2)
        z = z + F.avg_pool2d(z, 3, 1, 1)
        z += 1
        z = torch.cat([z, z * x, z[:, :1].sigmoid() * z], dim=1)
        return z.transpose(2, 3)

    check(network, 2, 3, 6, 5)


def test_attention() -> None:
    """What transformers do, on tokens instead of maps."""
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True).double().train()
    for part in block.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    block.self_attn.dropout = 0.0
    check(lambda x: block(x.flatten(2).transpose(1, 2)), 2, 8, 3, 2)


def test_outputs_that_are_one_of_several() -> None:
    check(lambda x: x.sin().unbind(1)[1] * x.split(2, dim=1)[0].sum(1), 2, 4, 3, 3)


def test_the_leaf_itself() -> None:
    check(lambda x: x + 0, 2, 3, 4, 4)


def test_features_that_do_not_depend_on_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match="do not depend"):
        Replay(draw(2, 3), draw(2, 3).requires_grad_())


def test_parameters_that_need_no_gradient() -> None:
    network = SmallResNet(width=4).double().requires_grad_(False)
    check(lambda x: network(x), 1, 3, 32, 32)


class Halved(torch.autograd.Function):
    """A derivative in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class WithHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Halved.apply(self.conv(x)))


@pytest.mark.parametrize("layer", ["layer1", "layer3.1", "fc"])
@pytest.mark.parametrize("count", [1, AT_ONCE + 3])
def test_linearizations_of_a_network(layer: str, count: int) -> None:
    source = ModuleFeatures(SmallResNet().double(), layer, preprocess=Preprocess.imagenet(32))
    images = (draw(2, 32, 32, 3) * 40 + 128).clamp(0, 255)
    linear = source.linearize(images)
    assert linear._replay.reason is None
    cotangents = draw(2, count, *source.feature_shape())
    leaf = images.clone().requires_grad_()
    features = source.differentiable(leaf)
    torch.testing.assert_close(linear.features, features.detach())
    expected = [torch.autograd.grad(features, leaf, cotangents[:, k], retain_graph=True)[0] for k in range(count)]
    torch.testing.assert_close(linear.pullback(cotangents), torch.stack(expected, 1), rtol=1e-8, atol=1e-10)


def test_derivatives_in_python_are_run_by_torch() -> None:
    source = ModuleFeatures(WithHalf().double().eval(), "last", preprocess=Preprocess.imagenet(8))
    images = draw(2, 8, 8, 3) * 40 + 128
    linear = source.linearize(images)
    assert "derivative written in Python" in linear._replay.reason
    cotangents = draw(2, K, *source.feature_shape())
    leaf = images.clone().requires_grad_()
    features = source.differentiable(leaf)
    expected = [torch.autograd.grad(features, leaf, cotangents[:, k], retain_graph=True)[0] for k in range(K)]
    torch.testing.assert_close(linear.pullback(cotangents), torch.stack(expected, 1))


def test_reduced_precision_and_uint8() -> None:
    network = SmallResNet()
    images = (draw(1, 32, 32, 3) * 40 + 128).clamp(0, 255).to(torch.uint8)
    maps = []
    for precision in ("float32", "bfloat16"):
        source = ModuleFeatures(network, "layer2", preprocess=Preprocess.imagenet(32), precision=precision)
        cotangents = draw(1, 4, *source.feature_shape()).float()
        maps.append(source.linearize(images).pullback(cotangents))
    assert maps[1].dtype == torch.float32
    assert float((maps[0] - maps[1]).norm() / maps[0].norm()) < 0.2


def test_what_a_linearization_keeps_is_measured() -> None:
    source = ModuleFeatures(SmallResNet(), "conv1", preprocess=Preprocess.imagenet(32))
    assert 3 * 32 * 32 * 4 <= source.graph_bytes(32, 32) <= 16 * 3 * 32 * 32 * 4
    deeper = ModuleFeatures(SmallResNet(), "layer4", preprocess=Preprocess.imagenet(32))
    assert deeper.graph_bytes(32, 32) > source.graph_bytes(32, 32) + 16 * 16 * 8 * 4
