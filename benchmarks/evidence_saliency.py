"""Does parallel backpropagation find what an object shares with a category?

    python benchmarks/evidence_saliency.py [--quick] [--write]

Synthetic category-selective neurons. A category is three parts, patches of natural images, each with a place of its
own; its exemplars show all three on natural backgrounds. A neuron is a ridge readout of the shared network's features
that tells exemplars of its category from images of other categories. An object of no category shows one of these parts
at its place, and parts of other categories elsewhere. Where the shared part lies is known; nothing about it is told to
the methods. Chance is the share of the image that the part takes (mass, peak) and 0.5 (area under the ROC curve).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import evidence
from cortexloop import attribution, regression
from cortexloop.attribution import ParallelBackprop, Post, Readout
from evidence import Result

LAYER, SIZE, PART, PARTS = 3, 112, 26, 3
PLACES = np.array([(y, x) for y in (6, 43, 80) for x in (6, 43, 80)])  # upper left corners
JITTER = 2
POST = Post(channels="l2", blur=2.0)
TRAINING = 40
"""Exemplars of each category that the neurons are fitted on; as many more are the gallery of references."""


@dataclass(frozen=True)
class World:
    """Where pixels come from: images for backgrounds, and the parts of every category with their places."""

    backgrounds: NDArray[np.uint8]  # [n, 112, 112, 3]
    parts: NDArray[np.uint8]  # [categories, PARTS, PART, PART, 3]
    places: NDArray[np.int64]  # [categories, PARTS, 2] upper left corner


def make_world(images: NDArray[np.uint8], categories: int, rng: np.random.Generator) -> World:
    """Parts are crops of high contrast: of 40 random ones the crop with the largest deviation."""
    parts = np.empty((categories, PARTS, PART, PART, 3), np.uint8)
    half = len(images) // 2
    for category in range(categories):
        for part in range(PARTS):
            best = -1.0
            for _ in range(40):
                y, x = rng.integers(0, SIZE - PART, 2)
                crop = images[rng.integers(half), y : y + PART, x : x + PART]
                if (deviation := float(crop.std())) > best:
                    best, parts[category, part] = deviation, crop
    places = np.stack([PLACES[rng.permutation(len(PLACES))[:PARTS]] for _ in range(categories)])
    return World(images[half:], parts, places)


def _paste(image: NDArray[np.float32], part: NDArray[np.uint8], place: NDArray[np.int64]) -> None:
    """Put a part onto an image, its outermost three pixels fading into it."""
    ramp = np.minimum(1.0, (np.minimum(np.arange(PART), np.arange(PART)[::-1]) + 1) / 4)
    alpha = np.minimum.outer(ramp, ramp)[..., None].astype(np.float32)
    y, x = place
    region = image[y : y + PART, x : x + PART]
    region += alpha * (part - region)


def make_image(
    world: World, category: int, own: Sequence[int], distractors: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """An image with some of a category's parts at their places and parts of other categories elsewhere.

    Returns:
        uint8 [112, 112, 3], and where the category's own parts lie, bool [112, 112].
    """
    background = world.backgrounds[rng.integers(len(world.backgrounds))].astype(np.float32)
    image = background.mean() + 0.4 * (background - background.mean())
    region = np.zeros((SIZE, SIZE), bool)
    taken = {tuple(place) for place in world.places[category]}
    free = [place for place in PLACES if tuple(place) not in taken]
    for place in rng.permutation(len(free))[:distractors]:
        other = (category + rng.integers(1, len(world.parts))) % len(world.parts)
        corner = free[place] + rng.integers(-JITTER, JITTER + 1, 2)
        _paste(image, world.parts[other, rng.integers(PARTS)], corner)
    for part in own:
        y, x = world.places[category, part] + rng.integers(-JITTER, JITTER + 1, 2)
        _paste(image, world.parts[category, part], np.array((y, x)))
        region[y : y + PART, x : x + PART] = True
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), region


def exemplars(world: World, category: int, count: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images of a category: all its parts, and two of others."""
    return np.stack([make_image(world, category, range(PARTS), 2, rng)[0] for _ in range(count)])


def auc(values: NDArray[np.float64], inside: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of a map as a classifier of pixels (Mann and Whitney; maps have no ties to speak of)."""
    order = values.ravel().argsort()
    rank = np.empty(order.size)
    rank[order] = np.arange(1, order.size + 1)
    n = int(inside.sum())
    return float((rank[inside.ravel()].sum() - n * (n + 1) / 2) / (n * (order.size - n)))


def main() -> None:
    """Run the experiment."""
    chosen = evidence.options(__doc__)
    rng = np.random.default_rng(0)
    categories, objects = (4, 1) if chosen.quick else (12, 10)
    world = make_world(evidence.session_images("190923"), categories, rng)
    source = evidence.shared_network(LAYER)

    print("fitting the neurons ...", file=sys.stderr)
    shown = np.concatenate([exemplars(world, c, TRAINING, rng) for c in range(categories)])
    label = np.repeat(np.eye(categories), TRAINING, axis=0)
    maps = source(shown)
    fit = regression.ridge(maps.flatten(1), torch.from_numpy(label).float(), alphas=np.logspace(-1, 6, 8).tolist())
    weights = fit.weights.float().view(categories, *source.feature_shape())

    methods = {
        "parallel backpropagation": ParallelBackprop(source, weights, post=POST),
        "parallel, similarity gradient": ParallelBackprop(source, weights, cotangent="similarity_gradient", post=POST),
        "parallel, minimum": ParallelBackprop(source, weights, cotangent="minimum", post=POST),
        "parallel, positive weights": ParallelBackprop(source, weights, sign="positive", post=POST),
        "parallel, integrated gradients": ParallelBackprop(
            source, weights, method="integrated_gradients", steps=16, post=POST
        ),
    }
    readout = Readout(source, weights)
    plain = {
        "gradient": attribution.Saliency(readout, post=POST),
        "gradient x input": attribution.InputXGradient(readout, post=POST),
        "integrated gradients": attribution.IntegratedGradients(readout, steps=16, post=POST),
    }
    rows: list[Result] = []
    for category in range(categories):
        print(f"category {category + 1} of {categories} ...", file=sys.stderr)
        gallery = exemplars(world, category, TRAINING, rng)
        made = [make_image(world, category, [i % PARTS], 3, rng) for i in range(objects)]
        images, regions = np.stack([m[0] for m in made]), [m[1] for m in made]
        parallel = methods["parallel backpropagation"]
        index = parallel.find_references(images, gallery, neurons=[category]).index[:, :, 0]
        pairs = [category] * objects
        found = {
            name: method.attribute(images, gallery, index=index, neurons=[category]).image[:, 0]
            for name, method in methods.items()
        }
        found |= {name: method.attribute(images, pairs=pairs) for name, method in plain.items()}
        for name, values in found.items():
            for i, region in enumerate(regions):
                value = values[i].double().numpy()
                y, x = np.unravel_index(value.argmax(), value.shape)
                rows.append(
                    {
                        "category": category,
                        "object": i,
                        "method": name,
                        "mass": float(value[region].sum() / value.sum()),
                        "auc": auc(value, region),
                        "peak": int(region[y, x]),
                    }
                )
    evidence.finish("shared-features", rows, text, chosen)


def text(rows: Sequence[Mapping[str, str]]) -> str:
    """The table: a line per method, means over all objects."""
    lines: list[list[str | float]] = []
    for name in dict.fromkeys(row["method"] for row in rows):
        here = [row for row in rows if row["method"] == name]
        means = [float(np.mean([float(row[k]) for row in here])) for k in ("mass", "auc", "peak")]
        lines.append([name, *means])
    share = PART**2 / SIZE**2
    lines.append(["chance", share, 0.5, share])
    return evidence.markdown(["method", "mass in the shared part", "area under ROC", "peak in it"], lines)


if __name__ == "__main__":
    main()
