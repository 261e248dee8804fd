"""`SynthesisSource`: images that drive the models of a bank most, by gradient ascent, to be verified on the neuron."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.realtime.clock import Clock, SystemClock
from cortexloop.realtime.refit import Double
from cortexloop.realtime.source import Images, Proposal
from cortexloop.realtime.sources import common
from cortexloop.synthesis import maximize, noise_image

_TIMED_STEPS = 3


class SynthesisSource:
    """Synthesized images, see `cortexloop.synthesis.maximize`: every model from the same series of noise images.

    Image i of the series belongs to model i mod M and starts from `noise_image(bank, seed + i // M)`, so after M images
    each model has had one. They are made while the images before are shown; nothing depends on responses.

    With a budget, the number of steps of a proposal is what fits in by the speed of the steps before it. That is the
    decision that is journaled: with as many steps, a replay makes the same images. (On a CPU to the bit; on another
    machine or a GPU the pixels that the session has kept count.)

    Args:
        bank: M models.
        per_batch: images per proposal.
        batches: proposals in all; None: without end.
        steps: of gradient ascent; with a budget the most.
        budget_ms: time to make the images of a proposal; None: as long as it takes.
        seed: of the noise.
        minimize, step_size, blur, blur_every, grey: see `maximize`.
        max_open: proposals that may be out.
        clock: None: the computer's.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        bank: ModelBank,
        *,
        per_batch: int,
        batches: int | None = None,
        steps: int = 100,
        budget_ms: float | None = None,
        seed: int = 0,
        minimize: bool = False,
        step_size: float = 10.0,
        blur: float = 1.0,
        blur_every: int = 50,
        grey: bool = False,
        max_open: int = 2,
        clock: Clock | None = None,
    ) -> None:
        for name, value, low in (
            ("per_batch", per_batch, 1), ("batches", batches, 1), ("steps", steps, 1), ("seed", seed, 0),
            ("max_open", max_open, 1), ("blur_every", blur_every, 0),
        ):  # fmt: skip
            common.check_count(name, value, low)
        common.check_budget(budget_ms)
        if not step_size >= 0 or not blur >= 0:
            raise ValueError(f"step_size and blur should be at least 0, got {step_size} and {blur}")
        self.size = (bank.height, bank.width)
        self.max_open = max_open
        self._bank, self._sha = bank, common.bank_digest(bank)
        self._per_batch, self._batches, self._steps, self._seed = per_batch, batches, steps, seed
        self._budget_ms = budget_ms
        self._options: dict[str, Any] = {
            "minimize": minimize,
            "step_size": step_size,
            "blur": blur,
            "blur_every": blur_every,
            "grey": grey,
        }
        self._clock: Clock = SystemClock() if clock is None else clock
        self._ledger = common.Ledger("synthesized images")
        self._step_ms: float | None = None

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "source": "synthesis",
            "bank": self._sha,
            "size": list(self.size),
            "per_batch": self._per_batch,
            "batches": self._batches,
            "steps": self._steps,
            "budget_ms": self._budget_ms,
            "seed": self._seed,
            "max_open": self.max_open,
            **self._options,
        }

    def propose(self, decision: Any = None) -> Proposal | None:
        """See `Source`.

        Raises:
            ValueError: a decision of another source.
        """
        first = self._ledger.proposed * self._per_batch
        if self._ledger.proposed == self._batches:
            return None
        which = [
            (i % len(self._bank), self._seed + i // len(self._bank)) for i in range(first, first + self._per_batch)
        ]
        if decision is None:
            decision = {"steps": self._affordable(which)}
        steps = decision.get("steps") if isinstance(decision, dict) else None
        if type(steps) is not int or not 1 <= steps <= self._steps:
            raise common.foreign(f'"steps" should be one of 1..{self._steps}')
        self._ledger.put(self._per_batch, str(steps))
        return Proposal(
            count=self._per_batch,
            render=lambda: self._render(which, steps),
            labels=[f"{self._bank.names[model]}:{start}" for model, start in which],
            decision=decision,
        )

    def learn(self, scores: Double, responses: Double) -> None:
        """See `Source`.

        Raises:
            RuntimeError, ValueError: nothing is out, or another number of scores.
        """
        self._ledger.take(scores)

    def digest(self) -> str:
        """See `Source`."""
        return self._ledger.digest()

    def _affordable(self, which: list[tuple[int, int]]) -> int:
        if self._budget_ms is None:
            return self._steps
        if self._step_ms is None:
            self._climb(which, 1)  # whatever is done once only
            self._climb(which, _TIMED_STEPS)
        assert self._step_ms is not None
        fitting = self._steps if self._step_ms == 0 else self._budget_ms / self._step_ms
        return int(max(1, min(self._steps, fitting)))

    def _render(self, which: list[tuple[int, int]], steps: int) -> Images:
        return np.rint(self._climb(which, steps)).astype(np.uint8)

    def _climb(self, which: list[tuple[int, int]], steps: int) -> NDArray[np.float32]:
        """Images [n, H, W, 3], levels 0..255; notes how long a step took."""
        begin = self._clock.monotonic_ns()
        models = [dataclasses.replace(self._bank.models[m], name=f"{i}") for i, (m, _) in enumerate(which)]
        bank = ModelBank(models).to(self._bank.device)
        start = np.stack([noise_image(bank, seed) for _, seed in which])
        images = maximize(bank, steps=steps, start=start, **self._options).images
        self._step_ms = (self._clock.monotonic_ns() - begin) / 1e6 / steps
        return images
