"""Does a factor model recover simulated neurons: their responses to held-out images, and where they look?

    python benchmarks/evidence_recovery.py [--quick] [--write]

Neurons are simulated in the features of a real trained network, the published shared compact model (layer 3, maps of
100 x 28 x 28): a Gaussian mask at a random place, times a vector of eight random channels, through a softplus. Noise is
added to the responses to 1,600 natural images, on which all models are fitted. The other 800 images are held out;
predictions of these are compared with noiseless responses. A model's receptive field is its readout's norm over
channels at each position; it is compared with the true mask, both cut off at 0.3 of their largest value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import evidence
from cortexloop import factor, metrics
from evidence import Result, median

LAYER, TRAINING, CHANNELS, LEVEL = 3, 1600, 8, 0.3
NOISE = (0.5, 1.0, 2.0)
ALPHAS = np.logspace(-4, 8, 13).tolist()
MAIN = "factor model, rank 3, mask + ridge"


class Fitted(Protocol):
    """A model of all neurons."""

    def predict(self, inputs: Tensor) -> Tensor:
        """[B, T]."""

    def weights(self) -> Tensor | None:
        """[T, C, H, W], None where it reads no place."""


def simulate(maps: Tensor, neurons: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Masks [T, H, W] and noiseless responses [n, T] of unit deviation."""
    count, channels, height, width = maps.shape
    rows, columns = np.mgrid[:height, :width]
    centre = rng.uniform(5, height - 6, (2, neurons))
    sigma = rng.uniform(1.5, 3.5, neurons)
    square = (rows[None] - centre[0][:, None, None]) ** 2 + (columns[None] - centre[1][:, None, None]) ** 2
    masks = torch.from_numpy(np.exp(-square / (2 * sigma[:, None, None] ** 2))).float()
    vectors = torch.zeros(neurons, channels)
    deviation = maps.std((0, 2, 3))
    for vector in vectors:
        vector[rng.choice(channels, CHANNELS, replace=False)] = torch.from_numpy(rng.standard_normal(CHANNELS)).float()
    vectors /= torch.where(deviation > 0, deviation, 1.0)
    drive = torch.empty(count, neurons)
    for start in range(0, count, 100):
        pooled = torch.einsum("bchw,thw->btc", maps[start : start + 100], masks)
        drive[start : start + 100] = (pooled * vectors).sum(-1)
    drive = (drive - drive.mean(0)) / drive.std(0)
    rates = torch.nn.functional.softplus(drive)
    return masks, (rates - rates.mean(0)) / rates.std(0)


def models(quick: bool) -> dict[str, Callable[[Tensor, Tensor], Fitted]]:
    """Name -> (training maps, responses) -> fitted model."""

    def factors(rank: int, reduction: str | None, **options: object) -> Callable[[Tensor, Tensor], Fitted]:
        alphas = None if reduction is None else ALPHAS
        return lambda x, y: factor.FactorModel.fit(None, x, y, rank=rank, reduction=reduction, alphas=alphas, **options)

    def baseline(kind: str, **options: object) -> Callable[[Tensor, Tensor], Fitted]:
        return lambda x, y: factor.Baseline.fit(None, x, y, kind=kind, alphas=ALPHAS, **options)

    return {
        MAIN: factors(3, "mask"),
        "factor model, rank 1, mask + ridge": factors(1, "mask"),
        "factor model, rank 3, covariance factors, softplus": factors(3, None),
        "PCA 1000 + ridge": baseline("pca", components=30 if quick else 1000),
        "sparse random projection + ridge": baseline("srp", components=100 if quick else None),
        "spatial average + ridge": baseline("average"),
        "dense ridge": baseline("dense"),
    }


def main() -> None:
    """Run the experiment."""
    chosen = evidence.options(__doc__)
    rng = np.random.default_rng(0)
    neurons = 4 if chosen.quick else 60
    source = evidence.shared_network(LAYER)
    images = np.concatenate([evidence.session_images(s)[: 120 if chosen.quick else None] for s in ("190923", "201025")])
    images = images[rng.permutation(len(images))]
    training = len(images) * TRAINING // 2400
    maps = source(images)
    masks, rates = simulate(maps, neurons, rng)
    rows: list[Result] = []
    for noise in NOISE[:1] if chosen.quick else NOISE:
        noisy = rates[:training] + noise * torch.from_numpy(rng.standard_normal((training, neurons))).float()
        for name, fit in models(chosen.quick).items():
            print(f"noise {noise}: {name} ...", file=sys.stderr)
            model = fit(maps[:training], noisy)
            predicted = model.predict(maps[training:])
            r = metrics.pearson_r(predicted.T.numpy(), rates[training:].T.numpy())
            fields = fields_of(model)
            if fields is None:
                iou = distance = np.full(neurons, np.nan)
            else:
                largest = fields.amax((1, 2), keepdim=True)
                iou = factor.overlap(fields > LEVEL * largest, masks > LEVEL).numpy()
                distance = (centroid(fields) - centroid(masks)).norm(dim=1).numpy()
            rows += [
                {
                    "noise": noise,
                    "model": name,
                    "neuron": n,
                    "r": float(r[n]),
                    "iou": float(iou[n]),
                    "distance": float(distance[n]),
                }
                for n in range(neurons)
            ]
    evidence.finish("recovery", rows, text, chosen)


def fields_of(model: Fitted) -> Tensor | None:
    """Norm over channels of the readout's weights, [T, H, W]; None where a model has no place."""
    weights = model.weights()
    return None if weights is None or weights.ndim != 4 or weights.shape[-1] == 1 else factor.feature_field(weights)


def centroid(fields: Tensor) -> Tensor:
    """[T, 2] centre of mass of what lies above the level."""
    kept = torch.where(fields > LEVEL * fields.amax((1, 2), keepdim=True), fields, 0.0).double()
    rows, columns = torch.meshgrid(*(torch.arange(float(n)).double() for n in fields.shape[1:]), indexing="ij")
    total = kept.sum((1, 2))
    return torch.stack([(kept * rows).sum((1, 2)) / total, (kept * columns).sum((1, 2)) / total], dim=1)


def text(rows: Sequence[Mapping[str, str]]) -> str:
    """The table: a line per model, three figures per noise level."""
    levels = list(dict.fromkeys(row["noise"] for row in rows))
    header = ["model"]
    for level in levels:
        header += [f"r, noise {level}", f"IoU, noise {level}", f"distance, noise {level}"]
    lines: list[list[str | float]] = []
    for name in dict.fromkeys(row["model"] for row in rows):
        line: list[str | float] = [name]
        for level in levels:
            here = [row for row in rows if row["model"] == name and row["noise"] == level]
            for figure in ("r", "iou", "distance"):
                values = np.array([float(row[figure]) for row in here])
                line.append("" if np.isnan(values).all() else median(values))
        lines.append(line)
    return evidence.markdown(header, lines)


if __name__ == "__main__":
    main()
