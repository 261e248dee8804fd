"""An evolution as a source: an optimiser proposes codes, a generator makes images of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop.evolve import Generator, Optimiser, Placement, to_uint8
from cortexloop.evolve.checkpoint import digest as tensor_digest
from cortexloop.evolve.evolution import IMAGES_AT_ONCE
from cortexloop.realtime.source import Images, Proposal, sha256


class EvolutionSource:
    """One closed-loop optimisation.

    Args:
        optimiser: of one problem, as made; proposes codes by `ask`, learns by `tell`.
        generator: makes images of the optimiser's codes.
        placement: where the image goes on the screen; as generated if None.
        generations: how many; without end if None.

    Raises:
        ValueError: several problems (give each a stream of its own), codes of another length than the generator's, or
            an optimiser that is under way.
    """

    max_open = 1

    def __init__(
        self,
        optimiser: Optimiser,
        generator: Generator,
        *,
        placement: Placement | None = None,
        generations: int | None = None,
    ) -> None:
        if optimiser.n != 1:
            raise ValueError(
                f"a stream is one optimisation, the optimiser has {optimiser.n} problems; make a stream for each"
            )
        if generator.dim != optimiser.dim:
            raise ValueError(
                f"the generator takes codes of length {generator.dim}, the optimiser's have length {optimiser.dim}"
            )
        if optimiser.generation != 0:
            raise ValueError(
                f"the optimiser should be new, it has been told {optimiser.generation} generations; a session starts "
                "at generation 0 and resumes from its journal"
            )
        self.optimiser, self.generator, self.placement = optimiser, generator, placement
        self.generations = generations
        self.size = (generator.height, generator.width) if placement is None else placement.canvas

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return {
            "source": "evolution",
            "optimiser": self.optimiser.settings(),
            "generator": self.generator.settings(),
            "placement": None if self.placement is None else self.placement.settings(),
            "generations": self.generations,
        }

    def propose(self, decision: Any = None) -> Proposal | None:
        """See `Source`."""
        if self.generations is not None and self.optimiser.generation >= self.generations:
            return None
        codes = self.optimiser.ask()[0].clone()
        return Proposal(count=len(codes), render=lambda: self._render(codes), codes=codes.cpu().numpy())

    def _render(self, codes: torch.Tensor) -> Images:
        parts = []
        for start in range(0, len(codes), IMAGES_AT_ONCE):
            images = self.generator(codes[start : start + IMAGES_AT_ONCE].to(torch.float32))
            parts.append(to_uint8(images if self.placement is None else self.placement(images)))
        return torch.cat(parts).cpu().numpy()

    def learn(self, scores: NDArray[np.float64], responses: NDArray[np.float64]) -> None:
        """See `Source`."""
        self.optimiser.tell(torch.from_numpy(scores)[None])

    def digest(self) -> str:
        """See `Source`."""
        state = self.optimiser.state_dict()
        tensors = (f"{name}={tensor_digest(tensor)}" for name, tensor in sorted(state["tensors"].items()))
        return sha256(str(state["generation"]), *tensors)
