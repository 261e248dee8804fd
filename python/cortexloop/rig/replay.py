"""Repeat a whole session from its journal: do its sources still propose, render and learn the same, bit by bit?"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cortexloop.realtime import checks
from cortexloop.realtime.jobs import check_images
from cortexloop.realtime.journal import JournalError, scan
from cortexloop.realtime.pixels import pixel_sha
from cortexloop.realtime.records import BatchMade, Start, Update
from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.source import Images, Source
from cortexloop.realtime.state import SessionState, Stream
from cortexloop.rig.history import existing

__all__ = ["Repeated", "repeat"]


@dataclass
class Repeated:
    """What was repeated; codes, scores and states of sources all came out as recorded.

    Attributes:
        batches: how many were made, of any kind.
        learned: how many generations were learned.
        images: how many images were rendered again.
        different: names of those that came out with other pixels, on another GPU for example. What was shown are the
            pixels in the session's folder.
    """

    batches: int = 0
    learned: int = 0
    images: int = 0
    different: list[str] = field(default_factory=list)


def repeat(
    path: str | os.PathLike[str],
    settings: SessionSettings,
    sources: Mapping[str, Source],
    references: Images | None = None,
    *,
    config: dict[str, Any] | None = None,
    render: bool = True,
) -> Repeated:
    """Lead new sources through all that a session recorded; its folder is only read, and may be in use.

    Args:
        path: the session's folder, or a journal.
        settings, sources, references, config: as for `Session.resume`; the sources as at the session's start.
        render: whether to make all images again, too, and compare their pixels.

    Raises:
        FileNotFoundError: there is no journal.
        JournalError: it is damaged.
        ResumeError: other settings, sources or references than the session began with; or a source proposes, scores
            or becomes something else than is recorded.
        ValueError: parts that do not belong together.
    """
    checked = scan(existing(path))
    if checked.problem is not None:
        raise JournalError(checked.problem)
    references, _ = checks.check_parts(settings, sources, references)
    kept = checks.plain({"settings": settings, "config": config or {}})
    state = SessionState(settings, sources)
    state.replaying = True
    found = Repeated()
    for record in checked.records():
        if isinstance(record, Start):
            checks.check_start(record, kept, sources, references)
            continue
        state.apply(record)
        if isinstance(record, BatchMade):
            found.batches += 1
            if render and record.batch_kind == "gen" and record.stream is not None:
                _render(found, record, state.streams[record.stream])
        found.learned += isinstance(record, Update)
    return found


def _render(found: Repeated, made: BatchMade, stream: Stream) -> None:
    """Make the images of a batch again and compare."""
    proposal = stream.proposals[-1]
    images = check_images(proposal.render(), proposal.count, stream.source.size)
    recorded = [(item, sha) for item, sha in zip(made.items, made.shas, strict=True) if item.kind == "gen"]
    for image, (item, sha) in zip(images, recorded, strict=True):
        found.images += 1
        if pixel_sha(image) != sha:
            found.different.append(item.item_id)
