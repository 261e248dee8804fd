"""Ridge regression that grows with an experiment: responses are added as they come, the weights follow.

What is kept are sums over images: n, sums, X'X and X'y, of differences from the first image (so that features far from
zero lose no digits), in float64. They are added up image by image, element by element, without a matrix product: the
same images in the same order give the same bits on any machine with any number of threads, however they are divided
into calls; another order differs by rounding.

Minimises |y - Xw - b|^2 + alpha |w|^2, as `cortexloop.regression.ridge` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.source import sha256
from cortexloop.regression import ridge

Double = NDArray[np.float64]
Validation = Literal["leave_one_out", "running"]

ALPHAS = tuple(10.0**k for k in range(-4, 6))

_ROWS = 64
"""Rows of X'X that are updated together: they stay in the cache."""
_AT_ONCE = 16384
"""Images that are predicted together; bounds memory."""


class Refit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is fitted again to the responses of a session.

    after: responses from which on its predictions are used; before, the bank's own. alphas, validation, standardize:
    see `RecursiveRidge`.
    """

    after: int = 32
    alphas: tuple[float, ...] = ALPHAS
    validation: Validation = "leave_one_out"
    standardize: bool = True

    def model(self, width: int) -> RecursiveRidge:
        """An empty model of so many features.

        Raises:
            ValueError: a setting out of range.
        """
        if self.after < 2:
            raise ValueError(f"a model can be used after 2 responses at the earliest, got after = {self.after}")
        return RecursiveRidge(width, alphas=self.alphas, validation=self.validation, standardize=self.standardize)


@dataclass(frozen=True, eq=False)
class Fit:
    """One neuron's linear model, response = features @ weights + intercept.

    weights: float64 [p]. alpha: the regularisation chosen. score: coefficient of determination for images that were not
    fitted (held out one by one, or predicted before they were added); NaN where nothing could be held out.
    """

    weights: Double
    intercept: float
    alpha: float
    score: float


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """weights(alpha) = vectors @ (projected / (values + alpha)), for features as they are."""

    values: Double
    vectors: Double
    projected: Double
    mean: Double
    response: float

    def weights(self, alpha: float) -> Double:
        return np.asarray(self.vectors @ (self.projected / (self.values + alpha)))

    def predictions(self, x: Double, alphas: Double) -> Double:
        """[images, A]"""
        shrunk = self.projected[:, None] / (self.values[:, None] + alphas)
        return np.asarray((x - self.mean) @ self.vectors @ shrunk + self.response)


class RecursiveRidge:
    """Ridge regression of one neuron's responses on p features, fed a few images at a time.

        model = RecursiveRidge(p)
        model.add(features, responses)      # [n, p], [n]; again and again
        model.predict(others)               # [m]

    Args:
        width: p.
        alphas: positive regularisation strengths to choose from; the first of equally good ones is taken.
        validation: what chooses. "leave_one_out": the mean squared error of each image predicted from all others; keeps
            the features of all images. "running": that of each image as it was predicted before it was added, which is
            the error that counts in a closed loop, where the model chooses the images; keeps the sums alone.
        standardize: divide features by their standard deviation (constant ones stay).

    Attributes:
        count: images added. ignored: images left out since they came with NaN.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        width: int,
        *,
        alphas: Sequence[float] = ALPHAS,
        validation: Validation = "leave_one_out",
        standardize: bool = False,
    ) -> None:
        if width < 1:
            raise ValueError(f"a model needs at least 1 feature, got {width}")
        if validation not in get_args(Validation):
            raise ValueError(f"validation should be one of {get_args(Validation)}, got {validation!r}")
        self.alphas: Double = np.array(alphas, dtype=np.float64)
        if self.alphas.ndim != 1 or not len(self.alphas) or not (np.isfinite(self.alphas) & (self.alphas > 0)).all():
            raise ValueError(f"alphas should be a list of positive numbers, got {alphas}")
        self.width, self.validation, self.standardize = width, validation, standardize
        self.count = self.ignored = 0
        self._origin: Double | None = None
        self._sum_x, self._sum_xx, self._sum_xy = np.zeros(width), np.zeros((width, width)), np.zeros(width)
        self._origin_y = self._sum_y = self._sum_yy = 0.0
        self._rows: list[Double] = []
        self._responses: list[float] = []
        # Squared errors of images predicted before they were added: by each alpha, and by the mean of those before.
        self._errors, self._mean_errors = np.zeros(len(self.alphas)), 0.0
        self._digest = sha256("recursive ridge", str(width))
        self._spectrum: _Spectrum | None = None
        self._fit: Fit | None = None

    def add(self, features: NDArray[Any], responses: NDArray[Any]) -> NDArray[np.bool_]:
        """Take images in; those with NaN in features or response are left out.

        Args:
            features: [n, p]. responses: [n].

        Returns:
            bool [n], which were taken.

        Raises:
            ValueError: other shapes, or infinity; nothing is taken then.
        """
        x = self._checked(features)
        y = np.asarray(responses, dtype=np.float64)
        if y.shape != (len(x),):
            raise ValueError(f"responses should be [{len(x)}], one for each row of features, got {list(y.shape)}")
        if np.isinf(x).any() or np.isinf(y).any():
            raise ValueError("features and responses should be finite, or NaN where an image was not shown")
        taken: NDArray[np.bool_] = ~(np.isnan(y) | np.isnan(x).any(axis=1))
        x, y = x[taken], y[taken]
        self.ignored += len(taken) - len(x)
        if not len(x):
            return taken
        if self.validation == "running" and self.count >= 2:
            self._validate(x, y)
        if self._origin is None:
            self._origin, self._origin_y = x[0].copy(), float(y[0])
        self._accumulate(x - self._origin, y - self._origin_y)
        self.count += len(x)
        if self.validation == "leave_one_out":
            self._rows.extend(x)
            self._responses.extend(y.tolist())
        for row, response in zip(x, y, strict=True):
            self._digest = sha256(self._digest, row, response.tobytes())
        self._spectrum = self._fit = None
        return taken

    def _accumulate(self, x: Double, y: Double) -> None:
        """Add to the sums, one image after the other."""
        for row, response in zip(x, y.tolist(), strict=True):
            self._sum_x += row
            self._sum_xy += row * response
            self._sum_y += response
            self._sum_yy += response * response
        product = np.empty((min(_ROWS, self.width), self.width))
        for first in range(0, self.width, _ROWS):
            part = self._sum_xx[first : first + _ROWS]
            out = product[: len(part)]
            for row in x:
                part += np.multiply(row[first : first + _ROWS, None], row, out=out)

    def _validate(self, x: Double, y: Double) -> None:
        found = self._decomposed()
        self._errors += np.square(y[:, None] - found.predictions(x, self.alphas)).sum(axis=0)
        self._mean_errors += float(np.square(y - found.response).sum())

    def _decomposed(self) -> _Spectrum:
        if self._spectrum is None:
            assert self._origin is not None
            n = self.count
            gram = self._sum_xx - np.multiply.outer(self._sum_x, self._sum_x) / n
            cross = self._sum_xy - self._sum_x * (self._sum_y / n)
            variance = gram.diagonal() / n
            varies = variance > 0
            scales = np.sqrt(np.where(varies & self.standardize, variance, 1.0))
            values, vectors = np.linalg.eigh(gram / np.multiply.outer(scales, scales))
            self._spectrum = _Spectrum(
                values=np.maximum(values, 0.0),
                vectors=np.where(varies[:, None], vectors / scales[:, None], 0.0),
                projected=vectors.T @ (cross / scales),
                mean=self._origin + self._sum_x / n,
                response=self._origin_y + self._sum_y / n,
            )
        return self._spectrum

    @property
    def response_variance(self) -> float:
        """Of the responses added so far (dividing by their number); 0 before."""
        if self.count == 0:
            return 0.0
        return max(0.0, (self._sum_yy - self._sum_y**2 / self.count) / self.count)

    def solve(self) -> Fit:
        """The model of all images so far.

        Raises:
            RuntimeError: fewer than 2 images.
        """
        if self.count < 2:
            raise RuntimeError(f"a model is fitted to 2 images at least, so far there are {self.count}")
        if self._fit is None:
            found = self._decomposed()
            alpha, score = self._choice()
            weights = found.weights(alpha)
            self._fit = Fit(weights, found.response - float(weights @ found.mean), alpha, score)
        return self._fit

    def _choice(self) -> tuple[float, float]:
        """(alpha, score)."""
        largest = float(self.alphas.max())
        if self.validation == "running":
            if self._mean_errors == 0:  # nothing was predicted yet, or nothing varied: the least daring choice
                return largest, float("nan")
            best = int(self._errors.argmin())
            return float(self.alphas[best]), 1.0 - float(self._errors[best]) / self._mean_errors
        if self._sum_yy == 0:  # all responses are the same
            return largest, float("nan")
        responses = np.array(self._responses)[:, None]
        held_out = ridge(np.stack(self._rows), responses, self.alphas, standardize=self.standardize)
        return float(held_out.alpha[0]), float(held_out.score[0])

    def predict(self, features: NDArray[Any]) -> Double:
        """Predicted responses [n] to features [n, p].

        Raises:
            ValueError: another shape. RuntimeError: fewer than 2 images were added.
        """
        fit = self.solve()
        x = self._checked(features, convert=False)
        predicted = np.empty(len(x))
        for first in range(0, len(x), _AT_ONCE):
            predicted[first : first + _AT_ONCE] = x[first : first + _AT_ONCE].astype(np.float64) @ fit.weights
        return predicted + fit.intercept

    def _checked(self, features: NDArray[Any], *, convert: bool = True) -> NDArray[Any]:
        x = np.asarray(features, dtype=np.float64) if convert else np.asarray(features)
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"features should be [images, {self.width}], got {list(x.shape)}")
        return x

    def digest(self) -> str:
        """SHA-256 of all that was added, in its order, and of the sums: of what is the same on any machine."""
        sums = (self._sum_x, self._sum_xx, self._sum_xy, np.array([self._sum_y, self._sum_yy]))
        return sha256(self._digest, str(self.count), *sums)

    def settings(self) -> dict[str, Any]:
        """What it was made with, JSON-able."""
        return {
            "width": self.width,
            "alphas": self.alphas.tolist(),
            "validation": self.validation,
            "standardize": self.standardize,
        }
