"""Which backend runs a problem: an ordered list per device in which each backend says why it would not."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cortexloop import _device
from cortexloop.backends.lasso_sets import LassoSets
from cortexloop.packing import LayerField, ModelField

ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
"""Fastest first, for each device type; every other device is served by the reference alone."""

NAMES = ("cpu", "cuda", "triton", "reference")
OPS = (
    "bank_forward",
    "bank_input_gradient",
    "bank_pullback",
    "sample_codes",
    "feature_moments",
    "factorized_readout",
    "point_readout",
    "nmf",
    "lasso_path",
)
"""What can be asked about; "sample_codes" stands for all operators on populations of codes, and the name of a readout
for its gradients, too."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the problem; the message is its reason."""


class BackendWarning(UserWarning):
    """`backend="auto"` fell through to a slower backend; the message names it and gives the reason."""


@dataclass(frozen=True)
class BankShape:
    """What a table says, hashable. `height`, `width`: input size. `table`: its bytes."""

    models: int
    columns: int
    height: int
    width: int
    table: bytes


@dataclass(frozen=True)
class Problem:
    """Everything a backend may decide on; no tensors.

    `device` is its type, `index` its number among those of its kind. `bank` is None if only the availability of a
    backend is of interest.
    """

    op: str
    device: str = "cpu"
    index: int = 0
    dtype: torch.dtype = torch.float32
    batch: int = 1
    layout: str = "NHWC"
    precision: str = "exact"
    bank: BankShape | None = None


Wanted = tuple[bool, bool, bool]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""By three inputs of a readout; None for those not wanted."""


class Backend(Protocol):
    """An implementation of the operators in `OPS`; those that it calls unsupported need not exist."""

    @property
    def name(self) -> str: ...

    def unsupported(self, problem: Problem) -> str | None:
        """None = can run; else one sentence for people."""

    def note(self, problem: Problem) -> str | None:
        """What a user should know about how it would run (for example: "fast" runs exactly), or None."""

    def bank_forward(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str
    ) -> Tensor: ...

    def bank_input_gradient(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]: ...

    def bank_pullback(
        self, images: Tensor, weights: Tensor, table: Tensor, cotangents: Tensor, layout: str
    ) -> Tensor: ...

    def random_rows(
        self, normal: bool, seed: int, stream: int, step: int, problems: Tensor, rows: int, columns: int
    ) -> Tensor: ...

    def sample_codes(
        self,
        seed: int,
        stream: int,
        step: int,
        problems: Tensor,
        rows: int,
        mean: Tensor,
        scale: Tensor,
        diagonal: Tensor | None,
        factors: tuple[Tensor, Tensor] | None,
        out: Tensor | None,
    ) -> Tensor: ...

    def code_moments(self, codes: Tensor, weights: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor | None]: ...

    def low_rank_product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor: ...

    def row_dots(self, x: Tensor, y: Tensor) -> Tensor: ...

    def feature_moments(
        self,
        features: Tensor,
        weights: Tensor | None,
        centred: Tensor,
        shift: Tensor,
        before: float,
        batch: float,
        mean: Tensor,
        m2: Tensor,
        cross: Tensor,
    ) -> None: ...

    def lasso_path(
        self,
        sets: LassoSets,
        set_of: Tensor,
        responses: Tensor | None,
        cross: Tensor,
        squares: Tensor,
        penalties: Tensor,
        tolerance: float,
        max_sweeps: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def nmf(
        self,
        matrices: Tensor,
        w: Tensor,
        h: Tensor,
        signed: bool,
        l1: tuple[float, float],
        l2: tuple[float, float],
        tolerance: float,
        max_iterations: int,
    ) -> Tensor: ...

    def factorized_readout(self, features: Tensor, masks: Tensor, vectors: Tensor) -> Tensor: ...

    def factorized_readout_gradient(
        self, features: Tensor, masks: Tensor, vectors: Tensor, cotangent: Tensor, wanted: Wanted
    ) -> Gradients: ...

    def point_readout(self, features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool) -> Tensor: ...

    def point_readout_gradient(
        self,
        features: Tensor,
        positions: Tensor,
        vectors: Tensor,
        align_corners: bool,
        cotangent: Tensor,
        wanted: Wanted,
    ) -> Gradients: ...


@dataclass(frozen=True)
class Verdict:
    """One row of an explanation: `reason` says why the backend would not run, `note` how it would."""

    backend: str
    chosen: bool
    reason: str | None
    note: str | None


@dataclass(frozen=True)
class Explanation:
    """Which backend would run, and why the others would not. `str()` gives a readable table."""

    op: str
    verdicts: tuple[Verdict, ...]

    @property
    def chosen(self) -> str:
        """The name of the backend that would run."""
        return next(v.backend for v in self.verdicts if v.chosen)

    def reason(self, backend: str) -> str | None:
        """Why `backend` would not run; None if it could."""
        for verdict in self.verdicts:
            if verdict.backend == backend:
                return verdict.reason
        return f"the {backend} backend does not serve this device"

    def __str__(self) -> str:
        lines = [f"{self.op}:"]
        for v in self.verdicts:
            state = "runs" if v.chosen else ("could run" if v.reason is None else "cannot run")
            detail = v.reason or v.note
            lines.append(f"  {v.backend:<10} {state}{': ' + detail if detail else ''}")
        return "\n".join(lines)


@functools.cache
def backend(name: str) -> Backend:
    """The backend of this name, imported when first asked for.

    Raises:
        ValueError: there is no such backend.
    """
    if name not in NAMES:
        raise ValueError(f"backend should be one of {', '.join(map(repr, ('auto', *NAMES)))}, got {name!r}")
    module = importlib.import_module(f"cortexloop.backends.{name}")
    found: Backend = module.BACKEND
    return found


_shapes: MutableMapping[Tensor, BankShape] = WeakTensorKeyDictionary()
_shapes_lock = threading.Lock()


def bank_shape(table: Tensor) -> BankShape:
    """The hashable description of a table, int64 [N, columns]; computed once per tensor: tables are never written.

    Raises:
        ValueError, TypeError: not a table as `cortexloop.packing.pack` makes it.
        RuntimeError: seen for the first time on a GPU while a graph is being captured.
    """
    with _shapes_lock:
        known = _shapes.get(table)
    if known is not None:
        return known
    first, each = len(ModelField), len(LayerField)
    if table.dtype != torch.int64:
        raise TypeError(f"table should be torch.int64, got {table.dtype}")
    if table.ndim != 2 or table.shape[0] < 1 or (table.shape[1] - first) % each or table.shape[1] <= first:
        raise ValueError(f"table should be [N, {first} + {each} * layers] with N >= 1, got {list(table.shape)}")
    if not table.is_contiguous():
        raise ValueError(f"table should be contiguous, got strides {list(table.stride())}")
    _device.refuse_capture(table.device)
    host = table.detach().cpu()
    shape = BankShape(
        models=table.shape[0],
        columns=table.shape[1],
        height=int(host[0, ModelField.HEIGHT]),
        width=int(host[0, ModelField.WIDTH]),
        table=host.numpy().tobytes(),
    )
    with _shapes_lock:
        _shapes[table] = shape
    return shape


@functools.lru_cache(maxsize=256)
def _first_supported(problem: Problem) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The first backend in order that takes the problem, and the (name, reason) of each one passed over."""
    passed: list[tuple[str, str]] = []
    for name in ORDER.get(problem.device, ("reference",)):
        reason = backend(name).unsupported(problem)
        if reason is None:
            return name, tuple(passed)
        passed.append((name, reason))
    raise BackendError("; ".join(f"{name}: {reason}" for name, reason in passed))


_preferred: ContextVar[str] = ContextVar("cortexloop_backend", default="auto")
_warned: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, `backend="auto"` means this backend. Holds for the current thread or task only.

    "auto" is looked up each time an operator runs, so the block also governs functions compiled by `torch.compile`
    that are called within it (enter it outside of them), and a backward pass that runs within it.

    Args:
        name: "cpu", "cuda", "triton", "reference", or "auto" to choose by problem again.

    Raises:
        ValueError: no backend of that name.
    """
    if name != "auto":
        backend(name)
    token = _preferred.set(name)
    try:
        yield
    finally:
        _preferred.reset(token)


def select(problem: Problem, name: str = "auto") -> Backend:
    """The backend that runs the problem.

    "auto" takes the backend of `use_backend` or else the first of `ORDER` without a reason against it, and warns once
    per distinct reason if that is not the fastest one. Any other name is taken at its word.

    Raises:
        BackendError: the named backend cannot run the problem.
        ValueError: there is no backend of that name.
    """
    if name == "auto":
        name = _preferred.get()
    if name == "auto":
        chosen, passed = _first_supported(problem)
        for other, reason in passed:
            if reason not in _warned:
                _warned.add(reason)
                warnings.warn(
                    f"the slower {chosen!r} backend is used instead of {other!r}: {reason}",
                    BackendWarning,
                    stacklevel=2,
                )
        return backend(chosen)
    found = backend(name)
    against = found.unsupported(problem)
    if against is not None:
        raise BackendError(f"the {name!r} backend cannot run {problem.op}: {against}")
    return found


def explain(problem: Problem, name: str = "auto") -> Explanation:
    """The verdict of every backend that serves the problem's device, fastest first. Never warns.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name == "auto":
        name = _preferred.get()
    names = ORDER.get(problem.device, ("reference",))
    if name != "auto" and backend(name).name not in names:
        names = (name, *names)
    reasons = {other: backend(other).unsupported(problem) for other in names}
    wanted = _first_supported(problem)[0] if name == "auto" else name
    return Explanation(
        op=problem.op,
        verdicts=tuple(
            Verdict(
                backend=other,
                chosen=other == wanted and reason is None,
                reason=reason,
                note=None if reason else backend(other).note(problem),
            )
            for other, reason in reasons.items()
        ),
    )
