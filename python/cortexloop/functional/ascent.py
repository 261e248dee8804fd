"""Gradient ascent on images: the loop that synthesized images of banks and of readouts share.

Source: Cowley et al., class_synth (synthesized images).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop.images import gaussian_blur

# Part of the published normalisation. It matters: raw gradients have an RMS of 1.5e-5 to 7e-5, so it damps early steps.
_RMS_EPSILON = 1e-5


@dataclass(frozen=True, eq=False)
class Climb:
    """Where `gradient_ascent` arrived."""

    images: Tensor
    """[N, H, W, C] the best image met on each way."""
    scores: Tensor
    """[N] its score."""
    initial: Tensor
    """[N] score of the start image."""
    trajectory: Tensor
    """[N, steps] score after every step, before the periodic blur; in host memory."""


def gradient_ascent(
    start: Tensor,
    gradient: Callable[[Tensor], tuple[Tensor, Tensor]],
    value: Callable[[Tensor], Tensor],
    *,
    low: Tensor | float,
    high: Tensor | float,
    steps: int,
    minimize: bool = False,
    step_size: float = 10.0,
    blur: float = 1.0,
    blur_every: int = 50,
    project: Callable[[Tensor], Tensor] | None = None,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Climb:
    """Let every image of a batch climb its own score.

    For step t = 0, 1, ..., with g the gradient of the scores:
    1. g <- g / (sqrt(mean g^2) + 1e-5), then Gaussian blur over height and width;
    2. x <- x + step_size g (minus if minimizing), clipped to low..high, then projected;
    3. the score of x is noted, and x kept if it is the best so far;
    4. if t > 0 and t is a multiple of `blur_every`, x is blurred.

    Args:
        start: [N, H, W, C] floating images.
        gradient: images -> gradient of their scores and the scores [N].
        value: images -> scores [N].
        low, high: bounds of pixels, broadcast against images.
        steps: at least 1.
        blur: sigma in pixels of both blurs; 0 for none.
        blur_every: steps between blurs of the image; 0 for none.
        project: applied to the images after every step.
        observe: called after every step with t (0-based), the images and their scores.

    Raises:
        ValueError: if `steps` is less than 1 or a size is negative.
    """
    if steps < 1:
        raise ValueError(f"steps should be at least 1, got {steps}")
    if blur < 0 or blur_every < 0 or step_size < 0:
        raise ValueError(
            f"step_size, blur and blur_every should not be negative, got {step_size}, {blur}, {blur_every}"
        )
    sign = -1.0 if minimize else 1.0
    floor, ceiling = (torch.as_tensor(bound, dtype=start.dtype, device=start.device) for bound in (low, high))
    x = start
    grad, reached = gradient(x)
    initial = reached.clone()
    best_images, best = x.clone(), torch.full_like(reached, -sign * torch.inf)
    trajectory = torch.empty(len(x), steps, dtype=reached.dtype)
    for t in range(steps):
        x = x + sign * step_size * gaussian_blur(unit_rms(grad), blur)
        x = torch.minimum(torch.maximum(x, floor), ceiling)
        if project is not None:
            x = project(x)
        blurs_now = blur_every > 0 and t > 0 and t % blur_every == 0
        if blurs_now or t == steps - 1:
            reached = value(x)
        else:  # the next gradient is taken at this very image and brings its score along
            grad, reached = gradient(x)
        better = sign * reached > sign * best
        best = torch.where(better, reached, best)
        best_images[better] = x[better]
        trajectory[:, t] = reached
        if observe is not None:
            observe(t, x, reached)
        if blurs_now and t < steps - 1:
            x = gaussian_blur(x, blur)
            grad, _ = gradient(x)
    return Climb(best_images, best, initial, trajectory)


def unit_rms(grad: Tensor) -> Tensor:
    """Gradients [N, H, W, C] over their root mean square, which has 1e-5 added to it."""
    # In float64, the order of the sum (which varies with batch and threads) vanishes in the rounding to float32.
    rms = grad.double().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return grad / (rms + _RMS_EPSILON).to(grad.dtype)
