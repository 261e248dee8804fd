"""ModelBank: many compact models of different shapes, packed once and evaluated together. A leaf data type."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop.packing import pack
from cortexloop.weights import CompactWeights

if TYPE_CHECKING:
    from cortexloop.models import CompactModel

PathOrPaths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class ModelBank:
    """A frozen set of N compact models that take images of one size.

    Batch norm is folded in float64, then everything is rounded once to float32 and packed into one buffer; shapes may
    differ from model to model and nothing is padded to the largest. The raw parameters are kept: `save` is bit-exact.

    Attributes:
        names: N unique names; column n of `responses(images, bank)` belongs to `names[n]`.
        height, width: input size in pixels.
        image_mean: RGB mean (0..255) that recentring subtracts.
        models: the raw parameters.
        weights, table: packed parameters (float32 [n]) and layout (int64 [N, fields]), see `cortexloop.packing`.

    Raises:
        ValueError: no models, duplicate names, an invalid model, or models of different input sizes or image means.
    """

    __slots__ = ("_positions", "models", "names", "table", "weights")

    names: tuple[str, ...]
    models: tuple[CompactWeights, ...]
    weights: torch.Tensor
    table: torch.Tensor
    _positions: dict[str, int]

    def __init__(self, models: Iterable[CompactWeights]) -> None:
        models = tuple(m.validate() for m in models)
        names = tuple(m.name for m in models)
        positions = {name: i for i, name in enumerate(names)}
        if len(positions) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise ValueError(f"model names of a bank must be unique, these occur more than once: {', '.join(twice)}")
        buffer, table = pack(models)
        weights = torch.empty(buffer.size, dtype=torch.float32)
        weights.copy_(torch.from_numpy(buffer))
        self._set(models, names, weights, torch.from_numpy(table))

    def _set(
        self, models: tuple[CompactWeights, ...], names: tuple[str, ...], weights: torch.Tensor, table: torch.Tensor
    ) -> None:
        values = {
            "models": models,
            "names": names,
            "weights": weights,
            "table": table,
            "_positions": {name: i for i, name in enumerate(names)},
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a ModelBank is frozen; build a new one instead of setting {name!r}")

    @classmethod
    def from_weights(cls, models: Iterable[CompactWeights]) -> ModelBank:
        """Pack models given as raw parameters."""
        return cls(models)

    @classmethod
    def from_modules(cls, modules: Iterable[CompactModel], names: Sequence[str] | None = None) -> ModelBank:
        """Pack trained modules; later changes of the modules do not reach the bank.

        Args:
            names: one name per module; "model0", "model1", ... if not given.
        """
        modules = list(modules)
        if names is None:
            names = [f"model{i}" for i in range(len(modules))]
        if len(names) != len(modules):
            raise ValueError(f"expected one name per module ({len(modules)}), got {len(names)}")
        return cls(module.to_weights(name) for module, name in zip(modules, names, strict=True))

    @classmethod
    def load(cls, source: PathOrPaths, *, names: Sequence[str] | None = None) -> ModelBank:
        """Load models from a file, a folder or a list of files of any readable format (see `cortexloop.io`).

        Args:
            names: load only these models, in this order.

        Raises:
            FileNotFoundError: the source does not exist.
            ValueError: a file is damaged or of an unknown format, or a name is not in it.
        """
        from cortexloop import io

        return cls(io.load_models(source, names=names))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank as one native safetensors file (bit-exact; written beside, then renamed)."""
        from cortexloop import io

        io.save_models(path, self.models)

    def select(self, which: Sequence[int] | Sequence[str] | slice | NDArray[np.generic] | int | str) -> ModelBank:
        """A bank of some of the models, by position (negative counts from the end), boolean mask, slice or name.

        Raises:
            ValueError: an unknown name, a mask of the wrong length, or nothing selected.
            IndexError: a position outside the bank.
        """
        if isinstance(which, (str, int, np.integer)):
            which = [which]  # type: ignore[assignment]
        positions = list(range(len(self)))[which] if isinstance(which, slice) else self._resolve(which)
        if not positions:
            raise ValueError("the selection is empty; a bank needs at least one model")
        bank = ModelBank(self.models[i] for i in positions)
        return bank.to(self.device)

    def _resolve(self, which: Sequence[int] | Sequence[str] | NDArray[np.generic] | int | str) -> list[int]:
        items = np.asarray(which)
        if items.ndim != 1:
            raise ValueError(f"expected a list of positions or names, got an array of shape {items.shape}")
        if items.size == 0:
            return []
        if items.dtype == bool:
            if items.size != len(self):
                raise ValueError(f"a boolean mask needs one entry per model ({len(self)}), got {items.size}")
            return [int(i) for i in np.flatnonzero(items)]
        if items.dtype.kind in "iu":
            for i in items:
                if not -len(self) <= i < len(self):
                    raise IndexError(f"position {i} is outside the bank of {len(self)} models")
            return [int(i) % len(self) for i in items]
        if items.dtype.kind != "U":
            raise ValueError(f"expected positions (integers), names (strings) or a boolean mask, got {items.dtype}")
        unknown = [str(name) for name in items if str(name) not in self._positions]
        if unknown:
            missing = ", ".join(map(repr, unknown))
            raise ValueError(f"no model named {missing} in this bank; names start with {self.names[:3]}")
        return [self._positions[str(name)] for name in items]

    def to(self, device: torch.device | str) -> ModelBank:
        """The same bank with its packed tensors on another device; itself if it is there already."""
        if torch.device(device) == self.device:
            return self
        bank = object.__new__(ModelBank)
        bank._set(self.models, self.names, self.weights.to(device), self.table.to(device))
        return bank

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def height(self) -> int:
        return self.models[0].height

    @property
    def width(self) -> int:
        return self.models[0].width

    @property
    def image_mean(self) -> tuple[float, float, float]:
        return self.models[0].image_mean

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        filters = sum(sum(m.filters) for m in self.models) / len(self)
        return (
            f"ModelBank({len(self)} models of {self.height} x {self.width} images, {filters:.0f} filters each on "
            f"average, {self.weights.numel() * 4 / 2**20:.1f} MiB on {self.device})"
        )
