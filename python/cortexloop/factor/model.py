"""`FactorModel`: a factorized encoding model of many neurons, fitted on training images only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import io
from cortexloop.factor import fitting
from cortexloop.factor._checks import Array
from cortexloop.factor.factorize import Init, Method, factorize
from cortexloop.factor.factors import Factors
from cortexloop.factor.inputs import KEEP_BYTES, FeatureBatches, as_numpy, check_responses
from cortexloop.factor.nonlinearity import Softplus
from cortexloop.factor.scores import Score
from cortexloop.factor.thresholds import Kind, Thresholded, View, threshold
from cortexloop.features import FeatureSource

Reduction = Literal["mask", "vector", "factor"]
KIND = "cortexloop-factor-model-1"


@dataclass(frozen=True, eq=False)
class FactorModel:
    """Predicts the responses of T neurons from a feature map: score of the readout's weights, then an output map.

    Make one by `FactorModel.fit` or `FactorModel.load`.
    """

    factors: Factors
    """What the covariances were factorized into."""
    readout: Factors
    """What predictions read with: the factors, or with a reduction those of its regression, in the same map."""
    gain: Tensor
    """float64 [T]: without non-linearity, response = gain score + intercept."""
    intercept: Tensor
    """float64 [T]"""
    nonlinearity: Softplus | None
    """Fitted on the training images; None: the line above."""
    kept: Tensor
    """float64 [T]: fraction of living features that survived the threshold."""
    alpha: Tensor | None
    """float64 [T]: regularisation chosen by the regression of a reduction; infinity for excluded neurons."""
    train: Tensor
    """int64 [n]: the images it was fitted on."""
    excluded: dict[str, list[int]]
    """Neurons that could not be fitted, which are predicted by their mean response: "constant" responses, "empty" (no
    feature survived the threshold), or "silent" (the score did not vary over the training images)."""
    settings: dict[str, Any]
    """All choices of the fit, JSON-able."""
    source: FeatureSource | None = field(default=None, repr=False)
    """Where features of images come from; None: features are given."""

    @classmethod
    def fit(
        cls,
        source: FeatureSource | None,
        inputs: Array,
        responses: Array,
        *,
        train: Sequence[int] | NDArray[Any] | Tensor | None = None,
        weights: Array | None = None,
        threshold: Kind = "two_sided",
        level: float | None = None,
        view: View = "covariance_z",
        permutations: int = 100,
        method: Method = "posneg_nmf",
        rank: int = 3,
        border: int = 1,
        init: Init = "nndsvda",
        factors: Factors | None = None,
        readout: Score = "dot",
        normalise: bool = False,
        nonlinearity: Literal["softplus", "auto"] | None = "auto",
        reduction: Reduction | None = None,
        regressor: Literal["ridge", "lasso"] = "ridge",
        alphas: Sequence[float] | None = None,
        folds: int | None = None,
        seed: int = 0,
        keep: int = KEEP_BYTES,
    ) -> FactorModel:
        """Fit all neurons: covariance, threshold, factors, and output, each from the training images alone.

        Args:
            source: the network and layer; None: `inputs` are features.
            inputs: images [B, h, w, 3] as the source takes them, or features [B, C, H, W].
            responses: [B, T], one column per neuron.
            train: which images to fit on; None: all. Responses to the others are not looked at.
            weights: [B] weight of each image in the covariance, such as its number of repeats.
            threshold, level, view: see `factor.threshold`. permutations: for the kinds that need them.
            method, rank, border, init: see `factor.factorize`.
            factors: instead of these: factors found before (on training images only!).
            readout, normalise: the score, see `factor.score`.
            nonlinearity: "softplus", see `fit_softplus`; None: a line; "auto": softplus, or a line behind a regression.
            reduction: regress responses on what the factors reduce the map to: "mask" (published spmask: R C numbers
                per image), "vector" (featvec: R H W inside the border) or "factor" (R). The regression becomes a
                readout in the same map.
            regressor, alphas, folds: of the reduction, see `regression.ridge` and `regression.lasso`.
            seed: of permutations, folds and random starts.
            keep: bytes of features to keep in memory instead of computing them in each pass.

        Raises:
            TypeError, ValueError: inputs that do not fit together, are not finite, or choices out of range.
        """
        check_choices(readout, nonlinearity, reduction, regressor)
        y, chosen, constant = check_responses(responses, len(inputs), train)
        batches = FeatureBatches(source, inputs, chosen, keep=keep)
        survivors: Thresholded | None = None
        if factors is None:
            extra = permutations if threshold in ("permutation", "familywise") else 0
            moments = fitting.moments_of(batches, y, weights, chosen, extra, seed)
            survivors = _threshold(moments, threshold, level=level, view=view)
            factors = factorize(survivors.tensor, method, rank=rank, border=border, init=init, seed=seed)
        elif factors.feature_shape != batches.shape or len(factors) != y.shape[1]:
            raise ValueError(
                f"factors are of {len(factors)} neurons on maps {list(factors.feature_shape)}, needed are "
                f"{y.shape[1]} on {list(batches.shape)}"
            )
        factors = factors.to(batches.device)
        empty = torch.nonzero((factors.norms == 0).all(1))[:, 0].tolist()
        excluded = {"constant": constant.tolist(), "empty": sorted(set(empty) - set(constant.tolist())), "silent": []}
        left_out = {*excluded["constant"], *excluded["empty"]}
        alpha = None
        effective = factors
        if reduction is not None:
            effective, alpha, shift = fitting.regress(
                batches,
                y,
                factors,
                sorted(set(range(len(factors))) - left_out),
                reduction,
                regressor,
                alphas,
                folds,
                seed,
            )
        scores = fitting.scores_of(batches, effective, readout, normalise)
        excluded["silent"] = sorted(set(fitting.constant_columns(scores)) - left_out)
        left_out.update(excluded["silent"])
        fitted = torch.tensor(sorted(set(range(len(factors))) - left_out), dtype=torch.int64)
        curved = nonlinearity == "softplus" or (nonlinearity == "auto" and reduction is None)
        output = fitting.fit_softplus_of(scores, y, fitted) if curved else None
        if reduction is not None:
            gain, intercept = torch.ones(len(factors), dtype=torch.float64), shift
        else:
            gain, intercept = fitting.fit_line(scores, y)
        gone = torch.tensor(sorted(left_out), dtype=torch.int64)
        gain, intercept = gain.cpu(), intercept.cpu()
        gain[gone], intercept[gone] = 0.0, y.mean(0).cpu()[gone]
        settings = {
            "threshold": None if survivors is None else survivors.rule,
            "factorize": factors.settings,
            "readout": readout,
            "normalise": normalise,
            "nonlinearity": "softplus" if curved else None,
            "reduction": reduction,
            "regressor": None if reduction is None else regressor,
            "folds": folds,
            "seed": seed,
            "source": None if source is None else {"name": source.name, **source.settings()},
        }
        present = (factors.norms > 0).any(1).double().cpu()
        return cls(
            factors=factors,
            readout=effective,
            gain=gain.to(batches.device),
            intercept=intercept.to(batches.device),
            nonlinearity=None if output is None else output.to(batches.device),
            kept=present if survivors is None else survivors.kept.cpu(),
            alpha=alpha,
            train=chosen,
            excluded=excluded,
            settings=settings,
            source=source,
        )

    def __len__(self) -> int:
        return len(self.factors)

    def scores(self, inputs: Array) -> Tensor:
        """Linear scores [B, T] of images (or features, without a source), before the output map."""
        batches = FeatureBatches(self.source, inputs, keep=0)
        if batches.shape != self.readout.feature_shape:
            raise ValueError(
                f"features should be [B, {', '.join(map(str, self.readout.feature_shape))}], got maps of "
                f"{list(batches.shape)}"
            )
        return fitting.scores_of(batches, self.readout, self.settings["readout"], self.settings["normalise"])

    def predict(self, inputs: Array) -> Tensor:
        """Predicted responses [B, T], in the unit of the training responses.

        Args:
            inputs: images [B, h, w, 3] for the source, or features [B, C, H, W] without one.

        Raises:
            TypeError, ValueError: as `scores`.
        """
        return self.output(self.scores(inputs))

    def output(self, scores: Tensor) -> Tensor:
        """Responses [B, T] for scores [B, T]."""
        if self.nonlinearity is not None:
            return self.nonlinearity(scores)
        return (scores.double() * self.gain + self.intercept).to(scores.dtype)

    def weights(self) -> Tensor:
        """The readout in full, [T, C, H, W]; for a line, responses = gain <weights, features> + intercept."""
        return self.readout.tensor()

    def report(
        self, inputs: Array, responses: Array, *, raw: Array | None = None, seed: int = 0
    ) -> dict[str, NDArray[np.float64]]:
        """How well it predicts images it was not fitted on, [T] per figure.

        Args:
            inputs, responses: held-out images (or features) and responses [B, T]; NaN = not shown.
            raw: [B, T, repeats] single trials of these images, NaN = not shown, for what noise allows.
            seed: of the random halves or resamples of the ceiling.

        Returns:
            "pearson", "spearman", "r2" (coefficient of determination), "fev" (1 - var(y - prediction) / var(y)); with
            `raw` also "ceiling" (what perfect predictions would reach: square root of the split-half reliability of
            all repeats) and "normalised" (pearson / ceiling). nan where a figure does not exist, such as a
            correlation for the neurons in `excluded`, whose prediction is constant.

        Raises:
            TypeError, ValueError: arrays that do not fit together.
        """
        return fitting.report(as_numpy(self.predict(inputs)), responses, raw, seed)

    def with_source(self, source: FeatureSource | None) -> FactorModel:
        """The same model on features of another source object (or, None, on given features).

        Raises:
            ValueError: its maps have another shape.
        """
        if source is not None and tuple(source.feature_shape()) != self.factors.feature_shape:
            raise ValueError(
                f"the model reads maps {list(self.factors.feature_shape)}, {source.name} gives "
                f"{list(source.feature_shape())}"
            )
        return replace(self, source=source)

    def summary(self) -> str:
        """A few lines for people."""
        c, h, w = self.factors.feature_shape
        where = "given features" if self.settings["source"] is None else str(self.settings["source"]["name"])
        lines = [f"factor model of {len(self)} neurons on {where}, {c} x {h} x {w}, {len(self.train)} training images"]
        lines.append(f"{self.factors.method}, rank {self.factors.rank}, border {self.factors.border}")
        if self.factors.explained is not None and len(self):
            explained = self.factors.explained
            lines[-1] += f": explains {float(explained.min()):.2f} to {float(explained.max()):.2f} of the covariances"
        if len(self):
            lines.append(f"kept {100 * float(self.kept.min()):.1f} to {100 * float(self.kept.max()):.1f} % of features")
        output = "softplus" if self.nonlinearity is not None else "line"
        how = (
            self.settings["readout"]
            if self.settings["reduction"] is None
            else (f"{self.settings['regressor']} on {self.settings['reduction']} features")
        )
        lines.append(f"read out by {how}, output {output}")
        for reason, neurons in self.excluded.items():
            if neurons:
                lines.append(f"{reason}, predicted by their mean response: neurons {', '.join(map(str, neurons))}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, atomically. The network of the source is not in it, its settings are.

        Raises:
            OSError: the file cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {}
        header: dict[str, Any] = {"excluded": self.excluded, "settings": self.settings}
        for name, factors in (("factors", self.factors), ("readout", self.readout)):
            values, header[name] = factors.arrays()
            arrays |= {f"{name}/{key}": value for key, value in values.items()}
        for name in ("gain", "intercept", "kept", "alpha", "train"):
            value = getattr(self, name)
            if value is not None:
                arrays[name] = as_numpy(value)
        if self.nonlinearity is not None:
            arrays |= {f"nonlinearity/{k}": as_numpy(v) for k, v in self.nonlinearity.tensors().items()}
        io.save_arrays(path, KIND, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], source: FeatureSource | None = None) -> FactorModel:
        """Read what `save` wrote.

        Args:
            source: to predict from images; None: from features. It should be as the one it was fitted with, see
                `settings["source"]`; another shape of maps is refused.

        Raises:
            ValueError: damaged or another kind of file, or maps of another shape. OSError: it cannot be read.
        """
        arrays, header = io.load_arrays(path, KIND)
        tensors = {name: torch.from_numpy(values) for name, values in arrays.items() if "/" not in name}
        try:
            parts = {
                name: {k.split("/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{name}/")}
                for name in ("factors", "readout", "nonlinearity")
            }
            curve = {name: torch.from_numpy(values) for name, values in parts["nonlinearity"].items()}
            model = cls(
                factors=Factors.from_arrays(parts["factors"], header["factors"]),
                readout=Factors.from_arrays(parts["readout"], header["readout"]),
                gain=tensors["gain"],
                intercept=tensors["intercept"],
                nonlinearity=Softplus(**curve) if curve else None,
                kept=tensors["kept"],
                alpha=tensors.get("alpha"),
                train=tensors["train"],
                excluded=header["excluded"],
                settings=header["settings"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a complete factor model: {error}") from error
        return model.with_source(source).to(source.device) if source is not None else model

    def to(self, device: torch.device | str) -> FactorModel:
        """On another device (the source stays where it is)."""
        return replace(
            self,
            factors=self.factors.to(device),
            readout=self.readout.to(device),
            gain=self.gain.to(device),
            intercept=self.intercept.to(device),
            nonlinearity=None if self.nonlinearity is None else self.nonlinearity.to(device),
        )


_threshold = threshold  # `fit` has an argument of that name


def check_choices(readout: str, nonlinearity: str | None, reduction: str | None, regressor: str) -> None:
    """Refuse unknown names, and a score that a regression cannot be.

    Raises:
        ValueError: one of these.
    """
    for name, value, known in (
        ("readout", readout, get_args(Score)),
        ("nonlinearity", nonlinearity, ("softplus", "auto", None)),
        ("reduction", reduction, (*get_args(Reduction), None)),
        ("regressor", regressor, ("ridge", "lasso")),
    ):
        if value not in known:
            raise ValueError(f"{name} should be one of {known}, got {value!r}")
    if reduction is not None and readout != "dot":
        raise ValueError(f'a regression predicts by a weighted sum, readout "dot"; got {readout!r}')
