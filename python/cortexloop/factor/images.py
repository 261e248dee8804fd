"""Preferred images of weights in feature space: gradient ascent through the network that the features come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.factor._checks import Array, floats
from cortexloop.factor.factors import Factors
from cortexloop.factor.scores import Weights, paired_score
from cortexloop.features import BankFeatures, FeatureSource, ModuleFeatures
from cortexloop.functional import gradient_ascent

Progress = Callable[[int, int, NDArray[np.floating]], None]
"""Called after every step with the first image of the batch, the steps done and the scores of the batch."""


@dataclass(frozen=True, eq=False)
class OptimalImages:
    """What `optimal_images` found for T neurons from S starts each."""

    images: NDArray[np.float32]
    """[T, S, H, W, 3] the best image met, pixel levels 0..255 (not rounded), RGB."""
    scores: NDArray[np.floating]
    """[T, S] its score."""
    initial: NDArray[np.floating]
    """[T, S] score of the start."""
    trajectory: NDArray[np.floating]
    """[T, S, steps] score after every step."""

    @property
    def stuck(self) -> NDArray[np.bool_]:
        """[T, S] whether the score never changed: a start where everything the weights read from is silent has no
        gradient. Other starts may do better."""
        same: NDArray[np.bool_] = (self.trajectory == self.initial[..., None]).all(-1)
        return same

    @property
    def best(self) -> NDArray[np.float32]:
        """[T, H, W, 3] the best of each neuron's images."""
        chosen = self.scores.argmax(1)
        return np.stack([self.images[t, s] for t, s in enumerate(chosen)])


def optimal_images(
    weights: Weights,
    source: FeatureSource,
    *,
    score: Literal["dot", "cosine"] = "dot",
    starts: int = 1,
    seed: int = 0,
    start: Array | None = None,
    shape: tuple[int, int] | None = None,
    steps: int = 100,
    step_size: float = 10.0,
    blur: float = 1.0,
    blur_every: int = 50,
    minimize: bool = False,
    batch: int | None = None,
    progress: Progress | None = None,
) -> OptimalImages:
    """Images that drive weights in feature space, for all neurons and starts, many in one batch.

    Each image climbs (or descends) the score of its own neuron, see `functional.gradient_ascent`: steps along the
    blurred gradient of unit RMS, clipped to 0..255. Neurons with the same start number start from the same noise, as do
    a neuron and its control models: what differs between their images is not the start.

    Args:
        weights: full [T, C, H, W] or `Factors` (of a model, a control or a `target`).
        source: the network and layer; gradients pass through `source.differentiable`.
        score: "dot", or "cosine" (published for images shown to neurons), which does not reward contrast alone.
        starts: images per neuron. seed: of the noise, uniform in 128..178 for each pixel and channel.
        start: [H, W, 3] or [S, H, W, 3] levels 0..255 to start from instead of noise.
        shape: height and width of the images, where neither the source nor `start` tells.
        steps, step_size, blur, blur_every, minimize: see `functional.gradient_ascent`.
        batch: images at a time; default the source's.

    Raises:
        TypeError, ValueError: weights of another shape than the source's maps, or a choice out of range.
    """
    if score not in ("dot", "cosine"):
        raise ValueError(f'score should be "dot" or "cosine", got {score!r}')
    if starts < 1 or (batch is not None and batch < 1):
        raise ValueError(f"starts and batch should be at least 1, got {starts} and {batch}")
    expected = source.feature_shape()
    found = weights.feature_shape if isinstance(weights, Factors) else tuple(weights.shape[1:])
    if tuple(found) != tuple(expected):
        raise ValueError(f"the maps of {source.name} are {list(expected)}, the weights are for {list(found)}")
    moved = weights.to(source.device)
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    begin = _start(start, starts, seed, shape, source).to(source.device, dtype)
    count, s = len(weights), len(begin)
    pairs = torch.arange(count * s, device=source.device)
    norms = (moved.tensor() if isinstance(moved, Factors) else moved).flatten(1).norm(dim=1)
    results: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for chunk in torch.split(pairs, batch or source.batch):
        neurons, from_start = chunk // s, chunk % s

        def value(x: Tensor, neurons: Tensor = neurons) -> Tensor:
            features = source.differentiable(x)
            dot = paired_score(features, moved, neurons)
            if score == "dot":
                return dot
            size = features.flatten(1).norm(dim=1) * norms[neurons]
            return dot / torch.where(size > 0, size, 1.0)

        def gradient(x: Tensor, value: Callable[[Tensor], Tensor] = value) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                shown = x.detach().requires_grad_()
                scores = value(shown)
                (grad,) = torch.autograd.grad(scores.sum(), shown)
            return grad, scores.detach()

        def reached(x: Tensor, value: Callable[[Tensor], Tensor] = value) -> Tensor:
            with torch.no_grad():
                return value(x)

        def observe(t: int, _: Tensor, scores: Tensor, first: int = int(chunk[0])) -> None:
            if progress is not None:
                progress(first, t + 1, scores.cpu().numpy())

        climb = gradient_ascent(
            begin[from_start],
            gradient,
            reached,
            low=0.0,
            high=255.0,
            steps=steps,
            minimize=minimize,
            step_size=step_size,
            blur=blur,
            blur_every=blur_every,
            observe=observe,
        )
        results.append((climb.images.cpu().float(), climb.scores.cpu(), climb.initial.cpu(), climb.trajectory))
    images, scores, initial, trajectory = (torch.cat(parts) for parts in zip(*results, strict=True))
    return OptimalImages(
        images=images.view(count, s, *images.shape[1:]).numpy(),
        scores=scores.view(count, s).numpy(),
        initial=initial.view(count, s).numpy(),
        trajectory=trajectory.view(count, s, steps).numpy(),
    )


def image_size(source: FeatureSource, shape: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of the images that a source takes.

    Raises:
        ValueError: the source does not tell and `shape` is None.
    """
    if shape is not None:
        return shape
    if isinstance(source, ModuleFeatures):
        return source.preprocess.height, source.preprocess.width
    if isinstance(source, BankFeatures):
        return source.bank.height, source.bank.width
    raise ValueError(f"{source.name} does not say how large its images are: say shape=(height, width)")


def _start(start: Array | None, starts: int, seed: int, shape: tuple[int, int] | None, source: FeatureSource) -> Tensor:
    """[S, H, W, 3] levels."""
    if start is None:
        h, w = image_size(source, shape)
        noise = np.random.default_rng(seed).random((starts, h, w, 3)) * 50.0 + 128.0
        return torch.from_numpy(noise)
    given = floats(start if start.ndim == 4 else start[None], "start", 4)
    if given.shape[-1] != 3 or (starts > 1 and len(given) not in (1, starts)):
        raise ValueError(f"start should be [H, W, 3] or [{starts}, H, W, 3], got {list(start.shape)}")
    return given.expand(max(starts, len(given)), *given.shape[1:])
