"""What the sources share: proposals that are out, time budgets, arrays inside decisions, and digests of contents."""

from __future__ import annotations

import base64
import binascii
import math
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.features import BankFeatures, FeatureSource, ModuleFeatures
from cortexloop.realtime.clock import Clock
from cortexloop.realtime.source import Images, sha256

_HASHED_AT_ONCE = 1024
_REMEMBERED = 8
"""Pieces of work by which the next one is judged: few, so that one hiccup is soon forgotten."""


class Ledger:
    """Proposals that are out, oldest first, and a digest of all that was proposed and learned, in its order.

    Args:
        kind: of the source, for messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._digest = sha256(kind)
        self._out: deque[tuple[int, Any]] = deque()
        self.proposed = 0
        """Proposals so far."""

    def put(self, count: int, *parts: bytes | str | NDArray[Any], kept: Any = None) -> None:
        """A proposal of so many images goes out. parts: what it is. kept: to be given back when it is learned."""
        self._digest = sha256(self._digest, "propose", str(count), *parts)
        self._out.append((count, kept))
        self.proposed += 1

    def take(self, scores: NDArray[np.float64]) -> Any:
        """The oldest proposal is learned; returns what was kept for it.

        Raises:
            RuntimeError: none is out. ValueError: scores [count] were expected; the proposal stays out.
        """
        if not self._out:
            raise RuntimeError(f"there is nothing to learn: no proposal of these {self._kind} is out")
        count, kept = self._out[0]
        if scores.shape != (count,):
            raise ValueError(f"the oldest proposal has {count} images, got scores of shape {list(scores.shape)}")
        if np.isinf(scores).any():
            raise ValueError("scores should be finite, or NaN for an image without a response")
        self._out.popleft()
        self._digest = sha256(self._digest, "learn", np.asarray(scores, dtype=np.float64))
        return kept

    def digest(self) -> str:
        """SHA-256."""
        return self._digest


class Budget:
    """Time that may be spent, from now on.

    Args:
        clock: whose time it is. ms: how much; None: without end.
    """

    def __init__(self, clock: Clock, ms: float | None) -> None:
        self._clock, self._begin = clock, clock.monotonic_ns()
        self._ns = math.inf if ms is None else ms * 1e6

    def spent_ms(self) -> float:
        """Since it was made."""
        return (self._clock.monotonic_ns() - self._begin) / 1e6

    def allows(self, ms: float) -> bool:
        """Whether something that takes so long would still be done in time."""
        return self._clock.monotonic_ns() - self._begin + ms * 1e6 <= self._ns


class Pace:
    """How long the slowest of the last few pieces of work took."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_REMEMBERED)

    def note(self, ms: float) -> None:
        """One more."""
        self._last.append(ms)

    @property
    def slowest_ms(self) -> float:
        """0 before the first."""
        return max(self._last, default=0.0)


def share(fraction: float, count: int, generation: int) -> int:
    """How many of `count` images of a generation make up a fraction over all generations: the rest is carried over."""
    return math.floor(fraction * count * (generation + 1)) - math.floor(fraction * count * generation)


def packed(array: NDArray[Any]) -> dict[str, Any]:
    """An array as text, for a decision."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def unpacked(value: Any, shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """The float32 array of this shape that was packed.

    Raises:
        ValueError: it is another.
    """
    try:
        array = np.frombuffer(base64.b64decode(value["base64"], validate=True), np.dtype(value["dtype"]))
        array = array.reshape(value["shape"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise foreign(f"its {what} are no array ({error})") from error
    if array.shape != shape or array.dtype != np.float32:
        raise foreign(f"its {what} should be float32 {list(shape)}, got {array.dtype} {list(array.shape)}")
    return np.asarray(array, dtype=np.float32)


def integers(decision: Any, name: str, low: int, high: int) -> NDArray[np.int64]:
    """A list of whole numbers low..high of a decision.

    Raises:
        ValueError: it is none.
    """
    values = decision.get(name) if isinstance(decision, dict) else None
    if not isinstance(values, list) or not all(type(v) is int and low <= v <= high for v in values):
        raise foreign(f"it should have a list {name!r} of whole numbers {low}..{high}")
    return np.array(values, dtype=np.int64)


def foreign(why: str) -> ValueError:
    """The error about a decision that is none of this source."""
    return ValueError(f"the decision does not belong to this source: {why}")


def check_images(images: Any, what: str = "images") -> Images:
    """Uint8 [N, H, W, 3], an array or a memory map.

    Raises:
        TypeError: not uint8. ValueError: another shape, or none.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise TypeError(f"{what} should be a uint8 array [N, H, W, 3], got {kind}")
    if images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f"{what} should be [N, H, W, 3] with at least one image, got {list(images.shape)}")
    return images


def images_digest(images: Images) -> str:
    """SHA-256 of a stack of images, read a part at a time (a gigabyte takes a second or two)."""
    found = sha256(f"{images.dtype.str}{images.shape}")
    for first in range(0, len(images), _HASHED_AT_ONCE):
        found = sha256(found, images[first : first + _HASHED_AT_ONCE])
    return found


def bank_digest(bank: ModelBank) -> str:
    """SHA-256 of names, weights and layout of a bank, on whatever device."""
    parts = (bank.weights.cpu().numpy(), bank.table.cpu().numpy(), np.array(bank.image_mean))
    return sha256("\n".join(bank.names), *parts)


def features_settings(source: FeatureSource) -> dict[str, Any]:
    """Settings of a source of features, with a digest of the network's weights.

    A source of another kind than those of `cortexloop.features` is known by its settings alone.
    """
    found = {"name": source.name, **source.settings()}
    if isinstance(source, BankFeatures):
        found["weights_sha256"] = bank_digest(source.bank)
    elif isinstance(source, ModuleFeatures):
        parts: list[str | NDArray[Any]] = []
        for name, tensor in sorted(source.module.state_dict().items()):
            raw = tensor.detach().cpu().flatten().view(torch.uint8)  # NumPy does not know every dtype
            parts += [f"{name} {tensor.dtype} {list(tensor.shape)}", raw.numpy()]
        found["weights_sha256"] = sha256(*parts)
    return found


def check_count(name: str, value: int | None, low: int = 1) -> None:
    """ValueError unless it is a whole number of at least `low`, or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low):
        raise ValueError(f"{name} should be a whole number of at least {low}, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """ValueError unless 0..1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} should lie in 0..1, got {value!r}")


def check_budget(ms: float | None) -> None:
    """ValueError unless it is above 0, or None."""
    if ms is not None and not ms > 0:
        raise ValueError(f"budget_ms should be above 0, got {ms!r}")
