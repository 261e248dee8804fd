"""Images as the output of a small network that is given each pixel's coordinates."""

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

MAX_UNITS = 64

_WAVES = 8
_INPUTS = 4 + 2 * _WAVES
_CYCLES = (1.0, 8.0)  # of the slowest and the fastest wave, per longer side of the image
_GAIN = 3.0  # RMS of what goes into a unit: the logistic function bends it clearly, and seldom saturates
_BIAS = 0.3  # of a unit, relative to what comes from all other units of the layer before


class CPPNGenerator(FormulaGenerator):
    """The code is the weights of a compositional pattern-producing network, as deviations from a random one.

    Each pixel's x, y, distance from the centre, and sine and cosine of eight fixed waves go through two layers of units
    logistic(.) - 1/2 and a linear layer to three colour axes; image = logistic(4 .) of that. The code is added to the
    random weights (by the seed) of the hidden layers, and is itself the weights of the last one.

    Why weights, and not an input to a fixed network: every image of the network is within reach, and a longer code is a
    larger network. Why around random weights: where all weights are zero, the hidden ones have no gradient. So a code
    of zeros is grey, but its neighbours already show structure.

    Source: Stanley 2007, Genetic Programming and Evolvable Machines 8:131; waves as inputs, Tancik et al. 2020,
    "Fourier features let networks learn high frequency functions". Sizes and gains are choices made here.

    Args:
        height, width: of the images, in pixels.
        dim: h^2 + 24 h + 3 for h units in each hidden layer: 643 for 16 (None), 1155 for 24.
        seed: of the weights at code 0 and of the waves.

    Raises:
        TypeError, ValueError: a size that is not a whole number, or a dim of no network.
    """

    name = "cppn"
    _cpu_pixels = 25_000

    def __init__(self, height: int, width: int, dim: int | None = None, seed: int = 0) -> None:
        height, width = check_size(height, width)
        count = code_length(16) if dim is None else whole("dim", dim, code_length(1), code_length(MAX_UNITS))
        units = round(math.sqrt(count + 141)) - 12  # dim = (units + 12)^2 - 141
        if code_length(units) != count:
            below = units if code_length(units) < count else units - 1
            raise ValueError(
                f"dim should be h^2 + 24 h + 3 for a network of h units in each layer, such as {code_length(below)} or "
                f"{code_length(below + 1)}, got {count}"
            )
        super().__init__(height, width, count)
        self.seed, self.units = check_seed(seed), units
        rng = np.random.default_rng(self.seed)
        inputs = _inputs(rng, self.height, self.width)
        first = rng.standard_normal((units, _INPUTS))
        second = rng.standard_normal((units, units + 1))
        # Scales are such that activity has the same RMS in every layer, at weights as large as a code of CODE_RMS makes
        # them. The last column is the bias, kept small: images should differ in pattern, less in mean.
        hidden = _unit(math.sqrt(2) * first @ inputs)
        scale = np.append(np.full(units, 1 / _rms(hidden)), _BIAS) * _GAIN / math.sqrt(2 * units)
        weights = math.sqrt(2) * second * scale
        hidden = _unit(weights[:, :-1] @ hidden + weights[:, -1:])
        last = np.append(np.full(units, 1 / _rms(hidden)), _BIAS) / math.sqrt(units)
        contrast = 4 * CONTRAST * math.sqrt(3 / np.sum(COLOUR_SPREAD**2))
        colours = (COLOUR_AXES * COLOUR_SPREAD[:, None]).T * contrast
        self._tables = (inputs, first, second, scale, last, colours)

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
        inputs, first, second, scale, last, colours = constants
        b, units = len(codes), self.units
        parts = torch.split(codes / CODE_RMS, [first.numel(), second.numel(), 3 * (units + 1)], dim=1)
        hidden = torch.bmm(parts[0].view(b, *first.shape) + first, inputs.expand(b, -1, -1))
        weights = (parts[1].view(b, *second.shape) + second) * scale
        hidden = torch.baddbmm(weights[:, :, -1:], weights[:, :, :-1], _units(hidden))
        weights = torch.bmm(colours.expand(b, 3, 3), parts[2].view(b, 3, units + 1)) * last
        image = torch.baddbmm(weights[:, :, -1:], weights[:, :, :-1], _units(hidden))
        return squash(image.view(b, 3, self.height, self.width), out)


def code_length(units: int) -> int:
    """Number of weights and biases of a network with so many units in each hidden layer."""
    return units * _INPUTS + units * (units + 1) + 3 * (units + 1)


def _inputs(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """[_INPUTS, height width] features of every pixel; standard random weights of them give half the variance."""
    side = max(height, width)
    y, x = ((2 * np.arange(n) + 1 - n) / side for n in (height, width))  # -1..1 along the longer side
    x, y = (np.asarray(v).ravel() for v in np.meshgrid(x, y))
    cycles = _CYCLES[0] * (_CYCLES[1] / _CYCLES[0]) ** (np.arange(_WAVES) / (_WAVES - 1))
    angle, phase = rng.uniform(0, np.pi, _WAVES), rng.uniform(0, 2 * np.pi, _WAVES)
    wave = np.pi * cycles * (np.outer(x, np.cos(angle)) + np.outer(y, np.sin(angle))) + phase
    # Standard deviations about 1; waves by 1 / frequency, like natural images.
    features = [2 * x, 2 * y, 2 * np.hypot(x, y), _BIAS * np.ones_like(x)]
    features += [*(np.sqrt(2) * np.sin(wave) / cycles).T, *(np.sqrt(2) * np.cos(wave) / cycles).T]
    gains = np.append([1, 1, 1, _BIAS], np.tile(1 / cycles, 2))
    return np.stack(features) * _GAIN / math.sqrt(2 * np.sum(gains**2))


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-x)) - 0.5)


def _rms(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _units(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return squash(x) - 0.5
    return squash(x, x).sub_(0.5)
