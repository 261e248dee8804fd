"""How well do factor models predict recorded V4 neurons, beside what they are usually compared with?

    python benchmarks/evidence_sessions.py [--quick] [--write]

Features are a layer of the published shared compact model; responses are repeat-averaged spike counts of three
sessions. The first half of a session's images is for fitting, with all choices made there; the second half is held out.
(The shared model was itself distilled from an ensemble that was trained on recordings of V4; all methods read the same
features.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import evidence
from cortexloop import factor, metrics
from evidence import SESSIONS, Result, median
from evidence_recovery import ALPHAS, Fitted

LAYER = 3


def models(quick: bool) -> dict[str, Callable[[Tensor, Tensor], Fitted]]:
    """Name -> (training maps, responses) -> fitted model."""

    def factors(rank: int, reduction: str | None, **options: object) -> Callable[[Tensor, Tensor], Fitted]:
        if reduction is not None and options.get("regressor") != "lasso":
            options["alphas"] = ALPHAS
        return lambda x, y: factor.FactorModel.fit(None, x, y, rank=rank, reduction=reduction, **options)

    def baseline(kind: str, **options: object) -> Callable[[Tensor, Tensor], Fitted]:
        if options.get("regressor") != "lasso":
            options["alphas"] = ALPHAS
        return lambda x, y: factor.Baseline.fit(None, x, y, kind=kind, **options)

    return {
        "factor model, rank 3, mask + ridge": factors(3, "mask"),
        "factor model, rank 1, mask + ridge": factors(1, "mask"),
        "factor model, rank 3, mask + lasso": factors(3, "mask", regressor="lasso"),
        "factor model, rank 3, vector + ridge": factors(3, "vector"),
        "factor model, rank 3, factor + ridge": factors(3, "factor"),
        "factor model, rank 3, softplus": factors(3, None),
        "factor model, rank 3, published threshold, softplus": factors(3, None, threshold="published"),
        "PCA 300 + ridge": baseline("pca", components=20 if quick else 300),
        "PCA 300 + lasso": baseline("pca", components=20 if quick else 300, regressor="lasso"),
        "sparse random projection + ridge": baseline("srp", components=100 if quick else None),
        "spatial average + ridge": baseline("average"),
        "dense ridge": baseline("dense"),
    }


def main() -> None:
    """Run the experiment."""
    chosen = evidence.options(__doc__)
    source = evidence.shared_network(LAYER)
    rows: list[Result] = []
    for session in SESSIONS[-1:] if chosen.quick else SESSIONS:
        images, responses = evidence.session_images(session), torch.from_numpy(evidence.session_responses(session))
        if chosen.quick:
            images, responses = images[:80], responses[:80, :3]
        half = len(images) // 2
        maps, y = source(images), responses.float()
        trials = evidence.single_trials(session)
        for name, fit in models(chosen.quick).items():
            print(f"{session}: {name} ...", file=sys.stderr)
            predicted = fit(maps[:half], y[:half]).predict(maps[half:]).T.numpy()
            held_out = y[half:].T.numpy()
            r = metrics.pearson_r(predicted, held_out)
            corrected = np.full(len(r), np.nan)
            if trials is not None:
                raw = trials[half : len(images), : len(r)].transpose(1, 0, 2)
                corrected = metrics.noise_corrected_r2(predicted, raw)
            rows += [
                {"session": session, "model": name, "neuron": n, "r": float(r[n]), "r2_er": float(corrected[n])}
                for n in range(len(r))
            ]
    evidence.finish("v4-sessions", rows, text, chosen)


def text(rows: Sequence[Mapping[str, str]]) -> str:
    """The table: a line per model, medians over neurons."""
    sessions = list(dict.fromkeys(row["session"] for row in rows))
    header = ["model", *[f"held-out r, {session}" for session in sessions]]
    corrected = [s for s in sessions if any(row["r2_er"] != "nan" for row in rows if row["session"] == s)]
    header += [f"noise-corrected R², {session}" for session in corrected]
    lines: list[list[str | float]] = []
    for name in dict.fromkeys(row["model"] for row in rows):
        line: list[str | float] = [name]
        for figure, of in (("r", sessions), ("r2_er", corrected)):
            for session in of:
                here = [row for row in rows if row["model"] == name and row["session"] == session]
                line.append(median([float(row[figure]) for row in here]))
        lines.append(line)
    return evidence.markdown(header, lines)


if __name__ == "__main__":
    main()
