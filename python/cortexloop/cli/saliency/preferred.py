"""The images that maps are made of: each neuron's preferred ones, or all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop import screening, textbook
from cortexloop.cli.console import BadInputError, progress
from cortexloop.cli.fitting.data import Pictures, open_images
from cortexloop.cli.saliency.options import SaliencyOptions

PROCEDURAL = 240
MOST_MAPS = 5000
"""More would fill memory and a disk with pictures that nobody looks at."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Pairs of an image and a neuron.

    Attributes:
        pixels: uint8 [n, H, W, 3]; `names` of them.
        positions: [k, N] row of `pixels` of each neuron's images; -1 for none.
        responses: [k, N].
        seen: how many images there were to choose from.
    """

    names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    positions: NDArray[np.int64]
    responses: NDArray[np.floating[Any]]
    seen: int


def choose_images(
    options: SaliencyOptions,
    neurons: Sequence[str],
    size: tuple[int, int],
    respond: Callable[[NDArray[np.uint8]], NDArray[np.floating[Any]]],
) -> tuple[Chosen, Pictures]:
    """The images of every neuron.

    Args:
        size: of the images.
        respond: images [b, H, W, 3] -> responses [b, N].

    Raises:
        BadInputError: images that cannot be used, or more maps than anyone could want.
    """
    pictures = open_or_draw(options, size)
    names: list[str] = []
    keep = len(pictures.names) if options.every_image else min(options.top, len(pictures.names))
    maps = keep * len(neurons) * (1 if options.model is None else 2 * options.references)
    if maps > MOST_MAPS:
        raise BadInputError(
            f"{keep:,} images for each of {len(neurons):,} neurons would make {maps:,} maps, at most {MOST_MAPS:,} "
            f"are made: "
            "choose --neurons, or fewer images"
        )
    best = screening.TopK(len(neurons), keep)
    with progress("scoring images", len(pictures.names), quiet=options.json) as bar:
        for batch, pixels in pictures.batches(options.source.batch):
            best.add(respond(pixels))
            names += batch
            bar.advance(len(batch))
    found = best.result()
    used = sorted(set(found.positions[found.positions >= 0].tolist()))
    pixels_of = pictures.pick([names[i] for i in used])
    rows = np.full(len(names) + 1, -1)  # the last entry is where position -1 leads
    rows[used] = np.arange(len(used))
    stacked = np.stack([pixels_of[names[i]] for i in used])
    return Chosen(tuple(names[i] for i in used), stacked, rows[found.positions], found.responses, len(names)), pictures


def open_or_draw(options: SaliencyOptions, size: tuple[int, int]) -> Pictures:
    """The images given, or procedural ones. Raises BadInputError."""
    if options.images is not None:
        return open_images(options.images, size, resize=options.resize, skip_bad=options.skip_bad)
    if size != (textbook.SIZE, textbook.SIZE):
        raise BadInputError(
            f"procedural images are {textbook.SIZE} x {textbook.SIZE} pixels, "
            f"these models take {size[0]} x {size[1]}: give --images"
        )
    return Pictures(textbook.procedural_images(PROCEDURAL, options.seed))
