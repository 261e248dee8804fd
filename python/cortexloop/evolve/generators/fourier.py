"""Images as sums of cosines with the spectrum and the colours of natural images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.evolve.generators.base import (
    CODE_RMS,
    COLOUR_AXES,
    COLOUR_SPREAD,
    CONTRAST,
    FormulaGenerator,
    check_size,
    squash,
)
from cortexloop.evolve.optimiser import whole


class FourierGenerator(FormulaGenerator):
    """The code is the coefficients of the lowest spatial frequencies of three colour axes.

    image = logistic(4 sum_i code_i a_i w_i), with w_i the orthonormal two-dimensional cosines (DCT-II) times a unit
    vector of colour, and the amplitude a_i proportional to 1 / frequency and to the natural spread of its colour axis.
    So a code of random numbers gives an image with the power spectrum of natural images, and equal steps in the code
    mean equal changes relative to what is natural.

    Coefficients are in the order of radial frequency, so a longer code refines what a shorter one shows. Frequencies of
    the two chromatic axes count double: colour has half the bandwidth, and each axis a quarter as many coefficients, as
    in JPEG, because natural images and primates have less fine structure in colour.

    Source: 1/f amplitude, Field 1987, JOSA A 4:2379; as a parametrisation of images, Olah, Mordvintsev & Schubert 2017,
    Feature Visualization (Distill); colour axes and spread, see `COLOUR_AXES` and `COLOUR_SPREAD`.

    Args:
        height, width: of the images, in pixels.
        dim: number of coefficients, at most 3 height width. None: 4096, as in published evolutions, or all there are.
        seed: taken like by other generators, and unused: nothing here is random.

    Raises:
        TypeError, ValueError: a size that is not a whole number, or more coefficients than colour values of pixels.
    """

    name = "fourier"

    def __init__(self, height: int, width: int, dim: int | None = None, seed: int = 0) -> None:
        height, width = check_size(height, width)
        most = 3 * height * width
        count = min(4096, most) if dim is None else whole("dim", dim, 1, most)
        super().__init__(height, width, count)
        self._layout = _Layout(height, width, count)
        self._tables = self._layout.tables()

    def settings(self) -> dict[str, Any]:
        """What it takes to make this generator again, JSON-able."""
        return {"generator": self.name, "height": self.height, "width": self.width, "dim": self.dim}

    def _render(self, codes: Tensor, constants: tuple[Tensor, ...], out: Tensor | None) -> Tensor:
        """Columns, colours, then rows: separable matrix products, with the rows folded about the centre.

        The cosines are even or odd about the image's centre, so the upper half of the sum of the even and of the odd
        ones is enough: the lower half is their difference, upside down. Luminance frequencies above those of the
        chromatic axes are summed once for all three channels.
        """
        place, amplitude, columns, chroma_columns, mix, even_low, odd_low, even_high, odd_high = constants
        b, shape = len(codes), self._layout
        c = torch.index_select(codes, 1, place) * amplitude
        luminance = c[:, : shape.rows * shape.columns].view(b, shape.rows, shape.columns)
        chroma = c[:, shape.rows * shape.columns :].view(b, 2 * shape.chroma_rows, shape.chroma_columns)

        def each(matrix: Tensor, count: int) -> Tensor:
            return matrix.expand(count, -1, -1)

        grey = torch.bmm(luminance, each(columns, b))  # [b, rows, width]
        colour = torch.bmm(chroma, each(chroma_columns, b)).view(b, 2, -1)
        low = torch.bmm(each(mix, b), colour).view(b, 3, shape.chroma_rows, self.width)
        low = (low + grey[:, None, : shape.chroma_rows]).view(3 * b, shape.chroma_rows, self.width)
        n = even_low.shape[1]
        m = shape.chroma_rows + even_high.shape[1]
        half = (b, 3, even_low.shape[0], self.width)
        even = torch.bmm(each(even_low, 3 * b), low[:, :n]).view(half)
        odd = torch.bmm(each(odd_low, 3 * b), low[:, n:]).view(half)
        even += torch.bmm(each(even_high, b), grey[:, shape.chroma_rows : m])[:, None]
        odd += torch.bmm(each(odd_high, b), grey[:, m:])[:, None]
        lower = (even - odd)[:, :, : self.height // 2].flip(-2)
        return squash(torch.cat((even + odd, lower), dim=-2), out)


class _Layout:
    """Where each coefficient goes, and the constants of the transform."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        self.height, self.width = height, width
        # Exact integers, so that equal frequencies are ordered alike on every machine: by axis, row, column.
        ky, kx = np.arange(height)[:, None] * width, np.arange(width)[None, :] * height
        squared = np.stack([ky**2 + kx**2] + [4 * (ky**2 + kx**2)] * 2)
        chosen = np.argsort(squared, axis=None, kind="stable")[:dim]
        self.axis, self.ky, self.kx = np.unravel_index(chosen, squared.shape)
        colour = self.axis > 0
        self.rows, self.columns = int(self.ky.max()) + 1, int(self.kx.max()) + 1
        self.chroma_rows = int(self.ky[colour].max()) + 1 if colour.any() else 0
        self.chroma_columns = int(self.kx[colour].max()) + 1 if colour.any() else 0

    def amplitudes(self) -> NDArray[np.float64]:
        """[dim] of each coefficient, such that a code of `CODE_RMS` has `CONTRAST`, times 4 for the logistic."""
        side = max(self.height, self.width)
        frequency = np.maximum(1.0, side * np.hypot(self.ky / self.height, self.kx / self.width))  # in half-cycles
        power = np.bincount(self.axis, frequency**-2.0, minlength=3)
        present = COLOUR_SPREAD * (power > 0)
        deviation = present * np.sqrt(3 * self.height * self.width / np.sum(present**2)) * CONTRAST / CODE_RMS
        scale = np.divide(deviation, np.sqrt(power), out=np.zeros(3), where=power > 0)
        return np.asarray(4 * scale[self.axis] / frequency)

    def tables(self) -> list[NDArray[Any]]:
        """Constants in the order in which `_render` takes them."""
        # Rows by parity, those that colour has first.
        rows = np.arange(self.rows)
        low, even = rows < self.chroma_rows, rows % 2 == 0
        groups = [rows[low & even], rows[low & ~even], rows[~low & even], rows[~low & ~even]]
        position = np.argsort(np.concatenate(groups))

        grey = self.rows * self.columns
        plane = self.chroma_rows * self.chroma_columns
        where = np.where(
            self.axis == 0,
            position[self.ky] * self.columns + self.kx,
            grey + (self.axis - 1) * plane + position[self.ky] * self.chroma_columns + self.kx,
        )
        place = np.zeros(grey + 2 * plane, np.int64)
        amplitude = np.zeros(len(place))  # 0 where there is no coefficient
        place[where] = np.arange(len(where))
        amplitude[where] = self.amplitudes()
        amplitude[:grey] *= COLOUR_AXES[0, 0]

        half = cosines(self.height, self.rows)[:, : (self.height + 1) // 2].T  # [half, rows]
        across = cosines(self.width, self.columns)
        mix = COLOUR_AXES[1:].T
        return [place, amplitude, across, across[: self.chroma_columns], mix, *(half[:, g] for g in groups)]


def cosines(n: int, count: int) -> NDArray[np.float64]:
    """[count, n] orthonormal DCT-II functions: c_k cos(pi k (x + 1/2) / n), c_k = sqrt(2/n) but c_0 = sqrt(1/n)."""
    k = np.arange(count)[:, None]
    return np.asarray(np.where(k == 0, 1.0, np.sqrt(2.0)) / np.sqrt(n) * np.cos(np.pi * k * (np.arange(n) + 0.5) / n))
