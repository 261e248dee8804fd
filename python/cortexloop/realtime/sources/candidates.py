"""`CandidateSource`: of a large set of images, those that models think worth showing. Screen in silico, then verify."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.features import FeatureSource
from cortexloop.realtime.clock import Clock, SystemClock
from cortexloop.realtime.refit import Double, Refit
from cortexloop.realtime.source import Images, Proposal, sha256
from cortexloop.realtime.sources import common
from cortexloop.realtime.sources.guide import Guide, Rows

Policy = Literal["best", "worst", "disagreement", "random"]
Positions = NDArray[np.int64]


class _Choice(NamedTuple):
    """Images to show: first those by the policy, the last `explore` at random. rows: what the refit learns from."""

    chosen: Positions
    explore: int
    rows: Rows | None
    decision: dict[str, Any]


class CandidateSource:
    """Screens candidates with a bank of models for as long as the budget lets it, and shows the most promising ones.

    Candidates are evaluated in chunks, in an order of chunks drawn from the seed; each round goes on where the last one
    stopped, so in the end all are known. What is shown are the first by the policy of all evaluated so far, and a
    stated share at random of all candidates. No image is shown twice. Equal ones: the earlier position first. An image
    to which a model responds with NaN or infinity is never chosen by a policy (and counted in the decision).

    The decision that is journaled: positions chosen, how many of them at random, how many candidates were evaluated,
    how many of these could not be ranked, what was predicted for those chosen, milliseconds taken, and the rows that a
    refitted model learns from. So a replay evaluates nothing and gives the same bits on another machine. After a
    restart candidates are evaluated again, within the budgets of the rounds that follow.

    Args:
        images: candidates, uint8 [N, H, W, 3], an array or a memory map, of the size of the bank.
        bank: models of this or similar neurons. The table of their responses takes 4 bytes per candidate and model.
        per_batch: images per proposal; the last one may have fewer.
        policy: "best", "worst": highest and lowest predicted response; "disagreement": largest standard deviation over
            the bank's models; "random": without models.
        explore: share of images at random, 0..1, exact over rounds.
        budget_ms: time for a proposal. Evaluation ends before a chunk that would exceed it, by the time that the
            slowest of the last few took, except that a proposal is always filled.
        seed: of the order of chunks and of random choices.
        chunk: images evaluated together.
        batches: proposals in all; None: until all candidates were shown.
        names: one per candidate, for labels "best:name", "explore:name"; their positions if None.
        model, refit, layer, precision: see `Guide`.
        max_open: proposals that may be out; None: 1 with a refit, else 2.
        images_sha256: digest of the candidates, `common.images_digest(images)`, where it is known and reading all of
            them takes long; None: computed here.
        clock: None: the computer's.

    Raises:
        TypeError, ValueError: arguments that do not fit together or are out of range.
    """

    def __init__(
        self,
        images: Images,
        bank: ModelBank,
        *,
        per_batch: int,
        policy: Policy = "best",
        explore: float = 0.0,
        budget_ms: float = 1000.0,
        seed: int = 0,
        chunk: int = 64,
        batches: int | None = None,
        names: Sequence[str] | None = None,
        model: str | int | None = None,
        refit: Refit | None = None,
        layer: FeatureSource | None = None,
        precision: str = "exact",
        max_open: int | None = None,
        images_sha256: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._images = common.check_images(images)
        if images.shape[1:3] != (bank.height, bank.width):
            raise ValueError(
                f"candidates are {images.shape[1]} x {images.shape[2]} pixels, the bank takes "
                f"{bank.height} x {bank.width}; resize them"
            )
        if policy not in get_args(Policy):
            raise ValueError(f"policy should be one of {get_args(Policy)}, got {policy!r}")
        if policy == "disagreement" and len(bank) < 2:
            raise ValueError("one model cannot disagree with itself; give a bank of at least 2")
        if names is not None and len(names) != len(images):
            raise ValueError(f"names should be one for each of {len(images)} candidates, got {len(names)}")
        common.check_count("per_batch", per_batch)
        common.check_count("batches", batches)
        common.check_count("max_open", max_open)
        common.check_count("seed", seed, 0)
        common.check_fraction("explore", explore)
        common.check_budget(budget_ms)
        self.size = (bank.height, bank.width)
        self.max_open = max_open or (1 if refit is not None else 2)
        self.guide = Guide(bank, chunk=chunk, model=model, refit=refit, layer=layer, precision=precision)
        self._per_batch, self._policy, self._explore, self._seed = per_batch, policy, explore, seed
        self._budget_ms, self._batches, self._names = budget_ms, batches, names
        self._clock: Clock = SystemClock() if clock is None else clock
        self._sha = images_sha256 or common.images_digest(images)
        self._ledger = common.Ledger("candidates")
        count = len(images)
        self._table: Rows = np.empty((count, self.guide.width), dtype=np.float32)
        self._shown, self._known, self._rankable = (np.zeros(count, dtype=np.bool_) for _ in range(3))
        self._order = np.random.default_rng(seed).permutation(-(-count // chunk))
        self._next = 0  # chunk of `_order` that is evaluated next
        self._pace = common.Pace()  # of chunks
        self._rank_ms = 0.0  # per candidate

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "source": "candidates",
            "candidates": len(self._images),
            "images_sha256": self._sha,
            "size": list(self.size),
            "per_batch": self._per_batch,
            "policy": self._policy,
            "explore": self._explore,
            "budget_ms": self._budget_ms,
            "seed": self._seed,
            "batches": self._batches,
            "max_open": self.max_open,
            "guide": self.guide.settings(),
        }

    def propose(self, decision: Any = None) -> Proposal | None:
        """See `Source`.

        Raises:
            ValueError: a decision of another source.
        """
        if self._ledger.proposed == self._batches or self._shown.all():
            return None
        choice = self._choose() if decision is None else self._chosen_by(decision)
        chosen = choice.chosen
        if not len(chosen):
            return None
        self._shown[chosen] = True
        rows = () if choice.rows is None else (choice.rows,)
        self._ledger.put(len(chosen), chosen, *rows, kept=choice.rows)
        ways = [self._policy] * (len(chosen) - choice.explore) + ["explore"] * choice.explore
        return Proposal(
            count=len(chosen),
            render=lambda: np.array(self._images[chosen]),
            labels=[f"{way}:{self._name(i)}" for way, i in zip(ways, chosen.tolist(), strict=True)],
            decision=choice.decision,
        )

    def learn(self, scores: Double, responses: Double) -> None:
        """See `Source`.

        Raises:
            RuntimeError, ValueError: nothing is out, or another number of scores.
        """
        rows = self._ledger.take(scores)
        if rows is not None:
            self.guide.learn(rows, scores)

    def digest(self) -> str:
        """See `Source`."""
        return sha256(self._ledger.digest(), self.guide.digest())

    def _name(self, position: int) -> str:
        return str(position) if self._names is None else self._names[position]

    # ------------------------------------------------------------------------------------ choosing

    def _choose(self) -> _Choice:
        budget = common.Budget(self._clock, self._budget_ms)
        left = np.flatnonzero(~self._shown)
        count = min(self._per_batch, len(left))
        at_random = count
        if self._policy != "random":
            at_random = common.share(self._explore, count, self._ledger.proposed)
        rng = np.random.default_rng([self._seed, self._ledger.proposed])
        drawn = rng.choice(left, at_random, replace=False)
        if self.guide.refit is not None:
            self._evaluate(drawn[~self._known[drawn]])
        best = np.empty(0, dtype=np.int64)
        if count > at_random:
            free = ~self._shown
            free[drawn] = False
            self._screen(budget, count - at_random, free)
            best = self._first(count - at_random, free)
        chosen = np.concatenate([best, drawn])
        rows = None if self.guide.refit is None else self._table[chosen]
        known = int(self._known.sum())
        decision = {
            "chosen": chosen.tolist(),
            "explore": at_random,
            "evaluated": known,
            "not_ranked": known - int(self._rankable.sum()),
            "predicted": self.guide.predict(self._table[chosen]).tolist() if self._known[chosen].all() else None,
            "ms": budget.spent_ms(),
            "rows": None if rows is None else common.packed(rows),
        }
        return _Choice(chosen, at_random, rows, decision)

    def _screen(self, budget: common.Budget, needed: int, free: NDArray[np.bool_]) -> None:
        """Evaluate chunks while there is time, and until there are as many to choose from as needed."""
        available = int((free & self._rankable).sum())
        chunk = self.guide.chunk
        while self._next < len(self._order):
            to_rank = self._rank_ms * (self._next + 1) * chunk
            if available >= needed and not budget.allows(self._pace.slowest_ms + to_rank):
                break
            first = int(self._order[self._next]) * chunk
            positions = np.arange(first, min(first + chunk, len(self._images)))
            fresh = free[positions] & ~self._known[positions]
            begin = budget.spent_ms()
            self._evaluate(positions)
            self._pace.note(budget.spent_ms() - begin)
            available += int((fresh & self._rankable[positions]).sum())
            self._next += 1

    def _evaluate(self, positions: Positions) -> None:
        if not len(positions):
            return
        rows = self.guide.rows(self._images[positions])
        self._table[positions] = rows
        self._known[positions] = True
        self._rankable[positions] = np.isfinite(rows).all(axis=1)

    def _first(self, count: int, free: NDArray[np.bool_]) -> Positions:
        """The best by the policy among those that are evaluated and free."""
        pool = np.flatnonzero(free & self._rankable)
        begin = self._clock.monotonic_ns()
        rows = self._table[pool]
        if self._policy == "disagreement":
            keys = -self.guide.disagreement(rows)
        else:
            keys = self.guide.predict(rows) * (1 if self._policy == "worst" else -1)
        if count < len(pool):
            # Only the smallest are sorted, with all that equal the last of them, so that position decides among these.
            few = np.flatnonzero(keys <= np.partition(keys, count - 1)[count - 1])
            pool, keys = pool[few], keys[few]
        found = pool[np.argsort(keys, kind="stable")[:count]]
        self._rank_ms = (self._clock.monotonic_ns() - begin) / 1e6 / max(1, len(rows))
        return found

    def _chosen_by(self, decision: Any) -> _Choice:
        chosen = common.integers(decision, "chosen", 0, len(self._images) - 1)
        if not 1 <= len(chosen) <= self._per_batch or len(np.unique(chosen)) < len(chosen) or self._shown[chosen].any():
            raise common.foreign(f"it should choose 1 to {self._per_batch} candidates that were not shown before")
        explore = decision.get("explore")
        if type(explore) is not int or not 0 <= explore <= len(chosen):
            raise common.foreign(f'"explore" should be one of 0..{len(chosen)}, got {explore!r}')
        rows = None
        if self.guide.refit is not None:
            rows = common.unpacked(decision.get("rows"), (len(chosen), self.guide.width), "rows")
        return _Choice(chosen, explore, rows, decision)
