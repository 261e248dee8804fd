"""What a factor model is compared with: linear readouts of the whole map, reduced without looking at responses."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import io, regression
from cortexloop.factor import fitting
from cortexloop.factor._checks import Array
from cortexloop.factor.inputs import KEEP_BYTES, FeatureBatches, as_numpy, check_responses
from cortexloop.features import FeatureSource

Kind = Literal["pca", "srp", "average", "dense"]
FILE_KIND = "cortexloop-baseline-1"


@dataclass(frozen=True, eq=False)
class Baseline:
    """Responses = <weights, features> + intercept, weights found by one regression for all T neurons.

    Make one by `Baseline.fit`; it predicts and reports as a `FactorModel` does.
    """

    kind: Kind
    readout: Tensor
    """[T, C H W] weights in the map; [T, C], of the means, for "average"."""
    intercept: Tensor
    """float64 [T]"""
    linear: regression.LinearModel
    """The regression on the reduced features."""
    feature_shape: tuple[int, int, int]
    """C, H, W."""
    train: Tensor
    """int64 [n]: the images it was fitted on."""
    excluded: dict[str, list[int]]
    """Neurons with "constant" responses, which are predicted by them."""
    settings: dict[str, Any]
    """All choices of the fit, JSON-able."""
    source: FeatureSource | None = field(default=None, repr=False)

    @classmethod
    def fit(
        cls,
        source: FeatureSource | None,
        inputs: Array,
        responses: Array,
        *,
        kind: Kind = "pca",
        regressor: Literal["ridge", "lasso"] = "ridge",
        components: int | None = None,
        train: Sequence[int] | NDArray[Any] | Tensor | None = None,
        unsupervised: Array | None = None,
        alphas: Sequence[float] | None = None,
        folds: int | None = None,
        seed: int = 0,
        keep: int = KEEP_BYTES,
    ) -> Baseline:
        """Reduce the map, regress all neurons at once, and put the regression back into the map.

        - "pca": principal components (published: 1000, of 2000 natural images; at most one less than the images);
        - "srp": sparse random projection (published: as many as Johnson & Lindenstrauss ask for at epsilon 0.1);
        - "average": the mean over positions, C features;
        - "dense": everything, C H W features; all training images' features have to fit in memory.

        Args:
            source, inputs, responses, train, keep: as `FactorModel.fit`.
            components: of "pca" (default 750, or fewer with fewer images) and "srp" (default by the rule above).
            unsupervised: images (or features) to find principal components of; default the training images.
            regressor, alphas, folds: see `regression.ridge` and `regression.lasso`.
            seed: of folds and of the projection.

        Raises:
            TypeError, ValueError: inputs that do not fit together, are not finite, or choices out of range.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind should be one of {get_args(Kind)}, got {kind!r}")
        if regressor not in ("ridge", "lasso"):
            raise ValueError(f'regressor should be "ridge" or "lasso", got {regressor!r}')
        if components is not None and kind in ("average", "dense"):
            raise ValueError(f"{kind!r} has no components to choose; leave them out")
        if unsupervised is not None and kind != "pca":
            raise ValueError(f'only "pca" learns from images alone, got {kind!r} with `unsupervised`')
        y, chosen, constant = check_responses(responses, len(inputs), train)
        batches = FeatureBatches(source, inputs, chosen, keep=keep)
        learned = batches if unsupervised is None else FeatureBatches(source, unsupervised, keep=keep)
        if learned.shape != batches.shape:
            raise ValueError(f"unsupervised maps are {list(learned.shape)}, the others {list(batches.shape)}")
        reducer: Any = None
        if kind == "pca":
            most = min(len(learned) - 1, int(np.prod(batches.shape)))
            reducer = regression.PCA(min(750, most) if components is None else components)
            reducer.fit(_flat(learned))
        elif kind == "srp":
            reducer = regression.SparseRandomProjection(
                "auto" if components is None else components, images=len(batches), seed=seed
            )
        reduced = torch.cat([_reduced(kind, reducer, features) for _, features in batches])
        linear = fitting.regressed(
            reduced, y, regressor, alphas, folds, seed, unusable="exclude" if len(constant) else "error"
        )
        readout, intercept = linear.weights, linear.intercept
        if kind == "pca":  # components are orthonormal: a sum of them with these weights
            readout = reducer.inverse(readout) - reducer.mean
            intercept = intercept - readout @ reducer.mean
        elif kind == "srp":
            readout = _out_of_projection(reducer, readout, int(np.prod(batches.shape)))
        return cls(
            kind=kind,
            readout=readout.float(),
            intercept=intercept,
            linear=linear,
            feature_shape=batches.shape,
            train=chosen,
            excluded={"constant": constant.tolist()},
            settings={
                "kind": kind,
                "components": components,
                "features": int(linear.weights.shape[1]),
                "regressor": regressor,
                "folds": folds,
                "seed": seed,
                "unsupervised": None if unsupervised is None else len(learned),
                "source": None if source is None else {"name": source.name, **source.settings()},
            },
            source=source,
        )

    def __len__(self) -> int:
        return len(self.readout)

    def predict(self, inputs: Array) -> Tensor:
        """Predicted responses [B, T] to images (or features, without a source).

        Raises:
            TypeError, ValueError: inputs of a wrong shape.
        """
        batches = FeatureBatches(self.source, inputs, keep=0)
        if batches.shape != self.feature_shape:
            raise ValueError(
                f"features should be [B, {', '.join(map(str, self.feature_shape))}], got maps of {list(batches.shape)}"
            )
        weights = self.readout.to(batches.device)
        predicted = weights.new_zeros(len(batches), len(self), dtype=torch.float64)
        for part, features in batches:
            predicted[part] = (_reduced(self.kind, None, features).to(weights) @ weights.T).double()
        return (predicted + self.intercept.to(predicted)).float()

    def weights(self) -> Tensor:
        """The readout in full, [T, C, H, W]."""
        c, h, w = self.feature_shape
        if self.kind == "average":
            return (self.readout / (h * w))[..., None, None].expand(-1, c, h, w).contiguous()
        return self.readout.view(-1, c, h, w)

    def report(
        self, inputs: Array, responses: Array, *, raw: Array | None = None, seed: int = 0
    ) -> dict[str, NDArray[np.float64]]:
        """As `FactorModel.report`."""
        return fitting.report(as_numpy(self.predict(inputs)), responses, raw, seed)

    def summary(self) -> str:
        """One line for people."""
        c, h, w = self.feature_shape
        count = self.linear.weights.shape[1]
        return f"{self.settings['regressor']} of {len(self)} neurons on {count} {self.kind} features of {c} x {h} x {w}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        arrays = {name: as_numpy(getattr(self, name)) for name in ("readout", "intercept", "train")}
        arrays |= {f"linear/{name}": value.numpy() for name, value in self.linear.tensors().items()}
        header = {
            "kind": self.kind,
            "feature_shape": list(self.feature_shape),
            "excluded": self.excluded,
            "settings": self.settings,
            "linear": self.linear.settings(),
        }
        io.save_arrays(path, FILE_KIND, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], source: FeatureSource | None = None) -> Baseline:
        """Read what `save` wrote.

        Raises:
            ValueError: damaged or another kind of file. OSError: it cannot be read.
        """
        arrays, header = io.load_arrays(path, FILE_KIND)
        try:
            tensors = {k.removeprefix("linear/"): torch.from_numpy(v) for k, v in arrays.items()}
            c, h, w = header["feature_shape"]
            return cls(
                kind=header["kind"],
                readout=tensors["readout"],
                intercept=torch.from_numpy(arrays["intercept"]),
                linear=regression.LinearModel.from_tensors(
                    {
                        k.removeprefix("linear/"): torch.from_numpy(v)
                        for k, v in arrays.items()
                        if k.startswith("linear/")
                    },
                    header["linear"],
                ),
                feature_shape=(c, h, w),
                train=tensors["train"],
                excluded=header["excluded"],
                settings=header["settings"],
                source=source,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a complete baseline: {error}") from error


def _flat(batches: FeatureBatches) -> Iterator[Tensor]:
    for _, features in batches:
        yield features.flatten(1)


def _reduced(kind: Kind, reducer: Any, features: Tensor) -> Tensor:
    if kind == "average":
        return features.mean((2, 3))
    flat = features.flatten(1)
    reduced: Tensor = flat if reducer is None else reducer.transform(flat)
    return reduced


def _out_of_projection(reducer: regression.SparseRandomProjection, weights: Tensor, features: int) -> Tensor:
    """Weights of projected features [T, k] as weights of features [T, P]."""
    found = weights.new_zeros(len(weights), features)
    for component in range(reducer.components):
        positions, signs = reducer.row(component, features)
        sign = torch.from_numpy(signs).to(weights)
        found[:, torch.from_numpy(positions).to(weights.device)] += weights[:, component, None] * sign
    scale: float = (reducer.density_for(features) * reducer.components) ** -0.5
    return found * scale
