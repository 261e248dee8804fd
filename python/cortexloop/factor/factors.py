"""Factors: where (masks) and what (vectors) a neuron reads from a feature map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import io
from cortexloop.factor._checks import neuron_indices

KIND = "cortexloop-factors-1"


@dataclass(frozen=True, eq=False)
class Factors:
    """Weights of T neurons on a feature map as sums of R outer products, W[t] = sum_f masks[t, f] x vectors[t, f].

    As `factorize` makes them, every mask has unit Euclidean norm, the vector carries the scale, and the factors of a
    neuron come in order of falling norm. A factor without content is 0 in mask and vector, and listed in `empty`.
    """

    masks: Tensor
    """[T, R, H, W]: where. 0 in the border."""
    vectors: Tensor
    """[T, R, C]: what, in the unit of the factorized tensor."""
    method: str
    """How they were found."""
    border: int = 0
    """Rows and columns at each side that were left out."""
    explained: Tensor | None = None
    """[T] 1 - |M - Mhat|^2 / |M|^2, M the tensor without its border; 0 where M is 0."""
    explained_published: Tensor | None = None
    """[T] 1 - |M - Mhat| / |M|: the ratio of norms that is called explained variance in the published code."""
    correlation: Tensor | None = None
    """[T] Pearson correlation of M and Mhat over their elements; 0 where either is constant."""
    iterations: Tensor | None = None
    """[T] int64, iterations taken; the most allowed where it did not converge."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What `factorize` was told, JSON-able."""

    def __post_init__(self) -> None:
        m, v = self.masks, self.vectors
        if m.ndim != 4 or v.ndim != 3 or m.shape[:2] != v.shape[:2]:
            raise ValueError(
                "masks should be [T, R, H, W] and vectors [T, R, C] of the same neurons and factors, "
                f"got {list(m.shape)} and {list(v.shape)}"
            )
        if m.dtype != v.dtype or m.device != v.device:
            raise ValueError(
                "masks and vectors should have one type on one device, "
                f"got {m.dtype} on {m.device} and {v.dtype} on {v.device}"
            )

    def __len__(self) -> int:
        return self.masks.shape[0]

    @property
    def rank(self) -> int:
        """Factors per neuron, R."""
        return self.masks.shape[1]

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """C, H, W of the feature map."""
        return self.vectors.shape[2], self.masks.shape[2], self.masks.shape[3]

    @property
    def norms(self) -> Tensor:
        """[T, R] Euclidean norm of each outer product."""
        norms: Tensor = self.masks.flatten(2).norm(dim=2) * self.vectors.norm(dim=2)
        return norms

    @property
    def empty(self) -> list[tuple[int, int]]:
        """(neuron, factor) of the factors without content."""
        return [(int(t), int(f)) for t, f in torch.nonzero(self.norms == 0)]

    def tensor(self) -> Tensor:
        """The weights in full, [T, C, H, W]."""
        return torch.einsum("trc,trhw->tchw", self.vectors, self.masks)

    def select(self, neurons: Sequence[int] | Tensor | NDArray[Any]) -> Factors:
        """Those of some neurons, in this order.

        Raises:
            ValueError: a neuron that does not exist.
        """
        chosen = neuron_indices(neurons, len(self)).to(self.masks.device)
        per_neuron: dict[str, Any] = {name: getattr(self, name) for name in _PER_NEURON}
        per_neuron = {name: None if value is None else value[chosen] for name, value in per_neuron.items()}
        return replace(
            self,
            masks=self.masks[chosen],
            vectors=self.vectors[chosen],
            **per_neuron,
        )

    def replaced(self, masks: Tensor | None = None, vectors: Tensor | None = None, *, method: str) -> Factors:
        """Other masks or vectors (of other numbers of factors, if both): without figures of the fit, now wrong."""
        return Factors(
            masks=self.masks if masks is None else masks,
            vectors=self.vectors if vectors is None else vectors,
            method=method,
            border=self.border,
            settings=dict(self.settings),
        )

    def to(self, device: torch.device | str) -> Factors:
        """On another device."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("masks", "vectors", *_PER_NEURON)}
        values = {name: None if value is None else value.to(device) for name, value in values.items()}
        return replace(self, **values)

    def arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Named arrays and a JSON-able header, from which `from_arrays` makes the same factors."""
        names = ("masks", "vectors", *_PER_NEURON)
        values = {name: getattr(self, name) for name in names}
        header = {"method": self.method, "border": self.border, "settings": self.settings}
        return {name: value.cpu().numpy() for name, value in values.items() if value is not None}, header

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]], header: dict[str, Any]) -> Factors:
        """The inverse of `arrays`.

        Raises:
            KeyError: something is missing. ValueError: shapes that do not fit.
        """
        tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in _PER_NEURON if name in arrays}
        masks, vectors = (torch.from_numpy(np.array(arrays[name])) for name in ("masks", "vectors"))
        return cls(masks, vectors, header["method"], header["border"], settings=header["settings"], **tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        arrays, header = self.arrays()
        io.save_arrays(path, KIND, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factors:
        """Read what `save` wrote.

        Raises:
            ValueError: damaged or another kind of file. OSError: it cannot be read.
        """
        arrays, header = io.load_arrays(path, KIND)
        try:
            return cls.from_arrays(arrays, header)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a complete file of factors: {error}") from error


_PER_NEURON = ("explained", "explained_published", "correlation", "iterations")
