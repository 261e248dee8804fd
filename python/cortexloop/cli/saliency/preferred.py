"""The images that maps are made of: each model's preferred ones, or all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import screening, textbook
from cortexloop.cli.console import BadInputError, progress
from cortexloop.cli.fitting.data import Pictures, open_images
from cortexloop.cli.saliency.options import SaliencyOptions

PROCEDURAL = 240
BATCH = 64
MOST_MAPS = 20_000
"""More would fill a disk with pictures that nobody looks at."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Pairs of an image and a model.

    Attributes:
        pixels: uint8 [n, H, W, 3]; `names` of them.
        positions: [k, N] row of `pixels` of each model's images; -1 for none.
        responses: [k, N].
        seen: how many images there were to choose from.
    """

    names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    positions: NDArray[np.int64]
    responses: NDArray[np.floating[Any]]
    seen: int


def choose_images(options: SaliencyOptions, bank: cl.ModelBank) -> tuple[Chosen, Pictures]:
    """The images of every model.

    Raises:
        BadInputError: images that cannot be used, or more maps than anyone could want.
    """
    pictures = _pictures(options, bank)
    names: list[str] = []
    keep = options.top
    if options.every_image:
        keep = len(pictures.names)
        if keep * len(bank) > MOST_MAPS:
            raise BadInputError(
                f"--every-image asks for {keep:,} images x {len(bank):,} neurons = {keep * len(bank):,} maps: at most "
                f"{MOST_MAPS:,} are made; choose --neurons or fewer images"
            )
    best = screening.TopK(len(bank), keep)
    blocks = []
    with progress("scoring images", len(pictures.names), quiet=options.json) as bar:
        for batch, pixels in pictures.batches(BATCH):
            block = cl.responses(pixels, bank)
            best.add(block)
            names += batch
            if options.every_image:
                blocks.append(block)
            bar.advance(len(batch))
    if options.every_image:
        responses = np.concatenate(blocks)
        positions = np.repeat(np.arange(len(names))[:, None], len(bank), axis=1)
    else:
        found = best.result()
        responses, positions = found.responses, found.positions
    used = sorted(set(positions[positions >= 0].tolist()))
    pixels_of = pictures.pick([names[i] for i in used])
    rows = np.full(len(names) + 1, -1)
    rows[used] = np.arange(len(used))
    stacked = np.stack([pixels_of[names[i]] for i in used])
    return Chosen(tuple(names[i] for i in used), stacked, rows[positions], responses, len(names)), pictures


def _pictures(options: SaliencyOptions, bank: cl.ModelBank) -> Pictures:
    if options.images is not None:
        return open_images(
            options.images, (bank.height, bank.width), resize=options.resize, skip_bad=options.skip_bad
        )
    if (bank.height, bank.width) != (textbook.SIZE, textbook.SIZE):
        raise BadInputError(
            f"procedural images are {textbook.SIZE} x {textbook.SIZE} pixels, "
            f"these models take {bank.height} x {bank.width}: give --images"
        )
    return Pictures(textbook.procedural_images(PROCEDURAL, options.seed))
