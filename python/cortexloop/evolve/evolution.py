"""The closed loop, in silico or around a rig's callback: generate images, place and score them, tell the optimiser."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cortexloop.evolve import checkpoint as checkpoints
from cortexloop.evolve.generators import Generator
from cortexloop.evolve.noise import Noise
from cortexloop.evolve.objectives import Objective
from cortexloop.evolve.optimiser import MAX_SEED, Optimiser, whole
from cortexloop.evolve.placement import Placement, to_uint8

IMAGES_AT_ONCE = 128
"""Images rendered and scored together; bounds memory, changes no result."""

NOISE_STREAM = 128
REFERENCE_NOISE_STREAM = 129
"""Streams of the trial-to-trial noise of evolved and of reference images; optimisers use streams below 128."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What happened in one generation.

    index: 0 is the first. scores: float64 [n, m], as told (mean over repeats), NaN = not shown. clean: float64 [n, m],
    before noise; None where a callback scored. reference_scores: float64 [n, R], of the reference images in this
    generation, with noise. code_norm: float64 [n], mean Euclidean length of the codes. seconds: for "generate", "score"
    and "optimise".
    """

    index: int
    scores: NDArray[np.float64]
    clean: NDArray[np.float64] | None
    reference_scores: NDArray[np.float64] | None
    code_norm: NDArray[np.float64]
    seconds: dict[str, float]


Callback = Callable[["Evolution", Generation], "bool | None"]
Scorer = Callable[[Tensor, int], "ArrayLike | Tensor"]


class Evolution:
    """Many closed-loop optimisations as one batch: generate, place, score, update.

        evolution = Evolution(BankObjective(bank, neurons), optimiser, generator)
        evolution.run(75)

    Args:
        objective: an `Objective` with as many problems as the optimiser, or a callable for a rig: it gets images uint8
            [n, m + R, H, W, 3] (the R references last) and the generation, and returns scores [n, m + R] or
            [n, m + R, repeats], NaN = not shown.
        optimiser: who proposes codes.
        generator: who makes images of them; its code length is the optimiser's.
        placement: where the image goes on the screen or on the models' input; as generated if None.
        references: images uint8 [R, H, W, 3] to show in every generation, of the size that is shown.
        noise: trial-to-trial variability added to an `Objective`'s scores; none if None.
        repeats: noisy trials per image and generation.
        seed: of the noise.

    Raises:
        ValueError, TypeError: parts that do not fit each other; the message says which.
    """

    def __init__(
        self,
        objective: Objective | Scorer,
        optimiser: Optimiser,
        generator: Generator,
        *,
        placement: Placement | None = None,
        references: ArrayLike | Tensor | None = None,
        noise: Noise | None = None,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        self.objective, self.optimiser, self.generator = objective, optimiser, generator
        self.placement, self.noise = placement, noise
        self.repeats = whole("repeats", repeats, 1, 10_000)
        self.seed = whole("seed", seed, 0, MAX_SEED)
        self.history: list[Generation] = []
        """All generations so far, oldest first."""
        self._updating = False
        self._codes: Tensor | None = None
        if generator.dim != optimiser.dim:
            raise ValueError(
                f"the generator takes codes of length {generator.dim}, the optimiser's have length {optimiser.dim}"
            )
        self.size = (generator.height, generator.width) if placement is None else placement.canvas
        """Height and width of the images shown."""
        if isinstance(objective, Objective):
            if objective.n != optimiser.n:
                raise ValueError(
                    f"the objective scores {objective.n} problems, the optimiser has {optimiser.n}; "
                    f"give one neuron for each"
                )
            if objective.size is not None and objective.size != self.size:
                raise ValueError(
                    f"the models take {objective.size[0]} x {objective.size[1]} pixels, images shown have "
                    f"{self.size[0]} x {self.size[1]}; make the generator of that size, or give a placement"
                )
        elif noise is not None or repeats != 1:
            raise ValueError("noise and repeats belong to objectives in silico; a callback returns what was recorded")
        self.references = None if references is None else self._read_references(references)
        self._clean_references: Tensor | None = None

    def _read_references(self, references: ArrayLike | Tensor) -> Tensor:
        images = references if isinstance(references, Tensor) else torch.as_tensor(np.array(references))
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (*self.size, 3):
            raise ValueError(
                f"references should be uint8 [R, {self.size[0]}, {self.size[1]}, 3], "
                f"got {images.dtype} {list(images.shape)}"
            )
        return images.to(self.optimiser.device)

    def images(self, codes: Tensor) -> Tensor:
        """Placed images of codes [..., dim]: float32 [..., 3, H, W] in [0, 1]."""
        images = self.generator(codes.to(torch.float32))
        return images if self.placement is None else self.placement(images)

    def render(self, codes: Tensor) -> Tensor:
        """What is shown for codes [..., dim]: uint8 [..., H, W, 3]."""
        flat = codes.reshape(-1, codes.shape[-1])
        parts = [to_uint8(self.images(flat[i : i + IMAGES_AT_ONCE])) for i in range(0, len(flat), IMAGES_AT_ONCE)]
        shown = torch.cat(parts) if parts else flat.new_zeros((0, *self.size, 3), dtype=torch.uint8)
        return shown.view(*codes.shape[:-1], *self.size, 3)

    def clean_scores(self, codes: Tensor) -> Tensor:
        """Noiseless scores of codes [n, m, dim] by an `Objective`: float64 [n, m].

        Raises:
            TypeError: a callback scores, which has no clean scores.
        """
        if not isinstance(self.objective, Objective):
            raise TypeError("a callback has no clean scores; show the images again")
        clean, _ = self._score_in_silico(self.objective, codes)
        return clean

    def step(self) -> Generation:
        """One generation.

        Raises:
            ValueError: the objective returned another shape, infinity, or a clean score that is NaN.
            RuntimeError: an earlier update was interrupted half way; load a checkpoint.
        """
        self._refuse_half_updates()
        clock = time.perf_counter
        start = clock()
        codes = self._ask()
        asked = clock()
        index = self.optimiser.generation
        clean: Tensor | None = None
        references: Tensor | None = None
        if isinstance(self.objective, Objective):
            clean, generating = self._score_in_silico(self.objective, codes)
            told = self._trials(clean, index, NOISE_STREAM)
            if self.references is not None:
                references = self._trials(self._reference_responses(self.objective), index, REFERENCE_NOISE_STREAM)
        else:
            told, references, generating = self._score_by_callback(self.objective, codes, index)
        scored = clock()
        self._updating = True
        try:
            self.optimiser.tell(told)
        except (TypeError, ValueError):
            self._updating = False  # refused scores have changed nothing: the same generation can be shown again
            raise
        self._updating = False
        norm = torch.linalg.vector_norm(codes.double(), dim=-1).mean(1)
        end = clock()
        generation = Generation(
            index=index,
            scores=_numpy(_over_repeats(told)),
            clean=None if clean is None else _numpy(clean),
            reference_scores=None if references is None else _numpy(_over_repeats(references)),
            code_norm=_numpy(norm),
            seconds={
                "generate": generating,
                "score": scored - asked - generating,
                "optimise": (asked - start) + (end - scored),
            },
        )
        self.history.append(generation)
        return generation

    def _ask(self) -> Tensor:
        """The codes of this generation, in memory that the next one uses again."""
        optimiser = self.optimiser
        shape = (optimiser.n, optimiser.codes_next, optimiser.dim)
        if self._codes is None or tuple(self._codes.shape) != shape:
            self._codes = torch.empty(shape, dtype=optimiser.dtype, device=optimiser.device)
        return optimiser.ask(out=self._codes)

    def _score_in_silico(self, objective: Objective, codes: Tensor) -> tuple[Tensor, float]:
        """(clean scores float64 [n, m], seconds spent on generating), some problems at a time."""
        n, m = codes.shape[:2]
        at_once = max(1, IMAGES_AT_ONCE // m)
        parts: list[Tensor] = []
        generating = 0.0
        for first in range(0, n, at_once):
            group = range(first, min(n, first + at_once))
            start = time.perf_counter()
            images = self.images(codes[group.start : group.stop])
            if not objective.wants_float:
                images = to_uint8(images)
            generating += time.perf_counter() - start
            values = objective.score(images, group)
            if tuple(values.shape) != (len(group), m):
                raise ValueError(f"the objective should return [{len(group)}, {m}] scores, got {list(values.shape)}")
            parts.append(values.to(self.optimiser.device, torch.float64))
        clean = torch.cat(parts)
        if bool(clean.isnan().any()):
            raise ValueError("the objective returned NaN for an image; in silico every image has a score")
        return clean, generating

    def _trials(self, clean: Tensor, index: int, stream: int) -> Tensor:
        """[n, m] without noise, [n, m, repeats] with."""
        if self.noise is None:
            return clean
        ids = torch.tensor(self.optimiser.problems, dtype=torch.int64, device=clean.device)
        return self.noise(clean, ids, index, self.repeats, self.seed, stream)

    def _reference_responses(self, objective: Objective) -> Tensor:
        """Clean scores of the references, float64 [n, R]; they do not change."""
        if self._clean_references is None:
            assert self.references is not None
            images = self.references
            if objective.wants_float:
                images = images.permute(0, 3, 1, 2).float() / 255
            rows = [
                objective.score(images[None], [problem]).to(self.optimiser.device, torch.float64)
                for problem in range(self.optimiser.n)
            ]
            self._clean_references = torch.cat(rows)
        return self._clean_references

    def _score_by_callback(self, scorer: Scorer, codes: Tensor, index: int) -> tuple[Tensor, Tensor | None, float]:
        """(scores of the codes, scores of the references or None, seconds spent on generating)."""
        start = time.perf_counter()
        images = self.render(codes)
        if self.references is not None:
            shown = self.references[None].expand(codes.shape[0], -1, -1, -1, -1)
            images = torch.cat((images, shown), dim=1)
        generating = time.perf_counter() - start
        returned = scorer(images, index)
        values = returned if isinstance(returned, Tensor) else torch.as_tensor(np.asarray(returned))
        if values.ndim not in (2, 3) or values.shape[:2] != images.shape[:2]:
            raise ValueError(
                f"the callback should return scores [{images.shape[0]}, {images.shape[1]}], or with a third axis of "
                f"repeats, got {list(values.shape)}"
            )
        values = values.to(self.optimiser.device, torch.float64)
        m = codes.shape[1]
        return values[:, :m], None if self.references is None else values[:, m:], generating

    def run(
        self,
        generations: int,
        *,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 1,
        patience: int | None = None,
    ) -> list[Generation]:
        """Run generations until there are `generations` of them in all, a callback returns True, or patience runs out.

        Args:
            generations: in all, counted from the beginning, so that the same call resumes a loaded run.
            callbacks: called after each generation with (evolution, generation).
            checkpoint: file to save to every `every` generations and at the end, atomically.
            patience: stop when for so many generations no problem's mean score has risen above (when minimising: fallen
                below) its best.

        Returns:
            The generations run by this call.

        Raises:
            ValueError, RuntimeError: as for `step`. OSError: the checkpoint could not be written.
        """
        whole("generations", generations, 0, 2**32 - 1)
        whole("every", every, 1, 2**31 - 1)
        if patience is not None:
            whole("patience", patience, 1, 2**31 - 1)
        done: list[Generation] = []
        stopped = False
        while not stopped and self.optimiser.generation < generations:
            generation = self.step()
            done.append(generation)
            for callback in callbacks:
                stopped |= callback(self, generation) is True
            stopped |= patience is not None and self.generations_without_gain() >= patience
            if checkpoint is not None and self.optimiser.generation % every == 0:
                self.save(checkpoint)
        if checkpoint is not None and done and self.optimiser.generation % every:
            self.save(checkpoint)
        return done

    def generations_without_gain(self) -> int:
        """How many generations ago any problem last improved on its best mean score; 0 if in the last one."""
        if not self.history:
            return 0
        sign = -1 if self.optimiser.minimise else 1
        means = np.stack([_mean_shown(sign * g.scores) for g in self.history])  # [G, n]
        best = np.maximum.accumulate(means, axis=0)
        gained = np.flatnonzero((best[1:] > best[:-1]).any(axis=1))
        return len(self.history) - 1 - (int(gained[-1]) + 1 if gained.size else 0)

    def settings(self) -> dict[str, Any]:
        """Everything that defines the run, JSON-able; a checkpoint can be loaded where all of it is equal."""
        objective = self.objective.settings() if isinstance(self.objective, Objective) else {"objective": "callback"}
        return {
            "optimiser": self.optimiser.settings(),
            "generator": self.generator.settings(),
            "objective": objective,
            "placement": None if self.placement is None else self.placement.settings(),
            "references": None if self.references is None else checkpoints.digest(self.references),
            "noise": None if self.noise is None else self.noise.settings(),
            "repeats": self.repeats,
            "seed": self.seed,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically: optimiser, history, settings. Readable with safetensors.

        Raises:
            RuntimeError: an update was interrupted half way; the last checkpoint before it is the one to go on from.
            OSError: the file cannot be written.
        """
        self._refuse_half_updates()
        checkpoints.save(path, self.settings(), self.optimiser.state_dict(), self.history)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint of a run with the same settings, to the same bits as if it had never stopped.

        Raises:
            ValueError: not a checkpoint, or of a run with other settings (the message names the first difference).
            OSError: the file cannot be read.
        """
        state, history = checkpoints.load(path, self.settings())
        self.optimiser.load_state_dict(state)
        self.history = history
        self._updating = False

    def _refuse_half_updates(self) -> None:
        if self._updating:
            raise RuntimeError(
                "the last update was interrupted half way and this run's state is lost; load a checkpoint"
            )


def _over_repeats(values: Tensor) -> Tensor:
    return values if values.ndim == 2 else values.nanmean(dim=2)


def _mean_shown(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the codes that were shown, [n]; -inf where none was."""
    shown = np.isfinite(scores)
    total = np.where(shown, scores, 0).sum(1)
    mean: NDArray[np.float64] = np.where(shown.any(1), total / np.maximum(shown.sum(1), 1), -np.inf)
    return mean


def _numpy(values: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.double().cpu().numpy()
    return array
