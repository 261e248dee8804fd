"""Features and responses as the fits take them: checked, on one device, centred in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Matrix = Tensor | NDArray[Any]
Unusable = Literal["error", "exclude"]
COLUMNS = 8192
"""Features that are held in float64 at a time where features are many."""


def as_matrix(values: Matrix, what: str, axes: str, *, finite: bool = True) -> Tensor:
    """A detached floating tensor [rows, columns] on the values' own device.

    Args:
        what, axes: for the message, such as "features" and "[images, features]".
        finite: refuse NaN and infinity.

    Raises:
        TypeError: not an array or tensor of numbers.
        ValueError: another number of axes, no entries, or values that are not finite.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "uif" or values.dtype.itemsize > 8:
            raise TypeError(f"{what} should be real numbers, got {values.dtype}")
        values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
        if values.dtype.kind == "u" and values.dtype != np.uint8:
            values = values.astype(np.float64)
        values = torch.from_numpy(values if values.flags.writeable else values.copy())
    if not isinstance(values, Tensor):
        raise TypeError(f"{what} should be a NumPy array or a torch tensor, got {type(values).__name__}")
    tensor = values.detach()
    if tensor.is_complex():
        raise TypeError(f"{what} should be real numbers, got {tensor.dtype}")
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if tensor.ndim != 2:
        advice = f"; one neuron alone is {what}[:, None]" if what == "responses" and tensor.ndim == 1 else ""
        advice = f"; flatten maps: {what}.flatten(1)" if what == "features" and tensor.ndim > 2 else advice
        raise ValueError(f"{what} should be {axes}, got shape {list(tensor.shape)}{advice}")
    if 0 in tensor.shape:
        raise ValueError(f"{what} should be {axes} with at least one of each, got shape {list(tensor.shape)}")
    if finite and not bool(torch.isfinite(tensor).all()):
        rows = (~torch.isfinite(tensor).all(dim=1)).nonzero()[:, 0]
        raise ValueError(
            f"{what} of image {int(rows[0])} hold NaN or infinity ({len(rows)} of {len(tensor)} images do); "
            "leave those images out"
        )
    return tensor


def as_pair(features: Matrix, responses: Matrix, unusable: Unusable) -> tuple[Tensor, Tensor, Tensor]:
    """Checked features [n, P] (their dtype), responses float64 [n, T] on their device, usable neurons bool [T].

    A neuron is unusable if its responses are constant, or hold NaN or infinity. Its column is 0 in what is returned.

    Raises:
        TypeError, ValueError: as `as_matrix`; numbers of images that differ or are below 2; an unusable neuron where
            `unusable` is "error"; no usable one.
    """
    if unusable not in ("error", "exclude"):
        raise ValueError(f'unusable should be "error" or "exclude", got {unusable!r}')
    x = as_matrix(features, "features", "[images, features]")
    y = as_matrix(responses, "responses", "[images, neurons]", finite=False).to(x.device, torch.float64)
    if len(x) != len(y):
        raise ValueError(
            f"features are of {len(x)} images and responses of {len(y)}; they should be of the same images"
        )
    if len(x) < 2:
        raise ValueError(f"a fit needs at least 2 images, got {len(x)}")
    missing = ~torch.isfinite(y).all(dim=0)
    constant = (y == y[:1]).all(dim=0)
    usable = ~(missing | constant)
    if unusable == "error" and not bool(usable.all()):
        found = [
            f"{name} for {_listed(which)}"
            for name, which in (("NaN or infinite", missing), ("constant", constant))
            if bool(which.any())
        ]
        raise ValueError(
            f"responses are {' and '.join(found)}; "
            'leave those neurons out, or say unusable="exclude" to have them listed'
        )
    if not bool(usable.any()):
        raise ValueError(f"none of the {y.shape[1]} neurons has finite responses that vary between images")
    return x, torch.where(usable, y, 0.0), usable


def _listed(which: Tensor) -> str:
    numbers = which.nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"neuron {shown}" if len(numbers) == 1 else f"neurons {shown} ({len(numbers)} of {len(which)})"


def column_blocks(x: Tensor, width: int = COLUMNS) -> Iterator[slice]:
    """Slices that cover the columns of x."""
    for start in range(0, x.shape[1], width):
        yield slice(start, min(start + width, x.shape[1]))


def column_means(x: Tensor) -> Tensor:
    """float64 [P]; exact for a column whose values are all equal, so that it is exactly 0 when centred."""
    means = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    for block in column_blocks(x):
        first = x[0, block].double()
        means[block] = first + (x[:, block].double() - first).mean(dim=0)
    return means


def column_scales(x: Tensor, means: Tensor) -> Tensor:
    """Standard deviations over images (dividing by n), float64 [P]; 1 for a constant column."""
    scales = torch.empty_like(means)
    for block in column_blocks(x):
        scales[block] = (x[:, block].double() - means[block]).square().mean(dim=0).sqrt()
    return torch.where(scales > 0, scales, 1.0)


def as_alphas(alphas: Any) -> Tensor:
    """float64 [A] on the CPU, positive.

    Raises:
        ValueError: not a list of positive finite numbers.
    """
    values = torch.as_tensor(np.asarray(alphas, dtype=np.float64)).flatten()
    if values.numel() == 0 or not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"alphas should be positive finite numbers, at least one, got {alphas!r}")
    return values
