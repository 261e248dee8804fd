"""The fit itself: factor models, the methods they are compared with, and how well each predicts held-out images."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.cli.console import bad_input, progress
from cortexloop.cli.fitting.cards import Fitted
from cortexloop.cli.fitting.data import Excluded, Recorded
from cortexloop.cli.fitting.findings import Double, Method
from cortexloop.cli.fitting.maps import Maps
from cortexloop.cli.fitting.options import BASELINES, FitOptions, settle_threshold
from cortexloop.factor import Baseline, FactorModel, Factors, FeatureMoments, Thresholded, factorize, threshold

PERMUTATIONS = 100
BEYOND = 2
"""Ranks above the chosen one in the curve of explained variance."""

ALONE = "factors alone"

_REASONS = {
    "constant": "its responses to the images to fit on are constant",
    "empty": "no feature's covariance with it passed the threshold",
    "silent": "its score does not vary over the images to fit on",
}

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was fitted.

    Attributes:
        methods: the factor model first.
        scores, predictions: [N, T] of all images.
        tensor: [T, C, H, W] what was factorized.
        excluded: neurons that are predicted by their mean only, and why.
        notes: what a user should know.
        texts: sentences for the method section and run.json.
    """

    model: FactorModel
    methods: tuple[Method, ...]
    scores: Double
    predictions: Double
    ceiling: Double | None
    explained: Double
    kept: Double
    ranks: tuple[int, ...]
    dead: int
    tensor: Tensor
    excluded: tuple[Excluded, ...]
    notes: tuple[str, ...]
    texts: dict[str, Any]


def fit(
    options: FitOptions,
    maps: Tensor,
    recorded: Recorded,
    train: NDArray[np.int64],
    held: NDArray[np.int64],
    baselines: Sequence[str],
) -> Outcome:
    """Fit the factor model and the others on `train`, and score all of them on `held`.

    Raises:
        BadInputError: options that do not fit the maps, such as a rank that is too large.
    """
    kind: Any
    kind, level = settle_threshold(options.threshold)
    responses = torch.from_numpy(recorded.responses)
    with progress("fitting", 4 + len(baselines), quiet=options.json) as bar, bad_input():
        begin = time.perf_counter()
        permutations = PERMUTATIONS if kind in ("permutation", "familywise") else 0
        moments = _moments(maps, responses, train, recorded.neurons, permutations, options)
        survivors: Thresholded = threshold(moments, kind, level=level)
        bar.advance()
        method: Any = options.method.replace("-", "_")
        with _empty_factors_expected():
            factors = factorize(survivors.tensor, method, rank=options.rank, border=options.border, seed=options.seed)
        shared = time.perf_counter() - begin
        bar.advance()

        def factor_model(reduction: str | None, curve: str | None) -> FactorModel:
            choices: dict[str, Any] = {"reduction": reduction, "nonlinearity": curve, "regressor": options.regressor}
            return FactorModel.fit(None, maps, responses, train=train, factors=factors, seed=options.seed, **choices)

        reduction = None if options.reduction == "none" else options.reduction
        curve = None if options.nonlinearity == "line" else options.nonlinearity
        model, seconds = _timed(lambda: factor_model(reduction, curve))
        told = {
            "neurons": list(recorded.neurons),
            "source": None if options.features is not None else options.source.stored(),
            "example": options.example,
            "seed": options.seed,
        }
        settings = {**model.settings, "threshold": survivors.rule, "fit": told}
        model = replace(model, kept=survivors.kept.cpu(), settings=settings)
        scores = model.scores(maps)
        predictions = model.output(scores).double().cpu().numpy()
        raw = None if recorded.raw is None else recorded.raw[:, held].transpose(1, 0, 2)
        tests, truth = maps[torch.from_numpy(held).to(maps.device)], recorded.responses[held]
        merits = model.report(tests, truth, raw=raw, seed=options.seed)
        methods = [_method("factors", _label(options), merits, shared + seconds)]
        bar.advance()
        described = {}
        if reduction is not None:
            alone, seconds = _timed(lambda: factor_model(None, "auto"))
            methods.append(_method(ALONE, "factors alone", alone.report(tests, truth), shared + seconds))
            described[ALONE] = "the sum of the factors and a softplus, without a regression"
        bar.advance()
        for name in baselines:
            make = partial(_baseline, name, maps, responses, train, options)
            (found, described[name]), seconds = _timed(make)
            methods.append(_method(name, BASELINES[name], found.report(tests, truth), seconds))
            bar.advance()
    ceiling = merits.get("ceiling")
    if ceiling is not None and not np.isfinite(ceiling).any():
        ceiling = None
    channels, height, width = maps.shape[1:]
    most = min(channels, (height - 2 * options.border) * (width - 2 * options.border))
    assert factors.explained is not None
    return Outcome(
        model, tuple(methods), scores.double().cpu().numpy(), predictions, ceiling,
        factors.explained.cpu().numpy(), survivors.kept.cpu().numpy(),
        tuple(range(1, min(options.rank + BEYOND, most) + 1)), int(moments.dead.sum()), survivors.tensor,
        tuple(
            Excluded(recorded.neurons[n], _REASONS[reason])
            for reason, places in model.excluded.items() for n in places
        ),
        _notes(factors, [n for places in model.excluded.values() for n in places], recorded),
        _texts(options, survivors, model, described),
    )  # fmt: skip


def _moments(
    maps: Tensor,
    responses: Tensor,
    train: NDArray[np.int64],
    names: Sequence[str],
    permutations: int,
    options: FitOptions,
) -> FeatureMoments:
    channels, height, width = maps.shape[1:]
    moments = FeatureMoments(
        (channels, height, width),
        responses.shape[1],
        names=names,
        permutations=permutations,
        seed=options.seed,
        responses=responses[torch.from_numpy(train)] if permutations else None,
        device=maps.device,
    )
    for start in range(0, len(train), 64):
        rows = torch.from_numpy(train[start : start + 64])
        moments.update(maps[rows.to(maps.device)], responses[rows])
    return moments


@contextlib.contextmanager
def _empty_factors_expected() -> Iterator[None]:
    """Without the warning of factors that came out empty, which the notes tell by name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* have a lower rank than", RuntimeWarning)
        yield


def _notes(factors: Factors, excluded: Sequence[int], recorded: Recorded) -> tuple[str, ...]:
    """What a user should know of the factors."""
    short = sorted({n for n, _ in factors.empty} - set(excluded))
    if not short:
        return ()
    named = ", ".join(recorded.neurons[n] for n in short[:5]) + (
        f" and {len(short) - 5} more" if len(short) > 5 else ""
    )
    return (f"what passed the threshold has a lower rank than {factors.rank} for {named}: they have fewer factors",)


def _timed(make: Callable[[], Result]) -> tuple[Result, float]:
    begin = time.perf_counter()
    made = make()
    return made, time.perf_counter() - begin


def _method(name: str, label: str, merits: dict[str, Double], seconds: float) -> Method:
    return Method(name, label, merits["pearson"], merits["r2"], merits["fev"], seconds)


def _baseline(
    name: str, maps: Tensor, responses: Tensor, train: NDArray[np.int64], options: FitOptions
) -> tuple[Baseline, str]:
    """One of `BASELINES`, and what it is in words."""
    kind: Any
    kind, regressor = {"dense-ridge": ("dense", "ridge"), "lasso": ("pca", "lasso")}.get(name, (name, "ridge"))
    made: Any = Baseline.fit
    found: Baseline = made(None, maps, responses, kind=kind, regressor=regressor, train=train, seed=options.seed)
    count = found.settings["features"]
    what = {
        "pca": f"{count:,} principal components of the images to fit on",
        "srp": f"{count:,} sparse random projections",
        "dense": f"all {count:,} features",
    }[kind]
    return found, f"{regressor} on {what}, its strength by cross-validation"


def _label(options: FitOptions) -> str:
    plural = "" if options.rank == 1 else "s"
    return f"{options.rank} factor{plural}" + ("" if options.reduction == "none" else f", {options.regressor}")


def _texts(
    options: FitOptions, survivors: Thresholded, model: FactorModel, described: dict[str, str]
) -> dict[str, Any]:
    regression = "The sum of the factors' scores predicts the response"
    if options.reduction != "none":
        regression = (
            f"A {options.regressor} regression of each neuron on {_REDUCTIONS[options.reduction]}; its strength is "
            "chosen by cross-validation within the images to fit on. It is again a readout of the same map, "
            "with the factors' masks or vectors"
        )
    curve = "a softplus fitted to the images to fit on" if model.nonlinearity is not None else "a line"
    return {
        "threshold": survivors.summary().replace("_", "-"),
        "regression": f"{regression}; the output is {curve}.",
        "baselines": described,
        "model": model.summary(),
    }


_REDUCTIONS = {
    "mask": "what each of its masks sees: the map summed under the mask, for every channel",
    "vector": "where each of its vectors is found: the map summed over channels with the vector's weights, for every "
    "place",
    "factor": "one number per factor",
}


def for_cards(outcome: Outcome, shown: Sequence[int], values: Maps, held: NDArray[np.int64]) -> Fitted:
    """What the cards of some neurons need."""
    model, settings = outcome.model, outcome.model.settings["factorize"]
    with bad_input(), _empty_factors_expected():
        by_rank = factorize(
            outcome.tensor[list(shown)], settings["method"], ranks=outcome.ranks, border=settings["border"]
        )
    curve_of = np.full((len(model), len(outcome.ranks)), np.nan)
    for place, rank in enumerate(outcome.ranks):
        explained = by_rank[rank].explained
        assert explained is not None
        curve_of[list(shown), place] = explained.cpu().numpy()
    scores = outcome.scores[held]
    low, high = scores.min(axis=0), scores.max(axis=0)
    grid = low + (high - low) * np.linspace(0, 1, 60)[:, None]
    answers = model.output(torch.from_numpy(grid).to(model.gain.device)).double().cpu().numpy()
    curves = [(grid[:, n], answers[:, n]) for n in range(len(model))]
    return Fitted(model.factors, values.values, outcome.scores, outcome.predictions, curves, curve_of, values.average)
