"""`Preprocess`: from pixel levels to what a network takes, every choice in the open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexloop.weights import IMAGE_MEAN

Triple = tuple[float, float, float]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """(scale * levels - mean) / std for each channel, of images of one size.

    Images of another size are an error, unless `resize` is set.

    Attributes:
        size: height and width that the network takes, in pixels; one number for squares.
        mean, std: R, G, B, in units of the scaled levels.
        scale: factor of the levels 0..255 before the mean is subtracted.
        channels: order of the channels that the network takes, "RGB" or "BGR"; mean and std are in this order.
        layout: axes that the network takes, "NCHW" or "NHWC".
        resize: whether images of other sizes are resized. Proportions are not kept.
        interpolation: "nearest", "bilinear" or "bicubic" (pixel centres at halves), in floating point, before the
            normalisation.
        antialias: whether resizing to a smaller size averages over the pixels in between, as Pillow does.

    Raises:
        ValueError: a size below 1, a standard deviation or scale of 0, or an unknown name.
    """

    size: tuple[int, int] | int
    mean: Sequence[float]
    std: Sequence[float]
    scale: float = 1 / 255
    channels: str = "RGB"
    layout: str = "NCHW"
    resize: bool = False
    interpolation: str = "bilinear"
    antialias: bool = True

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size should be a height and a width in pixels, got {self.size}")
        object.__setattr__(self, "size", size)
        for name in ("mean", "std"):
            value = tuple(float(v) for v in getattr(self, name))
            if len(value) != 3 or not all(map(math.isfinite, value)):
                raise ValueError(f"{name} should be three numbers (R, G, B), got {value}")
            object.__setattr__(self, name, value)
        if any(s <= 0 for s in self.std) or not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"std and scale should be positive, got {self.std} and {self.scale}")
        for name, known in (
            ("channels", ("RGB", "BGR")),
            ("layout", ("NCHW", "NHWC")),
            ("interpolation", INTERPOLATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def imagenet(cls, size: tuple[int, int] | int = 224, **others: Any) -> Preprocess:
        """What torchvision's, timm's and the robust networks take: 0..1, minus ImageNet's mean, over its deviation."""
        return cls(size, IMAGENET_MEAN, IMAGENET_STD, **others)

    @classmethod
    def recentred(
        cls, size: tuple[int, int] | int = 112, mean: Sequence[float] = IMAGE_MEAN, **others: Any
    ) -> Preprocess:
        """What compact models take: levels minus the mean of each channel, [B, H, W, 3]."""
        return cls(size, mean, (1.0, 1.0, 1.0), scale=1.0, layout="NHWC", **others)

    @property
    def height(self) -> int:
        """Height in pixels that the network takes."""
        return self.size[0]  # type: ignore[index]

    @property
    def width(self) -> int:
        """Width in pixels that the network takes."""
        return self.size[1]  # type: ignore[index]

    def settings(self) -> dict[str, Any]:
        """The attributes, as JSON can hold them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def check_size(self, height: int, width: int) -> None:
        """ValueError for images of another size that are not to be resized."""
        if (height, width) != self.size and not self.resize:
            raise ValueError(
                f"images are {height} x {width} pixels, the network takes {self.height} x {self.width}: resize them, "
                f"or say resize=True in Preprocess to have them resized ({self.interpolation})"
            )

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The network's input, differentiable in floating images.

        Args:
            images: uint8 or floating levels 0..255, [B, H, W, 3].
            dtype: of the result.

        Returns:
            [B, 3, height, width], or [B, height, width, 3] for layout "NHWC".

        Raises:
            ValueError: images of another size, without `resize`.
        """
        self.check_size(images.shape[1], images.shape[2])
        x = images.to(dtype)
        if tuple(images.shape[1:3]) != self.size:
            smooth = self.interpolation != "nearest"
            x = F.interpolate(
                x.permute(0, 3, 1, 2),
                size=self.size,
                mode=self.interpolation,
                align_corners=False if smooth else None,
                antialias=self.antialias and smooth,
            ).permute(0, 2, 3, 1)
        if self.channels == "BGR":
            x = x.flip(-1)
        std = torch.tensor(self.std, dtype=torch.float64)
        gain = (self.scale / std).to(x.device, dtype)
        offset = (-torch.tensor(self.mean, dtype=torch.float64) / std).to(x.device, dtype)
        # Recentring is a plain difference, rounded once, as the banks do it.
        x = x + offset if self.scale == 1 and self.std == (1.0, 1.0, 1.0) else torch.addcmul(offset, x, gain)
        return x.permute(0, 3, 1, 2).contiguous() if self.layout == "NCHW" else x
