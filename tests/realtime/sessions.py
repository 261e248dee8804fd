"""Small sessions for tests: sources, responders and ways to run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.evolve import CholeskyCMA, FourierGenerator
from cortexloop.realtime import Session, SessionSettings, StreamSettings
from cortexloop.realtime import messages as m
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.jobs import Immediately
from cortexloop.realtime.sources import EvolutionSource, FixedImages
from cortexloop.rig.inprocess import Loop, RequestError

SIZE = 12
NEVER_MS = 600_000.0


def evolution(seed: int = 0, generations: int = 4, population: int = 6) -> EvolutionSource:
    """A small evolution of images of 12 x 12 pixels."""
    generator = FourierGenerator(SIZE, SIZE)
    optimiser = CholeskyCMA(generator.dim, population=population, seed=seed)
    return EvolutionSource(optimiser, generator, generations=generations)


def pictures(count: int, seed: int = 1) -> NDArray[np.uint8]:
    """Random images."""
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def settings(*streams: str, **more: Any) -> SessionSettings:
    """Of a session without deadlines."""
    more.setdefault("within_ms", NEVER_MS)
    return SessionSettings(session="test", streams=[StreamSettings(name=name) for name in streams], **more)


def responses(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of two units that like bright images and contrast: a function of the pixels alone."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat.mean(1), flat.std(1)], axis=1)


class Rig:
    """Makes, resumes and runs one kind of session."""

    def __init__(
        self,
        folder: Path,
        make: Callable[[], dict[str, Any]],
        chosen: SessionSettings,
        references: NDArray[np.uint8] | None = None,
        clock: ManualClock | None = None,
    ) -> None:
        self.folder, self.make, self.settings, self.references = folder, make, chosen, references
        self.clock = clock or ManualClock()

    def create(self) -> Session:
        return Session.create(
            self.folder, self.settings, self.make(), self.references, clock=self.clock, executor=Immediately()
        )

    def resume(self) -> Session:
        return Session.resume(
            self.folder, self.settings, self.make(), self.references, clock=self.clock, executor=Immediately()
        )


def run(loop: Loop, batches: int | None = None, status: Callable[[m.Batch], list[str]] | None = None) -> list[m.Batch]:
    """Show and tell until the session is finished, or so many batches are told."""
    shown: list[m.Batch] = []
    while batches is None or len(shown) < batches:
        try:
            batch, images = loop.ask()
        except RequestError as error:
            if error.code != "FINISHED":
                raise
            break
        shown.append(batch)
        loop.tell(batch, responses(images), status=None if status is None else status(batch), final=True)
    return shown


def identity(batch: m.Batch) -> tuple[Any, ...]:
    """What makes a batch the same: names, pixels and order."""
    return (batch.batch_id, batch.kind, [(x.item_id, x.sha) for x in batch.items], batch.order, batch.pres_ids)


def sets(count: int = 5) -> dict[str, Any]:
    """One stream of fixed images."""
    return {"set": FixedImages(pictures(count), per_batch=2, seed=3)}
