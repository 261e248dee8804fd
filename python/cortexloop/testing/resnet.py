"""`SmallResNet`: a network with the names and the habits of torchvision's ResNets, with random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolution with a sum past them; one in-place ReLU is used three times."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)  # type: ignore[no-any-return]


class SmallResNet(nn.Module):
    """Images [B, 3, H, W], normalised as for ImageNet -> logits [B, classes]; in evaluation mode.

    The names are those of torchvision's resnet50 (conv1, bn1, relu, maxpool, layer1..layer4, avgpool, fc), and so are
    the in-place operations. Weights follow from the seed; every map has a standard deviation near 1.

    Args:
        width: channels of the first layer; those of layer1..layer4 are 4, 8, 16 and 32 times as many.
        blocks: bottlenecks of layer1..layer4.
        classes: outputs.
        seed: of the weights.
    """

    def __init__(self, width: int = 8, blocks: Sequence[int] = (1, 1, 2, 1), classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width << stage, stride))
                channels = (width << stage) * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)
        self.eval()
        self._draw(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """He-normal weights; batch norm with statistics that are near those of its input but not equal to them."""
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                fan_in = part.weight[0].numel()
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * math.sqrt(2 / fan_in))
                if part.bias is not None:
                    part.bias.copy_(torch.randn(part.bias.shape, generator=generator) * 0.1)
            elif isinstance(part, nn.BatchNorm2d):
                size = part.weight.shape
                assert part.running_mean is not None
                assert part.running_var is not None
                part.weight.copy_(0.6 + 0.4 * torch.rand(size, generator=generator))
                part.bias.copy_(torch.randn(size, generator=generator) * 0.3)
                part.running_mean.copy_(torch.randn(size, generator=generator) * 0.2)
                part.running_var.copy_(0.8 + 0.8 * torch.rand(size, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]
