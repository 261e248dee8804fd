"""Responses of a batch of images, with or without repeated trials, checked before they join running moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[Any]


@dataclass(frozen=True, eq=False)
class Trials:
    """Responses of a batch, ready to be used.

    Attributes:
        mean: float64 [B, T], over trials.
        count: float64 [B], number of trials; None if there was no such axis.
        scatter: float64 [B, T], sums over trials of squared deviations from the mean.
        usable: bool [B], images with a response of every neuron.
    """

    mean: Tensor
    count: Tensor | None
    scatter: Tensor
    usable: Tensor


def as_tensor(values: Array, name: str) -> Tensor:
    """A tensor without a graph.

    Raises:
        TypeError: neither a tensor nor an array of real numbers.
    """
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(values))
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} should be a tensor or an array, got {type(values).__name__}")
    if values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} should be real numbers, got {values.dtype}")
    return values.detach()


def checked_trials(responses: Array, images: int, names: tuple[str, ...], missing: str, offset: int = 0) -> Trials:
    """Average over trials and find out which images can be used.

    Args:
        responses: [B, T], NaN = no response; or [B, T, R], NaN = a trial that was not shown (the same for all neurons).
        images: B. names: of the T neurons.
        missing: "error" or "exclude", what to do about images without a response of every neuron.
        offset: number of the first image, for messages.

    Raises:
        ValueError: another shape, infinite responses, trials that only some of the neurons have, or responses that are
            missing with missing="error"; the first image and neuron are named.
    """
    y = as_tensor(responses, "responses").to("cpu", torch.float64)
    if y.ndim not in (2, 3) or tuple(y.shape[:2]) != (images, len(names)) or (y.ndim == 3 and y.shape[2] < 1):
        raise ValueError(
            f"responses should be [{images}, {len(names)}] (images of this batch, neurons), or with a third axis of "
            f"trials, got {list(y.shape)}"
        )
    infinite = torch.isinf(y)
    if bool(infinite.any()):
        where = torch.nonzero(infinite)[0].tolist()
        raise ValueError(
            f"responses should be finite or NaN, got {float(y[tuple(where)])} for image {where[0] + offset}, neuron "
            f"{names[where[1]]}"
        )
    if y.ndim == 2:
        usable = ~torch.isnan(y)
        _refuse_missing(usable, names, missing, offset)
        return Trials(y, None, torch.zeros_like(y), usable.all(1))
    shown = ~torch.isnan(y)
    partly = (shown != shown[:, :1]).any(1).any(1)
    if bool(partly.any()) and missing != "exclude":
        image = int(torch.nonzero(partly)[0])
        neuron = int(torch.nonzero((shown[image] != shown[image, :1]).any(1))[0])
        raise ValueError(
            f"image {image + offset} has other trials for neuron {names[neuron]} than for {names[0]}; all neurons "
            'should have the same trials: set the trials that one of them lacks to NaN in all, or say missing="exclude"'
        )
    count = shown.sum(2).double()
    some = count > 0
    _refuse_missing(some, names, missing, offset)
    mean = torch.where(shown, y, 0.0).sum(2) / count.clamp(min=1.0)
    scatter = torch.where(shown, y - mean[..., None], 0.0).square().sum(2)
    return Trials(mean, count[:, 0], scatter, some.all(1) & ~partly)


def _refuse_missing(present: Tensor, names: tuple[str, ...], missing: str, offset: int) -> None:
    if missing == "exclude" or bool(present.all()):
        return
    image, neuron = torch.nonzero(~present)[0].tolist()
    raise ValueError(
        f"image {image + offset} has no response of neuron {names[neuron]} (NaN); leave out that image or that neuron, "
        'or say missing="exclude" to leave out, and list, images without a response of every neuron'
    )
