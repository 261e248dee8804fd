"""Sparse random projections: features made fewer while distances between images stay, without a fit.

Entries are +-sqrt(1 / (density * components)) with probability density / 2 each, else 0 (Achlioptas 2003; Li, Hastie &
Church 2006). Each component's row follows from (seed, component) alone and is made when needed.
"""

from __future__ import annotations

import math
import operator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.regression.data import Matrix, as_matrix

ROWS = 256
"""Components that are applied at a time."""
IMAGES = 512
"""Images that are transposed at a time: as many columns lie side by side where a component picks its features."""


def johnson_lindenstrauss(images: int, eps: float = 0.1) -> int:
    """Components that keep all squared distances between so many images within 1 +- eps, with high probability.

    4 ln(images) / (eps^2 / 2 - eps^3 / 3), rounded down (Dasgupta & Gupta 2003), as scikit-learn has it; 6862 for 3000
    images and eps = 0.1.

    Raises:
        ValueError: fewer than 2 images, or eps not between 0 and 1.
    """
    if operator.index(images) < 2 or not 0 < eps < 1:
        raise ValueError(f"images should be at least 2 and eps between 0 and 1, got {images} and {eps}")
    return int(4 * math.log(images) / (eps**2 / 2 - eps**3 / 3))


class SparseRandomProjection:
    """Random projection of features [n, P] to [n, components]: `SparseRandomProjection(seed=0).transform(features)`.

    Nothing is fitted, so it has to be told how many images there are to be, where the components follow from that.

    Args:
        components: how many; "auto": `johnson_lindenstrauss(images, eps)`.
        images: for "auto": the number of images whose distances should stay.
        eps: for "auto": relative error of squared distances.
        density: share of entries that are not 0; "auto": 1 / sqrt(P).
        seed: 0 to 2^64 - 1.

    Raises:
        TypeError, ValueError: options that make no sense.
    """

    def __init__(
        self,
        components: int | Literal["auto"] = "auto",
        *,
        images: int | None = None,
        eps: float = 0.1,
        density: float | Literal["auto"] = "auto",
        seed: int = 0,
    ) -> None:
        if components == "auto":
            if images is None:
                raise ValueError('components="auto" needs the number of images: SparseRandomProjection(images=3000)')
            self.components = johnson_lindenstrauss(images, eps)
        else:
            self.components = operator.index(components)
        if self.components < 1:
            raise ValueError(f"components should be at least 1, got {components}")
        if density != "auto" and not 0 < density <= 1:
            raise ValueError(f'density should be "auto" or above 0 and at most 1, got {density}')
        self.density, self.seed = density, operator.index(seed)
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed should be 0 to 2^64 - 1, got {seed}")

    def density_for(self, features: int) -> float:
        """The share of entries that are not 0, for so many features."""
        return 1 / math.sqrt(features) if self.density == "auto" else float(self.density)

    def row(self, component: int, features: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Positions of a component's entries that are not 0, rising, and their signs.

        Gaps between positions are geometric, drawn by `numpy.random.Philox` with the key (seed, component).

        Raises:
            ValueError: there is no such component.
        """
        if not 0 <= component < self.components:
            raise ValueError(f"component should be 0 to {self.components - 1}, got {component}")
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, component], dtype=np.uint64)))
        density = self.density_for(features)
        expected = features * density
        draw = int(expected + 6 * math.sqrt(expected) + 8)
        ends: list[NDArray[np.int64]] = []
        signs: list[NDArray[np.float32]] = []
        last = -1
        while last < features:
            uniform = random.random((2, draw))
            if density == 1:
                gaps = np.ones(draw, dtype=np.int64)
            else:
                gaps = np.floor(np.log1p(-uniform[0]) / math.log1p(-density)).astype(np.int64) + 1
            ends.append(last + np.cumsum(gaps))
            signs.append(np.where(uniform[1] < 0.5, np.float32(-1), np.float32(1)))
            last = int(ends[-1][-1])
        positions, sign = np.concatenate(ends), np.concatenate(signs)
        inside = positions < features
        return positions[inside], sign[inside]

    def matrix(self, features: int) -> Tensor:
        """The whole projection, float32 [components, features], dense: for small sizes."""
        dense = torch.zeros(self.components, features)
        for component in range(self.components):
            positions, signs = self.row(component, features)
            dense[component, torch.from_numpy(positions)] = torch.from_numpy(signs)
        return dense * self._scale(features)

    def transform(self, features: Matrix) -> Tensor:
        """Projections [n, components] of features [n, P], in their dtype on their device.

        An image's result depends on nothing else in the batch.

        Raises:
            TypeError, ValueError: not finite numbers [n, P].
        """
        x = as_matrix(features, "features", "[images, features]")
        p = x.shape[1]
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        out = torch.empty(len(x), self.components, dtype=dtype, device=x.device)
        bags = [self._bag(start, p, x.device) for start in range(0, self.components, ROWS)]
        for images, block in zip(out.split(IMAGES), x.split(IMAGES), strict=True):  # type: ignore[no-untyped-call]
            columns = block.T.to(dtype).contiguous()
            for start, (positions, signs, offsets) in zip(range(0, self.components, ROWS), bags, strict=True):
                sums = torch.nn.functional.embedding_bag(
                    positions, columns, offsets, mode="sum", per_sample_weights=signs.to(dtype)
                )
                images[:, start : start + len(offsets)] = sums.T
        return out.mul_(self._scale(p))

    def _bag(self, start: int, features: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Positions and signs of `ROWS` components from `start` on, one after the other, and where each begins."""
        rows = [self.row(c, features) for c in range(start, min(start + ROWS, self.components))]
        begins = np.cumsum([0, *(len(positions) for positions, _ in rows[:-1])])
        positions, signs = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return (
            torch.from_numpy(positions).to(device),
            torch.from_numpy(signs).to(device),
            torch.from_numpy(begins).to(device),
        )

    def settings(self) -> dict[str, int | float | str]:
        """What makes the same projection again: `SparseRandomProjection(**settings)`."""
        return {"components": self.components, "density": self.density, "seed": self.seed}

    def _scale(self, features: int) -> float:
        return math.sqrt(1 / (self.density_for(features) * self.components))
