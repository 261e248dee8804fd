"""What scores images in silico: a bank of models, or any torch module with a readout. One neuron for each problem."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from cortexloop import functional
from cortexloop.bank import ModelBank


class Objective(abc.ABC):
    """A scorer whose problems can be scored in any split, so that memory stays bounded.

    A rig is no `Objective` but a plain callable, which gets all images of a generation at once.
    """

    wants_float = False
    """Whether images come as float32 [.., 3, H, W] in [0, 1] instead of uint8 [.., H, W, 3]."""

    @property
    @abc.abstractmethod
    def n(self) -> int:
        """Number of problems it scores."""

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images it takes; None for any."""
        return None

    @abc.abstractmethod
    def score(self, images: Tensor, problems: Sequence[int]) -> Tensor:
        """Noiseless scores [k, m] of images [k, m, ...]; row i belongs to the problem at position problems[i]."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What is scored, JSON-able; equal for two objectives only if they score alike."""


class BankObjective(Objective):
    """Problem i is scored by one model of a bank; each image meets its own model only.

    Args:
        bank: the models.
        neurons: for each problem the position of its model.
        precision: "exact" or "fast", as for `responses`.
        baseline: subtracted from the responses, [n] in response units (say, the response to a grey screen); 0 if None.

    Raises:
        TypeError, ValueError: neurons outside the bank, or a baseline of another length.
    """

    def __init__(
        self,
        bank: ModelBank,
        neurons: Sequence[int],
        *,
        precision: str = "exact",
        baseline: ArrayLike | Tensor | None = None,
    ) -> None:
        index = np.asarray(neurons)
        if index.ndim != 1 or index.size == 0 or index.dtype.kind not in "iu":
            raise TypeError(
                f"neurons should be a list of positions in the bank, one for each problem, got {neurons!r:.60}"
            )
        if index.min() < 0 or index.max() >= len(bank):
            raise ValueError(
                f"neurons should be from 0 to {len(bank) - 1}, got {int(index.min())} to {int(index.max())}"
            )
        if precision not in ("exact", "fast"):
            raise ValueError(f'precision should be "exact" or "fast", got {precision!r}')
        self.bank = bank
        self.neurons = torch.from_numpy(index.astype(np.int64)).to(bank.device)
        self.precision = precision
        values = torch.zeros(len(index)) if baseline is None else torch.as_tensor(baseline).detach().float()
        if tuple(values.shape) != (len(index),) or not bool(values.isfinite().all()):
            raise ValueError(
                f"baseline should be [{len(index)}], one finite response for each problem, got {baseline!r:.60}"
            )
        self.baseline = values.to(bank.device)

    @property
    def n(self) -> int:
        """Number of problems."""
        return len(self.neurons)

    @property
    def size(self) -> tuple[int, int]:
        """The models' input size."""
        return self.bank.height, self.bank.width

    def score(self, images: Tensor, problems: Sequence[int]) -> Tensor:
        """Responses above the baseline, float32 [k, m]."""
        k, m = images.shape[:2]
        which = torch.as_tensor(problems, device=self.neurons.device)
        pairs = self.neurons[which].repeat_interleave(m)
        values = functional.responses(images.flatten(0, 1), self.bank, pairs=pairs, precision=self.precision)
        return values.view(k, m) - self.baseline[which, None]

    def settings(self) -> dict[str, Any]:
        """Model names, a digest of their weights, and the options."""
        digest = hashlib.sha256(self.bank.weights.cpu().numpy().tobytes())
        digest.update(self.bank.table.cpu().numpy().tobytes())
        return {
            "objective": "bank",
            "neurons": [self.bank.names[i] for i in self.neurons.tolist()],
            "bank_sha256": digest.hexdigest(),
            "precision": self.precision,
            "baseline_sha256": hashlib.sha256(self.baseline.cpu().numpy().tobytes()).hexdigest(),
        }


class ModuleObjective(Objective):
    """Problem i is scored by a unit or a linear readout of any torch module.

    Args:
        module: takes images float32 [B, 3, H, W] and gives features [B, ...], which are flattened. In evaluation mode.
        units: for each problem the position of its unit among the flattened features; or else
        weights: for each problem a linear readout, [n, features]; or else
        readout: a callable (features [k, m, ...], positions of the k problems) -> scores [k, m]; then also
        problems: how many problems there are.
        preprocess: applied to images [B, 3, H, W] in [0, 1] first, such as a torchvision normalisation; none if None.
        batch: images per call of the module.
        name: what the module is, for the record; its class if None.

    Raises:
        ValueError, TypeError: not exactly one of units, weights and readout, or a module in training mode.
    """

    wants_float = True

    def __init__(
        self,
        module: nn.Module,
        *,
        units: Sequence[int] | None = None,
        weights: ArrayLike | Tensor | None = None,
        readout: Callable[[Tensor, Sequence[int]], Tensor] | None = None,
        problems: int | None = None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        batch: int = 64,
        name: str | None = None,
    ) -> None:
        if sum(x is not None for x in (units, weights, readout)) != 1:
            raise ValueError("give exactly one of units, weights and readout")
        if module.training:
            raise ValueError("the module is in training mode, in which scores depend on the batch; call module.eval()")
        if batch < 1:
            raise ValueError(f"batch should be at least 1, got {batch}")
        if (readout is None) != (problems is None):
            raise ValueError("problems, the number of problems, belongs to a readout and to nothing else")
        self.module, self.readout, self.preprocess, self.batch = module, readout, preprocess, batch
        self.name = type(module).__name__ if name is None else name
        self.units = None if units is None else torch.as_tensor(units, dtype=torch.int64)
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        if self.units is not None and (self.units.ndim != 1 or len(self.units) == 0 or bool((self.units < 0).any())):
            raise ValueError(f"units should be a list of positions, one for each problem, got {units!r:.60}")
        if self.weights is not None and (self.weights.ndim != 2 or not bool(self.weights.isfinite().all())):
            raise ValueError(f"weights should be finite, [problems, features], got {list(self.weights.shape)}")
        chosen = self.units if self.units is not None else self.weights
        self._n = int(problems or 0) if chosen is None else len(chosen)
        if self._n < 1:
            raise ValueError(f"problems should be at least 1, got {self._n}")

    @property
    def n(self) -> int:
        """Number of problems."""
        return self._n

    def score(self, images: Tensor, problems: Sequence[int]) -> Tensor:
        """Scores, float32 [k, m].

        Raises:
            ValueError: the module's features do not have the units or weights that were given.
        """
        k, m = images.shape[:2]
        with torch.no_grad():
            flat = images.flatten(0, 1)
            parts = [self.module(self._prepared(flat[i : i + self.batch])) for i in range(0, k * m, self.batch)]
            features = torch.cat(parts)
            if self.readout is not None:
                return self.readout(features.view(k, m, *features.shape[1:]), problems)
            features = features.reshape(k, m, -1)
            which = torch.as_tensor(problems)
            if self.units is not None:
                if int(self.units.max()) >= features.shape[2]:
                    raise ValueError(
                        f"unit {int(self.units.max())} was asked for, the module has {features.shape[2]} features"
                    )
                unit = self.units[which].to(features.device)
                return features.gather(2, unit.view(k, 1, 1).expand(k, m, 1))[..., 0]
            assert self.weights is not None
            if self.weights.shape[1] != features.shape[2]:
                raise ValueError(
                    f"weights have {self.weights.shape[1]} columns, the module has {features.shape[2]} features"
                )
            readouts = self.weights[which].to(features.device)
            return torch.bmm(features.float(), readouts[:, :, None])[..., 0]

    def _prepared(self, images: Tensor) -> Tensor:
        return images if self.preprocess is None else self.preprocess(images)

    def settings(self) -> dict[str, Any]:
        """The module's name and the units; a module itself cannot be told apart from another of its name."""
        found: dict[str, Any] = {"objective": "module", "module": self.name, "problems": self._n}
        if self.units is not None:
            found["units"] = self.units.tolist()
        if self.weights is not None:
            found["weights_sha256"] = hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()
        return found
