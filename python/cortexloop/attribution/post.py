"""From a map of numbers per colour to what is looked at: named steps in one order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop.images import gaussian_blur

CHANNELS = (None, "sum", "mean", "max_abs", "l2")
RECTIFY = (None, "abs", "relu")


@dataclass(frozen=True)
class Post:
    """Steps on attribution maps [..., H, W, 3], in this order.

    Attributes:
        rectify: "abs" or "relu" of every entry; None leaves signs.
        channels: one number per pixel: "sum", "mean" or "l2" (Euclidean norm) over the colours, or "max_abs", the
            largest absolute value; None keeps three.
        blur: sigma in pixels of a Gaussian over height and width, edges mirrored.
        clip: percentile of the absolute values of a map, 0..100, beyond which they are cut off (99 is usual).
        normalise: divide each map by its largest absolute value. A map of zeros stays one.

    Raises:
        ValueError: an unknown name or a number out of range.
    """

    rectify: str | None = None
    channels: str | None = None
    blur: float = 0.0
    clip: float | None = None
    normalise: bool = False

    def __post_init__(self) -> None:
        for name, known in (("rectify", RECTIFY), ("channels", CHANNELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} should be one of {known}, got {getattr(self, name)!r}")
        if not self.blur >= 0:
            raise ValueError(f"blur should not be negative, got {self.blur}")
        if self.clip is not None and not 0 < self.clip <= 100:
            raise ValueError(f"clip should be a percentile above 0 and up to 100, got {self.clip}")

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of one map of an image."""
        return (height, width, 3) if self.channels is None else (height, width)

    def __call__(self, maps: Tensor) -> Tensor:
        """The maps [..., H, W, 3] after all steps: [..., H, W], or [..., H, W, 3] if the colours are kept."""
        if self.rectify is not None:
            maps = maps.abs() if self.rectify == "abs" else maps.relu()
        if self.channels is not None:
            maps = {
                "sum": lambda x: x.sum(-1),
                "mean": lambda x: x.mean(-1),
                "max_abs": lambda x: x.abs().amax(-1),
                "l2": lambda x: x.square().sum(-1).sqrt(),
            }[self.channels](maps)
        axes = (-2, -1) if self.channels is not None else (-3, -2, -1)
        if self.blur:
            maps = (
                gaussian_blur(maps[..., None], self.blur)[..., 0] if len(axes) == 2 else gaussian_blur(maps, self.blur)
            )
        flat = maps.flatten(-len(axes))
        if self.clip is not None and flat.numel():
            # torch's quantile() refuses many numbers at once, and sorting needs no more memory than the maps
            ranked = flat.abs().sort(dim=-1).values
            place = self.clip / 100 * (ranked.shape[-1] - 1)
            low, high = ranked[..., int(place)], ranked[..., min(int(place) + 1, ranked.shape[-1] - 1)]
            bound = (low + (high - low) * (place - int(place)))[..., None]
            flat = torch.minimum(torch.maximum(flat, -bound), bound)
        if self.normalise and flat.numel():
            largest = flat.abs().amax(dim=-1, keepdim=True)
            flat = flat / torch.where(largest > 0, largest, 1)
        return flat.view(maps.shape)
