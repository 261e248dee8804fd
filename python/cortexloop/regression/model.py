"""A fitted linear readout of all neurons, and how its regularisation was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from cortexloop.regression.data import Matrix, as_matrix

Scoring = Literal["r2", "mse"]
_TENSORS = ("weights", "intercept", "alpha", "scores", "alphas", "folds", "excluded")


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Responses = features @ weights.T + intercept, for T neurons and P features.

    Attributes:
        weights: float64 [T, P], for features as they were given.
        intercept: float64 [T].
        alpha: float64 [T], the chosen regularisation; infinity for an excluded neuron.
        scores: float64 [A, T], larger is better: mean over folds of what `scoring` says, for images not fitted. For an
            excluded neuron, those of a constant prediction.
        alphas: float64 [A] or, where each neuron has its own, [A, T].
        folds: int64 [n], the fold in which an image was held out; empty if each image was held out alone, or none.
        excluded: int64, neurons without usable responses. Their weights are 0, their intercept is the mean of the
            responses that exist, or 0.
        kind: "ridge" or "lasso".
        scoring: "r2", coefficient of determination, or "mse", mean squared error times -1.
    """

    weights: Tensor
    intercept: Tensor
    alpha: Tensor
    scores: Tensor
    alphas: Tensor
    folds: Tensor
    excluded: Tensor
    kind: str
    scoring: Scoring

    @property
    def score(self) -> Tensor:
        """The best score of each neuron, float64 [T]."""
        return self.scores.max(dim=0).values

    @property
    def active(self) -> Tensor:
        """How many features each neuron uses (weights that are not 0), int64 [T]."""
        return (self.weights != 0).sum(dim=1)

    def predict(self, features: Matrix) -> Tensor:
        """Predicted responses [B, T] to features [B, P], in the weights' dtype on their device.

        Raises:
            TypeError, ValueError: not finite numbers [B, P].
        """
        x = as_matrix(features, "features", f"[images, {self.weights.shape[1]}]")
        if x.shape[1] != self.weights.shape[1]:
            raise ValueError(f"features should be [images, {self.weights.shape[1]}], got {list(x.shape)}")
        return x.to(self.weights) @ self.weights.T + self.intercept

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LinearModel:
        """A copy on another device, or with weights and intercept of another floating dtype."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        for name in ("weights", "intercept"):
            moved[name] = moved[name].to(dtype)
        return replace(self, **moved)

    def select(self, neurons: Tensor | list[int]) -> LinearModel:
        """The models of some neurons, in the order given. `excluded` is numbered anew."""
        chosen = torch.as_tensor(neurons, device=self.weights.device)
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero()[:, 0]
        mask = torch.zeros(len(self.weights), dtype=torch.bool, device=self.weights.device)
        mask[self.excluded] = True
        return replace(
            self,
            weights=self.weights[chosen],
            intercept=self.intercept[chosen],
            alpha=self.alpha[chosen],
            scores=self.scores[:, chosen],
            alphas=self.alphas[:, chosen] if self.alphas.ndim == 2 else self.alphas,
            excluded=mask[chosen].nonzero()[:, 0],
        )

    def tensors(self) -> dict[str, Tensor]:
        """What to save, for safetensors: contiguous tensors in host memory by name. `settings` is the rest."""
        return {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}

    def settings(self) -> dict[str, str]:
        """What to save beside the tensors, for a file's header."""
        return {"kind": self.kind, "scoring": self.scoring}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, str]) -> LinearModel:
        """The model that `tensors` and `settings` were taken from; further entries are ignored.

        Raises:
            ValueError: an entry is missing, or shapes do not fit together.
        """
        names = {field.name for field in fields(cls)}
        missing = sorted(names - tensors.keys() - settings.keys())
        if missing:
            raise ValueError(f"not a complete linear model: {', '.join(missing)} missing")
        model = cls(**{name: tensors[name] for name in _TENSORS}, **{k: settings[k] for k in ("kind", "scoring")})  # type: ignore[arg-type]
        t = model.weights.shape[0]
        if model.weights.ndim != 2 or any(v.shape[-1:] != (t,) for v in (model.intercept, model.alpha, model.scores)):
            shapes = {name: list(tensors[name].shape) for name in ("weights", "intercept", "alpha", "scores")}
            raise ValueError(f"shapes of a linear model do not fit together: {shapes}")
        return model
