"""Images as sums of Gabor patches."""

from __future__ import annotations

import math
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
    check_seed,
    check_size,
    squash,
)
from cortexloop.evolve.optimiser import whole

PARAMETERS = 11
"""Code entries of a patch: place (x, y), orientation, frequency, size; even and odd part on three colour axes."""

MAX_PATCHES = 4096

# Bounds between which a logistic function leads from code to parameter.
_FREQUENCY = (1.0, 0.25)  # cycles per longer side of the image; cycles per pixel
_CYCLES = (0.25, 1.0)  # standard deviation of the envelope in wavelengths
_TURN = math.pi / 4  # radians of orientation that a standardised code entry of 1 turns by


class GaborGenerator(FormulaGenerator):
    """The code moves, turns, scales and weights a fixed number of Gabor patches.

    image = logistic(4 sum_k exp(-r_k^2 / (2 s_k^2)) / s_k (a_k cos(w_k) + b_k sin(w_k))), with r_k the distance from
    the patch's place, s_k its size, w_k the phase of its wave there, and a_k, b_k colours: two weights, of the even
    and the odd part, stand for contrast and phase, so that the image is linear in them and smooth everywhere. A code of
    zeros is grey, while places, orientations and frequencies are spread at random (by the seed) around it.

    Patches have frequencies that are spread evenly in octaves, and equal energy, so random images have about the 1/f
    spectrum of natural ones. Envelopes are circular: sums of separable functions then, hence quick to compute; long
    contours are several patches in a row.

    Source: the Gabor function as the receptive field of simple cells, Jones & Palmer 1987, J Neurophysiol 58:1233;
    this parametrisation is a choice made here.

    Args:
        height, width: of the images, in pixels.
        dim: 11 for each patch: place x, y, orientation, log frequency, log size, then the weights on the three colour
            axes of the even part, and those of the odd part. None: 64 patches.
        seed: of the spread at code 0.

    Raises:
        TypeError, ValueError: a size that is not a whole number, or a dim that is no multiple of 11.
    """

    name = "gabor"
    _cpu_pixels = 50_000

    def __init__(self, height: int, width: int, dim: int | None = None, seed: int = 0) -> None:
        height, width = check_size(height, width)
        count = 64 * PARAMETERS if dim is None else whole("dim", dim, PARAMETERS, MAX_PATCHES * PARAMETERS)
        if count % PARAMETERS:
            low = count // PARAMETERS * PARAMETERS
            raise ValueError(
                f"dim should be a multiple of {PARAMETERS}, the parameters of a patch, such as {low} or "
                f"{low + PARAMETERS}, got {count}"
            )
        super().__init__(height, width, count)
        self.seed = check_seed(seed)
        self.patches = count // PARAMETERS
        """Number of patches."""
        rng = np.random.default_rng(self.seed)
        spread = rng.uniform(0.05, 0.95, (self.patches, 5))
        rest = np.log(spread / (1 - spread))  # what the logistic function makes `spread` of
        rest[:, 2] = np.pi * spread[:, 2]
        step = np.array([1, 1, _TURN, 1, 1]) / CODE_RMS
        weight = COLOUR_SPREAD[:, None] * COLOUR_AXES * self._scale(spread) / CODE_RMS
        grid_x, grid_y = (np.arange(n) + 0.5 for n in (self.width, self.height))
        self._tables = (rest, step, weight, grid_x, grid_y)

    def _scale(self, spread: NDArray[np.float64]) -> float:
        """Of the weights: gives codes of `CODE_RMS` `CONTRAST` where patches lie as at code 0; times 4 for `squash`."""
        side = max(self.height, self.width)
        lowest, highest = _FREQUENCY[0] / side, _FREQUENCY[1]
        frequency = lowest * (highest / lowest) ** spread[:, 3]
        size = _CYCLES[0] * (_CYCLES[1] / _CYCLES[0]) ** spread[:, 4] / frequency
        energy = np.ones(self.patches)
        for axis, n in enumerate((self.width, self.height)):
            from_place = np.arange(n) + 0.5 - n * spread[:, axis, None]
            energy *= np.exp(-((from_place / size[:, None]) ** 2)).sum(1)
        # cos^2 + sin^2 = 1: what a patch adds to the mean square over pixels and channels
        mean_square = (energy / size**2).sum() * (COLOUR_SPREAD**2).sum() / (3 * self.height * self.width)
        return float(4 * CONTRAST / math.sqrt(mean_square))

    def settings(self) -> dict[str, Any]:
        """What it takes to make this generator again, JSON-able."""
        return {
            "generator": self.name,
            "height": self.height,
            "width": self.width,
            "dim": self.dim,
            "seed": self.seed,
        }

    def _render(self, codes: Tensor, constants: tuple[Tensor, ...], out: Tensor | None) -> Tensor:
        """Each patch is a sum of two products of a function of x and one of y, so an image is one matrix product."""
        rest, step, weight, grid_x, grid_y = constants
        b, k = len(codes), self.patches
        patches = codes.reshape(b, k, PARAMETERS)
        shape = patches[:, :, :5] * step + rest
        share = squash(shape)
        x, y = self.width * share[:, :, 0], self.height * share[:, :, 1]
        angle = shape[:, :, 2]
        lowest = _FREQUENCY[0] / max(self.height, self.width)
        frequency = lowest * torch.exp(math.log(_FREQUENCY[1] / lowest) * share[:, :, 3])
        size = _CYCLES[0] * torch.exp(math.log(_CYCLES[1] / _CYCLES[0]) * share[:, :, 4]) / frequency
        even, odd = (
            torch.bmm(patches[:, :, first : first + 3], weight.expand(b, 3, 3))[..., None] / size[:, :, None, None]
            for first in (5, 8)
        )

        def profile(grid: Tensor, place: Tensor, waves: Tensor) -> tuple[Tensor, Tensor]:
            """Envelope times cosine and sine along one axis, each [b, k, n]."""
            from_place = grid - place[:, :, None]
            envelope = torch.exp((from_place / size[:, :, None]).square() * -0.5)
            phase = 2 * math.pi * waves[:, :, None] * from_place
            return envelope * phase.cos(), envelope * phase.sin()

        cos_x, sin_x = profile(grid_x, x, frequency * angle.cos())
        cos_y, sin_y = (f[:, :, None] for f in profile(grid_y, y, frequency * angle.sin()))
        # even cos(p + q) + odd sin(p + q), with the factors of cos p and of sin p collected
        rows = torch.cat((even * cos_y + odd * sin_y, odd * cos_y - even * sin_y), dim=1)
        image = torch.bmm(rows.view(b, 2 * k, 3 * self.height).transpose(1, 2), torch.cat((cos_x, sin_x), dim=1))
        return squash(image.view(b, 3, self.height, self.width), out)
