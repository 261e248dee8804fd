"""Regressions of many neurons on a CPU: lasso, ridge and principal components, against scikit-learn.

    python benchmarks/bench_regression.py [--only lasso,ridge,pca] [--threads 1,2] [--record]

Each part runs in a process of its own with a fixed number of threads; within a part, candidate and peers alternate.
scikit-learn's LassoCV and GridSearchCV fit one neuron after another; a timed run takes one of the 64 neurons, in turn,
and times are per neuron. Before any clock starts, cross-validated errors and weights are compared.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn import decomposition
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LassoCV, Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV

import cortexloop as cl
import runner
from bench_bank import WrongResultError, isa
from cortexloop import regression
from record import Contender, Row, measure, provenance, quantiles

OURS = "cortexloop"
LASSO, GRID, LOO, SKLEARN_PCA = (
    "scikit-learn LassoCV, one neuron after another",
    "scikit-learn GridSearchCV, one neuron after another",
    "scikit-learn RidgeCV, all neurons",
    "scikit-learn PCA",
)
NEURONS, IMAGES, FEATURES, FOLDS = 64, 1000, 750, 5
ALPHAS = np.logspace(-4, 5, 10)

Array = NDArray[np.float64]


def data(images: int = IMAGES, features: int = FEATURES) -> tuple[Array, Array]:
    """Features like components of a network's (falling variances, some correlation); sparse weights and noise."""
    rng = np.random.default_rng(0)
    scales = np.arange(1, features + 1) ** -0.5
    x = rng.standard_normal((images, features)) * scales
    x += 0.3 * scales * (rng.standard_normal((images, 10)) @ rng.standard_normal((10, features)))
    chosen = rng.random((features, NEURONS)) < 0.04
    weights = rng.standard_normal((features, NEURONS)) * chosen / scales[:, None] ** 0.5
    drive = x @ weights
    return x, drive / drive.std(0) + rng.standard_normal((images, NEURONS))


def rows_of(
    case: str, direction: str, contenders: Sequence[tuple[Contender, int]], threads: int, budget: float, batch: int
) -> list[Row]:
    """Time contenders, the first of which is ours; each with the number of neurons that a run of it takes."""
    times = measure([c for c, _ in contenders], budget=budget, min_rounds=3, max_rounds=20)
    base = times[OURS] / contenders[0][1]
    found = []
    for contender, neurons in contenders:
        each = times[contender.name] / neurons
        q50, q20, q80 = quantiles(each * 1e3)
        ratio, ratio_q20, ratio_q80 = quantiles(each / base)
        mine = contender.name == OURS
        found.append(
            Row(
                case=case, batch=batch, op="regression", direction=direction, backend=contender.name,
                version=cl.__version__ if mine else importlib.metadata.version("scikit-learn"),
                isa=isa() if mine else "", threads=threads, metric="time",
                unit="ms/neuron" if direction != "pca" else "ms", q50=q50, q20=q20, q80=q80, rounds=len(each),
                ratio_to=OURS, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80, **provenance(),
            )
        )  # fmt: skip
    return found


def contender(name: str, run: Callable[[], object]) -> Contender:
    """What it computes is compared before, not fetched."""
    return Contender(name, run, lambda: np.empty(0))


def part_lasso(threads: int, budget: float) -> list[Row]:
    """Each neuron's own path of 100 alphas, five folds, as LassoCV does by default."""
    x, y = data()
    turns = itertools.count()

    def theirs(neuron: int | None = None) -> LassoCV:
        chosen = next(turns) % NEURONS if neuron is None else neuron
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LassoCV(cv=FOLDS).fit(x, y[:, chosen])

    folds = np.repeat(np.arange(FOLDS), IMAGES // FOLDS)  # LassoCV's folds are blocks
    ours = regression.lasso(x, y, folds=folds)
    for neuron in (0, NEURONS // 2):
        peer = theirs(neuron)
        if not np.isclose(-float(ours.score[neuron]), peer.mse_path_.mean(1).min(), rtol=1e-3):
            raise WrongResultError(
                f"neuron {neuron}: cross-validated error {-float(ours.score[neuron])}, "
                f"scikit-learn's {peer.mse_path_.mean(1).min()}"
            )
    return rows_of(
        f"{IMAGES} images, {FEATURES} features, {NEURONS} neurons",
        "lasso",
        [
            (contender(OURS, lambda: regression.lasso(x, y, folds=folds)), NEURONS),
            (contender(LASSO, theirs), 1),
        ],
        threads,
        budget,
        NEURONS,
    )


def part_ridge(threads: int, budget: float) -> list[Row]:
    """Ten alphas: leave-one-out, and five folds."""
    x, y = data()
    turns = itertools.count()
    folds = np.repeat(np.arange(FOLDS), IMAGES // FOLDS)

    def grid() -> GridSearchCV:
        neuron = next(turns) % NEURONS
        return GridSearchCV(Ridge(), {"alpha": ALPHAS}, cv=FOLDS).fit(x, y[:, neuron])

    def loo() -> RidgeCV:
        return RidgeCV(ALPHAS, alpha_per_target=True).fit(x, y)

    peer, ours = loo(), regression.ridge(x, y, ALPHAS)
    if not np.allclose(ours.alpha.numpy(), peer.alpha_) or not np.allclose(ours.weights.numpy(), peer.coef_, atol=1e-6):
        raise WrongResultError("leave-one-out ridge differs from scikit-learn's")
    case = f"{IMAGES} images, {FEATURES} features, {NEURONS} neurons"
    found = rows_of(
        case,
        "ridge, leave-one-out",
        [(contender(OURS, lambda: regression.ridge(x, y, ALPHAS)), NEURONS), (contender(LOO, loo), NEURONS)],
        threads,
        budget,
        NEURONS,
    )
    return found + rows_of(
        case,
        "ridge, five folds",
        [(contender(OURS, lambda: regression.ridge(x, y, ALPHAS, folds)), NEURONS), (contender(GRID, grid), 1)],
        threads,
        budget,
        NEURONS,
    )


def part_pca(threads: int, budget: float) -> list[Row]:
    """Components of 500 images' features of a network's layer."""
    images, features, components = 500, 20000, 250
    scales = np.arange(1, features + 1) ** -0.3
    x = (np.random.default_rng(1).standard_normal((images, features)) * scales).astype(np.float32)

    def ours() -> regression.PCA:
        return regression.PCA(components).fit(x)

    def theirs() -> decomposition.PCA:
        return decomposition.PCA(components, svd_solver="full").fit(x)

    a, b = ours().transform(x[:5]).double().numpy(), theirs().transform(x[:5])
    if not np.allclose(np.abs(a[:, :50]), np.abs(b[:, :50]), rtol=1e-2, atol=1e-2 * float(np.abs(b).max())):
        raise WrongResultError("principal components differ from scikit-learn's")
    case = f"{images} images, {features} features, {components} components"
    return rows_of(
        case, "pca", [(contender(OURS, ours), 1), (contender(SKLEARN_PCA, theirs), 1)], threads, budget, images
    )


PARTS = {"lasso": part_lasso, "ridge": part_ridge, "pca": part_pca}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, __doc__, PARTS, budget=10.0))
