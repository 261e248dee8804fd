"""Arguments of this room: arrays of any kind become tensors, and what cannot be used is refused in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[Any]


def floats(values: Array, name: str, dims: int, *, finite: bool = True) -> Tensor:
    """A float32 or float64 tensor with `dims` axes (a view where it can be); half precision becomes float32.

    Raises:
        TypeError: not an array of numbers. ValueError: another number of axes, or NaN or infinite values.
    """
    if not isinstance(values, Tensor | np.ndarray):
        raise TypeError(f"{name} should be a tensor or an array, got {type(values).__name__}")
    tensor = (values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))).detach()
    if tensor.is_complex():
        raise TypeError(f"{name} should be real numbers, got {tensor.dtype}")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if tensor.ndim != dims:
        raise ValueError(f"{name} should have {dims} axes, got shape {list(tensor.shape)}")
    if finite and not all_finite(tensor):
        raise ValueError(f"{name} should be finite, got NaN or infinite values; leave those images or neurons out")
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """In one pass over the memory where all is well: NaN and infinities survive a sum, but a sum can overflow."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def neuron_indices(neurons: Sequence[int] | Tensor | NDArray[Any], count: int) -> Tensor:
    """int64 indices in 0..count - 1.

    Raises:
        ValueError: an index that does not exist, or none.
    """
    chosen = torch.as_tensor(np.asarray(neurons)).flatten()
    if chosen.dtype == torch.bool:
        if len(chosen) != count:
            raise ValueError(f"a choice by booleans should have {count} of them, got {len(chosen)}")
        chosen = torch.nonzero(chosen)[:, 0]
    if chosen.numel() == 0:
        raise ValueError("at least one has to be chosen, got an empty choice")
    if chosen.is_floating_point():
        raise ValueError(f"indices should be whole numbers, got {chosen.dtype}")
    chosen = chosen.long()
    if int(chosen.min()) < 0 or int(chosen.max()) >= count:
        raise ValueError(f"indices should lie in 0..{count - 1}, got {int(chosen.min())}..{int(chosen.max())}")
    return chosen


def listed(indices: Tensor | Sequence[int], most: int = 8) -> str:
    """Indices as text, shortened: "3, 17, 20 and 5 more"."""
    values = [int(i) for i in indices]
    text = ", ".join(str(i) for i in values[:most])
    return text if len(values) <= most else f"{text} and {len(values) - most} more"
