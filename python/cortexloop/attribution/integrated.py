"""Integrated gradients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.attribution.base import MEMORY, Baseline, Neurons, PixelMethod, Selection
from cortexloop.attribution.post import Post
from cortexloop.attribution.targets import Target
from cortexloop.bank import ModelBank
from cortexloop.features.base import Images

RULES = ("gausslegendre", "midpoint")


def path_nodes(steps: int, rule: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes in 0..1 and weights (sum 1) of a quadrature rule.

    "gausslegendre" is exact for polynomials of degree 2 steps - 1; "midpoint" is the Riemann sum at interval centres.

    Raises:
        ValueError: no steps, or an unknown rule.
    """
    if steps < 1:
        raise ValueError(f"steps should be at least 1, got {steps}")
    if rule not in RULES:
        raise ValueError(f"rule should be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "midpoint":
        return (np.arange(steps) + 0.5) / steps, np.full(steps, 1 / steps)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return (nodes + 1) / 2, weights / 2


class IntegratedGradients(PixelMethod):
    """(image - baseline) times the mean gradient along the straight line between them, in response units.

    The sum of a map is the change of the response from baseline to image, up to the error of the quadrature
    (completeness; Sundararajan, Taly & Yan 2017). At every point of the line all neurons of an image share its forward
    pass, where the network is shared.

    Args: as of `PixelMethod`, and
        baseline: where the line starts: "zero", the levels that the network sees as 0; "blur", the image blurred with a
            sigma of an eighth of its height; a level 0..255; or images, [H, W, 3] or one for each.
        steps: points on the line.
        rule: "gausslegendre" or "midpoint".

    Raises:
        ValueError: no steps, or an unknown rule.
    """

    def __init__(
        self,
        target: Target | ModelBank,
        *,
        baseline: Baseline = "zero",
        steps: int = 50,
        rule: str = "gausslegendre",
        post: Post | None = None,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(target, post=post, memory=memory)
        self.baseline, self.steps, self.rule = baseline, steps, rule
        self._nodes, self._weights = path_nodes(steps, rule)

    def _maps(self, levels: Tensor, start: Tensor, chosen: Selection) -> Tensor:
        difference = levels - start
        total: Tensor | None = None
        for node, weight in zip(self._nodes.tolist(), self._weights.tolist(), strict=True):
            # levels - (1 - a) (levels - start), so that nothing but the sum depends on the number of steps
            point = levels - (1 - node) * difference
            gradient = self.target.gradients(point, chosen.neurons, chosen.paired)
            total = gradient.mul_(weight) if total is None else total.add_(gradient, alpha=weight)
        assert total is not None
        return total * (difference if chosen.paired else difference[:, None])

    def convergence_delta(
        self, maps: Tensor, images: Images, neurons: Neurons | None = None, pairs: Neurons | None = None
    ) -> Tensor:
        """How far the sum of each map is from the change of the response: [B, K], or [B] with pairs.

        Args:
            maps: what `attribute` gave for the same images and neurons, without any `post`.

        Raises:
            ValueError: maps of another shape.
        """
        levels, chosen = self._inputs(images, neurons, pairs)
        leading = (len(levels),) if chosen.paired else (len(levels), len(chosen.neurons))
        if tuple(maps.shape) != (*leading, *levels.shape[1:]):
            raise ValueError(f"maps should be {[*leading, *levels.shape[1:]]}, got {list(maps.shape)}")
        start = self._start(levels)
        delta = maps.flatten(len(leading)).sum(-1)
        for rows, columns in self._chunks(levels, chosen):
            where = Selection(chosen.neurons[columns], chosen.paired)
            end = self.target.responses(levels[rows], where.neurons, where.paired)
            change = end - self.target.responses(start[rows], where.neurons, where.paired)
            delta[rows if chosen.paired else (rows, columns)] -= change
        return delta
