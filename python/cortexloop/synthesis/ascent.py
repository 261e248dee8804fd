"""Gradient ascent on images, for all neurons of a bank at once: image i climbs the response of model i.

Source: Cowley et al., class_synth (synthesized images) and Cowley et al. (adversarial images).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.bank import ModelBank
from cortexloop.functional import gradient_ascent, input_gradient, responses
from cortexloop.functional.ascent import unit_rms
from cortexloop.images import recenter

Progress = Callable[[int, NDArray[np.floating]], None]
"""Called after every step with the number of steps done (1-based) and the responses of the images, [N]."""


@dataclass(frozen=True, eq=False)
class Ascent:
    """What `maximize` found: one image per neuron, and the way there."""

    names: tuple[str, ...]
    images: NDArray[np.float32]
    """[N, H, W, 3] the best image met, pixels 0..255 (not rounded), RGB."""
    responses: NDArray[np.floating]
    """[N] its response."""
    initial: NDArray[np.floating]
    """[N] response of the start image."""
    trajectory: NDArray[np.floating]
    """[N, steps] response after every step, before the periodic blur."""
    recorded: NDArray[np.floating]
    """[len(record), N, H, W, 3] pixels 0..255 after the steps asked for, before the periodic blur."""


@dataclass(frozen=True, eq=False)
class Adversarial:
    """What `adversarial` made: one image per neuron, close to its base image."""

    names: tuple[str, ...]
    images: NDArray[np.float32]
    """[N, H, W, 3] pixels 0..255 (not rounded), RGB."""
    responses: NDArray[np.floating]
    """[N] response of the image."""
    base: NDArray[np.floating]
    """[N] response of the base image."""
    distance: NDArray[np.floating]
    """[N] mean absolute difference from the base image, in grey levels; below epsilon if the image got no further."""
    steps: NDArray[np.int64]
    """[N] steps taken."""


def maximize(
    bank: ModelBank,
    *,
    steps: int = 100,
    seed: int = 0,
    minimize: bool = False,
    start: NDArray[np.generic] | Tensor | None = None,
    step_size: float = 10.0,
    blur: float = 1.0,
    blur_every: int = 50,
    grey: bool = False,
    record: Sequence[int] = (),
    progress: Progress | None = None,
    backend: str = "auto",
) -> Ascent:
    """The maximizing (or minimizing) synthesized image of every neuron of a bank, all in one batch.

    Each image follows `functional.gradient_ascent`: a step along the blurred gradient of unit RMS, clipped to pixels
    0..255, and now and then a blur of the image.

    The published code does the same, except that its best response starts at 0 (1e5 when minimizing), so that a model
    that never exceeds 0 returns the noise it started from; here it starts at minus (plus) infinity.

    Args:
        bank: N models. Neuron n's image depends on its own model only, not on the others in the bank.
        steps: number of steps, at least 1 (1000 in the published code's default, 100 in its example).
        seed: of the noise image to start from, see `noise_image`; unused with `start`.
        minimize: descend instead.
        start: [H, W, 3] for all neurons or [N, H, W, 3]: uint8 pixels 0..255 or recentred float32 or float64 values
            (float64 computes in float64, by the reference backend). None: noise.
        step_size: grey levels per step at unit RMS of the gradient.
        blur: sigma in pixels of both blurs; 0 for none.
        blur_every: steps between blurs of the image; 0 for none.
        grey: replace R, G and B by their mean after every step.
        record: steps (0-based) after which to keep the images.
        progress: called after every step.
        backend: see `responses`.

    Returns:
        An `Ascent`.

    Raises:
        ValueError: if `steps` is less than 1, a recorded step does not exist, a size is negative, or `start` does not
            fit the bank.
    """
    if any(not 0 <= t < steps for t in record):
        raise ValueError(f"recorded steps should lie in 0..{steps - 1}, got {list(record)}")
    x = _start_images(bank, noise_image(bank, seed) if start is None else start)
    low, high, mean = _pixel_range(bank, x)
    pairs = torch.arange(len(bank), device=x.device)
    cotangent = torch.ones(len(bank), dtype=x.dtype, device=x.device)
    recorded = {}

    def observe(t: int, images: Tensor, reached: Tensor) -> None:
        if t in record:
            recorded[t] = (images + mean).cpu()
        if progress is not None:
            progress(t + 1, _numpy(reached))

    climb = gradient_ascent(
        x,
        lambda x: input_gradient(x, bank, cotangent, pairs=pairs, backend=backend, return_responses=True),
        lambda x: responses(x, bank, pairs=pairs, backend=backend),
        low=low,
        high=high,
        steps=steps,
        minimize=minimize,
        step_size=step_size,
        blur=blur,
        blur_every=blur_every,
        project=(lambda x: (x + mean).mean(-1, keepdim=True) - mean) if grey else None,
        observe=observe,
    )
    kept = [recorded[t] for t in record]
    return Ascent(
        names=bank.names,
        images=_pixels(climb.images, mean),
        responses=_numpy(climb.scores),
        initial=_numpy(climb.initial),
        trajectory=_numpy(climb.trajectory),
        recorded=torch.stack(kept).numpy() if kept else np.empty((0, *x.shape), dtype=_numpy(climb.scores).dtype),
    )


def adversarial(
    bank: ModelBank,
    base: NDArray[np.generic] | Tensor,
    *,
    epsilon: float = 10.0,
    minimize: bool = False,
    step_size: float = 1.0,
    max_steps: int = 500,
    progress: Progress | None = None,
    backend: str = "auto",
) -> Adversarial:
    """Change natural images a little so that each neuron's response rises (or falls) a lot.

    Gradient ascent from the base image, x <- clip(x + step_size g / (sqrt(mean g^2) + 1e-5)), until the mean absolute
    difference from the base reaches `epsilon`. The threshold, 10 grey levels, is that of Cowley et al.; step size and
    the missing blur are choices made here, as the paper does not state them.

    Args:
        bank: N models.
        base: [H, W, 3] for all neurons or [N, H, W, 3], uint8 pixels or recentred float values.
        epsilon: mean absolute difference in grey levels at which an image is finished.
        minimize: lower the response instead.
        step_size: grey levels per step at unit RMS of the gradient.
        max_steps: ends images that do not get that far: a small receptive field can be saturated before. Images that a
            step leaves as they are end at once.
        progress: called after every step.
        backend: see `responses`.

    Raises:
        ValueError: if `epsilon` or `step_size` is not positive, `max_steps` is less than 1, or `base` does not fit the
            bank.
    """
    if not epsilon > 0 or not step_size > 0 or max_steps < 1:
        raise ValueError(
            f"epsilon and step_size should be positive, max_steps at least 1, got {epsilon}, {step_size}, {max_steps}"
        )
    origin = _start_images(bank, base)
    x = origin.clone()
    low, high, mean = _pixel_range(bank, x)
    step = -step_size if minimize else step_size
    current = responses(x, bank, pairs=torch.arange(len(bank), device=x.device), backend=backend)
    initial = current.clone()
    distance = torch.zeros_like(current)
    taken = torch.zeros(len(bank), dtype=torch.int64, device=x.device)
    stuck = torch.zeros(len(bank), dtype=torch.bool, device=x.device)
    for t in range(max_steps):
        active = torch.nonzero((distance < epsilon) & ~stuck)[:, 0]
        if len(active) == 0:
            break
        ones = torch.ones(len(active), dtype=x.dtype, device=x.device)
        grad = input_gradient(x[active], bank, ones, pairs=active, backend=backend)
        moved = torch.minimum(torch.maximum(x[active] + step * unit_rms(grad), low), high)
        stuck[active] = (moved == x[active]).flatten(1).all(dim=1)  # no gradient, or all it moves is at its bound
        x[active] = moved
        distance[active] = (x[active] - origin[active]).abs().mean(dim=(1, 2, 3))
        taken[active] += 1
        if progress is not None:
            current[active] = responses(x[active], bank, pairs=active, backend=backend)
            progress(t + 1, _numpy(current))
    current = responses(x, bank, pairs=torch.arange(len(bank), device=x.device), backend=backend)
    return Adversarial(
        names=bank.names,
        images=_pixels(x, mean),
        responses=_numpy(current),
        base=_numpy(initial),
        distance=_numpy(distance),
        steps=taken.cpu().numpy(),
    )


def noise_image(bank: ModelBank, seed: int = 0) -> NDArray[np.float32]:
    """The published start image: every pixel and channel uniform in 128..178; recentred float32 [H, W, 3]."""
    pixels = np.random.default_rng(seed).random((bank.height, bank.width, 3)) * 50.0 + 128.0
    return np.asarray(pixels - np.asarray(bank.image_mean), dtype=np.float32)


def _start_images(bank: ModelBank, start: NDArray[np.generic] | Tensor) -> Tensor:
    """Recentred images [N, H, W, 3] on the bank's device, float64 if `start` is, else float32."""
    images = start if isinstance(start, Tensor) else torch.from_numpy(np.array(start))
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise ValueError(f"images to start from should be uint8, float32 or float64, got {images.dtype}")
    shape = (bank.height, bank.width, 3)
    if tuple(images.shape) not in (shape, (len(bank), *shape)):
        raise ValueError(
            f"images to start from should be {list(shape)}, or {[len(bank), *shape]} with one per neuron, "
            f"got {list(images.shape)}"
        )
    images = recenter(images, bank.image_mean) if images.dtype == torch.uint8 else images
    return images.detach().to(bank.device).expand(len(bank), *shape).clone()


def _pixel_range(bank: ModelBank, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = torch.tensor(bank.image_mean, dtype=x.dtype, device=x.device)
    return -mean, 255.0 - mean, mean


def _pixels(x: Tensor, mean: Tensor) -> NDArray[np.float32]:
    pixels: NDArray[np.float32] = (x + mean).clamp(0.0, 255.0).to("cpu", torch.float32).numpy()
    return pixels


def _numpy(x: Tensor) -> NDArray[np.floating]:
    array: NDArray[np.floating] = x.detach().cpu().numpy()
    return array
