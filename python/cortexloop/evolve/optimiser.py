"""The optimiser's side of an evolution: ask for codes, tell scores. n independent problems run as one batch.

Randomness is counter-based: what problem i draws in generation g depends on (seed, problem id, g) alone. So the same
seed gives the same run for any split of problems into batches, any number of threads, and after any resume.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

MAX_SEED = 2**64 - 1
MAX_PROBLEM = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of all codes shown so far, by the scores that were told (noisy ones if they are).

    codes: [n, dim], NaN before anything was shown. scores: float64 [n], NaN before. generation: int64 [n], -1 before.
    """

    codes: Tensor
    scores: Tensor
    generation: Tensor


@dataclasses.dataclass(frozen=True)
class Selection:
    """A generation and what its scores say. Codes that were not shown come last in every order.

    codes: [n, m, dim], as they count for the update. scores: float64 [n, m], higher is better, NaN where not shown.
    order: int64 [n, m], positions from best to worst; ties by position. rank: int64 [n, m], its inverse.
    shown: int64 [n], how many have a score. first: whether these are the codes of `first_generation`.
    """

    codes: Tensor
    scores: Tensor
    order: Tensor
    rank: Tensor
    shown: Tensor
    first: bool

    @property
    def active(self) -> Tensor:
        """Problems of which anything was shown, bool [n]; the others keep their state."""
        return self.shown > 0

    def best_first(self) -> Tensor:
        """The codes from best to worst, [n, m, dim]."""
        return self.codes.gather(1, self.order[..., None].expand_as(self.codes))


class Optimiser(abc.ABC):
    """Batched ask and tell.

        codes = optimiser.ask()          # [n, population, dim]
        optimiser.tell(scores)           # [n, population], NaN = not shown

    Args:
        dim: length of a code.
        problems: how many independent problems, or the ids of their random streams (distinct, below 2^32): problems
            (128, 129) run bit for bit as the last two of `problems=130` do.
        population: codes per generation, at least 2.
        seed: 0 to 2^64 - 1.
        minimise: look for low scores instead of high ones.
        first_generation: codes [k, dim] or [n, k, dim] to show as generation 0; sampled like all others if None.
        device, dtype: of the codes. float32 runs in the C++ kernels where they are built; float64 in plain torch.

    Raises:
        ValueError, TypeError: any argument outside of what is said here.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold the state, tensors whose first axis is the problem."""
    PARTS: ClassVar[tuple[str, ...]] = ("settings", "generation", "asked", "tensors")
    """What `state_dict` has."""

    def __init__(
        self,
        dim: int,
        *,
        problems: int | Sequence[int] = 1,
        population: int,
        seed: int = 0,
        minimise: bool = False,
        first_generation: ArrayLike | Tensor | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dim = whole("dim", dim, 1, 2**31 - 1)
        self.population = whole("population", population, 2, 2**24 - 1)
        self.seed = whole("seed", seed, 0, MAX_SEED)
        self.problems = _problem_ids(problems)
        self.n = len(self.problems)
        self.minimise = bool(minimise)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype should be torch.float32 or torch.float64, got {dtype}")
        self.dtype = dtype
        self.device = torch.device(device)
        self.generation = 0
        """Generations told so far."""
        self._ids = torch.tensor(self.problems, dtype=torch.int64, device=self.device)
        self._first = None if first_generation is None else self.codes_like("first_generation", first_generation)
        self._injected: Tensor | None = None
        self._pending: Tensor | None = None
        self._room: Tensor | None = None
        """Where `_sample` may write its result; it may as well return another tensor."""
        self._best_codes = torch.full((self.n, self.dim), torch.nan, dtype=dtype, device=self.device)
        self._best_scores = torch.full((self.n,), torch.nan, dtype=torch.float64, device=self.device)
        self._best_generation = torch.full((self.n,), -1, dtype=torch.int64, device=self.device)

    @property
    @abc.abstractmethod
    def centre(self) -> Tensor:
        """The current estimate of the optimum, [n, dim]."""

    @abc.abstractmethod
    def _sample(self) -> Tensor:
        """The codes of this generation, [n, m, dim] with m of `_sampled`; a pure function of the state."""

    @abc.abstractmethod
    def _update(self, selection: Selection) -> None:
        """Learn from a generation; problems that are not active keep their state."""

    def _settings(self) -> dict[str, Any]:
        """What the subclass was made with, JSON-able."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Everything that defines a run but its start, JSON-able; a state can be loaded where all of it is equal."""
        return {
            "optimiser": type(self).__name__,
            "dim": self.dim,
            "problems": list(self.problems),
            "population": self.population,
            "seed": self.seed,
            "minimise": self.minimise,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._settings(),
        }

    @property
    def best(self) -> Best:
        """The best codes shown so far, copies."""
        return Best(self._best_codes.clone(), self._best_scores.clone(), self._best_generation.clone())

    def ask(self, out: Tensor | None = None) -> Tensor:
        """The codes to show next, [n, m, dim]: the same until they are told. Do not write into them.

        m is `population`; in generation 0 the number of codes in `first_generation`, if that was given.

        Args:
            out: write the codes here and return this tensor. For large batches: the hundreds of megabytes that a
                generation may take then come from the system once, and not in every generation.

        Raises:
            ValueError: `out` has another shape, dtype or device, or is not contiguous.
        """
        if out is not None and self._pending is not out:
            return self._ask_into(out)
        if self._pending is None:
            codes = self._first if self.generation == 0 and self._first is not None else self._sample()
            if self._injected is not None:
                codes = codes.clone()
                codes[:, : self._injected.shape[1]] = self._injected
            self._pending = codes
        return self._pending

    def _ask_into(self, out: Tensor) -> Tensor:
        m = self.codes_next
        if (tuple(out.shape), out.dtype, out.device) != ((self.n, m, self.dim), self.dtype, self._best_codes.device):
            raise ValueError(
                f"out should be {self.dtype} [{self.n}, {m}, {self.dim}] on {self.device}, "
                f"got {out.dtype} {list(out.shape)} on {out.device}"
            )
        if not out.is_contiguous():
            raise ValueError(f"out should be contiguous, got strides {list(out.stride())}")
        self._room = out
        try:
            codes = self.ask()
        finally:
            self._room = None
        if codes.data_ptr() != out.data_ptr():
            out.copy_(codes)
        self._pending = out
        return out

    @property
    def codes_next(self) -> int:
        """How many codes of each problem the next generation has (the one asked for, until it is told)."""
        if self.generation == 0 and self._first is not None:
            return self._first.shape[1]
        return self._sampled()

    def _sampled(self) -> int:
        """How many codes `_sample` returns now."""
        return self.population

    def inject(self, codes: ArrayLike | Tensor) -> None:
        """Put codes of your own in the first places of the next generation.

        Args:
            codes: [k, dim] or [n, k, dim], k at most the size of that generation. Later calls replace earlier ones.

        Raises:
            RuntimeError: the generation was asked for already.
            ValueError, TypeError: wrong shape or type, NaN or infinity.
        """
        if self._pending is not None:
            raise RuntimeError("codes were asked for and not told yet; inject before ask()")
        injected = self.codes_like("codes", codes)
        if injected.shape[1] > self.codes_next:
            raise ValueError(f"the next generation has {self.codes_next} codes, got {injected.shape[1]} to inject")
        self._injected = injected

    def _as_counted(self, codes: Tensor, injected: int) -> Tensor:
        """The codes as they enter the update; the first `injected` ones were not sampled."""
        return codes

    def tell(self, scores: ArrayLike | Tensor) -> None:
        """Give the scores of the codes last asked for.

        Args:
            scores: [n, m], or [n, m, repeats], which are averaged without the NaNs. NaN: not shown. A code without any
                score takes no part; a problem without any keeps its state and draws new codes.

        Raises:
            RuntimeError: nothing was asked for.
            ValueError, TypeError: another shape, infinity, or not real numbers; nothing changes.
        """
        if self._pending is None:
            raise RuntimeError("there is nothing to tell about: call ask() first")
        shown_codes = self._pending
        values = self._read_scores(scores, shown_codes.shape[1])
        oriented = -values if self.minimise else values
        missing = oriented.isnan()
        order = oriented.masked_fill(missing, -torch.inf).argsort(dim=1, descending=True, stable=True)
        # NaN has the key of the lowest score; a second stable sort puts the codes not shown behind all others.
        order = order.gather(1, missing.gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
        position = torch.arange(order.shape[1], device=self.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, position)
        injected = 0 if self._injected is None else self._injected.shape[1]
        selection = Selection(
            codes=self._as_counted(shown_codes, injected),
            scores=oriented,
            order=order,
            rank=rank,
            shown=(~missing).sum(1),
            first=self.generation == 0 and self._first is not None,
        )
        self._keep_best(selection, shown_codes, values)
        self._update(selection)
        self._pending = self._injected = None
        self.generation += 1

    def _read_scores(self, scores: ArrayLike | Tensor, m: int) -> Tensor:
        """float64 [n, m] on the device, repeats averaged."""
        values = _real("scores", scores)
        if values.shape[:2] != (self.n, m) or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] < 1):
            raise ValueError(
                f"scores should be [{self.n}, {m}] (problems, codes asked for) or [{self.n}, {m}, repeats], "
                f"got {list(values.shape)}"
            )
        # Only what is in host memory is looked at: reading from another device would wait for it.
        if values.device.type == "cpu" and values.isinf().any():
            raise ValueError("scores should be finite, or NaN for a code that was not shown; got infinity")
        values = values.to(self.device, torch.float64).contiguous()
        return values if values.ndim == 2 else _mean_of_repeats(values)

    def _keep_best(self, selection: Selection, shown_codes: Tensor, values: Tensor) -> None:
        first = selection.order[:, :1]
        score = values.gather(1, first)[:, 0]
        known = self._best_scores
        better = selection.active & (known.isnan() | ((score < known) if self.minimise else (score > known)))
        codes = shown_codes.gather(1, first[..., None].expand(-1, -1, self.dim))[:, 0]
        self._best_codes = torch.where(better[:, None], codes, self._best_codes)
        self._best_scores = torch.where(better, score, known)
        self._best_generation = torch.where(better, self.generation, self._best_generation)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the same bits: settings, generation, and copies of the tensors."""
        tensors = {name: getattr(self, name).clone() for name in self._tensor_names()}
        if self._injected is not None:
            tensors["_injected"] = self._injected.clone()
        if self._first is not None and self.generation == 0:
            tensors["_first"] = self._first.clone()
        return {
            "settings": self.settings(),
            "generation": self.generation,
            "asked": self._pending is not None,
            "tensors": tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of an optimiser with the same settings. Nothing changes if it does not fit.

        Raises:
            ValueError: settings differ (the message names the first that does), or something is missing or of the wrong
                shape.
        """
        ours = self.settings()
        theirs = state.get("settings", ours)
        for name in (*ours, *sorted(theirs.keys() - ours.keys())):
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the state belongs to another run: its {name} is {theirs.get(name)!r}, "
                    f"here it is {ours.get(name)!r}"
                )
        for part in self.PARTS:
            if part not in state:
                raise ValueError(f"the state lacks {part!r}")
        tensors: dict[str, Tensor] = state["tensors"]
        for name in self._tensor_names():
            if name not in tensors:
                raise ValueError(f"the state lacks the tensor {name!r}")
            expected, got = getattr(self, name).shape, tensors[name].shape
            if not self._fits(name, got):
                raise ValueError(f"the state's {name} should have the shape {list(expected)}, got {list(got)}")
        injected, first = (
            self.codes_like(name, tensors[name]) if name in tensors else None for name in ("_injected", "_first")
        )
        for name in self._tensor_names():
            here: Tensor = getattr(self, name)
            setattr(self, name, tensors[name].to(here.device, here.dtype, copy=True))
        self._injected, self._first = injected, first
        self.generation = int(state["generation"])
        self._pending = None
        if state["asked"]:
            self.ask()

    def _tensor_names(self) -> tuple[str, ...]:
        return (*self.STATE, "_best_codes", "_best_scores", "_best_generation")

    def _fits(self, name: str, shape: torch.Size) -> bool:
        """Whether a loaded tensor may replace the one here."""
        expected: Tensor = getattr(self, name)
        return shape == expected.shape

    def codes_like(self, name: str, codes: ArrayLike | Tensor) -> Tensor:
        """Codes [n, k, dim] of this optimiser's device and dtype from [k, dim] or [n, k, dim].

        Raises:
            ValueError, TypeError: wrong shape or type, NaN or infinity.
        """
        tensor = self._numbers(name, codes)
        each = tensor[None].expand(self.n, -1, -1) if tensor.ndim == 2 else tensor
        if each.ndim != 3 or each.shape[0] != self.n or each.shape[1] < 1 or each.shape[2] != self.dim:
            raise ValueError(
                f"{name} should be [k, {self.dim}] or [{self.n}, k, {self.dim}] with k >= 1, got {list(tensor.shape)}"
            )
        return each.clone(memory_format=torch.contiguous_format)

    def code_per_problem(self, name: str, code: ArrayLike | Tensor | None) -> Tensor:
        """One code for each problem, [n, dim], from [dim] or [n, dim]; zeros for None."""
        if code is None:
            return torch.zeros(self.n, self.dim, dtype=self.dtype, device=self.device)
        tensor = self._numbers(name, code)
        each = tensor[None].expand(self.n, -1) if tensor.ndim == 1 else tensor
        if tuple(each.shape) != (self.n, self.dim):
            raise ValueError(f"{name} should be [{self.dim}] or [{self.n}, {self.dim}], got {list(tensor.shape)}")
        return each.clone(memory_format=torch.contiguous_format)

    def _numbers(self, name: str, values: ArrayLike | Tensor) -> Tensor:
        tensor = _real(name, values).to(self.device, self.dtype)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} should be finite, got NaN or infinity")
        return tensor


def keep(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the problem is active, else `old`; active bool [n], the others [n, ...]."""
    return torch.where(active.view(-1, *(1,) * (new.ndim - 1)), new, old)


def whole(name: str, value: object, low: int, high: int) -> int:
    """A whole number within bounds.

    Raises:
        TypeError: not a whole number. ValueError: out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} should be a whole number, got {value!r}")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name} should be from {low} to {high}, got {value}")
    return number


def positive(name: str, value: object, *, zero: bool = False) -> float:
    """A finite positive number (or 0 if that is allowed).

    Raises:
        TypeError: not a number. ValueError: out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} should be a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and (number > 0 or (zero and number == 0))):
        raise ValueError(f"{name} should be a finite number {'of at least' if zero else 'above'} 0, got {value}")
    return number


def fraction(name: str, value: object, highest: int = 1) -> float:
    """A number from 0 to `highest`.

    Raises:
        TypeError: not a number. ValueError: out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} should be a number, got {value!r}")
    number = float(value)
    if not 0 <= number <= highest:
        raise ValueError(f"{name} should be from 0 to {highest}, got {value}")
    return number


def _real(name: str, values: ArrayLike | Tensor) -> Tensor:
    try:
        tensor = values.detach() if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} should be an array of real numbers, got {values!r:.80}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} should be real numbers, got {tensor.dtype}")
    return tensor


def _mean_of_repeats(values: Tensor) -> Tensor:
    """Mean over the last axis without the NaNs, NaN where there is nothing else; summed in order."""
    shown = ~values.isnan()
    total = torch.zeros_like(values[..., 0])
    for repeat in range(values.shape[2]):
        total = torch.where(shown[..., repeat], total + values[..., repeat], total)
    return total / shown.sum(2)


def _problem_ids(problems: object) -> tuple[int, ...]:
    if isinstance(problems, numbers.Integral):
        return tuple(range(whole("problems", problems, 1, 2**31 - 1)))
    listed = problems.tolist() if isinstance(problems, (np.ndarray, Tensor)) else problems
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        raise TypeError(f"problems should be a number or a sequence of ids, got {problems!r}")
    ids = tuple(whole("problems", problem, 0, MAX_PROBLEM) for problem in listed)
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"problems should be at least one id, each once, got {list(ids)[:8]}")
    return ids
