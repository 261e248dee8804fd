"""Sources that models guide, in a real session: shown, told, journaled, and taken up again after a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cortexloop as cl
from cortexloop.evolve import FourierGenerator
from cortexloop.realtime.refit import Refit
from cortexloop.realtime.session import Session
from cortexloop.realtime.settings import SessionSettings, StreamSettings
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.sources import CandidateSource, ModelGuided, SynthesisSource
from cortexloop.rig.inprocess import Loop

Make = Callable[[], Source]


@pytest.fixture(params=["candidates", "guided", "synthesis"])
def make(request: pytest.FixtureRequest, small_bank: cl.ModelBank, rng: np.random.Generator) -> Make:
    """New sources, always of the same settings, by the computer's clock."""
    images = rng.integers(0, 256, (60, 17, 13, 3), dtype=np.uint8)
    refit = Refit(after=8)
    sources: dict[str, Make] = {
        "candidates": lambda: CandidateSource(
            images, small_bank, per_batch=6, explore=0.3, budget_ms=5, chunk=8, refit=refit
        ),
        "guided": lambda: ModelGuided(
            FourierGenerator(17, 13, 24), small_bank, per_batch=6, budget_ms=5, chunk=8, refit=refit
        ),
        "synthesis": lambda: SynthesisSource(small_bank, per_batch=6, batches=9, steps=9, budget_ms=30),
    }
    return sources[request.param]


def test_a_session_goes_on_after_a_restart(make: Make, small_bank: cl.ModelBank, tmp_path: Path) -> None:
    settings = SessionSettings(session="screen", streams=[StreamSettings(name="only")])
    shas: list[str] = []

    def rounds(session: Session, count: int, after: str | None) -> str | None:
        loop = Loop(session)
        for _ in range(count):
            batch, images = loop.ask(after=after, within_ms=60_000)
            assert (batch.kind, len(batch.items)) == ("gen", 6)
            assert all(item.label for item in batch.items)
            loop.tell(batch, respond(images), final=True)
            shas.extend(item.sha for item in batch.items)
            after = batch.batch_id
        session.close()
        return after

    def respond(images: Images) -> Any:
        return cl.responses(np.array(images), small_bank).astype(np.float64) @ [-2.0, 1.0, -0.5]

    after = rounds(Session.create(tmp_path / "session", settings, {"only": make()}), 3, None)
    for _ in range(2):
        source = make()
        # Every proposal and digest of the journal is compared on the way.
        after = rounds(Session.resume(tmp_path / "session", settings, {"only": source}), 2, after)
    assert len(set(shas)) == 7 * 6
