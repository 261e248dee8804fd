"""What all readouts share: shapes, bias, the reduction of a regulariser, constraints without in-place changes."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTIONS = ("sum", "mean", "none")

AnyReadout = TypeVar("AnyReadout", bound="Readout")


def straight_through(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, with the gradient going to `parameter` as if they were equal.

    So a parameter outside of its range acts as the nearest one inside and can still come back.
    """
    return value.detach() + (parameter - parameter.detach())


def positive_number(value: float, name: str, *, zero: bool = True) -> float:
    """A finite number above 0, or from 0 on.

    Raises:
        ValueError: it is not.
    """
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name} should be a finite number {'of at least' if zero else 'above'} 0, got {value}")
    return number


class EluPlusOne(nn.Module):
    """Rates above 0 from linear responses: ELU(y + offset) + 1.

    Args:
        offset: added first; published models have 0 or -1.
    """

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = float(offset)

    def forward(self, responses: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return F.elu(responses + self.offset) + 1

    def extra_repr(self) -> str:
        return f"offset={self.offset:g}"


class Readout(nn.Module, abc.ABC):
    """Feature maps [B, C, H, W] -> responses [B, T].

    Attributes:
        in_shape: (C, H, W) of the features.
        neurons: T.
        bias: parameter [T], or None.

    Args:
        in_shape, neurons: as above, each at least 1.
        bias: whether the responses have an offset.

    Raises:
        ValueError: a size below 1.
    """

    bias: nn.Parameter | None

    def __init__(self, in_shape: Sequence[int], neurons: int, *, bias: bool = True) -> None:
        super().__init__()
        sizes = tuple(int(size) for size in in_shape)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"in_shape should be (C, H, W), each at least 1, got {tuple(in_shape)}")
        if neurons < 1:
            raise ValueError(f"neurons should be at least 1, got {neurons}")
        self.in_shape: tuple[int, int, int] = (sizes[0], sizes[1], sizes[2])
        self.neurons = int(neurons)
        self.register_parameter("bias", nn.Parameter(torch.zeros(self.neurons)) if bias else None)

    @abc.abstractmethod
    def penalty(self) -> Tensor:
        """The regulariser of each neuron, [T]; sums over what each neuron has."""

    @abc.abstractmethod
    def penalized(self) -> int:
        """Over how many numbers the regulariser's mean is taken."""

    @abc.abstractmethod
    def initialize_weights(self, generator: torch.Generator | None) -> None:
        """Draw all parameters but the bias anew."""

    def initialize(self, mean_activity: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        """Draw the parameters anew.

        Args:
            mean_activity: [T], each neuron's mean response to training images, where the bias starts; None: 0.
            generator: source of the random numbers; None: torch's own.

        Raises:
            ValueError: a mean activity of another shape or that is not finite, or for a readout without a bias.
        """
        self.initialize_weights(generator)
        if mean_activity is None:
            if self.bias is not None:
                nn.init.zeros_(self.bias)
            return
        if self.bias is None:
            raise ValueError("mean_activity is where the bias starts, and this readout has none")
        mean = torch.as_tensor(mean_activity)
        if tuple(mean.shape) != (self.neurons,) or not torch.isfinite(mean).all():
            raise ValueError(f"mean_activity should be [{self.neurons}], finite, got {list(mean.shape)}")
        with torch.no_grad():
            self.bias.copy_(mean)

    def regularizer(self, reduction: str = "sum") -> Tensor:
        """The regulariser, with its weights: what is added to the loss.

        Args:
            reduction: "sum" over neurons; "mean" divides that by the number of weights that it is about; "none" gives
                one number per neuron, [T].

        Raises:
            ValueError: another reduction.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction should be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
        each = self.penalty()
        if reduction == "none":
            return each
        return each.sum() / self.penalized() if reduction == "mean" else each.sum()

    @torch.no_grad()
    def project(self) -> None:
        """Move parameters out of range to the nearest point inside: for after an optimiser's step, not required."""

    def _check_features(self, features: Tensor) -> None:
        if features.ndim != 4 or tuple(features.shape[1:]) != self.in_shape:
            c, h, w = self.in_shape
            raise ValueError(f"features should be [B, {c}, {h}, {w}], got {list(features.shape)}")

    def _with_bias(self, responses: Tensor, index: Tensor | None = None) -> Tensor:
        if self.bias is None:
            return responses
        return responses + (self.bias if index is None else self.bias[index])

    def _neuron_index(self, neurons: Sequence[int] | Tensor | None) -> Tensor | None:
        """Positions of some neurons as int64 on the device of the parameters; from positions or a mask [T].

        Raises:
            TypeError: neither integers nor booleans.
            ValueError: outside of 0..T - 1.
        """
        if neurons is None:
            return None
        index = torch.as_tensor(neurons, device=next(self.parameters()).device)
        if index.ndim == 1 and not len(index):
            return index.long()  # an empty list has no integer type of its own
        if index.dtype == torch.bool:
            if tuple(index.shape) != (self.neurons,):
                raise ValueError(f"a mask of neurons should be [{self.neurons}], got {list(index.shape)}")
            return torch.nonzero(index)[:, 0]
        if index.ndim != 1 or index.is_floating_point() or index.is_complex():
            raise TypeError(f"neurons should be a list of integers, got {index.dtype} {list(index.shape)}")
        index = index.long()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.neurons:
            raise ValueError(f"neurons should lie in 0..{self.neurons - 1}, got {index.tolist()}")
        return index

    def extra_repr(self) -> str:
        c, h, w = self.in_shape
        return f"{c} x {h} x {w} -> {self.neurons}, bias={self.bias is not None}"


class PublishedState:
    """A state dict of a neuralpredictors readout, read key by key.

    Args:
        state: of the readout, or of a whole model.
        prefix: what comes before the readout's keys, such as "readout.all_sessions.".
    """

    def __init__(self, state: Mapping[str, Any], prefix: str) -> None:
        self.prefix = prefix
        self.left = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of this name; None in `shape` stands for any size.

        Raises:
            ValueError: it is not there, has another shape, or is not finite.
        """
        found = self.take_optional(name)
        if found is None:
            raise ValueError(f"the state dict should have {self.prefix + name!r}; it has {sorted(self.left)}")
        fits = found.ndim == len(shape) and all(a in (None, b) for a, b in zip(shape, found.shape, strict=True))
        if not fits:
            wanted = ", ".join("?" if size is None else str(size) for size in shape)
            raise ValueError(f"{self.prefix + name!r} should be [{wanted}], got {list(found.shape)}")
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise ValueError(f"{self.prefix + name!r} holds NaN or infinity")
        return found

    def take_optional(self, name: str) -> Tensor | None:
        """The tensor of this name, or None."""
        found = self.left.pop(name, None)
        return None if found is None else torch.as_tensor(found).detach()

    def shared(self, features: Tensor, axis: int) -> Tensor:
        """Feature weights that neurons share, spread out to one set per neuron, with each neuron's scale."""
        index, scales = self.take_optional("feature_sharing_index"), self.take_optional("scales")
        if index is None or scales is None:
            return features
        return scales * features.index_select(axis, index.long())

    def finish(self) -> None:
        """ValueError if anything was left over: then it would mean something that is not understood here."""
        if self.left:
            raise ValueError(f"nothing here corresponds to {sorted(self.prefix + key for key in self.left)}")


def fill(readout: AnyReadout, **values: Tensor | None) -> AnyReadout:
    """Copy values into the parameters of these names, in the dtype of the values; an absent bias stays absent.

    Raises:
        ValueError: a value of another shape.
    """
    dtype = next(value.dtype for value in values.values() if value is not None)
    readout.to(dtype=dtype)
    with torch.no_grad():
        for name, value in values.items():
            parameter = getattr(readout, name)
            if value is None:
                continue
            if parameter.shape != value.shape:
                raise ValueError(f"{name} should be {list(parameter.shape)}, got {list(value.shape)}")
            parameter.copy_(value)
    return readout
