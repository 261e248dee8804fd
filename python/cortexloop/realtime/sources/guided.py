"""`ModelGuided`: images that a generator makes, chosen by models that follow the neuron."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.evolve import OPTIMISERS, Generator, Placement, make_optimiser, to_uint8
from cortexloop.evolve.generators.base import CODE_RMS
from cortexloop.features import FeatureSource
from cortexloop.realtime.clock import Clock, SystemClock
from cortexloop.realtime.refit import Double, Refit
from cortexloop.realtime.source import Images, Proposal, sha256
from cortexloop.realtime.sources import common
from cortexloop.realtime.sources.guide import Guide, Rows

Policy = Literal["model", "disagreement", "evolution"]
Codes = NDArray[np.float32]


class _Found(NamedTuple):
    """Codes [n, dim] and their rows, images evaluated on the way, generations in silico."""

    codes: Codes
    rows: Rows
    evaluated: int
    generations: int


class ModelGuided:
    """A model-guided evolution: most images of a generation are those that look best in silico within the budget.

    The first predictions are the bank's; with a `Refit` those of a regression on the scores of the session, see
    `Guide`. Policies:

    - "model": of a pool of codes, those with the highest prediction. Half of the pool is new, half are children of the
      best codes shown so far: genes of two of them, and mutations. The pool grows until the budget is used up.
    - "disagreement": of such a pool those about which the bank's models disagree most.
    - "evolution": for each image an evolution in silico that starts from such a pool, run as long as the budget lets
      it; its best code is shown.

    A stated share of the images comes from new codes, unseen by any model. Codes and rows are in the decision that is
    journaled, so a replay evaluates nothing and gives the same bits on another machine.

    Args:
        generator: makes images of codes.
        bank: models of this or similar neurons; their input is of the size that is shown.
        per_batch: images per proposal.
        policy: see above.
        budget_ms: time for a proposal. It ends before a chunk (or a generation in silico) that would exceed it by the
            time that the slowest of the last few took, but not before the first.
        explore: share of images from new codes, 0..1, exact over generations.
        seed: of all codes.
        chunk: images evaluated together.
        batches: proposals in all; None: without end.
        parents: how many of the best codes shown have children.
        mutation: standard deviation of mutations over that of new codes. Children are scaled by
            1 / sqrt(1 + mutation^2), so that codes do not grow.
        spread: standard deviation of new codes.
        most: images evaluated for a proposal (whole chunks or generations), however much time there is.
        optimiser, population: of the evolution in silico, a name of `OPTIMISERS` and codes per generation and image.
        minimise: look for low responses.
        placement: where the image goes on what is shown.
        model, refit, layer, precision: see `Guide`.
        max_open: proposals that may be out.
        clock: None: the computer's.

    Raises:
        TypeError, ValueError: arguments that do not fit together or are out of range.
    """

    def __init__(
        self,
        generator: Generator,
        bank: ModelBank,
        *,
        per_batch: int,
        policy: Policy = "model",
        budget_ms: float = 1000.0,
        explore: float = 0.25,
        seed: int = 0,
        chunk: int = 64,
        batches: int | None = None,
        parents: int = 8,
        mutation: float = 0.3,
        spread: float = CODE_RMS,
        most: int = 4096,
        optimiser: str = "ga-ponce2019",
        population: int = 16,
        minimise: bool = False,
        placement: Placement | None = None,
        model: str | int | None = None,
        refit: Refit | None = None,
        layer: FeatureSource | None = None,
        precision: str = "exact",
        max_open: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self.size = (generator.height, generator.width) if placement is None else placement.canvas
        if self.size != (bank.height, bank.width):
            raise ValueError(
                f"images are {self.size[0]} x {self.size[1]} pixels, the bank takes {bank.height} x {bank.width}; "
                "make a generator of that size or place its images on such a canvas"
            )
        if policy not in get_args(Policy):
            raise ValueError(f"policy should be one of {get_args(Policy)}, got {policy!r}")
        if policy == "disagreement" and len(bank) < 2:
            raise ValueError("one model cannot disagree with itself; give a bank of at least 2")
        if optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser should be one of {', '.join(OPTIMISERS)}, got {optimiser!r}")
        for name, value, low in (
            ("per_batch", per_batch, 1), ("batches", batches, 1), ("parents", parents, 1), ("seed", seed, 0),
            ("population", population, 2), ("max_open", max_open, 1), ("most", most, 1),
        ):  # fmt: skip
            common.check_count(name, value, low)
        if not mutation >= 0 or not spread > 0:
            raise ValueError(f"mutation should be at least 0 and spread above 0, got {mutation} and {spread}")
        common.check_fraction("explore", explore)
        common.check_budget(budget_ms)
        self.max_open = max_open
        self.guide = Guide(bank, chunk=chunk, model=model, refit=refit, layer=layer, precision=precision)
        self._generator, self._placement, self._policy = generator, placement, policy
        self._per_batch, self._explore, self._seed, self._batches = per_batch, explore, seed, batches
        self._budget_ms, self._parents, self._mutation, self._spread = budget_ms, parents, mutation, spread
        self._optimiser, self._population, self._minimise = optimiser, population, minimise
        self._most = most
        self._clock: Clock = SystemClock() if clock is None else clock
        self._ledger = common.Ledger("generated images")
        # The best codes that were shown, best first, and their scores (negative if low ones are wanted).
        self._best: Codes = np.empty((0, generator.dim), dtype=np.float32)
        self._best_scores: Double = np.empty(0)
        self._pace = common.Pace()

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "source": "guided",
            "generator": self._generator.settings(),
            "placement": None if self._placement is None else self._placement.settings(),
            "size": list(self.size),
            "per_batch": self._per_batch,
            "policy": self._policy,
            "budget_ms": self._budget_ms,
            "explore": self._explore,
            "seed": self._seed,
            "batches": self._batches,
            "parents": self._parents,
            "mutation": self._mutation,
            "spread": self._spread,
            "most": self._most,
            "optimiser": self._optimiser if self._policy == "evolution" else None,
            "population": self._population if self._policy == "evolution" else None,
            "minimise": self._minimise,
            "max_open": self.max_open,
            "guide": self.guide.settings(),
        }

    def propose(self, decision: Any = None) -> Proposal | None:
        """See `Source`.

        Raises:
            ValueError: a decision of another source.
        """
        if self._ledger.proposed == self._batches:
            return None
        if decision is None:
            decision = self._choose()
        if not isinstance(decision, dict) or decision.get("explore") not in range(self._per_batch + 1):
            raise common.foreign(f'"explore" should be one of 0..{self._per_batch}')
        explore = int(decision["explore"])
        codes = common.unpacked(decision.get("codes"), (self._per_batch, self._generator.dim), "codes")
        rows = common.unpacked(decision.get("rows"), (self._per_batch, self.guide.width), "rows")
        self._ledger.put(self._per_batch, codes, rows, kept=(codes, rows))
        return Proposal(
            count=self._per_batch,
            render=lambda: self._render(codes),
            codes=codes,
            labels=[self._policy] * (self._per_batch - explore) + ["explore"] * explore,
            decision=decision,
        )

    def learn(self, scores: Double, responses: Double) -> None:
        """See `Source`.

        Raises:
            RuntimeError, ValueError: nothing is out, or another number of scores.
        """
        codes, rows = self._ledger.take(scores)
        self.guide.learn(rows, scores)
        shown = ~np.isnan(scores)
        all_scores = np.concatenate([self._best_scores, -scores[shown] if self._minimise else scores[shown]])
        all_codes = np.concatenate([self._best, codes[shown]])
        order = np.argsort(-all_scores, kind="stable")[: self._parents]
        self._best, self._best_scores = all_codes[order], all_scores[order]

    def digest(self) -> str:
        """See `Source`."""
        return sha256(self._ledger.digest(), self.guide.digest())

    # ------------------------------------------------------------------------------------ choosing

    def _render(self, codes: Codes) -> Images:
        images = self._generator(torch.tensor(codes, device=self.guide.bank.device))
        if self._placement is not None:
            images = self._placement(images)
        return to_uint8(images).cpu().numpy()

    def _rows(self, codes: Codes) -> Rows:
        rows = np.empty((len(codes), self.guide.width), dtype=np.float32)
        for first in range(0, len(codes), self.guide.chunk):
            some = slice(first, first + self.guide.chunk)
            rows[some] = self.guide.rows(self._render(codes[some]))
        return rows

    def _keys(self, rows: Rows) -> Double:
        """Higher is better; minus infinity where a model responds with NaN or infinity."""
        keys = np.full(len(rows), -np.inf)
        finite = np.isfinite(rows).all(axis=1)
        if self._policy == "disagreement":
            keys[finite] = self.guide.disagreement(rows[finite])
        else:
            keys[finite] = self.guide.predict(rows[finite]) * (-1 if self._minimise else 1)
        return keys

    def _choose(self) -> dict[str, Any]:
        budget = common.Budget(self._clock, self._budget_ms)
        explore = common.share(self._explore, self._per_batch, self._ledger.proposed)
        new = self._new(self._rng(0), explore)
        new_rows = self._rows(new)
        found = _Found(new[:0], new_rows[:0], 0, 0)
        if explore < self._per_batch:
            search = self._evolved if self._policy == "evolution" else self._screened
            found = search(budget, self._per_batch - explore)
        codes, rows = np.concatenate([found.codes, new]), np.concatenate([found.rows, new_rows])
        return {
            "codes": common.packed(codes),
            "explore": explore,
            "evaluated": found.evaluated,
            "generations": found.generations,
            "refitted": self.guide.refitted,
            "predicted": self.guide.predict(rows).tolist(),
            "ms": budget.spent_ms(),
            "rows": common.packed(rows),
        }

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._ledger.proposed, part])

    def _new(self, rng: np.random.Generator, count: int) -> Codes:
        found: Codes = rng.standard_normal((count, self._generator.dim), dtype=np.float32) * np.float32(self._spread)
        return found

    def _pool(self, rng: np.random.Generator, count: int) -> Codes:
        """New codes, every other one replaced by a child if there are parents."""
        codes = self._new(rng, count)
        if len(self._best):
            born = len(codes[1::2])
            parents = rng.integers(0, len(self._best), (2, born))
            genes = rng.random((born, codes.shape[1]), dtype=np.float32) < 0.5
            children = np.where(genes, self._best[parents[0]], self._best[parents[1]])
            children += np.float32(self._mutation) * codes[1::2]
            codes[1::2] = children / np.float32(np.sqrt(1 + self._mutation**2))
        return codes

    def _screened(self, budget: common.Budget, count: int) -> _Found:
        """The best of a pool that grows while there is time."""
        kept, rows, keys = self._new(self._rng(0), 0), np.empty((0, self.guide.width), np.float32), np.empty(0)
        evaluated = 0
        while len(kept) < count or (evaluated < self._most and budget.allows(self._pace.slowest_ms)):
            begin = budget.spent_ms()
            codes = self._pool(self._rng(1 + evaluated // self.guide.chunk), self.guide.chunk)
            found = self._rows(codes)
            kept, rows = np.concatenate([kept, codes]), np.concatenate([rows, found])
            keys = np.concatenate([keys, self._keys(found)])
            best = np.argsort(-keys, kind="stable")[:count]
            kept, rows, keys = kept[best], rows[best], keys[best]
            evaluated += len(codes)
            self._pace.note(budget.spent_ms() - begin)
        return _Found(kept, rows, evaluated, 0)

    def _evolved(self, budget: common.Budget, count: int) -> _Found:
        """The best code of each of `count` evolutions in silico that run while there is time."""
        start = self._pool(self._rng(1), count * self._population).reshape(count, self._population, -1)
        optimiser = make_optimiser(
            self._optimiser,
            self._generator.dim,
            problems=count,
            population=self._population,
            seed=int(self._rng(2).integers(2**63)),
            first_generation=start,
        )
        problems = np.arange(count)
        best, best_keys = start[:, 0].copy(), np.full(count, -np.inf)
        best_rows = np.full((count, self.guide.width), np.nan, dtype=np.float32)
        evaluated = generations = 0
        while generations == 0 or (evaluated < self._most and budget.allows(self._pace.slowest_ms)):
            begin = budget.spent_ms()
            codes = optimiser.ask().numpy()
            rows = self._rows(codes.reshape(-1, codes.shape[2]))
            keys = self._keys(rows).reshape(codes.shape[:2])
            first = keys.argmax(axis=1)
            better = keys[problems, first] > best_keys
            best[better], best_keys[better] = codes[problems, first][better], keys[problems, first][better]
            best_rows[better] = rows.reshape(*keys.shape, -1)[problems, first][better]
            optimiser.tell(np.where(np.isfinite(keys), keys, np.nan))
            evaluated += keys.size
            generations += 1
            self._pace.note(budget.spent_ms() - begin)
        return _Found(best, best_rows, evaluated, generations)
