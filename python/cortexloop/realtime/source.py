"""Where a stream's images come from: what a source has to offer, and why it can be replayed.

A source is a deterministic machine: `propose` and `learn` in the same order give the same proposals, bit for bit. What
depends on time or hardware instead (how many candidates could be scored within a budget) is its `decision`, which the
journal keeps and hands back on replay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Proposal:
    """Images that a source wants to be shown.

    count: how many. render: makes them, uint8 sRGB [count, height, width, 3]; called once while the session runs, and
    again only after a restart if the pixels were not kept. codes: float32 or float64 [count, dim] that they were made
    from, None if there are none. labels: a name for each (of a file, for example). decision: anything of numbers, text,
    lists and dicts that `propose` must be given on replay.
    """

    count: int
    render: Callable[[], Images]
    codes: NDArray[Any] | None = None
    labels: list[str] = field(default_factory=list)
    decision: Any = None


@runtime_checkable
class Source(Protocol):
    """One stream of stimuli. Called from one thread at a time."""

    size: tuple[int, int]
    """Height and width of its images."""
    max_open: int
    """How many proposals may be out before the first of them is learned: 1 for most optimisers."""

    def settings(self) -> dict[str, Any]:
        """What defines it, JSON-able; a session resumes only with equal settings."""
        ...

    def propose(self, decision: Any = None) -> Proposal | None:
        """The next images, None when there are no more. `decision`: on replay, what was decided."""
        ...

    def learn(self, scores: NDArray[np.float64], responses: NDArray[np.float64]) -> None:
        """Take the responses to the oldest proposal that is out.

        Args:
            scores: [count], one number per image, NaN = missing.
            responses: [count, units] of which the scores were made; mean over repeats, NaN = missing.
        """
        ...

    def digest(self) -> str:
        """SHA-256 of the state that future proposals depend on, hexadecimal."""
        ...


def sha256(*parts: bytes | str | NDArray[Any]) -> str:
    """SHA-256 of bytes, texts and arrays one after the other, hexadecimal; arrays with their dtype and shape."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()
