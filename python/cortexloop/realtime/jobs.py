"""What takes long and runs beside a session: sources learn and propose, images are rendered and kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.pixels import PixelStore
from cortexloop.realtime.source import Images, Proposal, Source

T = TypeVar("T")


class Immediately(Executor):
    """An executor that does the work at once, in the caller's thread: for simulations and replays."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """See `concurrent.futures.Executor`."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:  # the future carries it to whoever asks for the result
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Lesson:
    """What a source is to learn: scores [count] and responses [count, units] to batch `batch_id`."""

    batch_id: str
    scores: NDArray[np.float64]
    responses: NDArray[np.float64]


@dataclass(frozen=True)
class Advance:
    """What came of it.

    digest: after learning, None if there was no lesson. proposal: None if there was none to make, or no more. finished:
    the source has no more. images, shas: of the proposal.
    """

    lesson: Lesson | None
    digest: str | None
    proposal: Proposal | None
    finished: bool
    images: Images | None
    shas: list[str]
    seconds: float


def advance(source: Source, lesson: Lesson | None, propose: bool, pixels: PixelStore) -> Advance:
    """Learn, then propose and render.

    Raises:
        ValueError: the source rendered something else than it announced.
    """
    start = time.perf_counter()
    digest = None
    if lesson is not None:
        source.learn(lesson.scores, lesson.responses)
        digest = source.digest()
    proposal = source.propose() if propose else None
    images: Images | None = None
    shas: list[str] = []
    if proposal is not None:
        images = check_images(proposal.render(), proposal.count, source.size)
        shas = pixels.put(images)
        pixels.sync()  # before the batch is recorded, and beside the session's thread
    return Advance(
        lesson=lesson,
        digest=digest,
        proposal=proposal,
        finished=propose and proposal is None,
        images=images,
        shas=shas,
        seconds=time.perf_counter() - start,
    )


def check_images(images: Images, count: int, size: tuple[int, int]) -> Images:
    """The images, in C order.

    Raises:
        ValueError: not uint8 [count, *size, 3], or none at all.
    """
    if count < 1:
        raise ValueError(f"a source proposes at least one image, or None when there are no more; got {count}")
    if images.dtype != np.uint8 or images.shape != (count, *size, 3):
        raise ValueError(
            f"a source announced {count} images uint8 [{count}, {size[0]}, {size[1]}, 3] and rendered "
            f"{images.dtype} {list(images.shape)}"
        )
    return np.ascontiguousarray(images)
