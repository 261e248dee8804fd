"""Training sets of a lasso, as every backend takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LassoSets(NamedTuple):
    """S training sets of P features, in one of two forms, all float64. Only what the form needs is given.

    Attributes:
        images: number of images of all sets together.
        diagonal: [S, P], sums of squares of the centred features; 0 where a feature is constant in a set.
        gram: [S, P, P], products of the centred features; or None for columns.
        columns: [P, images], the features of all images of all sets, of which set s has those with mask[s] = 1.
        mask: [S, images], 0 or 1.
        means: [S, P], mean of each feature over the images of the set.
    """

    images: int
    diagonal: Tensor
    gram: Tensor | None = None
    columns: Tensor | None = None
    mask: Tensor | None = None
    means: Tensor | None = None
