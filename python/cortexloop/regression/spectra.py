"""Spectra of centred features, of all images and without a fold, from one Gram or kernel matrix.

What leaves a fold out is an update of the whole: the Gram matrix less the products of the images held out, or a block
of the kernel matrix, centred anew. So the cost of products hardly grows with the number of folds.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop.regression.data import column_blocks, column_means, column_scales

COLUMNS = 1024
"""(alpha, neuron) columns of one product."""


@dataclass(frozen=True)
class HeldOut:
    """What predicts a fold: yhat = basis @ (projected / (eigenvalues + alpha)) + mean.

    Attributes:
        eigenvalues: [r], at least 0. basis: [images held out, r]. projected: [r, T]. mean: [T].
    """

    eigenvalues: Tensor
    basis: Tensor
    projected: Tensor
    mean: Tensor

    def predictions(self, alphas: Tensor) -> Iterator[Tensor]:
        """Blocks [images, some alphas, T], in the order of alphas [A]."""
        for some in torch.split(alphas, max(1, COLUMNS // self.projected.shape[1])):
            shrunk = self.projected[:, None] / (self.eigenvalues[:, None] + some)[..., None]
            yield (self.basis @ shrunk.flatten(1)).view(len(self.basis), len(some), -1) + self.mean


class Spectrum(abc.ABC):
    """Features [n, P] and responses [n, T], and what every fit on them needs.

    Args:
        standardize: divide features by their standard deviation over the images of each fit.
    """

    def __init__(self, x: Tensor, y: Tensor, standardize: bool) -> None:
        self.x, self.means, self.standardize = x, column_means(x), standardize
        self.scales = column_scales(x, self.means) if standardize else torch.ones_like(self.means)
        self.response_means = column_means(y)
        self.y = y - self.response_means

    @abc.abstractmethod
    def leave_one_out(self, alphas: Tensor) -> Tensor:
        """Mean squared error of each image predicted from all others, [A, T]."""

    @abc.abstractmethod
    def without(self, test: Tensor) -> HeldOut:
        """The fit without some images (bool [n]) on the CPU or the features' device."""

    @abc.abstractmethod
    def weights(self, alpha: Tensor) -> Tensor:
        """Weights [T, P] for features as given, from all images; alpha [T]."""

    def intercept(self, weights: Tensor) -> Tensor:
        """[T], so that mean features give mean responses."""
        return self.response_means - weights @ self.means


def spectrum(x: Tensor, y: Tensor, standardize: bool) -> Spectrum:
    """The smaller of both forms. The dual one also where both are equal: there it alone keeps leave-one-out exact."""
    return (Dual if len(x) <= x.shape[1] + 1 else Primal)(x, y, standardize)


class Primal(Spectrum):
    """By the Gram matrix of features, [P, P]."""

    def __init__(self, x: Tensor, y: Tensor, standardize: bool) -> None:
        super().__init__(x, y, standardize)
        self.centred = x.double() - self.means
        self.gram, self.cross = self.centred.T @ self.centred, self.centred.T @ self.y
        self._eigen: tuple[Tensor, Tensor, Tensor] | None = None

    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues [P], eigenvectors [P, P], and the responses' projections [P, T]."""
        if self._eigen is None:
            self._eigen = _projected(self.gram, self.cross, self.scales)
        return self._eigen

    def leave_one_out(self, alphas: Tensor) -> Tensor:
        values, vectors, projected = self._all()
        basis = self.centred @ (vectors / self.scales[:, None])
        squares = basis.square()
        errors = []
        for alpha in alphas:
            residual = self.y - basis @ (projected / (values + alpha)[:, None])
            kept = 1 - 1 / len(self.y) - squares @ (1 / (values + alpha))
            errors.append((residual / kept[:, None]).square().mean(dim=0))
        return torch.stack(errors)

    def without(self, test: Tensor) -> HeldOut:
        test = test.to(self.x.device)
        x, y, n = self.centred[test], self.y[test], int((~test).sum())
        shift, mean = -x.sum(dim=0) / n, -y.sum(dim=0) / n  # means of the others, as all together have mean 0
        gram = self.gram - x.T @ x - n * torch.outer(shift, shift)
        cross = self.cross - x.T @ y - n * torch.outer(shift, mean)
        scales = self.scales
        if self.standardize:
            others = self.x[~test]
            scales = column_scales(others, column_means(others))
        values, vectors, projected = _projected(gram, cross, scales)
        return HeldOut(values, (x - shift) @ (vectors / scales[:, None]), projected, mean + self.response_means)

    def weights(self, alpha: Tensor) -> Tensor:
        values, vectors, projected = self._all()
        weights = (vectors @ (projected / (values[:, None] + alpha))).T / self.scales
        return torch.where(self.gram.diagonal() > 0, weights, 0.0)  # exactly 0 for a constant feature


class Dual(Spectrum):
    """By the kernel matrix of images, [n, n]. Features are held in float64 a block of columns at a time."""

    def __init__(self, x: Tensor, y: Tensor, standardize: bool) -> None:
        super().__init__(x, y, standardize)
        self.kernel = _kernel(x, self.means, self.scales)
        self._eigen: tuple[Tensor, Tensor, Tensor] | None = None

    def _all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues [n - 1], eigenvectors [n, n - 1] without the constant one, and the responses' projections."""
        if self._eigen is None:
            n = len(self.kernel)
            # Lifted above all others, the constant vector is the last one: exactly constant responses are no part of
            # the rest, however small alpha is.
            lift = 2 * self.kernel.abs().sum(dim=1).max() + 1
            values, vectors = torch.linalg.eigh(self.kernel + lift / n)
            values, vectors = values[:-1].clamp(min=0), vectors[:, :-1]
            self._eigen = values, vectors, vectors.T @ self.y
        return self._eigen

    def leave_one_out(self, alphas: Tensor) -> Tensor:
        values, vectors, projected = self._all()
        squares = vectors.square()
        errors = []
        for alpha in alphas:  # the residual over 1 - leverage, both divided by alpha
            inverse = 1 / (values + alpha)
            residual = vectors @ (projected * inverse[:, None])
            errors.append((residual / (squares @ inverse)[:, None]).square().mean(dim=0))
        return torch.stack(errors)

    def without(self, test: Tensor) -> HeldOut:
        test = test.to(self.x.device)
        train = ~test
        kernel = self.kernel
        if self.standardize:
            others = self.x[train]
            means = column_means(others)
            kernel = _kernel(self.x, means, column_scales(others, means))
        inner, across = kernel[train][:, train], kernel[test][:, train]
        row, total = inner.mean(dim=1), inner.mean()
        across = across - across.mean(dim=1, keepdim=True) - row + total
        inner = inner - row - row[:, None] + total
        y = self.y[train]
        mean = y.mean(dim=0)
        values, vectors = torch.linalg.eigh(inner)
        # Directions in which the images do not differ predict nothing: rounding alone would be divided by alpha.
        seen = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        values, vectors = values[seen], vectors[:, seen]
        return HeldOut(values, across @ vectors, vectors.T @ (y - mean), mean + self.response_means)

    def weights(self, alpha: Tensor) -> Tensor:
        values, vectors, projected = self._all()
        seen = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        shrunk = torch.where(seen[:, None], projected / (values[:, None] + alpha), 0.0)
        dual = (vectors @ shrunk).T
        weights = torch.empty(len(dual), self.x.shape[1], dtype=torch.float64, device=self.x.device)
        for block in column_blocks(self.x):
            centred = (self.x[:, block].double() - self.means[block]) / self.scales[block].square()
            weights[:, block] = dual @ centred
        return weights


def _projected(gram: Tensor, cross: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram / torch.outer(scales, scales))
    return values.clamp(min=0), vectors, vectors.T @ (cross / scales[:, None])


def _kernel(x: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """Products of centred, scaled images, [n, n]."""
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for block in column_blocks(x):
        centred = (x[:, block].double() - means[block]) / scales[block]
        kernel.addmm_(centred, centred.T)
    return kernel
