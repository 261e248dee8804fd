"""Parallel backpropagation: what an image shares, for one neuron, with the most similar image of a gallery.

Source: Lappe et al., "Parallel Backpropagation for Shared-Feature Visualization", NeurIPS 2024. The method here is a
RECONSTRUCTION from the abstract and the captions: no code is public, and details that they leave open are named options
with the choices of this package as defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop.attribution.base import MEMORY, Baseline, Neurons, chunks, floating, reference_levels, select
from cortexloop.attribution.integrated import path_nodes
from cortexloop.attribution.post import Post
from cortexloop.attribution.targets import Readout
from cortexloop.attribution.weights import FactorsLike
from cortexloop.features import FeatureSource
from cortexloop.features.base import Images, as_levels

COTANGENTS = ("weighted_product", "similarity_gradient", "minimum")
SIMILARITIES = ("weighted", "cosine", "abs_cosine")
METHODS = ("gradient", "grad_x_input", "integrated_gradients")


@dataclass(frozen=True, eq=False)
class References:
    """The most similar images of a gallery, for each image and neuron, best first."""

    index: Tensor
    """[B, K, top] int64, positions in the gallery."""
    similarity: Tensor
    """[B, K, top]."""


@dataclass(frozen=True, eq=False)
class PairMaps:
    """Maps of both images of each pair (image, its reference for neuron k)."""

    image: Tensor
    """[B, K, H, W, 3], or without the last axis, see `Post`."""
    reference: Tensor
    """The same for the reference."""
    similarity: Tensor
    """[B, K] of the pair."""


class ParallelBackprop:
    """Maps of the features that two images share, as far as a neuron reads them.

    With phi and phi' the features of an image x and its reference x', w the neuron's readout weights:

    - the reference maximises a similarity of phi and phi' for this neuron, see `similarity`;
    - the features that both have, weighted, are a cotangent h = w * phi * phi' in feature space;
    - h is pulled back to the pixels of both: S = J(x)^T h and S' = J(x')^T h. No Jacobian is ever made, and all neurons
      of an image share its forward pass.

    S is the gradient of 1/2 sum_i w_i phi'_i phi_i(x)^2 with phi' held fixed.

    Args:
        source: the features.
        weights: [N, C, H, W], or factors (masks and vectors), of N neurons. Weights on principal components have to be
            brought to feature space first (w = P^T v).
        cotangent: "weighted_product", w phi phi'; "similarity_gradient", w phi' for the image and w phi for the
            reference: the gradient of the "weighted" similarity; or "minimum", w min(phi, phi').
        similarity: "weighted", sum w phi phi' (which the weighted product sums to); "cosine" of w phi and w phi'; or
            "abs_cosine", the cosine under the metric |w|.
        sign: "all" weights, or "positive" ones only, in cotangent and similarity.
        method: "gradient"; "grad_x_input", (x - baseline) S; or "integrated_gradients", (x - baseline) times the mean
            of S along the line from the baseline with h held fixed, whose sum is h . (phi(x) - phi(baseline)).
        steps, rule: points of that line, see `path_nodes`.
        baseline: "zero", "blur", a level or one image [H, W, 3], see `IntegratedGradients`.
        post: steps on each map.
        memory: see `Method`.

    Raises:
        ValueError: an unknown name, or weights that do not fit the source.
    """

    def __init__(
        self,
        source: FeatureSource,
        weights: Tensor | FactorsLike,
        *,
        cotangent: str = "weighted_product",
        similarity: str = "weighted",
        sign: str = "all",
        method: str = "gradient",
        steps: int = 32,
        rule: str = "gausslegendre",
        baseline: Baseline = "zero",
        post: Post | None = None,
        memory: int = MEMORY,
    ) -> None:
        for name, value, known in (
            ("cotangent", cotangent, COTANGENTS),
            ("similarity", similarity, SIMILARITIES),
            ("sign", sign, ("all", "positive")),
            ("method", method, METHODS),
        ):
            if value not in known:
                raise ValueError(f"{name} should be one of {', '.join(known)}, got {value!r}")
        self.source = source
        self.target = Readout(source, weights)
        self.cotangent, self.similarity, self.sign, self.method = cotangent, similarity, sign, method
        self.baseline = baseline
        self.post = Post() if post is None else post
        self.memory = memory
        self._nodes, self._node_weights = path_nodes(steps, rule)

    # --- references -----------------------------------------------------------------------------------------------

    def find_references(
        self,
        images: Images,
        gallery: Images | Iterable[Images],
        *,
        neurons: Neurons | None = None,
        top: int = 1,
        exclude: Tensor | None = None,
    ) -> References:
        """The `top` most similar gallery images of every image for every neuron, as one matrix product per image.

        Args:
            images: [B, H, W, 3]; their features are held at once.
            gallery: one array, or an iterable of arrays: it is streamed and never held.
            neurons: positions; default all.
            top: how many.
            exclude: int64 [B]: a gallery position that each image may not have (itself), -1 for none.

        Raises:
            ValueError: fewer than `top` gallery images to choose from, or an image without any feature that a neuron
                reads (its cosine is not defined).
            TypeError, ValueError: images that do not fit.
        """
        if top < 1:
            raise ValueError(f"top should be at least 1, got {top}")
        phi = self.source(as_levels(images, self.source.device)).flatten(1)  # [B, D]
        chosen = select(self.target, len(phi), neurons, None).neurons
        count, features = len(chosen), phi.shape[1]
        if exclude is not None and tuple(exclude.shape) != (len(phi),):
            raise ValueError(f"exclude should hold one gallery position for each of {len(phi)} images")
        best = phi.new_full((len(phi), count, top), -torch.inf)
        index = torch.full((len(phi), count, top), -1, dtype=torch.int64, device=phi.device)
        item = 8 if phi.dtype == torch.float64 else 4
        blocks = list(chunks(1, count, item * features, 4 * item * features, self.memory, paired=False))
        seen = 0
        for theirs in self.source.stream(gallery):
            other = theirs.flatten(1)  # [M, D]
            for _, columns in blocks:
                weights = self._metric(chosen[columns]).flatten(1)  # [k, D]
                for b in range(len(phi)):
                    scores = self._similarities(weights, phi[b], other, b)  # [k, M]
                    if exclude is not None and seen <= int(exclude[b]) < seen + len(other):
                        scores[:, int(exclude[b]) - seen] = -torch.inf
                    at = torch.arange(seen, seen + len(other), device=phi.device).expand_as(scores)
                    # the earlier one first where two are alike
                    joined = torch.cat([best[b, columns], scores], dim=1)
                    order = joined.argsort(dim=1, descending=True, stable=True)[:, :top]
                    best[b, columns] = joined.gather(1, order)
                    index[b, columns] = torch.cat([index[b, columns], at], dim=1).gather(1, order)
            seen += len(other)
        if count and len(phi) and bool((index < 0).any() | best.isneginf().any()):
            raise ValueError(
                f"the gallery of {seen} images has fewer than {top} that an image could be compared with (left out are "
                "those without any feature that the neuron reads)"
            )
        return References(index, best)

    def _signed(self, neurons: Tensor) -> Tensor:
        rows = self.target.weights.rows(neurons)
        return rows.relu() if self.sign == "positive" else rows

    def _metric(self, neurons: Tensor) -> Tensor:
        """The weight of phi_i phi'_i in the similarity's numerator, [K, C, H, W]."""
        rows = self._signed(neurons)
        if self.similarity == "weighted":
            return rows
        return rows.square() if self.similarity == "cosine" else rows.abs()

    def _similarities(self, metric: Tensor, phi: Tensor, others: Tensor, image: int) -> Tensor:
        """[K, M] from metric [K, D], one image's features [D] and others' [M, D]; -inf where not defined."""
        scores = (metric * phi) @ others.T
        if self.similarity == "weighted":
            return scores
        own = (metric @ phi.square()).sqrt()[:, None]
        if not bool((own > 0).all()):
            raise ValueError(
                f"image {image} has no feature that {int((own <= 0).sum())} of the neurons read: a cosine with it is "
                'not defined; leave it out, or take similarity="weighted"'
            )
        theirs = (metric @ others.square().T).sqrt()
        defined: Tensor = torch.where(theirs > 0, scores / (own * torch.where(theirs > 0, theirs, 1)), -torch.inf)
        return defined

    def _pair_similarity(self, metric: Tensor, phi: Tensor, others: Tensor) -> Tensor:
        """[K] from metric and others, [K, C, H, W], and one image's features; -inf where not defined."""
        scores = (metric * phi * others).flatten(1).sum(1)
        if self.similarity == "weighted":
            return scores
        norms = [(metric * x.square()).flatten(1).sum(1).sqrt() for x in (phi, others)]
        norm = norms[0] * norms[1]
        defined: Tensor = torch.where(norm > 0, scores / torch.where(norm > 0, norm, 1), -torch.inf)
        return defined

    # --- maps -----------------------------------------------------------------------------------------------------

    def attribute(
        self,
        images: Images,
        references: Images,
        *,
        index: Tensor | None = None,
        neurons: Neurons | None = None,
    ) -> PairMaps:
        """Maps of what each image and its reference share.

        Args:
            images: uint8 or floating levels, [B, H, W, 3].
            references: without `index`, one reference for each image, [B, H, W, 3], for all neurons; with it, the
                gallery.
            index: int64 [B, K], the gallery position of each image's reference for each neuron, such as
                `find_references(...).index[:, :, 0]`.
            neurons: the K neurons; default all.

        Raises:
            TypeError, ValueError: what does not fit; too little `memory`.
        """
        device = self.source.device
        levels, others = (floating(as_levels(x, device), self.target) for x in (images, references))
        chosen = select(self.target, len(levels), neurons, None).neurons
        batch, count = len(levels), len(chosen)
        if index is None:
            if len(others) != batch:
                raise ValueError(
                    f"without index, references should be one for each of {batch} images, got {len(others)}"
                )
            index = torch.arange(batch)[:, None].expand(batch, count)
        if tuple(index.shape) != (batch, count) or index.is_floating_point():
            raise ValueError(f"index should be integers [{batch}, {count}], got {index.dtype} {list(index.shape)}")
        index = index.cpu()
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < len(others)):
            raise ValueError(f"index should lie in the gallery, 0..{len(others) - 1}")
        near, far = self.source(levels), self.source(others)  # features, [B, ...] and [M, ...]
        similarity = near.new_empty(batch, count)
        first = self._side(levels, near, far, index, chosen, similarity)
        # The other side: for each gallery image that is used, the (image, neuron) pairs that use it.
        second = torch.empty_like(first)
        for position in torch.unique(index).tolist():
            users = torch.nonzero(index == position)
            for part in self._split(users, others):
                weights = self._signed(chosen[part[:, 1]])
                cotangents = self._cotangents(weights, far[position][None], near[part[:, 0]])
                maps = self._pulled(others[position : position + 1], cotangents[None])[0]
                second[part[:, 0], part[:, 1]] = self.post(maps).to(second.dtype)
        return PairMaps(first, second, similarity)

    def _side(
        self, levels: Tensor, near: Tensor, far: Tensor, index: Tensor, chosen: Tensor, similarity: Tensor
    ) -> Tensor:
        """Maps of the images, [B, K, ...]; the similarities are written."""
        whole = levels.new_empty((len(levels), len(chosen), *self.post.shape(*levels.shape[1:3])))
        for b in range(len(levels)):
            for part in self._split(torch.arange(len(chosen))[:, None], levels):
                columns = part[:, 0]
                weights = self._signed(chosen[columns])
                theirs = far[index[b, columns]]
                cotangents = self._cotangents(weights, near[b][None], theirs)
                similarity[b, columns] = self._pair_similarity(self._metric(chosen[columns]), near[b], theirs)
                whole[b, columns] = self.post(self._pulled(levels[b : b + 1], cotangents[None])[0]).to(whole.dtype)
        return whole

    def _split(self, items: Tensor, levels: Tensor) -> list[Tensor]:
        """Pairs of one image in chunks that fit into memory."""
        image, pair = self.target.memory(levels.shape[1], levels.shape[2])
        blocks = chunks(1, max(1, len(items)), image, 2 * pair, self.memory, paired=False)
        return [items[columns] for _, columns in blocks if len(items)]

    def _cotangents(self, weights: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """h for the image with features `own`, [K, C, H, W]."""
        if self.cotangent == "similarity_gradient":
            return weights * other
        if self.cotangent == "minimum":
            return weights * torch.minimum(own, other)
        return weights * (own * other)

    def _pulled(self, levels: Tensor, cotangents: Tensor) -> Tensor:
        """Maps [1, K, H, W, 3] of one image for cotangents [1, K, C, H, W]."""
        if self.method == "gradient":
            return self._pullback(levels, cotangents)
        difference = levels - reference_levels(self.baseline, levels, self.target.zero)
        if self.method == "grad_x_input":
            return self._pullback(levels, cotangents) * difference[:, None]
        total: Tensor | None = None
        for node, weight in zip(self._nodes.tolist(), self._node_weights.tolist(), strict=True):
            part = self._pullback(levels - (1 - node) * difference, cotangents)
            total = part.mul_(weight) if total is None else total.add_(part, alpha=weight)
        assert total is not None
        return total * difference[:, None]

    def _pullback(self, levels: Tensor, cotangents: Tensor) -> Tensor:
        linear = self.source.linearize(levels)
        return linear.pullback(cotangents.to(linear.features.dtype))
