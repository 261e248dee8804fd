"""Runs a source as a session does, with every decision passed through the journal's encoding, and plays it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.source import Images, Proposal, Source


class TickingClock(ManualClock):
    """Each look at it takes some milliseconds, so that every budget runs out somewhere."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def monotonic_ns(self) -> int:
        self.advance(self.ms / 1000)
        return super().monotonic_ns()


@dataclass
class Proposed:
    """A proposal, with the images that were rendered and the decision as the journal gives it back."""

    proposal: Proposal
    images: Images
    decision: Any


@dataclass
class Learned:
    """What was learned, and the digest afterwards."""

    scores: NDArray[np.float64]
    digest: str


Event = Proposed | Learned
Neuron = Callable[[Images], NDArray[np.float64]]


def as_journalled(value: Any) -> Any:
    """As it comes back from the journal."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


def run(source: Source, neuron: Neuron, rounds: int, *, missing: int = 0) -> list[Event]:
    """Propose as much as may be out, learn the oldest; `missing`: each so-manyth score is NaN."""
    events: list[Event] = []
    out: list[Proposed] = []
    finished = False
    for step in range(rounds):
        while len(out) < source.max_open and not finished:
            proposal = source.propose()
            if proposal is None:
                finished = True
            else:
                images = proposal.render()
                assert images.shape == (proposal.count, *source.size, 3)
                assert images.dtype == np.uint8
                assert len(proposal.labels) == proposal.count
                out.append(Proposed(proposal, images, as_journalled(proposal.decision)))
                events.append(out[-1])
        if not out:
            break
        scores = neuron(out.pop(0).images)
        if missing:
            scores[step % missing :: missing] = np.nan
        source.learn(scores, scores[:, None])
        events.append(Learned(scores, source.digest()))
    return events


def replay(source: Source, events: Sequence[Event]) -> None:
    """Lead a new source through what another one did, and compare everything bit for bit."""
    for event in events:
        if isinstance(event, Learned):
            source.learn(event.scores, event.scores[:, None])
            assert source.digest() == event.digest
            continue
        proposal = source.propose(event.decision)
        assert proposal is not None
        assert same_proposal(proposal, event)


def same_proposal(proposal: Proposal, event: Proposed) -> bool:
    """Bit for bit, and the decision but for the time it took."""
    ours, theirs = proposal.codes, event.proposal.codes
    return (
        proposal.count == event.proposal.count
        and proposal.labels == event.proposal.labels
        and ((ours is None and theirs is None) or (ours is not None and np.array_equal(ours, theirs)))
        and np.array_equal(proposal.render(), event.images)
        and timeless(as_journalled(proposal.decision)) == timeless(event.decision)
    )


def timeless(decision: Any) -> Any:
    """Without the time that was taken."""
    return {k: v for k, v in decision.items() if k != "ms"} if isinstance(decision, dict) else decision


def check_resume_anywhere(make: Callable[[], Source], neuron: Neuron, events: Sequence[Event]) -> None:
    """A new source that is led through the first part of the events goes on as the old one did, from any point.

    For sources that have all the time there is (a clock that stands still).
    """
    for cut in range(len(events) + 1):
        source = make()
        replay(source, events[:cut])
        for event in events[cut:]:
            if isinstance(event, Learned):
                source.learn(event.scores, event.scores[:, None])
                assert source.digest() == event.digest
            else:
                proposal = source.propose()
                assert proposal is not None
                assert same_proposal(proposal, event)


def rounds_of(events: Sequence[Event]) -> list[Proposed]:
    """The proposals alone."""
    return [event for event in events if isinstance(event, Proposed)]
