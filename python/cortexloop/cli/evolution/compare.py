"""Numbers that compare evolutions: optimisers with each other, and evolved images with the best natural one.

Pure NumPy on noise-free responses; C conditions (optimiser and noise level), N neurons, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Double = NDArray[np.float64]

RESAMPLES = 10_000
CONFIDENCE = 0.95
GENETIC = ("ga-ponce2019", "ga-xdream")
"""What ratios refer to: the first of these that was run."""

_Z = 1.959963984540054  # two-sided 95 % point of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean or ratio with its confidence interval; NaN bounds where one neuron alone gives none.

    All are NaN for a ratio to scores that the bootstrap does not tell from 0.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Entry:
    """One optimiser at one noise level (`noise` None: averaged over all of them)."""

    optimiser: str
    noise: float | None
    score: Estimate
    ratio: Estimate | None
    """To the genetic algorithm at the same noise level; None if none was run."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Normalised scores of all optimisers, by two measures.

    Attributes:
        final: from the mean response to the last generation.
        best: from the largest response to any image so far.
        neurons: how many were averaged.
        apart: positions of neurons that no image of any run drove above grey: there is nothing to divide by.
        genetic: the optimiser that ratios refer to.
    """

    final: tuple[Entry, ...]
    best: tuple[Entry, ...]
    neurons: int
    apart: tuple[int, ...]
    genetic: str | None


@dataclass(frozen=True, eq=False)
class AgainstNatural:
    """Evolved against natural images, for one condition or for the best of all runs.

    Attributes:
        ratios: [N], NaN for neurons whose best natural response is not above grey.
        exceeding: of `neurons` that have a ratio, how many exceed 1.
        fraction: `exceeding / neurons` with its Wilson interval.
        median: of the ratios.
    """

    ratios: Double
    exceeding: int
    neurons: int
    fraction: Estimate
    median: float


def normalise(response: Double, peak: Double, grey: Double, *, minimise: bool = False) -> Double:
    """Response above grey as a share of the largest response above grey of the same neuron in any run.

    Args:
        response: [C, N, S] to be normalised.
        peak: [C, N, S] largest response of each run (smallest, with `minimise`).
        grey: [N] response to a grey screen.

    Returns:
        [C, N, S]; NaN for neurons whose largest response is not above grey (below, with `minimise`).
    """
    sign = -1.0 if minimise else 1.0
    above = sign * (peak - grey[None, :, None])
    ceiling = above.max(axis=(0, 2))
    ceiling = np.where(ceiling > 0, ceiling, np.nan)
    return np.asarray(sign * (response - grey[None, :, None]) / ceiling[None, :, None])


def compare(
    conditions: Sequence[tuple[str, float]],
    final: Double,
    best: Double,
    grey: Double,
    *,
    seed: int,
    minimise: bool = False,
) -> Comparison:
    """Compare optimisers over neurons.

    Args:
        conditions: (optimiser, noise) of the C conditions, each optimiser with every noise level.
        final: [C, N, S] mean noise-free response to the last generation.
        best: [C, N, S] largest noise-free response of the whole run.
        grey: [N] response to a grey screen.
        seed: of the bootstrap.
    """
    # At the end the best so far is the best of the whole run: both measures are divided by the same peak.
    shares = [normalise(values, best, grey, minimise=minimise).mean(axis=2) for values in (final, best)]
    known = np.isfinite(shares[1]).all(axis=0)
    genetic = next((name for name in GENETIC if any(name == optimiser for optimiser, _ in conditions)), None)
    entries = [_entries(conditions, values[:, known], genetic, seed) for values in shares]
    apart = tuple(int(n) for n in np.flatnonzero(~known))
    return Comparison(entries[0], entries[1], int(known.sum()), apart, genetic)


def _entries(
    conditions: Sequence[tuple[str, float]], values: Double, genetic: str | None, seed: int
) -> tuple[Entry, ...]:
    """Every optimiser at every noise level, then over all levels; `values` [C, neurons] are means over seeds."""
    optimisers = list(dict.fromkeys(optimiser for optimiser, _ in conditions))
    levels = list(dict.fromkeys(noise for _, noise in conditions))
    table = {condition: values[c] for c, condition in enumerate(conditions)}
    groups: list[tuple[float | None, dict[str, Double]]] = [
        (noise, {name: table[name, noise] for name in optimisers}) for noise in levels
    ]
    if len(levels) > 1:
        groups.append((None, {o: np.mean([table[o, noise] for noise in levels], axis=0) for o in optimisers}))
    drawn = _resamples(values.shape[1], seed)
    found = []
    for noise, by_name in groups:
        reference = None if genetic is None else by_name[genetic]
        for name, own in by_name.items():
            ratio = None
            if reference is not None:
                ratio = Estimate(1.0, np.nan, np.nan) if name == genetic else _estimate(own, drawn, reference)
            found.append(Entry(name, noise, _estimate(own, drawn), ratio))
    return tuple(found)


def _resamples(neurons: int, seed: int) -> NDArray[np.int64]:
    """[RESAMPLES, neurons] drawn with replacement; the same draws for all entries, so that ratios are paired."""
    return np.random.default_rng(seed).integers(0, max(neurons, 1), size=(RESAMPLES, neurons))


def _estimate(values: Double, drawn: NDArray[np.int64], reference: Double | None = None) -> Estimate:
    """Mean over neurons with its percentile bootstrap interval, or the ratio of two means if the second is above 0."""
    if not values.size:
        return Estimate(np.nan, np.nan, np.nan)
    tail = 50 * (1 - CONFIDENCE)
    mean = float(values.mean())
    means = values[drawn].mean(axis=1)
    if reference is not None:
        below = reference[drawn].mean(axis=1)
        if np.percentile(below, tail) <= 0:
            return Estimate(np.nan, np.nan, np.nan)
        mean /= float(reference.mean())
        means = np.divide(means, below, out=np.full_like(means, np.inf), where=below > 0)
    if values.size < 2:
        return Estimate(mean, np.nan, np.nan)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(mean, float(low), float(high))


def wilson(successes: int, trials: int) -> Estimate:
    """A share with its 95 % Wilson score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    if trials == 0:
        return Estimate(np.nan, np.nan, np.nan)
    share = successes / trials
    weight = _Z**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * np.sqrt(share * (1 - share) / trials + weight / (4 * trials))
    return Estimate(share, float(max(0.0, centre - half)), float(min(1.0, centre + half)))


def against_natural(evolved: Double, natural: Double, grey: Double, *, minimise: bool = False) -> AgainstNatural:
    """Ratio of responses above grey, evolved to natural, neuron by neuron.

    Args:
        evolved: [N] response to the best evolved image.
        natural: [N] response to the best natural image.
        grey: [N] response to a grey screen.
    """
    sign = -1.0 if minimise else 1.0
    below = sign * (natural - grey)
    known = below > 0
    ratios = np.divide(sign * (evolved - grey), below, out=np.full(len(grey), np.nan), where=known)
    exceeding, neurons = int((ratios[known] > 1).sum()), int(known.sum())
    median = float(np.median(ratios[known])) if neurons else np.nan
    return AgainstNatural(ratios, exceeding, neurons, wilson(exceeding, neurons), median)
