"""Genetic algorithms: the fitter codes are parents of the next generation, gene by gene, with mutations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cortexloop import ops
from cortexloop.evolve import streams
from cortexloop.evolve.optimiser import Optimiser, Selection, fraction, positive, whole
from cortexloop.evolve.sums import running_sum

DRAWS = 2**20  # numbers in a temporary tensor
COLDEST = 1e-8
"""Lower bound of the temperature, for scores that are all the same."""


class GeneticAlgorithm(Optimiser):
    """Genetic algorithm on real-valued codes. Two published conventions: `ponce2019` and `xdream`.

    From a generation with scores s to the next one:

    1. The `conserve` best codes come first, unchanged.
    2. Codes that were not shown come last, unchanged, if `carry_over`; they are dropped if not.
    3. The places between go to children. Each has two parents, drawn independently (they may be the same) with
       probability proportional to the fitness exp((s - max s) / kT), kT = `temperature` * standard deviation of s. Each
       gene is the first parent's with probability `first_parent`, else the second's; then it is mutated with
       probability `mutation_rate` by adding N(0, `mutation_size`^2).

    Scores are those of the codes that were shown; one that was not shown is never a parent and not conserved for its
    score, and there is no score in its place. Fewer codes shown than `conserve`: all of them are conserved. Nothing
    shown: the same generation comes again (after a `first_generation`: the random one that it replaced, and behind it
    the codes carried over, if they are).

    Args:
        population: codes per generation.
        temperature: kT over the standard deviation of the scores, above 0; low is strict.
        clip: from 0 to 100: scores above this percentile count as it, for fitness alone, so that one outlier cannot be
            every child's parent; no clipping if None.
        first_parent: 0 to 1. mutation_rate: 0 to 1. mutation_size: at least 0.
        conserve: 0 to population - 1.
        carry_over: whether codes that were not shown are shown again.
        initial_mean, initial_deviation: of the normal numbers of the first generation, numbers or [dim].
        initial_minimum: smaller ones are raised to this; not if None.
        dim, problems, seed, minimise, first_generation, device, dtype: see `Optimiser`.

    Raises:
        ValueError, TypeError: bad arguments.
    """

    STATE: ClassVar[tuple[str, ...]] = ("_codes",)

    def __init__(
        self,
        dim: int,
        *,
        population: int,
        temperature: float,
        clip: float | None,
        first_parent: float,
        mutation_rate: float,
        mutation_size: float,
        conserve: int,
        carry_over: bool,
        initial_mean: float | ArrayLike | Tensor = 0.0,
        initial_deviation: float | ArrayLike | Tensor = 1.0,
        initial_minimum: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(dim, population=population, **common)
        self.temperature = positive("temperature", temperature)
        self.clip = None if clip is None else fraction("clip", clip, 100)
        self.first_parent = fraction("first_parent", first_parent)
        self.mutation_rate = fraction("mutation_rate", mutation_rate)
        self.mutation_size = positive("mutation_size", mutation_size, zero=True)
        self.conserve = whole("conserve", conserve, 0, self.population - 1)
        self.carry_over = bool(carry_over)
        self._codes = self._first_codes(initial_mean, initial_deviation, initial_minimum)

    @classmethod
    def ponce2019(
        cls,
        dim: int,
        *,
        population: int | None = 40,
        mutation_rate: float = 0.25,
        mutation_size: float = 0.75,
        temperature: float = 2.0,
        parental_skew: float = 0.75,
        conserve: int | None = None,
        **common: Any,
    ) -> GeneticAlgorithm:
        """As in Ponce et al. 2019 ("Evolving images for visual neurons using a deep generative network").

        The temperature multiplies the standard deviation, kT = 2 std. A quarter of the population is conserved (10 of
        40). Three quarters of the genes are the first parent's (parental skew). Scores are not clipped; codes that were
        not shown are dropped. The first generation is N(0, 1).

        Args:
            dim, population and the rest: as for the class; `parental_skew` is `first_parent`.

        Raises:
            ValueError, TypeError: bad arguments.
        """
        population = 40 if population is None else whole("population", population, 2, 2**24 - 1)
        return cls(
            dim,
            population=population,
            temperature=temperature,
            clip=None,
            first_parent=fraction("parental_skew", parental_skew),
            mutation_rate=mutation_rate,
            mutation_size=mutation_size,
            conserve=population // 4 if conserve is None else conserve,
            carry_over=False,
            **common,
        )

    @classmethod
    def xdream(
        cls,
        dim: int,
        *,
        population: int | None = 20,
        mutation_rate: float = 0.5,
        mutation_size: float = 0.5,
        selectivity: float = 2.0,
        heritability: float = 0.5,
        conserve: int = 0,
        **common: Any,
    ) -> GeneticAlgorithm:
        """As in XDREAM (Xiao & Kreiman 2020, "XDream: Finding preferred stimuli for visual neurons ...").

        The selectivity divides the standard deviation, kT = std / 2: the opposite convention. Scores count up to their
        95th percentile, after the standard deviation was taken. Half of the genes are the first parent's
        (heritability). Codes that were not shown are shown again. Nothing is conserved unless `conserve` says so.

        The first generation is N(0, 1); the published experiments drew it from the statistics of the fc6 codes of
        natural images, without negative values: give those as `initial_mean` and `initial_deviation`, and 0 as
        `initial_minimum`.

        Args:
            dim, population and the rest: as for the class; `heritability` is `first_parent`, `selectivity` is
                1 / `temperature`.

        Raises:
            ValueError, TypeError: bad arguments.
        """
        return cls(
            dim,
            population=20 if population is None else population,
            temperature=1 / positive("selectivity", selectivity),
            clip=95.0,
            first_parent=fraction("heritability", heritability),
            mutation_rate=mutation_rate,
            mutation_size=mutation_size,
            conserve=conserve,
            carry_over=True,
            **common,
        )

    def _settings(self) -> dict[str, Any]:
        names = ("temperature", "clip", "first_parent", "mutation_rate", "mutation_size", "conserve", "carry_over")
        return {name: getattr(self, name) for name in names}

    @property
    def centre(self) -> Tensor:
        """The mean of the generation that is shown or comes next, [n, dim]."""
        codes = self._first if self.generation == 0 and self._first is not None else self._codes
        weights = codes.new_full(codes.shape[:2], 1 / codes.shape[1])
        return ops.code_moments(codes, weights)[0]

    def _first_codes(
        self,
        mean: float | ArrayLike | Tensor,
        deviation: float | ArrayLike | Tensor,
        minimum: float | None,
    ) -> Tensor:
        means, deviations = self._genes("initial_mean", mean), self._genes("initial_deviation", deviation)
        if not bool((deviations >= 0).all()):
            raise ValueError("initial_deviation should be at least 0")
        z = ops.normals(self.seed, streams.GENETIC_FIRST, 0, self._ids, self.population, self.dim).to(self.dtype)
        codes = means + deviations * z
        return codes if minimum is None else codes.clamp(min=self._genes("initial_minimum", minimum))

    def _genes(self, name: str, values: float | ArrayLike | Tensor) -> Tensor:
        """One number, or one for each gene."""
        tensor = self._numbers(name, values)
        if tensor.ndim > 0 and tuple(tensor.shape) != (self.dim,):
            raise ValueError(f"{name} should be a number or [{self.dim}], got {list(tensor.shape)}")
        return tensor

    def _sample(self) -> Tensor:
        return self._codes

    def _update(self, selection: Selection) -> None:
        m, shown = selection.codes.shape[1], selection.shown[:, None]
        place = torch.arange(self.population, device=self.device).expand(self.n, -1)
        conserved = shown.clamp(max=self.conserve)
        kept = place < conserved
        source = place.clamp(max=m - 1)
        active = selection.active[:, None].expand_as(kept)
        if self.carry_over:
            # Behind the conserved codes, as many as have room: those not shown are last in the order, by position.
            first = self.population - torch.minimum(m - shown, self.population - conserved)
            carried = place >= first
            source = torch.where(carried, shown + place - first, source)
            kept = kept | carried
        first, second = self._parents(selection)
        rows = torch.arange(self.n, device=self.device)[:, None] * m  # of the codes of all problems, below each other
        # A code that is kept is its own first parent.
        first = selection.order.gather(1, torch.where(kept, source, first)) + rows
        second = selection.order.gather(1, second) + rows
        every = selection.codes.reshape(self.n * m, self.dim)
        codes = torch.empty_like(self._codes)
        # By parts that stay in cache: memory for all draws of a large batch at once costs more than the arithmetic.
        size = max(1, DRAWS // (self.population * self.dim))
        for start in range(0, self.n, size):
            part = slice(start, start + size)
            codes[part] = self._recombined(self._ids[part], every, first[part], second[part], kept[part])
        # Without a score there are no parents: then what was to be shown stays.
        self._codes = torch.where((active | kept)[..., None], codes, self._codes, out=codes)

    def _parents(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Ranks of the first and the second parent of every child, int64 [n, population] each."""
        draws = ops.uniforms(
            self.seed, streams.GENETIC_PARENTS, self.generation + 1, self._ids, 2, self.population
        ).double()
        cumulative = running_sum(self._fitness(selection))
        drawn = torch.searchsorted(cumulative, draws.flatten(1) * cumulative[:, -1:], right=True)
        # Rounding may put a draw behind the last parent.
        drawn = torch.minimum(drawn, (selection.shown[:, None] - 1).clamp(min=0))
        first, second = drawn.chunk(2, dim=1)
        return first, second

    def _recombined(self, ids: Tensor, codes: Tensor, first: Tensor, second: Tensor, kept: Tensor) -> Tensor:
        """Children of codes[first] and codes[second], or codes[first] where `kept`; [problems, population, dim].

        Args:
            ids: [problems]; codes: [rows, dim]; first, second: rows, [problems, population]; kept: bool, likewise.
        """
        # In place, and by factors of 0 and 1 instead of torch.where: that is ten times slower for masks of random bits.
        size = (self.generation + 1, ids, self.population, self.dim)
        kept = kept[..., None]
        chosen = ops.uniforms(self.seed, streams.GENETIC_RECOMBINATION, *size).lt_(self.first_parent)
        chosen.masked_fill_(kept, 1.0)
        child = codes.index_select(0, first.flatten()).view(*first.shape, -1).mul_(chosen)
        other = codes.index_select(0, second.flatten()).view(*first.shape, -1)
        child.add_(other.mul_(chosen.neg_().add_(1)))
        chosen = ops.uniforms(self.seed, streams.GENETIC_MUTATED, *size).lt_(self.mutation_rate)
        chosen.masked_fill_(kept, 0.0)
        mutation = ops.normals(self.seed, streams.GENETIC_MUTATION, *size).to(self.dtype)
        return child.add_(mutation.mul_(self.mutation_size).mul_(chosen))

    def _fitness(self, selection: Selection) -> Tensor:
        """By rank, float64 [n, m]: 1 for the best, 0 for codes that were not shown."""
        shown = selection.shown[:, None]
        counts = torch.arange(selection.codes.shape[1], device=self.device) < shown
        # Differences to the best score, so that a constant added to all scores changes nothing.
        scores = selection.scores.gather(1, selection.order)
        scores = torch.where(counts, scores - scores[:, :1], 0.0)
        number = shown.clamp(min=1).double()
        mean = running_sum(scores)[:, -1:] / number
        squares = running_sum(torch.where(counts, (scores - mean) * (scores - mean), 0.0))[:, -1:]
        heat = (self.temperature * (squares / number).sqrt()).clamp(min=COLDEST)
        if self.clip is not None:
            top = _percentile(scores, number, self.clip)
            scores = torch.minimum(scores, top) - top
        return torch.where(counts, (scores / heat).exp(), 0.0)


def _percentile(descending: Tensor, number: Tensor, percent: float) -> Tensor:
    """Percentile with linear interpolation of the first `number` [n, 1] of each row, [n, 1]."""
    place = (number - 1) * (1 - percent / 100)
    above = place.floor().long()
    below = (above + 1).clamp(max=descending.shape[1] - 1)
    high = descending.gather(1, above)
    part = place - above
    return torch.where(part > 0, high + (descending.gather(1, below) - high) * part, high)
