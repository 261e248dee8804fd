"""Principal components of features that are many more than images, by the images' kernel matrix.

With n images and P features the smaller of two matrices is diagonalised: the products of centred images [n, n] (dual;
no matrix of P * P is ever formed), or the products of centred features [P, P]. Axes, variances and coordinates are
those of scikit-learn's `PCA`, up to the signs of axes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cortexloop.regression.data import Matrix, as_matrix, column_blocks

Axes = Literal["auto", "materialised", "dual"]
AXES_LIMIT = 2**30
"""Bytes of axes up to which "auto" materialises them."""


class PCA:
    """Principal components: `PCA(750).fit(features).transform(features)`.

    Batches of features [n_i, P] are kept as they come (one copy in their own dtype) until there are more images than
    features; from then on only the [P, P] products of features are. All sums are in float64, of features less the mean
    of the first batch, so that a large mean costs no digits.

    Axes are kept in one of two forms. Materialised: [components, P]; an image costs components * P multiplications, and
    the training features are let go. Dual: as combinations of the training features, which stay; nothing of the size of
    the axes is formed, and an image costs n * P. "auto" materialises up to `AXES_LIMIT` bytes. Where features are
    fewer than images, axes are always materialised.

    Args:
        components: how many; at most the smaller of n - 1 (n without centring) and P.
        centre: subtract the mean image; else the axes are those of the second moment.
        axes: "auto", "materialised" or "dual".

    Attributes (after `fit`):
        mean: float64 [P], 0 without centring.
        variances: float64 [components], variance along each axis (dividing by n - 1), falling.
        ratios: float64 [components], shares of the total variance.
        images: number of images.
        dual: whether the axes are kept in the dual form.
    """

    mean: Tensor
    variances: Tensor
    ratios: Tensor
    images: int
    dual: bool

    def __init__(self, components: int, *, centre: bool = True, axes: Axes = "auto") -> None:
        self.components = operator.index(components)
        if self.components < 1:
            raise ValueError(f"components should be at least 1, got {components}")
        if axes not in get_args(Axes):
            raise ValueError(f"axes should be one of {', '.join(map(repr, get_args(Axes)))}, got {axes!r}")
        self.centre, self.form = centre, axes
        self._axes: Tensor | None = None  # [components, P], in the features' dtype
        self._mix: Tensor | None = None  # [components, n]: axes = mix @ (training features - mean)
        self._kept: list[Tensor] = []

    def fit(self, features: Matrix | Iterable[Matrix]) -> PCA:
        """Find the axes of features [n, P], or of batches of them.

        Batches that are tensors on one device stay there; computations run there.

        Raises:
            TypeError: not arrays or tensors of numbers.
            ValueError: values that are not finite, batches with other numbers of features, or too few images, features
                or directions for the components wanted.
        """
        batches, gram = _collect(_batches(features))
        if gram is None:
            self._fit_dual(batches)
        else:
            self._fit_primal(gram)
        return self

    def transform(self, features: Matrix) -> Tensor:
        """Coordinates [B, components] of features [B, P] along the axes, in the features' dtype, on the axes' device.

        Raises:
            RuntimeError: not fitted.
            TypeError, ValueError: not finite numbers [B, P].
        """
        x = self._checked(features)
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        out = torch.zeros(len(x), self.components, dtype=torch.float64, device=x.device)
        for block in column_blocks(x):
            centred = (x[:, block].double() - self.mean[block]).to(dtype)
            out += (centred @ self._axis_block(block, dtype).T).double()
        return out.to(dtype)

    def inverse(self, coordinates: Matrix) -> Tensor:
        """Features [B, P] from coordinates [B, components], float64.

        Raises:
            RuntimeError: not fitted.
            TypeError, ValueError: not finite numbers [B, components].
        """
        self._fitted()
        z = as_matrix(coordinates, "coordinates", f"[images, {self.components}]").to(self.mean.device, torch.float64)
        if z.shape[1] != self.components:
            raise ValueError(f"coordinates should be [images, {self.components}], got {list(z.shape)}")
        out = self.mean.repeat(len(z), 1)
        for block in column_blocks(out):
            out[:, block] += z @ self._axis_block(block, torch.float64)
        return out

    def axes(self) -> Tensor:
        """The axes, orthonormal rows [components, P], float64; formed now if they are kept in the dual form."""
        self._fitted()
        axes = torch.empty(self.components, len(self.mean), dtype=torch.float64, device=self.mean.device)
        for block in column_blocks(axes):
            axes[:, block] = self._axis_block(block, torch.float64)
        return axes

    def tensors(self) -> dict[str, Tensor]:
        """What to save, for safetensors: contiguous tensors in host memory by name. Dual axes are materialised."""
        axes = self.axes() if self._axes is None else self._axes
        found = {"axes": axes, "mean": self.mean, "variances": self.variances, "ratios": self.ratios}
        found["images"] = torch.tensor([self.images])
        found["centre"] = torch.tensor([int(self.centre)])
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PCA:
        """The fitted components that `tensors` were taken from; further entries are ignored.

        Raises:
            ValueError: an entry is missing.
        """
        missing = sorted({"axes", "mean", "variances", "ratios", "images", "centre"} - tensors.keys())
        if missing:
            raise ValueError(f"not complete principal components: {', '.join(missing)} missing")
        made = cls(len(tensors["axes"]), centre=bool(tensors["centre"][0]))
        made._axes, made.dual = tensors["axes"], False
        made.mean, made.variances, made.ratios = tensors["mean"], tensors["variances"], tensors["ratios"]
        made.images = int(tensors["images"][0])
        return made

    def _fitted(self) -> None:
        if self._axes is None and self._mix is None:
            raise RuntimeError("these principal components have not been fitted; call fit(features) first")

    def _checked(self, features: Matrix) -> Tensor:
        self._fitted()
        p = len(self.mean)
        x = as_matrix(features, "features", f"[images, {p}]")
        if x.shape[1] != p:
            raise ValueError(f"features should be [images, {p}], got {list(x.shape)}")
        return x.to(self.mean.device)

    def _axis_block(self, block: slice, dtype: torch.dtype) -> Tensor:
        """Some columns of the axes."""
        if self._axes is not None:
            return self._axes[:, block].to(dtype)
        assert self._mix is not None
        first, block_axes = (
            0,
            torch.zeros(self.components, block.stop - block.start, dtype=torch.float64, device=self.mean.device),
        )
        for batch in self._kept:
            mix = self._mix[:, first : first + len(batch)]
            block_axes.addmm_(mix, batch[:, block].double() - self.mean[block])
            first += len(batch)
        return block_axes.to(dtype)

    def _fit_dual(self, batches: list[Tensor]) -> None:
        n, p = sum(map(len, batches)), batches[0].shape[1]
        self._refuse(n, p)
        device = batches[0].device
        self.mean = torch.zeros(p, dtype=torch.float64, device=device)
        kernel = torch.zeros(n, n, dtype=torch.float64, device=device)
        for block in column_blocks(batches[0]):
            columns = torch.cat([batch[:, block] for batch in batches]).double()
            if self.centre:
                origin = columns[0].clone()  # the mean is exact for a column whose values are all equal
                columns -= origin
                shift = columns.mean(dim=0)
                self.mean[block] = origin + shift
                columns -= shift
            kernel.addmm_(columns, columns.T)
        values, vectors = torch.linalg.eigh(kernel)
        values, vectors = self._sorted(values, vectors, n)
        # Axes are combinations of images; their sign makes the largest share of an image positive.
        mix = (vectors * _signs(vectors) / values.sqrt()).T
        self._kept, self._mix, self._axes = batches, mix, None
        itemsize = batches[0].element_size()
        self.dual = self.form == "dual" or (self.form == "auto" and self.components * p * itemsize > AXES_LIMIT)
        if not self.dual:
            axes = torch.empty(
                self.components, p, dtype=torch.float64 if itemsize == 8 else torch.float32, device=device
            )
            for block in column_blocks(axes):
                axes[:, block] = self._axis_block(block, axes.dtype)
            self._axes, self._mix, self._kept = axes, None, []

    def _fit_primal(self, gram: _Gram) -> None:
        n, p = gram.count, len(gram.origin)
        self._refuse(n, p)
        shift = gram.sum / n
        if self.centre:
            self.mean, products = gram.origin + shift, gram.products - n * torch.outer(shift, shift)
        else:
            self.mean = torch.zeros_like(shift)
            origin = gram.origin
            products = gram.products + torch.outer(origin, gram.sum) + torch.outer(gram.sum + n * origin, origin)
        values, vectors = torch.linalg.eigh(products)
        values, vectors = self._sorted(values, vectors, n)
        self._axes = (vectors * _signs(vectors)).T.contiguous().to(gram.dtype)
        self._mix, self._kept, self.dual = None, [], False

    def _sorted(self, values: Tensor, vectors: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues first; sets variances.

        Raises:
            ValueError: fewer directions of variance than components.
        """
        values = values.flip(0).clamp(min=0)
        directions = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
        if directions < self.components:
            raise ValueError(
                f"the features vary in {directions} directions, fewer than the {self.components} components wanted; "
                f"use PCA({max(1, directions)})"
            )
        self.images = n
        self.variances = values[: self.components] / (n - 1)
        self.ratios = values[: self.components] / values.sum()
        return values[: self.components], vectors.flip(1)[:, : self.components]

    def _refuse(self, n: int, p: int) -> None:
        most = min(n - 1 if self.centre else n, p)
        if n < 2 or self.components > most:
            raise ValueError(
                f"{self.components} components of {n} images with {p} features; at most {max(0, most)} exist"
            )


class _Gram:
    """Sums over images, of features less an origin: enough for the covariance of features."""

    def __init__(self, origin: Tensor, dtype: torch.dtype) -> None:
        self.origin, self.count = origin, 0
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.sum = torch.zeros_like(origin)
        self.products = torch.zeros(len(origin), len(origin), dtype=torch.float64, device=origin.device)

    def add(self, batch: Tensor) -> None:
        x = batch.double() - self.origin
        self.count += len(x)
        self.sum += x.sum(dim=0)
        self.products.addmm_(x.T, x)


def _batches(features: Matrix | Iterable[Matrix]) -> Iterator[Tensor]:
    several = not isinstance(features, (Tensor, np.ndarray))
    width = None
    for batch in features if several else [features]:
        x = as_matrix(batch, "features", "[images, features]")  # type: ignore[arg-type]
        if width is not None and x.shape[1] != width:
            raise ValueError(f"batches should all have {width} features, got one of {x.shape[1]}")
        width = x.shape[1]
        yield x
    if width is None:
        raise ValueError("there is no batch of features to fit")


def _collect(batches: Iterator[Tensor]) -> tuple[list[Tensor], _Gram | None]:
    """The batches, if there are fewer images than features; else their sums."""
    kept: list[Tensor] = []
    count, gram = 0, None
    for batch in batches:
        if gram is None:
            kept.append(batch)
            count += len(batch)
            if count > batch.shape[1]:
                gram = _Gram(kept[0].double().mean(dim=0), batch.dtype)
                for earlier in kept:
                    gram.add(earlier)
                kept = []
        else:
            gram.add(batch)
    return kept, gram


def _signs(vectors: Tensor) -> Tensor:
    """1 or -1 for each column, so that its entry of largest magnitude becomes positive (the first of equal ones)."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return torch.where(vectors.gather(0, largest)[0] < 0, -1.0, 1.0).to(vectors)
