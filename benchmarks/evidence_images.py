"""Do images made for a rank-3 readout drive a neuron as well as images made for dense weights?

    python benchmarks/evidence_images.py [--quick] [--write]

For neurons of session 201025: covariance of the shared network's features with the recorded responses to images 1 to
600, factorized at rank 3; images climb the readout's score by gradient ascent. How strongly they drive the neuron is
asked of an independent model: the neuron's own published compact model, a different network that was distilled without
any of these weights. Dense weights are the same covariance before it is factorized, and ridge weights on all features.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

import cortexloop as cl
import evidence
from cortexloop import factor, metrics
from evidence import Result, median
from evidence_recovery import ALPHAS

SESSION, LAYER, RANK, TRAINING = "201025", 3, 3, 600
DENSE = "covariance, dense"
CONTROLS = ("channels permuted", "mask patches shuffled")


def chosen_neurons(count: int) -> NDArray[np.int64]:
    """The neurons that their compact models predict best on held-out images: the judge has to know its neuron."""
    bank = evidence.compact_models(SESSION)
    images = evidence.session_images(SESSION)[TRAINING:]
    r = metrics.pearson_r(cl.responses(images, bank).T, evidence.session_responses(SESSION)[TRAINING:].T)
    return np.sort(np.argsort(-r)[:count])


def main() -> None:
    """Run the experiment."""
    chosen = evidence.options(__doc__)
    neurons = chosen_neurons(2 if chosen.quick else 16)
    starts, steps = (1, 5) if chosen.quick else (1, 100)
    source = evidence.shared_network(LAYER)
    images = evidence.session_images(SESSION)[:TRAINING]
    responses = evidence.session_responses(SESSION)[:TRAINING, neurons]
    maps = source(images)

    moments = factor.FeatureMoments(source.feature_shape(), len(neurons))
    moments.update(maps, torch.from_numpy(responses).float())
    covariance = factor.threshold(moments, "two_sided").tensor
    low_rank = factor.factorize(covariance, "posneg_nmf", rank=RANK, border=1)
    ridge = factor.Baseline.fit(None, maps, responses, kind="dense", alphas=ALPHAS).weights()
    readouts: dict[str, torch.Tensor | factor.Factors] = {
        f"rank {RANK}": low_rank,
        DENSE: factor.threshold(moments, "none").tensor,
        "ridge, dense": ridge,
        CONTROLS[0]: factor.channel_permutation(low_rank, seed=1).apply(low_rank),
        CONTROLS[1]: factor.patch_shuffle(low_rank, seed=1).apply(low_rank),
    }
    bank = evidence.compact_models(SESSION).select(neurons)
    grey = cl.responses(np.full((1, 112, 112, 3), 128, np.uint8), bank)[0]
    natural = (cl.responses(evidence.session_images(SESSION), bank) - grey).max(0)
    pairs = list(range(len(neurons)))
    rows: list[Result] = []
    for name, weights in readouts.items():
        print(f"images for {name} ...", file=sys.stderr)
        found = factor.optimal_images(weights, source, starts=starts, seed=0, steps=steps)
        pixels = np.clip(np.rint(found.best), 0, 255).astype(np.uint8)
        drive = cl.responses(pixels, bank, pairs=pairs) - grey
        rows += [
            {"neuron": int(n), "readout": name, "response": float(d), "best natural": float(best)}
            for n, d, best in zip(neurons, drive, natural, strict=True)
        ]
    evidence.finish("optimal-images", rows, text, chosen)


def text(rows: Sequence[Mapping[str, str]]) -> str:
    """The table: a line per readout."""
    names = list(dict.fromkeys(row["readout"] for row in rows))
    response = {name: np.array([float(row["response"]) for row in rows if row["readout"] == name]) for name in names}
    natural = np.array([float(row["best natural"]) for row in rows if row["readout"] == names[0]])
    lines = []
    for name in names:
        ratio, count = response[name] / response[DENSE], len(natural)
        better = int((response[name] > natural).sum())
        mean = float(response[name].mean() / response[DENSE].mean())
        lines.append([name, median(response[name]), median(ratio), mean, f"{better} of {count}"])
    return evidence.markdown(
        [
            "images made for",
            "response above grey, median",
            "relative to dense covariance, median",
            "ratio of means",
            "above the best of 1200 natural images",
        ],
        lines,
    )


if __name__ == "__main__":
    main()
