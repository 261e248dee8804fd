"""How batches are made up: which items, in which order of presentation, under which names."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from cortexloop.realtime.messages import Item
from cortexloop.realtime.rounds import Round
from cortexloop.realtime.source import Proposal
from cortexloop.realtime.state import BEST, SessionState

Items = tuple[list[Item], list[str]]
"""Items, and the full SHA-256 of the pixels of each."""


def batch_name(stream: str, generation: int, repair: int = 0) -> str:
    """Of the batch of a proposal, or of the n-th repair of it."""
    return f"{stream}-{generation:04d}" + (f"-r{repair}" if repair else "")


def reference_items(shas: Sequence[str]) -> Items:
    """The session's references."""
    return [Item(item_id=f"ref-{i:03d}", kind="ref", sha=sha[:16]) for i, sha in enumerate(shas)], list(shas)


def proposed_items(stream: str, generation: int, proposal: Proposal, shas: Sequence[str]) -> Items:
    """The images of a proposal."""
    items = [
        Item(
            item_id=f"{batch_name(stream, generation)}-{i:03d}",
            kind="gen",
            sha=sha[:16],
            stream=stream,
            label=proposal.labels[i] if proposal.labels else None,
        )
        for i, sha in enumerate(shas)
    ]
    return items, list(shas)


def lacking_items(current: Round) -> tuple[Items, list[int], list[int]]:
    """The items of a round that lack responses, how many each lacks, and their places in its first batch."""
    lacking, made = current.lacking(), current.batches[0].made
    places = [i for i, item in enumerate(made.items) if item.item_id in lacking]
    items = [made.items[i] for i in places]
    return (items, [made.shas[i] for i in places]), [lacking[item.item_id] for item in items], places


def best_items(state: SessionState) -> Items:
    """The images with the highest scores so far, over all streams; none before anything is learned."""
    found = [entry for stream in state.streams.values() for entry in stream.best]
    best = sorted(found, key=lambda x: (-x[0], x[1].item_id))[:BEST]
    return [item for _, item, _ in best], [sha for _, _, sha in best]


def presentation_order(seed: int, name: str, items: Sequence[Item], counts: Sequence[int]) -> list[int]:
    """Indices into `items`, each as often as its count: references first, each group shuffled.

    References come first because they need nothing computed, and so the next batch has longer to be ready. The order
    depends on the session's seed and the batch's name only.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    order: list[int] = []
    for kind in ("ref", "gen"):
        group = [i for i, item in enumerate(items) if item.kind == kind for _ in range(counts[i])]
        order += rng.permutation(np.array(group, np.int64)).tolist()
    return order
