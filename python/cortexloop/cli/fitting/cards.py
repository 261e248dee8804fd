"""What the report shows of each neuron: its factors, receptive fields, images and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.cli.console import progress
from cortexloop.cli.fitting.data import Pictures, Recorded
from cortexloop.cli.fitting.findings import Card, Channel, Double, Ellipse, FactorShown, FieldShown, Seen
from cortexloop.cli.sources import OpenSource
from cortexloop.factor import Factors, Gaussians, back_projected, feature_field, fit_gaussians

CHANNELS = 6
SEEN = 5
NOISE_IMAGES = 16
"""Images through which gradients are averaged, for the fields in pixels."""

LEVEL = 0.3
"""Of its amplitude, where a fitted Gaussian's outline is drawn."""

MARGIN = 0.12
"""Around the part of an image where a mask looks, as a fraction of the image."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """What cards are made of.

    Attributes:
        factors: of all T neurons.
        maps: [N, C, H, W] of all images.
        scores, predictions: [N, T] linear scores and predicted responses.
        curves: per neuron, (x, y) of the predicted response for each score.
        by_rank: [T, ranks] explained variance.
        average: the mean image, or None.
    """

    factors: Factors
    maps: Tensor
    scores: Double
    predictions: Double
    curves: Sequence[tuple[Double, Double]]
    by_rank: Double
    average: NDArray[np.uint8] | None


def make_cards(
    shown: Sequence[int],
    fitted: Fitted,
    recorded: Recorded,
    held: NDArray[np.int64],
    opened: OpenSource | None,
    pictures: Pictures | None,
    *,
    seed: int,
    quiet: bool,
) -> tuple[Card, ...]:
    """Cards of the neurons at positions `shown`."""
    chosen = fitted.factors.select(list(shown)).to("cpu")
    analytic = feature_field(chosen)
    gradient = None
    size = pictures.size if pictures is not None else None
    if opened is not None:
        with progress("projecting back to pixels", 1, quiet=quiet) as bar:
            gradient = back_projected(chosen, opened.source, count=NOISE_IMAGES, seed=seed, shape=opened.size).cpu()
            bar.advance()
        size = opened.size
    fields = _shown(analytic, size), None if gradient is None else _shown(gradient, size)
    parts = [_parts(chosen, i, fitted.maps, opened) for i in range(len(shown))]
    ranked = [_ranked(fitted.predictions[held, n], recorded.responses[held, n]) for n in shown]
    best = [int(recorded.responses[:, n].argmax()) for n in shown]
    names = recorded.names
    needed = {names[held[i]] for rows in ranked for row in rows for i in row}
    needed |= {names[i] for rows in parts for _, _, tops in rows for i in tops} | {names[i] for i in best}
    found = {} if pictures is None else pictures.pick(sorted(needed))

    cards = []
    for i, n in enumerate(shown):
        best_rows, worst_rows, off_rows = (
            tuple(
                Seen(
                    names[held[j]], float(fitted.predictions[held[j], n]), float(recorded.responses[held[j], n]),
                    found.get(names[held[j]]),
                )
                for j in rows
            )
            for rows in ranked[i]
        )  # fmt: skip
        norms = chosen.norms[i]
        cards.append(
            Card(
                index=n,
                name=recorded.neurons[n],
                factors=tuple(
                    FactorShown(
                        chosen.masks[i, f].double().numpy(),
                        tuple(
                            Channel(name, weight, _patch(found.get(names[top]), chosen.masks[i, f]), names[top])
                            for name, weight, top in zip(channel_names, weights, tops, strict=True)
                        ),
                        float(norms[f] / norms.sum()) if float(norms.sum()) else 0.0,
                    )
                    for f, (channel_names, weights, tops) in enumerate(parts[i])
                ),
                analytic=fields[0][i],
                gradient=None if fields[1] is None else fields[1][i],
                background=found.get(names[best[i]], fitted.average),
                background_name="the image with the strongest recorded response",
                best=best_rows,
                worst=worst_rows,
                off=off_rows,
                x=fitted.scores[held, n],
                y=recorded.responses[held, n],
                curve=fitted.curves[n],
                by_rank=fitted.by_rank[n],
            )
        )
    return tuple(cards)


def _parts(
    factors: Factors, neuron: int, maps: Tensor, opened: OpenSource | None
) -> list[tuple[list[str], list[float], list[int]]]:
    """Of each factor with content, its strongest channels: names, weights of a unit vector, the image best for each."""
    found = []
    names = None if opened is None else opened.channels
    for f in range(factors.rank):
        vector = factors.vectors[neuron, f]
        if not bool(vector.any()):
            continue
        strongest = vector.abs().topk(min(CHANNELS, len(vector))).indices
        strongest = strongest[vector[strongest] != 0]
        mask = factors.masks[neuron, f].to(maps)
        seen = torch.einsum("bkhw,hw->bk", maps[:, strongest.to(maps.device)], mask)
        tops = seen.argmax(0).tolist()
        labels = [f"channel {c}" if names is None else names[c] for c in strongest.tolist()]
        found.append((labels, (vector[strongest] / vector.norm()).tolist(), tops))
    return found


def _patch(pixels: NDArray[np.uint8] | None, mask: Tensor) -> NDArray[np.uint8] | None:
    """The square part of an image where a mask looks, and a margin for the extent of the features themselves."""
    if pixels is None or mask.numel() == 1:
        return pixels
    weight = mask.abs().double()
    total = float(weight.sum())
    if total == 0:
        return pixels
    centre, side = [], MARGIN
    for axis, (cells, extent) in enumerate(zip(mask.shape, pixels.shape[:2], strict=True)):
        along = weight.sum(1 - axis) / total
        places = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        mean = float((along * places).sum())
        centre.append(mean * extent)
        side = max(side, 2.5 * float((along * (places - mean) ** 2).sum()) ** 0.5 + MARGIN)
    half = min(1.0, side) * min(pixels.shape[:2]) / 2
    starts = [round(min(max(c - half, 0), n - 2 * half)) for c, n in zip(centre, pixels.shape[:2], strict=True)]
    size = max(round(2 * half), 1)
    return pixels[starts[0] : starts[0] + size, starts[1] : starts[1] + size]


def _ranked(predicted: Double, recorded: Double) -> tuple[list[int], list[int], list[int]]:
    """Held-out images: highest predicted, lowest predicted, and furthest from the prediction."""
    order = np.argsort(-predicted, kind="stable")
    count = min(SEEN, len(order) // 2)
    off = np.argsort(-np.abs(predicted - recorded), kind="stable")
    return order[:count].tolist(), order[::-1][:count].tolist(), off[:count].tolist()


def _shown(fields: Tensor, size: tuple[int, int] | None) -> list[FieldShown]:
    """Fields with the outline of the Gaussian fitted to each."""
    height, width = fields.shape[1:]
    gaussians = fit_gaussians(fields) if min(height, width) >= 3 else None
    return [
        FieldShown(
            field.double().numpy(), None if gaussians is None else _ellipse(gaussians, i, size or (height, width))
        )
        for i, field in enumerate(fields)
    ]


def _ellipse(gaussians: Gaussians, i: int, size: tuple[int, int]) -> Ellipse | None:
    """The outline in image pixels; None where it says nothing: of a flat map, or wider than the image."""
    height, width = gaussians.shape
    reach = math.sqrt(-2 * math.log(LEVEL))
    if float(gaussians.amplitude[i]) == 0 or reach * float(gaussians.sigma_u[i]) > max(height, width) / 2:
        return None
    sx, sy = size[1] / width, size[0] / height
    return (
        (float(gaussians.x[i]) + 0.5) * sx,
        (float(gaussians.y[i]) + 0.5) * sy,
        reach * float(gaussians.sigma_u[i]) * sx,
        reach * float(gaussians.sigma_v[i]) * sy,
        math.degrees(float(gaussians.theta[i])),
    )
