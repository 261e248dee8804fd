"""Covariance and correlation of every feature with every response, over images that stream by (Wang & Ponce).

The moments are kept centred (n, means, sums of squared and of multiplied deviations; Chan, Golub & LeVeque 1983), not
as raw sums: those lose all digits in float32 where a feature's mean is far above its standard deviation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cortexloop import io
from cortexloop.factor.permutations import Permutations
from cortexloop.factor.trials import Array, Trials, as_tensor, checked_trials
from cortexloop.factor.views import MomentViews
from cortexloop.functional import MomentState, feature_moments_update

KIND = "cortexloop-feature-moments-1"
MAX_BYTES = 8 << 30
"""Memory that permutations may take if nothing else is said."""

LARGEST = 1e17
"""Size of features above which float32 sums of their squares could overflow; far above what any network gives."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class FeatureMoments(MomentViews):
    """Running moments of features [C, H, W] and of the responses of T neurons, from which all views are computed.

        moments = FeatureMoments((1024, 14, 14), neurons=64)
        for features, responses in batches:                      # [B, 1024, 14, 14], [B, 64]
            moments.update(features, responses)
        moments.correlation(), moments.covariance_z(), moments.t()      # [64, 1024, 14, 14] each

    All moments are those of the population (divided by n), as published. n is the total weight: the number of images,
    or of trials. With repeats (responses [B, T, R]), every trial counts as an image shown again: trial-to-trial
    variance is part of the response's variance and lowers the correlation.

    Views are float32 [T, C, H, W]. They are 0 where nothing can be said, never NaN: for `dead` features, and, where
    they divide by the response's standard deviation, for `constant_responses`.

    Args:
        feature_shape: C, H, W.
        neurons: T.
        names: of the neurons, for messages and `constant_responses`; None: "0", "1", ...
        device: where features come and moments stay.
        missing: "error": NaN responses are refused; "exclude": images without a response of every neuron are left out
            and listed in `excluded`.
        permutations: P > 0 keeps P further sets of moments with the images' responses permuted, for `z`, `null_mean`,
            `null_sd`, `max_t_null` and `max_t_threshold`. They take P times the memory and P times the arithmetic.
        seed: of the permutations.
        responses: [n, T] of all images, needed for permutations only. Batches then come in order, or with `rows`.
        max_bytes: memory the moments may take with permutations.
        backend: which backend updates them.

    Raises:
        ValueError: sizes that make no sense, permutations without responses, or more memory than `max_bytes`.
    """

    def __init__(
        self,
        feature_shape: Sequence[int],
        neurons: int,
        *,
        names: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        missing: Literal["error", "exclude"] = "error",
        permutations: int = 0,
        seed: int = 0,
        responses: Array | None = None,
        max_bytes: int = MAX_BYTES,
        backend: str = "auto",
    ) -> None:
        shape = tuple(int(size) for size in feature_shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"feature_shape should be C, H, W, each at least 1, got {list(shape)}")
        if neurons < 1:
            raise ValueError(f"neurons should be at least 1, got {neurons}")
        if missing not in ("error", "exclude"):
            raise ValueError(f'missing should be "error" or "exclude", got {missing!r}')
        if permutations < 0 or permutations == 1:
            raise ValueError(f"permutations should be 0 or at least 2, got {permutations}")
        if permutations and responses is None:
            raise ValueError("permutations need `responses`, those of all images, before the first batch")
        self.feature_shape = shape
        self.neurons = int(neurons)
        self.names = tuple(str(i) for i in range(neurons)) if names is None else tuple(str(name) for name in names)
        if len(self.names) != neurons:
            raise ValueError(f"there should be a name for each of {neurons} neurons, got {len(self.names)}")
        self.device = torch.device(device)
        self.missing: Literal["error", "exclude"] = missing
        self.backend = backend
        self.images = 0
        """Images that came by, those left out included."""
        self.excluded: list[int] = []
        """Numbers of the images that were left out, counted over all batches from 0."""
        self._permutations: Permutations | None = None
        columns, size = neurons * (1 + permutations), int(np.prod(shape))
        if permutations:
            needed = size * (4 * columns + 16)
            if needed > max_bytes:
                raise ValueError(
                    f"{permutations} permutations of {neurons} neurons on {size} features need "
                    f"{needed / 2**30:.1f} GiB, max_bytes is {max_bytes / 2**30:.1f} GiB; take fewer of them"
                )
            assert responses is not None
            self._permutations = Permutations.draw(responses, neurons, permutations, seed)
        self._state = MomentState.empty(columns, size, self.device)

    def update(
        self,
        features: Array,
        responses: Array | None = None,
        weights: Array | None = None,
        *,
        rows: Array | None = None,
        check: bool = True,
    ) -> None:
        """Let a batch of images join. An empty batch changes nothing.

        Args:
            features: [B, C, H, W] on this object's device (NumPy arrays are brought there), float32, float16 or
                bfloat16; float64 runs in plain torch.
            responses: [B, T], NaN = missing; or [B, T, R], single trials, NaN = not shown, in the same places for all
                neurons. With permutations they may be left out: they are known.
            weights: [B], at least 0; images of weight 0 are left out without being looked at. Not with trials, whose
                number is the weight.
            rows: with permutations, which of the images these are; None: the next ones in order.
            check: look for NaN, infinite and enormous features. This reads them once more, and on a GPU waits for it.

        Raises:
            TypeError: not numbers, or a dtype that is not taken.
            ValueError: shapes or devices that do not fit, NaN or infinite features, or responses that `missing` does
                not allow. The first image (counted over all batches) and neuron are named. Nothing has changed then.
        """
        x = self._checked_features(features)
        chosen = None
        if self._permutations is not None:
            chosen = self._permutations.take(rows, len(x))
            responses = self._known_responses(responses, chosen)
        elif rows is not None:
            raise ValueError("rows are the places of images in `responses` of the constructor: only with permutations")
        if responses is None:
            raise ValueError("responses are missing; only with permutations are they known beforehand")
        trials = checked_trials(responses, len(x), self.names, self.missing, self.images)
        weight = self._checked_weights(weights, trials, len(x))
        used = trials.usable & (weight > 0)
        used_x = x if bool(used.all()) else x[used.nonzero()[:, 0].to(x.device)]
        if check:
            self._refuse_infinite(used_x, used)
        if len(used_x):
            kept = weight[used]
            means = trials.mean[used] if chosen is None else self._permutations.columns(chosen[used])  # type: ignore[union-attr]
            even = weights is None and trials.count is None
            backend = "reference" if x.dtype == torch.float64 and self.backend == "auto" else self.backend
            feature_moments_update(
                used_x.reshape(len(used_x), -1), means, self._state, None if even else kept, backend=backend
            )
            self._state.response_m2[: self.neurons] += trials.scatter[used].sum(0)
        if chosen is not None:
            self._permutations.shown[chosen] = True  # type: ignore[union-attr]
        self.excluded += [self.images + int(i) for i in torch.nonzero(~trials.usable)[:, 0]]
        self.images += len(x)

    @classmethod
    def from_source(
        cls,
        source: Any,
        images: Any,
        responses: Array,
        *,
        weights: Array | None = None,
        batch: int = 64,
        **options: Any,
    ) -> FeatureMoments:
        """Moments of all images that a source of features gives.

        Args:
            source: has `stream(images)` (a `features.FeatureSource`); or is called with a slice of `images` at a time
                and returns features [b, C, H, W]; or, with images=None, is an iterable of feature batches.
            images: what the source takes.
            responses: [n, T] or [n, T, R]; weights: [n]; see `update`.
            batch: images at a time for a source that is called.
            **options: of the constructor, except feature_shape and neurons. `device` is that of the first features.

        Raises:
            ValueError: the source gives more or fewer images than there are responses; and what `update` raises.
        """
        y = as_tensor(responses, "responses")
        w = None if weights is None else as_tensor(weights, "weights")
        if y.ndim not in (2, 3) or (w is not None and tuple(w.shape) != (len(y),)):
            raise ValueError(
                f"responses should be [n, T] or [n, T, R] and weights [n], got {list(y.shape)} and "
                f"{None if w is None else list(w.shape)}"
            )
        moments: FeatureMoments | None = None
        start = 0
        for x in _batches(source, images, batch):
            if moments is None:
                options.setdefault("device", x.device)
                if options.get("permutations"):
                    options.setdefault("responses", y)
                moments = cls(tuple(x.shape[1:]), y.shape[1], **options)
            part = slice(start, start + len(x))
            start += len(x)
            if start > len(y):
                raise ValueError(f"the source gives more images than the {len(y)} that there are responses to")
            moments.update(x, y[part], None if w is None else w[part])
        if moments is None or start < len(y):
            raise ValueError(f"the source gave {start} images, there are responses to {len(y)}")
        return moments

    def merge(self, other: FeatureMoments) -> None:
        """Add the images of another object: of another worker, or of another session with the same neurons.

        Images of `other` count as coming after those here: its `excluded` are renumbered.

        Raises:
            ValueError: other features, neurons or devices; or permutations of other responses, or of the same images.
        """
        if other is self:
            raise ValueError("moments cannot be merged with themselves: every image would count twice")
        if other.feature_shape != self.feature_shape or other.names != self.names:
            raise ValueError(
                f"moments of {self.neurons} neurons on features {list(self.feature_shape)} cannot be merged with those "
                f"of {other.neurons} on {list(other.feature_shape)}"
                + (": names differ" if other.feature_shape == self.feature_shape else "")
            )
        if other.device != self.device:
            raise ValueError(f"moments on {self.device} cannot be merged with those on {other.device}; see `to`")
        mine, theirs = self._permutations, other._permutations
        if mine is not None and theirs is not None:
            if not mine.same_as(theirs) or bool((mine.shown & theirs.shown).any()):
                raise ValueError("with permutations, both need the same responses and seed, and different images")
            mine.shown |= theirs.shown
        elif mine is not theirs:
            raise ValueError(
                f"one of them has {max(self.permutations, other.permutations)} permutations, the other none"
            )
        a, b = self._state, other._state
        if b.total > 0:
            share = b.total / (a.total + b.total)
            factor = a.total * share
            d, shift = b.mean - a.mean, b.response_mean - a.response_mean
            columns = max(1, (1 << 22) // len(shift))
            scaled = (factor * shift).to(self.device)[:, None]
            for start in range(0, len(d), columns):
                part = slice(start, start + columns)
                a.cross[:, part] += (b.cross[:, part].double() + scaled * d[part]).float()
            a.m2 += b.m2 + factor * d.square()
            a.mean += share * d
            a.response_m2 += b.response_m2 + factor * shift.square()
            a.response_mean += share * shift
            a.total += b.total
        self.excluded += [self.images + i for i in other.excluded]
        self.images += other.images

    def to(self, device: torch.device | str) -> FeatureMoments:
        """This object with its moments on another device."""
        self.device = torch.device(device)
        state = self._state
        state.mean, state.m2 = state.mean.to(device), state.m2.to(device)
        state.cross = state.cross.to(device)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file, atomically.

        Raises:
            OSError: it cannot be written; an older file is untouched.
        """
        state = self._state
        arrays = {
            "response_mean": state.response_mean.numpy(),
            "response_m2": state.response_m2.numpy(),
            "mean": state.mean.cpu().numpy(),
            "m2": state.m2.cpu().numpy(),
            "cross": state.cross.cpu().numpy(),
            "excluded": np.asarray(self.excluded, np.int64),
        }
        if self._permutations is not None:
            arrays.update(self._permutations.arrays())
        header = {
            "feature_shape": list(self.feature_shape),
            "names": list(self.names),
            "missing": self.missing,
            "images": self.images,
            "total": self.count,
            "permutations": self.permutations,
            "sha256": _digest(arrays),
        }
        io.save_arrays(path, KIND, arrays, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> FeatureMoments:
        """Read what `save` wrote: the same to the bit.

        Raises:
            ValueError: damaged, or not such a file. OSError: it cannot be read.
        """
        arrays, header = io.load_arrays(path, KIND)
        try:
            if header["sha256"] != _digest(arrays):
                raise ValueError("its checksum differs; copy the file again from its source")
            moments = cls(
                header["feature_shape"], len(header["names"]), names=header["names"], missing=header["missing"]
            )
            if header["permutations"]:
                moments._permutations = Permutations.from_arrays(arrays)
            names = ("response_mean", "response_m2", "mean", "m2", "cross")
            tensors = {name: torch.from_numpy(arrays[name]) for name in names}
            columns, size = moments.neurons * (1 + moments.permutations), int(np.prod(moments.feature_shape))
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            if shapes != dict(zip(names, [(columns,)] * 2 + [(size,)] * 2 + [(columns, size)], strict=True)):
                raise ValueError("the sizes of its tensors do not fit together")
            moments._state = MomentState(total=float(header["total"]), **tensors)
            moments.images, moments.excluded = int(header["images"]), arrays["excluded"].tolist()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is damaged: {error}") from error
        return moments.to(device)

    def _checked_features(self, features: Array) -> Tensor:
        x = as_tensor(features, "features")
        if isinstance(features, np.ndarray):
            x = x.to(self.device)
        if x.dtype not in _FLOATS:
            raise TypeError(f"features should be float32, float16, bfloat16 or float64, got {x.dtype}; convert them")
        if tuple(x.shape[1:]) != self.feature_shape or x.ndim != 4:
            raise ValueError(f"features should be [B, {', '.join(map(str, self.feature_shape))}], got {list(x.shape)}")
        if x.device.type != self.device.type or (self.device.index not in (None, x.device.index)):
            raise ValueError(
                f"features are on {x.device}, these moments on {self.device}: make them with device={str(x.device)!r}"
            )
        return x.contiguous()

    def _known_responses(self, responses: Array | None, chosen: Tensor) -> Tensor:
        assert self._permutations is not None
        known = self._permutations.responses[chosen]
        if responses is not None:
            given = as_tensor(responses, "responses").to("cpu", torch.float64)
            if not torch.equal(given, known):
                raise ValueError(
                    "responses are not those given to the constructor for these images; with permutations, batches "
                    "come in that order, or with `rows`"
                )
        return known

    def _checked_weights(self, weights: Array | None, trials: Trials, images: int) -> Tensor:
        """float64 [B]."""
        if weights is None:
            return torch.ones(images, dtype=torch.float64) if trials.count is None else trials.count
        if trials.count is not None:
            raise ValueError("weights cannot be given with single trials: the number of trials is the weight")
        w = as_tensor(weights, "weights").to("cpu", torch.float64)
        if tuple(w.shape) != (images,) or not bool((torch.isfinite(w) & (w >= 0)).all()):
            raise ValueError(f"weights should be [{images}], finite and at least 0")
        return w.float().double()

    def _refuse_infinite(self, x: Tensor, used: Tensor) -> None:
        if x.numel() == 0 or _in_range(x):
            return
        number, c, h, w = torch.nonzero(~(x.float().abs() <= LARGEST))[0].tolist()
        value = float(x[number, c, h, w])
        wanted = f"at most {LARGEST:g} in size" if np.isfinite(value) else "finite"
        raise ValueError(
            f"features should be {wanted}, got {value} for image {self.images + int(used.nonzero()[number])}, "
            f"channel {c}, row {h}, column {w}; leave that image out, or look for an overflow in the network"
        )


def _in_range(x: Tensor) -> bool:
    """Whether no feature is NaN, infinite or above LARGEST, in one pass over memory; torch.isfinite takes several."""
    if x.dtype in (torch.float16, torch.bfloat16):
        least, most = (value.float() for value in torch.aminmax(x))  # NaN survives
        return bool((least >= -LARGEST) & (most <= LARGEST))
    return bool(torch.linalg.vector_norm(x) <= LARGEST) or bool((x.abs() <= LARGEST).all())


def _batches(source: Any, images: Any, batch: int) -> Iterator[Tensor]:
    """Feature batches of whatever gives some."""
    if hasattr(source, "stream"):
        found: Iterable[Any] = source.stream(images)
    elif callable(source):
        found = (source(images[start : start + batch]) for start in range(0, len(images), batch))
    elif images is None:
        found = source
    else:
        raise TypeError(
            f"source should have `stream`, be callable, or be an iterable of features (then images=None), got "
            f"{type(source).__name__}"
        )
    for features in found:
        yield as_tensor(features, "features")


def _digest(arrays: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"\n{name} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()
