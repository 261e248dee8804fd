"""A fixed set of images as a source: shown in parts, once or several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.source import Images, Proposal, sha256


class FixedImages:
    """Images in a fixed or shuffled order.

    Args:
        images: uint8 sRGB [N, H, W, 3].
        per_batch: how many are shown together.
        rounds: how often the whole set is shown.
        labels: a name for each, of a file for example.
        shuffle: another order in each round, from `seed`.
        seed: 0 to 2^63 - 1.

    Raises:
        ValueError: images of another type or shape, no images, a number below 1, or as many labels as images lacking.
    """

    max_open = 2

    def __init__(
        self,
        images: Images,
        *,
        per_batch: int,
        rounds: int = 1,
        labels: Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
            raise ValueError(
                f"images should be uint8 [N, H, W, 3] with N >= 1, got {images.dtype} {list(images.shape)}"
            )
        if per_batch < 1 or rounds < 1:
            raise ValueError(f"per_batch and rounds should be at least 1, got {per_batch} and {rounds}")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"there should be {len(images)} labels, one for each image, got {len(labels)}")
        self.images, self.labels = images, None if labels is None else list(labels)
        self.per_batch, self.rounds, self.shuffle, self.seed = per_batch, rounds, shuffle, seed
        self.size = (int(images.shape[1]), int(images.shape[2]))
        self.proposed = 0
        """Proposals made so far."""
        self._content = sha256(images, *(self.labels or ()))
        self._batches = -(-len(images) // per_batch)

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "source": "images",
            "images": self._content,
            "per_batch": self.per_batch,
            "rounds": self.rounds,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def propose(self, decision: Any = None) -> Proposal | None:
        """See `Source`."""
        turn, part = divmod(self.proposed, self._batches)
        if turn >= self.rounds:
            return None
        order = np.arange(len(self.images))
        if self.shuffle:
            np.random.default_rng([self.seed, turn]).shuffle(order)
        chosen = order[part * self.per_batch : (part + 1) * self.per_batch]
        self.proposed += 1
        return Proposal(
            count=len(chosen),
            render=lambda: np.ascontiguousarray(self.images[chosen]),
            labels=[self.labels[i] if self.labels else str(i) for i in chosen.tolist()],
        )

    def learn(self, scores: NDArray[np.float64], responses: NDArray[np.float64]) -> None:
        """Responses do not change what comes next."""

    def digest(self) -> str:
        """See `Source`."""
        return sha256(str(self.proposed))
