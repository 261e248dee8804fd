"""Gradient, input times gradient, and SmoothGrad."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cortexloop.attribution.base import MEMORY, Baseline, PixelMethod, Selection
from cortexloop.attribution.post import Post
from cortexloop.attribution.targets import Target
from cortexloop.bank import ModelBank


class Saliency(PixelMethod):
    """The gradient of the response, in response units per grey level (signed; see `Post` for absolute values).

    Source: Simonyan, Vedaldi & Zisserman 2013.

    Args: as of `PixelMethod`.
    """

    def _maps(self, levels: Tensor, start: Tensor, chosen: Selection) -> Tensor:
        return self.target.gradients(levels, chosen.neurons, chosen.paired)


class InputXGradient(PixelMethod):
    """(image - baseline) times the gradient, in response units.

    With the default baseline, the levels that the network sees as 0, it is the product of the network's own input and
    its gradient (Shrikumar et al. 2016).

    Args: as of `PixelMethod`, and
        baseline: "zero", "blur", a level, or an image, see `IntegratedGradients`.
    """

    def __init__(
        self,
        target: Target | ModelBank,
        *,
        baseline: Baseline = "zero",
        post: Post | None = None,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(target, post=post, memory=memory)
        self.baseline = baseline

    def _maps(self, levels: Tensor, start: Tensor, chosen: Selection) -> Tensor:
        gradients = self.target.gradients(levels, chosen.neurons, chosen.paired)
        difference = levels - start
        return gradients * (difference if chosen.paired else difference[:, None])


KINDS = ("smoothgrad", "smoothgrad_sq", "vargrad")


class SmoothGrad(PixelMethod):
    """Statistics of the gradient over noisy versions of the image.

    Sources: Smilkov et al. 2017 (the mean), Hooker et al. 2019 (mean of squares), Adebayo et al. 2018 (variance).
    Noise image s is the same for all images and neurons and follows from (seed, s), so that no result depends on what
    else is attributed, and all neurons share the forward passes of a network.

    Args: as of `PixelMethod`, and
        samples: noise images.
        deviation: standard deviation of the noise, in grey levels (0.15 of the range is usual).
        kind: "smoothgrad", "smoothgrad_sq" or "vargrad" (population variance).
        seed: of the noise.

    Raises:
        ValueError: no samples, a deviation that is not positive, or an unknown kind.
    """

    def __init__(
        self,
        target: Target | ModelBank,
        *,
        samples: int = 16,
        deviation: float = 0.15 * 255,
        kind: str = "smoothgrad",
        seed: int = 0,
        post: Post | None = None,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(target, post=post, memory=memory)
        if samples < 1 or not deviation > 0:
            raise ValueError(f"samples should be at least 1, deviation positive, got {samples} and {deviation}")
        if kind not in KINDS:
            raise ValueError(f"kind should be one of {', '.join(KINDS)}, got {kind!r}")
        self.samples, self.deviation, self.kind, self.seed = samples, deviation, kind, seed

    def noise(self, sample: int, height: int, width: int) -> Tensor:
        """Noise image number `sample`, float64 [H, W, 3], in grey levels."""
        normal = np.random.default_rng((self.seed, sample)).standard_normal((height, width, 3))
        return torch.from_numpy(self.deviation * normal)

    def _maps(self, levels: Tensor, start: Tensor, chosen: Selection) -> Tensor:
        total: Tensor | None = None
        squares: Tensor | None = None
        for sample in range(self.samples):
            noise = self.noise(sample, levels.shape[1], levels.shape[2]).to(levels.device, levels.dtype)
            gradient = self.target.gradients(levels + noise, chosen.neurons, chosen.paired)
            if self.kind != "smoothgrad_sq":
                total = gradient if total is None else total.add_(gradient)
            if self.kind != "smoothgrad":
                squares = gradient.square() if squares is None else squares.addcmul_(gradient, gradient)
        if self.kind == "smoothgrad":
            assert total is not None
            return total / self.samples
        assert squares is not None
        if total is None:
            return squares / self.samples
        # rounding can leave a variance slightly below 0
        return (squares / self.samples - (total / self.samples).square()).clamp(min=0)
