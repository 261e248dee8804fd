"""Run the evolutions of an experiment: part by part, each resumable, with live progress and a soft Ctrl-C."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import cortexloop as cl
from cortexloop import evolve
from cortexloop.cli.console import bad_input, stderr
from cortexloop.cli.evolution.findings import STAGES, TRACES, Layout
from cortexloop.cli.evolution.options import Settings
from cortexloop.cli.evolution.store import RunFolder

GROUP = 32
"""Evolutions that run together at most. Results do not depend on it; memory and the size of checkpoints do."""

FRAMES = 4
"""Generations, evenly spaced from the first to the last, of which the best image is kept."""

WORKING_BYTES = 1 << 30
"""About how much memory the codes of a group may take, with all that an optimiser computes of them."""


class InterruptedRunError(Exception):
    """Ctrl-C; what was done until then can be resumed."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that evolutions are made of."""

    settings: Settings
    bank: cl.ModelBank
    generator: evolve.Generator
    placement: evolve.Placement | None
    references: NDArray[np.uint8] | None
    backend: str

    def optimiser(self, name: str, layout: Layout, group: int) -> evolve.Optimiser:
        """A new optimiser for a group; its random numbers depend on neuron names and seeds, not on the group."""
        settings = self.settings
        return evolve.OPTIMISERS[name](
            self.generator.dim,
            problems=self.streams(layout)[group * layout.group : (group + 1) * layout.group],
            population=settings.population,
            generations=settings.generations,
            seed=0,
            minimise=settings.minimise,
        )

    def streams(self, layout: Layout) -> list[int]:
        """The random stream of every problem: a neuron evolves the same way whichever others are chosen with it."""
        taken: dict[int, None] = {}
        for name in self.bank.names:
            for seed in range(self.settings.seed, self.settings.seed + layout.seeds):
                stream = stream_id(name, seed)
                while stream in taken:
                    stream = (stream + 1) % 2**32
                taken[stream] = None
        return list(taken)

    def neurons(self, layout: Layout, group: int) -> list[int]:
        return [problem // layout.seeds for problem in layout.members(group)]

    def evolution(self, condition: tuple[str, float], layout: Layout, group: int) -> evolve.Evolution:
        """A group of evolutions under one condition, before its first generation."""
        settings = self.settings
        name, level = condition
        noise: evolve.MultiplicativeNoise | evolve.PoissonNoise | None = None
        if not settings.quiet(level):
            poisson = settings.noise_model == "poisson"
            noise = evolve.PoissonNoise(level) if poisson else evolve.MultiplicativeNoise(level)
        neurons = self.neurons(layout, group)
        baseline = self.baseline()[neurons].astype(np.float32)
        return evolve.Evolution(
            evolve.BankObjective(self.bank, neurons, precision=settings.precision, baseline=baseline),
            self.optimiser(name, layout, group),
            self.generator,
            placement=self.placement,
            references=self.references,
            noise=noise,
            repeats=settings.repeats,
            seed=0,
        )

    def responses(self, images: NDArray[np.uint8], neurons: list[int]) -> NDArray[np.float64]:
        """Image i through model neurons[i], [n]."""
        found = cl.responses(images, self.bank, pairs=neurons, precision=self.settings.precision, backend=self.backend)
        return np.asarray(found, np.float64)

    def baseline(self) -> NDArray[np.float64]:
        """What scores are counted from, [N]: noise changes with it, and nothing else.

        Models of recorded neurons often have an arbitrary zero; noise in proportion to it would mean nothing.
        """
        return self.grey() if self.settings.baseline == "grey" else np.zeros(len(self.bank))

    def grey(self) -> NDArray[np.float64]:
        """Response of every model to a screen of mid-grey (128), [N]."""
        screen = np.full((1, self.bank.height, self.bank.width, 3), 128, np.uint8)
        found = cl.responses(screen, self.bank, precision=self.settings.precision, backend=self.backend)
        return np.asarray(found[0], np.float64)


def stream_id(name: str, seed: int) -> int:
    """32 bits from a neuron's name and a seed."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{seed}".encode(), digest_size=4).digest(), "little")


def group_size(experiment: Experiment) -> int:
    """How many evolutions to run together."""
    codes = 8 * 4 * experiment.settings.population * experiment.generator.dim
    return max(1, min(GROUP, WORKING_BYTES // codes))


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """That many threads of torch, if a number is given; within the block it may change, and is put back at its end."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_torch_threads(generator: evolve.Generator) -> None:
    """One thread of torch instead of the present number, unless this many are always faster by far.

    A formula is many small steps, after each of which all threads wait for the last. Where another program takes one
    of the processors, that can last a hundred times as long as a single thread takes, and it comes and goes.
    """
    many = torch.get_num_threads()
    if many == 1:
        return
    seconds = {}
    codes = torch.zeros(32, generator.dim)
    for count in (1, many):
        torch.set_num_threads(count)
        generator(codes)
        taken = []
        for _ in range(9):
            begin = time.perf_counter()
            generator(codes)
            taken.append(time.perf_counter() - begin)
        seconds[count] = sorted(taken)
    torch.set_num_threads(many if seconds[many][-1] < 0.5 * seconds[1][len(taken) // 2] else 1)


# ------------------------------------------------------------------------------------------------- running


def run_parts(
    experiment: Experiment,
    layout: Layout,
    folder: RunFolder,
    *,
    every: int,
    quiet: bool,
) -> None:
    """Run what has not been run yet: every condition, group by group.

    Args:
        every: generations between checkpoints.
        quiet: no progress.

    Raises:
        InterruptedRunError: Ctrl-C; a checkpoint was written.
    """
    settings = experiment.settings
    conditions = settings.conditions()
    total = len(conditions) * layout.problems * settings.generations
    with _soft_interrupt() as interrupted, _live(total, quiet=quiet) as live, cl.use_backend(experiment.backend):
        for c, condition in enumerate(conditions):
            what = f"{condition[0]}, {settings.noise_label(condition[1])}" if len(conditions) > 1 else condition[0]
            for group in range(layout.groups):
                if folder.part(c, group).exists():
                    live.skip(len(layout.members(group)) * settings.generations)
                    continue
                live.start(what, settings, experiment.baseline()[experiment.neurons(layout, group)])
                evolution = experiment.evolution(condition, layout, group)
                frames = _run_part(evolution, folder, (c, group), settings, every, live, interrupted)
                folder.save_part(c, group, _part(experiment, evolution, frames, experiment.neurons(layout, group)))


Frames = dict[str, NDArray[Any]]
"""Best codes of some generations: "frame-000074" -> [n, dim]."""


def _run_part(
    evolution: evolve.Evolution,
    folder: RunFolder,
    place: tuple[int, int],
    settings: Settings,
    every: int,
    live: _Live,
    interrupted: Callable[[], bool],
) -> Frames:
    """Run one group to its end, from its checkpoint if it has one."""
    frames: Frames = {}
    optimiser, state = evolution.optimiser, folder.state(*place)
    if state.exists():
        with bad_input():
            evolution.load(state)
        frames = folder.load_frames(*place)
        live.skip(len(evolution.history) * optimiser.n)
    kept = set(np.linspace(0, settings.generations - 1, FRAMES).round().astype(int).tolist())
    while len(evolution.history) < settings.generations:
        begin = time.perf_counter()
        codes = optimiser.ask() if len(evolution.history) in kept else None  # the same that the step takes
        asking = time.perf_counter() - begin
        # Poisson noise refuses responses that would be too many spikes; other errors are bugs.
        with bad_input() if isinstance(evolution.noise, evolve.PoissonNoise) else contextlib.nullcontext():
            generation = evolution.step()
        if codes is not None:
            generation.seconds["optimise"] += asking
            frames[f"frame-{generation.index:06d}"] = _best_codes(codes, generation, settings.minimise)
        live.advance(generation)
        done, stop = len(evolution.history), interrupted()
        if done < settings.generations and (stop or done % every == 0):
            folder.save_frames(*place, frames)  # before the state: it may hold more than the state asks for, never less
            with bad_input():
                evolution.save(state)
            if stop:
                raise InterruptedRunError
    return frames


def _best_codes(codes: torch.Tensor, generation: evolve.Generation, minimise: bool) -> NDArray[Any]:
    """Of codes [n, m, dim] those with the best noise-free response, [n, dim]."""
    assert generation.clean is not None
    best = generation.clean.argmin(axis=1) if minimise else generation.clean.argmax(axis=1)
    return codes[torch.arange(len(best)), torch.from_numpy(best)].cpu().numpy()


def _part(
    experiment: Experiment, evolution: evolve.Evolution, frames: Frames, neurons: list[int]
) -> dict[str, NDArray[Any]]:
    """Everything that is kept of a finished group; `neurons` names the model of each problem."""
    history, optimiser = evolution.history, evolution.optimiser
    baseline = experiment.baseline()[neurons]
    part: dict[str, NDArray[Any]] = {}
    for name, codes in (("best", optimiser.best.codes), ("centre", optimiser.centre)):
        images = evolution.render(codes).cpu().numpy()
        part[f"{name}_code"] = codes.cpu().numpy()
        part[f"{name}_image"] = images
        part[f"{name}_clean"] = experiment.responses(images, neurons)
    part["best_score"] = optimiser.best.scores.cpu().numpy() + baseline
    part["best_generation"] = optimiser.best.generation.cpu().numpy()
    codes = torch.from_numpy(np.stack([frames[name] for name in sorted(frames)], axis=1))
    part["frame_image"] = evolution.render(codes).cpu().numpy()
    part["frame_generation"] = np.array([int(name.removeprefix("frame-")) for name in sorted(frames)])
    for name in TRACES:
        part[name] = np.stack([_trace(name, generation, baseline) for generation in history])
    for stage in STAGES:
        part[f"seconds_{stage}"] = np.array([generation.seconds.get(stage, 0.0) for generation in history])
    return part


def _trace(name: str, generation: evolve.Generation, baseline: NDArray[np.float64]) -> NDArray[np.float64]:
    """One row of a table of generations, [n]: scores as responses, that is with the baseline put back."""
    assert generation.clean is not None
    if name == "code_norm":
        return generation.code_norm
    if name == "reference_mean":
        scores = generation.reference_scores
        return np.full(len(baseline), np.nan) if scores is None else np.asarray(scores.mean(axis=1) + baseline)
    values = generation.clean if name.startswith("clean") else generation.scores
    kind = name.removeprefix("clean_")
    reduced = values.mean(axis=1) if kind == "mean" else values.min(axis=1) if kind == "min" else values.max(axis=1)
    return np.asarray(reduced + baseline, np.float64)


# ------------------------------------------------------------------------------------------------- while it runs


@contextlib.contextmanager
def _soft_interrupt() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first time lets the generation finish, the second time interrupts at once."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield lambda: False
        return
    pressed = False

    def handle(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        with contextlib.suppress(OSError):  # where the reader of stderr was interrupted too
            stderr().print("[yellow]stopping[/] after this generation; Ctrl-C again stops at once", soft_wrap=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Live:
    """The line that shows how far the evolutions are."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task("", total=total, state="")
        self._baseline: NDArray[np.float64] | float = 0.0
        self._best: NDArray[np.float64] | None = None
        self._minimise = False
        self._generations = 0
        self._recent: list[tuple[float, int]] = []
        self._done = 0

    def skip(self, generations: int) -> None:
        """Generations that were computed earlier."""
        self._done += generations
        if self._progress is not None and self._task is not None:
            self._progress.reset(self._task, completed=self._done)  # a jump is not speed

    def start(self, what: str, settings: Settings, baseline: NDArray[np.float64]) -> None:
        """A group begins; `baseline` is what its scores are counted from, [n]."""
        self._baseline = baseline[:, None]
        self._best, self._minimise, self._generations = None, settings.minimise, settings.generations
        self._recent = []
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=escape(what))

    def advance(self, generation: evolve.Generation) -> None:
        """A generation of the group is done."""
        if self._progress is None or self._task is None:
            return
        assert generation.clean is not None
        clean = generation.clean + self._baseline
        best = clean.min(axis=1) if self._minimise else clean.max(axis=1)
        if self._best is not None:
            best = np.minimum(best, self._best) if self._minimise else np.maximum(best, self._best)
        self._best = best
        self._done += len(clean)
        self._recent = [*self._recent[-19:], (time.perf_counter(), self._done)]
        (begin, before), (end, after) = self._recent[0], self._recent[-1]
        rate = f"{(after - before) / (end - begin):,.0f} gen/s" if end > begin else ""
        state = f"{generation.index + 1}/{self._generations}  score {clean.mean():.2f} (best {best.mean():.2f})  {rate}"
        self._progress.update(self._task, advance=len(clean), state=state)


@contextlib.contextmanager
def _live(total: int, *, quiet: bool) -> Iterator[_Live]:
    """A line on stderr that vanishes at the end; nothing with `quiet`, or where stderr is no terminal."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield _Live(None, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        yield _Live(shown, total)
