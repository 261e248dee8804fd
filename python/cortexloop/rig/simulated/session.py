"""A session and a simulated rig in one process: everything in one thread, by a clock of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.session import Session
from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.source import Images, Source
from cortexloop.rig.simulated.days import Day
from cortexloop.rig.simulated.neurons import Neurons
from cortexloop.rig.simulated.report import DayReport, GenerationRow, check_journal
from cortexloop.rig.simulated.rig import CLOCK_UNITS, SimulatedRig
from cortexloop.rig.simulated.world import SimulatedWorld, SlowExecutor


def simulate(
    folder: Path,
    settings: SessionSettings,
    sources: Mapping[str, Source],
    references: Images | None,
    neurons: Neurons,
    day: Day,
    *,
    seed: int = 0,
    batches: int | None = None,
    config: dict[str, Any] | None = None,
    sources_again: Callable[[], Mapping[str, Source]] | None = None,
    on_generation: Callable[[GenerationRow], None] | None = None,
) -> DayReport:
    """A day at the rig, faster than life. The same arguments give the same day, bit for bit.

    Args:
        folder: of the session; must have none.
        settings: of the session; the rig's clocks are added.
        sources: one for each stream.
        references: uint8 [R, H, W, 3], or None.
        neurons: that look at the display.
        day: timing and mishaps.
        seed: of the rig.
        batches: how many are shown; until the sources are finished if None.
        config: to be kept in the journal.
        sources_again: makes the sources anew, as they were at first, for a server that was killed; it never is if None.
        on_generation: called when a generation is told.

    Raises:
        ValueError: a stream that is scored by a unit that the neurons do not have.
        FileExistsError, JournalError: see `Session.create`.
    """
    wanted = sorted({unit for stream in settings.streams for unit in stream.units} - set(neurons.units))
    if wanted:
        raise ValueError(f"streams are scored by {wanted}, the simulated neurons are {neurons.units}")
    settings = msgspec.structs.replace(settings, clock_units={**settings.clock_units, **CLOCK_UNITS})
    clock = ManualClock(monotonic_ns=1_000_000_000_000)
    rng = np.random.default_rng([seed, 4])
    jobs = [0]

    def takes_ms() -> float:
        jobs[0] += 1
        slow = day.slow_every and jobs[0] % day.slow_every == 0
        return day.slow_ms if slow else float(rng.gamma(4.0, day.compute_ms / 4.0))

    def restart(killed: Session) -> tuple[Session, SlowExecutor]:
        assert sources_again is not None
        on_disk = folder.with_name(f"{folder.name}.killed")
        shutil.copytree(folder, on_disk)  # before the session is closed, which a killed one is not
        killed.close()
        shutil.rmtree(folder)
        on_disk.rename(folder)
        executor = SlowExecutor(clock, takes_ms)
        again = sources_again()
        return (
            Session.resume(folder, settings, again, references, config=config, clock=clock, executor=executor),
            executor,
        )

    executor = SlowExecutor(clock, takes_ms)
    session = Session.create(folder, settings, sources, references, config=config, clock=clock, executor=executor)
    may_crash = None if sources_again is None else restart
    world = SimulatedWorld(session, clock, executor, day, seed, restart=may_crash)
    try:
        rig = SimulatedRig(
            world,
            world,
            neurons,
            day,
            seed=seed,
            score_units={stream.name: stream.units for stream in settings.streams},
            on_generation=on_generation,
        )
        report = rig.run(batches)
    finally:
        world.session.close()
    report.repeated, report.server_crashes = world.repeated, world.crashes
    check_journal(report, folder, rig.acknowledged, rig.light_ns, (day.light_ms, day.light_jitter_ms))
    return report


def example(
    unit: str = "curve_up", *, generations: int = 20, population: int = 24, references: int = 8, seed: int = 0
) -> tuple[SessionSettings, dict[str, Source], Images]:
    """Settings, sources and references of a small session: one evolution of 16 Gabor patches for one neuron."""
    from cortexloop.evolve import GENERATORS, make_optimiser
    from cortexloop.realtime.sources.evolution import EvolutionSource
    from cortexloop.textbook import SIZE, procedural_images

    generator = GENERATORS["gabor"](SIZE, SIZE, 16 * 11, seed=seed)
    optimiser = make_optimiser("cholesky-cma", generator.dim, population=population, generations=generations, seed=seed)
    stream = {"name": "evolution", "units": [unit]}
    settings = msgspec.convert({"session": "simulated", "seed": seed, "streams": [stream]}, SessionSettings)
    sources: dict[str, Source] = {"evolution": EvolutionSource(optimiser, generator, generations=generations)}
    return settings, sources, procedural_images(references, seed=seed)
