"""What correlations chance alone gives: the same images with their responses permuted among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cortexloop.factor.trials import Array, as_tensor


@dataclass(eq=False)
class Permutations:
    """Responses of all images of a session, P orders of the images, and which images have been shown to the moments.

    Attributes:
        responses: float64 [n, T].
        orders: int64 [P, n]; in permutation p, image i gets the responses of image orders[p, i].
        shown: bool [n].
    """

    responses: Tensor
    orders: Tensor
    shown: Tensor

    @classmethod
    def draw(cls, responses: Array, neurons: int, count: int, seed: int) -> Permutations:
        """Random orders: of seed, number of images and permutation alone.

        Raises:
            ValueError: not [n, T] with at least 3 images, or not finite.
        """
        y = as_tensor(responses, "responses").to("cpu", torch.float64)
        if y.ndim != 2 or y.shape[0] < 3 or y.shape[1] != neurons:
            raise ValueError(
                f"permutations need the responses [n, {neurons}] of all n >= 3 images, got {list(y.shape)}"
            )
        if not bool(torch.isfinite(y).all()):
            image, neuron = torch.nonzero(~torch.isfinite(y))[0].tolist()
            raise ValueError(
                f"permutations need finite responses, got {float(y[image, neuron])} for image {image}, neuron "
                f"{neuron}; leave out that image or that neuron"
            )
        orders = np.stack([np.random.default_rng([seed, p]).permutation(len(y)) for p in range(count)])
        return cls(y.clone(), torch.from_numpy(orders).long(), torch.zeros(len(y), dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.orders)

    def take(self, rows: Array | None, images: int) -> Tensor:
        """Which images come now, int64 [B]: those given, or else the next in order. They are not marked as shown.

        Raises:
            ValueError: another number of rows, some that do not exist, come twice, or have come before.
        """
        n = len(self.responses)
        if rows is None:
            first = int(self.shown.nonzero().max()) + 1 if bool(self.shown.any()) else 0
            chosen = torch.arange(first, first + images)
        else:
            chosen = as_tensor(rows, "rows").cpu()
            if chosen.is_floating_point() or tuple(chosen.shape) != (images,):
                raise ValueError(f"rows should be {images} whole numbers, got {chosen.dtype} {list(chosen.shape)}")
            chosen = chosen.long()
        if images and (int(chosen.min()) < 0 or int(chosen.max()) >= n):
            raise ValueError(
                f"rows should lie in 0..{n - 1}, the images whose responses were given, got "
                f"{int(chosen.min())}..{int(chosen.max())}"
            )
        if len(set(chosen.tolist())) < images or bool(self.shown[chosen].any()):
            again = chosen[self.shown[chosen]].tolist() or chosen.tolist()
            raise ValueError(f"every image should come once, got image {again[0]} again")
        return chosen

    def columns(self, rows: Tensor) -> Tensor:
        """Responses of these images, then those of each permutation: [B, T (1 + P)]."""
        return torch.cat([self.responses[rows], *(self.responses[order[rows]] for order in self.orders)], dim=1)

    def same_as(self, other: Permutations) -> bool:
        """Whether responses and orders are equal."""
        return torch.equal(self.responses, other.responses) and torch.equal(self.orders, other.orders)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All of it, to be saved."""
        return {
            "permutations/responses": self.responses.numpy(),
            "permutations/orders": self.orders.numpy(),
            "permutations/shown": self.shown.numpy().astype(np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray[Any, Any]]) -> Permutations:
        """What `arrays` gave.

        Raises:
            ValueError, KeyError: not that.
        """
        responses, orders, shown = (arrays[f"permutations/{name}"] for name in ("responses", "orders", "shown"))
        n = len(responses)
        if responses.ndim != 2 or orders.ndim != 2 or orders.shape[1] != n or shown.shape != (n,):
            raise ValueError("its permutations do not fit together")
        return cls(torch.from_numpy(responses), torch.from_numpy(orders), torch.from_numpy(shown).bool())


def null_statistics(correlations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (of a sample) over permutations, float64 [T, D]; of float [P, T, D]."""
    values = correlations.double()
    return values.mean(0), values.std(0, correction=1)


def exceeded_by(maxima: Tensor, alpha: float) -> Tensor:
    """The value that the largest of a permutation exceeds with probability at most alpha; [T] of [P, T].

    The k-th largest of P values with k = floor(alpha (P + 1)), so that the data, one more permutation, are counted.

    Raises:
        ValueError: alpha is not in (0, 1), or too small for so few permutations.
    """
    count = len(maxima)
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha should be between 0 and 1, got {alpha}")
    k = math.floor(alpha * (count + 1) + 1e-9)
    if k < 1:
        raise ValueError(
            f"alpha = {alpha:g} needs at least {math.ceil(1 / alpha) - 1} permutations, these moments have {count}"
        )
    return maxima.sort(dim=0, descending=True).values[k - 1]
