"""Control models: factors with one property destroyed at random, and the record from which they can be made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop import io
from cortexloop.factor._checks import neuron_indices
from cortexloop.factor.factorize import cropped
from cortexloop.factor.factors import Factors

Kind = Literal["channel_permutation", "patch_shuffle", "mask_transplant", "keep_only", "remove", "sign_flip"]
Target = Literal["full", "centre", "wmap", "facttsr"]
KIND = "cortexloop-control-1"


@dataclass(frozen=True, eq=False)
class Control:
    """What was done to factors, completely: `apply` does the same again, to the bit, on any machine.

    Nothing is drawn when it is applied; the permutations themselves are kept, not only the seed.
    """

    kind: Kind
    seed: int | None
    """What the random choices came from; None where there are none."""
    shape: tuple[int, int, int, int, int]
    """T, R, C, H, W of the factors it is for."""
    border: int
    arrays: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """channel_permutation: "channels" [T, R, C]. patch_shuffle: "patches" [T, R, grid^2], where patch i of the result
    comes from, and "rolls" [T, R, 2], rows and columns to roll by. mask_transplant: "donors" [T]. keep_only, remove and
    sign_flip: "factors" [k]."""
    options: dict[str, Any] = field(default_factory=dict)
    """Numbers such as the grid of patches, JSON-able."""

    def apply(self, factors: Factors) -> Factors:
        """The control's factors: as many neurons, the same shapes (fewer factors for the ablations).

        Raises:
            ValueError: factors of another shape or border than the control was made for.
        """
        shape = (*factors.masks.shape[:2], *factors.feature_shape)
        if shape != self.shape or factors.border != self.border:
            raise ValueError(
                f"this control is for factors [T, R, C, H, W] = {list(self.shape)} with border {self.border}, "
                f"got {list(shape)} with border {factors.border}"
            )
        arrays = {name: torch.from_numpy(values).to(factors.masks.device) for name, values in self.arrays.items()}
        masks, vectors = _APPLY[self.kind](factors, arrays, self.options)
        return factors.replaced(masks, vectors, method=f"{factors.method}, {self.kind}")

    def to_json(self) -> str:
        """Everything as JSON text, for the record of an experiment."""
        return json.dumps({**self._header(), "arrays": {name: values.tolist() for name, values in self.arrays.items()}})

    @classmethod
    def from_json(cls, text: str) -> Control:
        """The inverse of `to_json`.

        Raises:
            ValueError: not such a text.
        """
        try:
            header = json.loads(text)
            return cls._from(header, {k: np.asarray(v, dtype=np.int64) for k, v in header["arrays"].items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not the record of a control: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to one safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        io.save_arrays(path, KIND, self.arrays, self._header())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Control:
        """Read what `save` wrote.

        Raises:
            ValueError: damaged or another kind of file. OSError: it cannot be read.
        """
        arrays, header = io.load_arrays(path, KIND)
        try:
            return cls._from(header, arrays)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a complete record of a control: {error}") from error

    def _header(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "seed": self.seed,
            "shape": list(self.shape),
            "border": self.border,
            "options": self.options,
        }

    @classmethod
    def _from(cls, header: dict[str, Any], arrays: dict[str, NDArray[np.int64]]) -> Control:
        if header["kind"] not in get_args(Kind):
            raise ValueError(f"kind should be one of {get_args(Kind)}, got {header['kind']!r}")
        t, r, c, h, w = (int(n) for n in header["shape"])
        return cls(header["kind"], header["seed"], (t, r, c, h, w), header["border"], arrays, header["options"])


def channel_permutation(factors: Factors, *, seed: int) -> Control:
    """Permute every vector over channels, each by itself: what is destroyed, where stays.

    Published: feature shuffle.
    """
    t, r, c, _, _ = _shape(factors)
    rng = np.random.default_rng(seed)
    return _control("channel_permutation", factors, seed, {"channels": _permutations(rng, (t, r), c)})


def patch_shuffle(factors: Factors, *, seed: int, grid: int = 6) -> Control:
    """Cut every mask in grid x grid patches, permute them, then roll cyclically: where is destroyed, what stays.

    Works inside the border. Patches have floor(H / grid) rows and floor(W / grid) columns; rows and columns left over
    stay in their place until the roll (published: mask shuffle, grid 6).

    Raises:
        ValueError: a grid finer than the mask.
    """
    t, r, _, h, w = _shape(factors)
    h, w = h - 2 * factors.border, w - 2 * factors.border
    if not 1 <= grid <= min(h, w):
        raise ValueError(f"grid should lie in 1..{min(h, w)} for masks of {h} x {w} inside the border, got {grid}")
    rng = np.random.default_rng(seed)
    patches = _permutations(rng, (t, r), grid * grid)
    rolls = np.stack([rng.integers(0, h, (t, r)), rng.integers(0, w, (t, r))], axis=-1)
    return _control("patch_shuffle", factors, seed, {"patches": patches, "rolls": rolls}, {"grid": grid})


def mask_transplant(factors: Factors, *, seed: int) -> Control:
    """Every neuron gets the masks of another one, drawn at random: no neuron keeps its own.

    Raises:
        ValueError: fewer than two neurons.
    """
    t = len(factors)
    if t < 2:
        raise ValueError("masks are transplanted between neurons, so at least 2 are needed, got 1")
    # A cycle through the neurons in random order is a permutation without fixed points.
    order = np.random.default_rng(seed).permutation(t)
    donors = np.empty(t, dtype=np.int64)
    donors[order] = np.roll(order, 1)
    return _control("mask_transplant", factors, seed, {"donors": donors})


def keep_only(factors: Factors, chosen: int | Sequence[int]) -> Control:
    """Rank-1 (or higher) ablation: nothing but these factors.

    Raises:
        ValueError: a factor that does not exist.
    """
    return _control("keep_only", factors, None, {"factors": _chosen(factors, chosen)})


def remove(factors: Factors, chosen: int | Sequence[int]) -> Control:
    """Ablation: without these factors.

    Raises:
        ValueError: a factor that does not exist, or none left.
    """
    gone = _chosen(factors, chosen)
    if len(np.unique(gone)) == factors.rank:
        raise ValueError(f"removing all {factors.rank} factors leaves none; leave out fewer")
    return _control("remove", factors, None, {"factors": gone})


def sign_flip(factors: Factors, chosen: int | Sequence[int] | None = None) -> Control:
    """Vectors times -1, of all factors or of these: the same place and axis, the opposite preference.

    Raises:
        ValueError: a factor that does not exist.
    """
    return _control("sign_flip", factors, None, {"factors": _chosen(factors, chosen)})


def target(factors: Factors, kind: Target, factor: int | None = None, *, size: int = 4) -> Factors:
    """Weights to make preferred images for, as published (Wang & Ponce; names of their code).

    - "full": the vector of one factor over the whole map, mask 1 everywhere;
    - "centre": the vector over the central `size` x `size` positions;
    - "wmap": the vector at its own mask, one factor of the model;
    - "facttsr": the sum of all factors. (Their fifth, "tsr", is the tensor before it was factorized.)

    Args:
        factor: which one, for all but "facttsr".
        size: of the central block, 2 to 4 in the published experiments; the centre is rounded down.

    Raises:
        ValueError: an unknown kind, a factor that does not exist or is missing or superfluous, or a block larger than
            the map.
    """
    if kind not in get_args(Target):
        raise ValueError(f'a target should be one of {get_args(Target)}, or the tensor itself for "tsr", got {kind!r}')
    if kind == "facttsr":
        if factor is not None:
            raise ValueError('"facttsr" is the sum of all factors; leave out `factor`, or ask for "wmap"')
        return factors
    if factor is None or not 0 <= factor < factors.rank:
        raise ValueError(f"{kind!r} is made of one factor, 0..{factors.rank - 1}, got {factor}")
    masks, vectors = factors.masks[:, factor : factor + 1], factors.vectors[:, factor : factor + 1]
    if kind == "full":
        masks = torch.ones_like(masks)
    elif kind == "centre":
        _, h, w = factors.feature_shape
        if not 1 <= size <= min(h, w):
            raise ValueError(f"size should lie in 1..{min(h, w)}, got {size}")
        top, left = (h - size) // 2, (w - size) // 2
        masks = torch.zeros_like(masks)
        masks[..., top : top + size, left : left + size] = 1.0
    return factors.replaced(masks.clone(), vectors.clone(), method=f"{factors.method}, {kind} of factor {factor}")


def _shape(factors: Factors) -> tuple[int, int, int, int, int]:
    t, r = factors.masks.shape[:2]
    return (t, r, *factors.feature_shape)


def _control(
    kind: Kind,
    factors: Factors,
    seed: int | None,
    arrays: dict[str, NDArray[np.int64]],
    options: dict[str, Any] | None = None,
) -> Control:
    kept = {name: np.ascontiguousarray(values, dtype=np.int64) for name, values in arrays.items()}
    return Control(kind, seed, _shape(factors), factors.border, kept, options or {})


def _permutations(rng: np.random.Generator, shape: tuple[int, int], count: int) -> NDArray[np.int64]:
    return rng.permuted(np.broadcast_to(np.arange(count), (*shape, count)), axis=-1)


def _chosen(factors: Factors, chosen: int | Sequence[int] | None) -> NDArray[np.int64]:
    if chosen is None:
        chosen = range(factors.rank)
    indices = neuron_indices([chosen] if isinstance(chosen, int) else list(chosen), factors.rank)
    return np.asarray(indices.numpy())


Applied = tuple[Tensor, Tensor]
Arrays = dict[str, Tensor]


def _permute_channels(factors: Factors, arrays: Arrays, _: dict[str, Any]) -> Applied:
    return factors.masks.clone(), factors.vectors.take_along_dim(arrays["channels"], 2)


def _shuffle_patches(factors: Factors, arrays: Arrays, options: dict[str, Any]) -> Applied:
    grid = int(options["grid"])
    masks = factors.masks.clone()
    inner = cropped(masks, factors.border)
    t, r, h, w = inner.shape
    rows, columns = h // grid, w // grid
    block = inner[..., : rows * grid, : columns * grid].reshape(t, r, grid, rows, grid, columns)
    patches = block.transpose(3, 4).reshape(t, r, grid * grid, rows * columns)
    moved = patches.take_along_dim(arrays["patches"][..., None], 2).view(t, r, grid, grid, rows, columns)
    inner[..., : rows * grid, : columns * grid] = moved.transpose(3, 4).reshape(t, r, rows * grid, columns * grid)
    down, right = arrays["rolls"][..., 0, None], arrays["rolls"][..., 1, None]
    at_row = (torch.arange(h, device=masks.device) - down) % h
    at_column = (torch.arange(w, device=masks.device) - right) % w
    inner.copy_(inner.take_along_dim(at_row[..., None], 2).take_along_dim(at_column[..., None, :], 3))
    return masks, factors.vectors.clone()


def _transplant(factors: Factors, arrays: Arrays, _: dict[str, Any]) -> Applied:
    return factors.masks[arrays["donors"]], factors.vectors.clone()


def _keep(factors: Factors, arrays: Arrays, _: dict[str, Any]) -> Applied:
    return factors.masks[:, arrays["factors"]], factors.vectors[:, arrays["factors"]]


def _remove(factors: Factors, arrays: Arrays, _: dict[str, Any]) -> Applied:
    kept = torch.ones(factors.rank, dtype=torch.bool, device=factors.masks.device)
    kept[arrays["factors"]] = False
    return factors.masks[:, kept], factors.vectors[:, kept]


def _flip(factors: Factors, arrays: Arrays, _: dict[str, Any]) -> Applied:
    vectors = factors.vectors.clone()
    vectors[:, arrays["factors"]] *= -1.0
    return factors.masks.clone(), vectors


_APPLY: dict[str, Callable[[Factors, Arrays, dict[str, Any]], Applied]] = {
    "channel_permutation": _permute_channels,
    "patch_shuffle": _shuffle_patches,
    "mask_transplant": _transplant,
    "keep_only": _keep,
    "remove": _remove,
    "sign_flip": _flip,
}
