"""Which images are held out together: reproducible from a seed, and recorded with every fit."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Folds = int | NDArray[Any] | Tensor
"""A number of folds, or the fold of each image, [n]."""


def assign_folds(n: int, folds: Folds, *, groups: NDArray[Any] | Tensor | None = None, seed: int = 0) -> Tensor:
    """The fold of each image, int64 [n], 0 to k - 1: the image is held out when that fold is scored.

    Images (or groups) are put in a random order by `numpy.random.Philox(seed)`. Without groups the sizes differ by one
    at most, larger ones first; a group falls whole into the fold that is smallest when its turn comes.

    Args:
        n: number of images.
        folds: number of folds k, 2 to n; or the fold of each image [n], which is only checked.
        groups: label of each image [n], integers or strings: images of one group (of one movie, one category) are never
            split between training and scoring.
        seed: 0 to 2^64 - 1.

    Raises:
        TypeError: folds or seed are no integers.
        ValueError: fewer than 2 folds, more folds than images or groups, a fold without images, or lengths that differ.
    """
    labels = None if groups is None else np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
    if labels is not None and labels.shape != (n,):
        raise ValueError(f"groups should be [{n}], one label per image, got shape {list(labels.shape)}")
    if isinstance(folds, (np.ndarray, Tensor, list, tuple)):
        return _given(n, np.asarray(folds.cpu() if isinstance(folds, Tensor) else folds), labels)
    k = operator.index(folds)
    kinds, group_of = (np.arange(n), np.arange(n)) if labels is None else np.unique(labels, return_inverse=True)
    what = "images" if labels is None else "groups"
    if not 2 <= k <= len(kinds):
        raise ValueError(f"folds should be 2 to {len(kinds)} (the number of {what}), got {k}")
    order = np.random.Generator(np.random.Philox(operator.index(seed))).permutation(len(kinds))
    fold_of_group = np.empty(len(kinds), dtype=np.int64)
    if labels is None:
        fold_of_group[order] = np.repeat(np.arange(k), [n // k + (i < n % k) for i in range(k)])
    else:
        sizes = np.zeros(k, dtype=np.int64)
        count = np.bincount(group_of)
        for group in order:
            smallest = int(sizes.argmin())
            fold_of_group[group] = smallest
            sizes[smallest] += count[group]
    return torch.from_numpy(fold_of_group[group_of])


def _given(n: int, folds: NDArray[Any], labels: NDArray[Any] | None) -> Tensor:
    if folds.shape != (n,) or folds.dtype.kind not in "iu":
        raise ValueError(f"folds should be a number, or integers [{n}], got {folds.dtype} of shape {list(folds.shape)}")
    k = int(folds.max()) + 1
    if folds.min() < 0 or k < 2 or len(np.unique(folds)) != k:
        raise ValueError(f"folds should be numbered 0 to k - 1 with k >= 2 and no empty one, got {np.unique(folds)}")
    if labels is not None:
        for label in np.unique(labels):
            if len(np.unique(folds[labels == label])) > 1:
                raise ValueError(f"images of group {label} are in more than one fold")
    return torch.from_numpy(folds.astype(np.int64))
