"""`cortexloop bench`: this machine's speed in a few seconds, against plain torch modules called in a loop.

All candidates take turns in every round, so that a busy machine slows them alike; medians and ratios of medians are
shown. Nothing is timed before its result agrees with the modules.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

import cortexloop as cl
from cortexloop.cli.console import BadInputError, print_json, progress, stderr, stdout
from cortexloop.cli.inputs import load_bank
from cortexloop.cli.machine import facts, load
from cortexloop.models import CompactModel
from cortexloop.testing import Case, ModelShape, random_inputs

BATCHES = (1, 16)

# Four models around the median of the published ones, [47, 57, 3, 7, 3].
PUBLISHED_SHAPES = tuple(
    ModelShape(filters, (5,) * 5, (1, 2, 2, 1, 1))
    for filters in ((47, 57, 3, 7, 3), (44, 46, 3, 5, 3), (49, 63, 5, 9, 4), (48, 60, 3, 3, 3))
)

# float32 torch is off by about 1e-6 itself; products of bfloat16 by up to a tenth of a model's standard deviation.
TOLERANCE = {"exact": 1e-3, "fast": 0.5}


@dataclass
class Candidate:
    """Something to time: `seconds` per call, one entry per round."""

    op: str
    engine: str
    precision: str
    batch: int
    threads: int
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)

    def milliseconds_per_pair(self, models: int) -> float:
        return 1e3 * float(np.median(self.seconds)) / (self.batch * models)


def bench(models: Path | None, *, seconds: float, json: bool) -> None:
    """Measure for about `seconds` and print a table (or JSON rows).

    Raises:
        BadInputError: models that cannot be read, or no time to measure.
        RuntimeError: the kernels disagree with the torch modules; nothing is timed then.
    """
    if not seconds > 0:
        raise BadInputError(f"--seconds should be above 0, got {seconds}")
    bank, images = _problem(models)
    modules = [CompactModel.from_weights(weights).requires_grad_(False) for weights in bank.models]
    found = facts()
    fast = bool(found["kernels"]["fast"])
    _check(bank, images, modules, fast)
    busy = load()
    if busy is not None and busy > 0.5 and not json:
        stderr().print(
            f"[yellow]warning:[/] other programs keep {busy:.1f} processors busy: ratios with several threads "
            "say little now, measure again when the machine is quiet",
            soft_wrap=True,
        )
    before = cl.get_num_threads(), torch.get_num_threads()
    candidates = _candidates(bank, images, modules, sorted({1, before[0]}), fast)
    try:
        rounds = _measure(candidates, seconds, quiet=json)
    finally:
        cl.set_num_threads(before[0])
        torch.set_num_threads(before[1])
    _report(candidates, len(bank), rounds, found | {"load": busy}, json=json)


def _problem(models: Path | None) -> tuple[cl.ModelBank, torch.Tensor]:
    """Four models and float32 recentred images [16, H, W, 3]."""
    if models is None:
        inputs = random_inputs(Case("bench", max(BATCHES), 112, 112, PUBLISHED_SHAPES))
        return inputs.bank, inputs.images
    bank = load_bank(models)
    bank = bank.select(np.linspace(0, len(bank) - 1, min(4, len(bank))).round().astype(int))
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (max(BATCHES), bank.height, bank.width, 3), dtype=np.uint8))
    return bank, cl.recenter(pixels, bank.image_mean)


def _loop_forward(modules: list[CompactModel], images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([module(images) for module in modules], dim=1)


def _loop_gradient(modules: list[CompactModel], images: torch.Tensor) -> torch.Tensor:
    leaf = images.clone().requires_grad_()
    total = torch.stack([module(leaf) for module in modules], dim=1).sum()
    return torch.autograd.grad(total, leaf)[0]


def _check(bank: cl.ModelBank, images: torch.Tensor, modules: list[CompactModel], fast: bool) -> None:
    expected = _loop_forward(modules, images)
    spread = expected.std(dim=0).clamp_min(1e-6)
    for precision in ("exact", "fast") if fast else ("exact",):
        error = ((cl.responses(images, bank, precision=precision) - expected).abs() / spread).max().item()
        if not error < TOLERANCE[precision]:
            raise RuntimeError(
                f"{precision} responses differ from the torch modules by {error:.3g} standard deviations"
            )
    gradient = _loop_gradient(modules, images[:1])
    ours = cl.input_gradient(images[:1], bank, torch.ones(1, len(bank)))
    error = (torch.linalg.vector_norm(ours - gradient) / torch.linalg.vector_norm(gradient)).item()
    if not error < 0.05:  # single ReLU gates within rounding of 0 may differ
        raise RuntimeError(f"input gradients differ from the torch modules by {error:.3g} of their norm")


def _candidates(
    bank: cl.ModelBank, images: torch.Tensor, modules: list[CompactModel], threads: list[int], fast: bool
) -> list[Candidate]:
    found: list[Candidate] = []
    for batch in BATCHES:
        x = images[:batch].clone()
        ones = torch.ones(batch, len(bank))
        for n in threads:
            for precision in ("exact", "fast") if fast else ("exact",):

                def forward(x: torch.Tensor = x, precision: str = precision) -> object:
                    return cl.responses(x, bank, precision=precision)

                found.append(Candidate("responses", "cortexloop", precision, batch, n, forward))

            def loop(x: torch.Tensor = x) -> object:
                return _loop_forward(modules, x)

            def gradient(x: torch.Tensor = x, ones: torch.Tensor = ones) -> object:
                return cl.input_gradient(x, bank, ones)

            def loop_gradient(x: torch.Tensor = x) -> object:
                return _loop_gradient(modules, x)

            found.append(Candidate("responses", "torch modules", "exact", batch, n, loop))
            found.append(Candidate("input_gradient", "cortexloop", "exact", batch, n, gradient))
            found.append(Candidate("input_gradient", "torch modules", "exact", batch, n, loop_gradient))
    return found


def _measure(candidates: list[Candidate], seconds: float, *, quiet: bool) -> int:
    """Rounds of all candidates, at least two after a first one that does not count; returns how many counted."""
    started = time.perf_counter()
    rounds = 0
    with progress("timing", 100, quiet=quiet) as bar:
        shown = 0
        while rounds < 3 or time.perf_counter() - started < seconds * (rounds - 0.5) / rounds:
            for candidate in candidates:
                cl.set_num_threads(candidate.threads)
                torch.set_num_threads(candidate.threads)
                begin = time.perf_counter()
                candidate.call()
                candidate.seconds.append(time.perf_counter() - begin)
                percent = min(99, int(100 * (time.perf_counter() - started) / seconds))
                bar.advance(percent - shown)
                shown = percent
            rounds += 1
    for candidate in candidates:
        del candidate.seconds[0]
    return rounds - 1


def _report(candidates: list[Candidate], models: int, rounds: int, found: dict[str, object], *, json: bool) -> None:
    rows = []
    candidates = sorted(candidates, key=lambda c: (c.op != "responses", c.batch, c.threads))
    for candidate in candidates:
        baseline = next(
            c
            for c in candidates
            if (c.op, c.batch, c.threads, c.engine)
            == (candidate.op, candidate.batch, candidate.threads, "torch modules")
        )
        own = candidate.milliseconds_per_pair(models)
        rows.append(
            {
                "op": candidate.op,
                "batch": candidate.batch,
                "threads": candidate.threads,
                "engine": candidate.engine,
                "precision": candidate.precision,
                "ms_per_pair": own,
                "speedup": baseline.milliseconds_per_pair(models) / own,
            }
        )
    if json:
        print_json({"rounds": rounds, "models": models, "rows": rows, "machine": found})
        return
    kernels = found["kernels"]
    assert isinstance(kernels, dict)
    where = kernels["isa"] or "reference backend"
    table = Table(
        "operation",
        title=f"milliseconds per image and model, {models} models, median of {rounds} rounds",
        caption=f"{found['processor']}, {where}, torch {torch.__version__}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("images", "threads", "torch modules", "cortexloop exact", "cortexloop fast"):
        table.add_column(name, justify="right")
    for op, batch, threads in dict.fromkeys((c.op, c.batch, c.threads) for c in candidates):
        cells = []
        for engine, precision in (("torch modules", "exact"), ("cortexloop", "exact"), ("cortexloop", "fast")):
            key = (op, batch, threads, engine, precision)
            row = next(
                (r for r in rows if (r["op"], r["batch"], r["threads"], r["engine"], r["precision"]) == key), None
            )
            cells.append("" if row is None else f"{row['ms_per_pair']:.3f}")
            if row is not None and engine == "cortexloop":
                cells[-1] += f" [green]{row['speedup']:5.1f}x[/]"
        table.add_row(op, str(batch), str(threads), *cells)
    stdout().print(table)
